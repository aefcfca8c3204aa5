"""A run's result as others load it: the adapter in PEFT's format, or a whole model in Hugging Face's."""

from __future__ import annotations

import dataclasses
import functools
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from posttrain_jax import adapters, settings
from posttrain_jax.adapters import dora, over, peft_format
from posttrain_jax.build import adapter as adapter_lib
from posttrain_jax.build import decisions, model_card, start, use
from posttrain_jax.core import files, tree
from posttrain_jax.data import chat, templates
from posttrain_jax.models import decoder, fetch, hf, rotary
from posttrain_jax.models.config import ModelConfig, as_ids
from posttrain_jax.quant import report
from posttrain_jax.runs import manner
from posttrain_jax.runs import record as runs

log = logging.getLogger(__name__)

ADAPTER, MODEL = "adapter", "model"
MERGE_BASES = ("original", "dequantised")
# What the logits of a merged model are compared on; some hundred tokens of a conversation's kind.
PROBE = """\
How do bees find their way home? A bee that leaves the hive flies a few wide circles first, and learns how the place
looks from each side. On the way out it keeps count of its turns by the position of the sun, and of the distance by
how fast the ground moves past its eyes. To come back it takes the straight line, and near the hive trusts what it has
learned to see: a tree, the edge of a field, the colour of the box. In 1973 Karl von Frisch shared a Nobel prize for
showing that bees tell each other such directions in a dance."""
START_FROM_BASE = ("pissa", "olora", "loftq")  # the quantised base of such a run is not the model's


def export(
  workdir: str | Path,
  out: str | Path,
  *,
  merge: bool = False,
  merge_base: str = "original",
  keep_base: bool = False,
  name: str = model_card.HERE,
) -> Path:
  """The folder `out` that a run's result was written to, whole or not at all.

  A run with an adapter gives a PEFT folder, or with `merge` the base and the adapter as one model; full fine-tuning
  gives its model either way.  A run that is not finished gives what it has saved so far, and says so.

  Args:
    merge_base: what an adapter of a quantised base is added to: the "original" weights (what PEFT users do: closer
      to the base, not quite what was trained), or the "dequantised" ones that it was trained on.  How far the logits
      of each are from what was trained is logged, on a text of a hundred tokens.
    keep_base: `out` is two folders: `base`, the frozen weights as they were stored in training, in bitsandbytes' format
      where they are quantised, and `adapter`, which is for them.  Together they are what was trained, to the bit; of a
      method that takes its start out of the base (PiSSA, OLoRA, LoftQ) no adapter of the original weights is.
    name: what the folder is to be called on the hub; its model card says so.

  Raises:
    FileNotFoundError: workdir holds no run, or one that has saved nothing yet.
    FileExistsError: out is there already.
    ValueError: a file of the result is damaged; the message names it.
  """
  if merge_base not in MERGE_BASES:
    raise ValueError(f"merge_base={merge_base!r}: write one of {', '.join(MERGE_BASES)}")
  out = Path(out)
  run = read(workdir)
  workdir = run.folder
  if out.exists() and not (out.is_dir() and not any(out.iterdir())):
    raise FileExistsError(f"{out} exists; name a new folder, or remove it first")
  is_full = run.field("adapter.method") == "none"
  source = workdir / (MODEL if is_full else ADAPTER)
  if not source.is_dir():
    raise FileNotFoundError(f"{source} does not exist: {_how_far(run)}")
  if run.done is None:
    log.warning("%s holds what was saved so far: %s", source, _how_far(run))
  if is_full:
    _check_model(source)
  else:
    _check_adapter(source)
  if keep_base and (merge or is_full):
    raise ValueError("keep_base is for an adapter beside its base: leave merge out, and train one")
  notes: list[str] = []
  with files.publish(out) as new:
    if keep_base:
      _keep_base(run, source, new, out)
    elif merge and not is_full:
      notes = _merge(run, source, new, merge_base)
    else:
      shutil.copytree(source, new, dirs_exist_ok=True)
      _say_how_far(run, source)
    if not keep_base and manner.read(new) is None:
      _accompany(run, new, is_merged=merge and not is_full)
    model_card.write(new, run, name=name, notes=notes)
  return out


def accompany(folder: Path, base: Path, template: str, how: manner.Manner) -> None:
  """Lays into the folder of an adapter or a model what it needs to be used as it was trained.

  Tokenizer and chat template stand there as other libraries look for them, all else in our record.

  Args:
    base: the folder whose tokenizer it was trained with.
    template: the name of the chat template.
    how: in what manner it was trained.
  """
  hf.copy_tokenizer(base, folder)
  if not (base / "tokenizer_config.json").exists():  # the model's config.json says what it is
    chat.load_tokenizer(base).save_pretrained(folder)
  write_template(folder, template)
  manner.write(folder, dataclasses.replace(how, template=None))


def _accompany(run: runs.Run, folder: Path, *, is_merged: bool) -> None:
  """The same for what a run exported that wrote nothing beside it."""
  template = run.field("model.template") or "tokenizer"
  how = (
    manner.read(run.folder / ADAPTER) or manner.read(run.folder / MODEL) or use.of_run(run.folder)
  )
  if is_merged:
    how = dataclasses.replace(how, storage=None)
  beside = next((d for d in (run.folder / ADAPTER, run.folder / MODEL) if d.is_dir()), None)
  spoken = use.tokenizer_folder(fetch.resolve(run.field("model.name")), beside)
  accompany(folder, spoken, template, how)


def read(workdir: str | Path) -> runs.Run:
  """The run in a folder; another folder is refused."""
  if not (Path(workdir) / runs.CONFIG).exists():
    raise FileNotFoundError(
      f"{workdir} has no {runs.CONFIG}: it is no run's folder; give the --workdir of a `posttrain train`"
    )
  return runs.read(workdir)


def _how_far(run: runs.Run) -> str:
  if run.done is not None:
    return f"the run is finished after {run.steps} steps, and the folder was removed since"
  wanted = run.field("steps")
  command = run.record.get("command")
  finish = f"; to finish it: {command}" if command else "; run its command again to finish it"
  return f"the run is at step {run.steps}{f' of {wanted}' if wanted else ''}{finish}"


# Checks


def _check_adapter(folder: Path) -> None:
  """Both of PEFT's files are there and can be read, and every number is finite."""
  path = folder / peft_format.CONFIG
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist; {folder} is not a whole adapter")
  files.read_json(path)
  path = folder / peft_format.TENSORS
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist; {folder} is not a whole adapter")
  try:
    with safetensors.safe_open(path, "np") as f:
      names = list(f.keys())
      for name in names:
        _check_finite(path, name, f.get_tensor(name))
  except safetensors.SafetensorError as error:
    raise ValueError(f"{path} cannot be read: {error}; it may be cut short") from error
  if not names:
    raise ValueError(f"{path} holds no tensor: nothing was adapted")


def _check_model(folder: Path) -> None:
  """The folder holds what its config describes, and every number is finite; a leaf is read at a time."""
  hf.load(folder, place=lambda path, array: None)


def _check_finite(where: Path, name: str, array: np.ndarray) -> None:
  if not np.isfinite(np.asarray(array, np.float32)).all():
    raise ValueError(f"{where}: {name} holds numbers that are not finite; nothing was exported")


# Merging


@dataclasses.dataclass(frozen=True)
class _Trained:
  """What a run trained, an adapter on the base as that was stored; and the adapter of the original that it exported."""

  folder: Path
  config: ModelConfig
  adapter_config: adapters.AnyConfig
  original: Any
  adapter: Any
  stored: Any
  stored_adapter: Any
  below: tuple[str, ...]  # methods of the frozen adapters that either base has bound
  in_weights: bool  # whether merged weights can hold all of it

  def logits(self, params: Any) -> Any:
    text = chat.load_tokenizer(self.folder)(PROBE)["input_ids"][: self.config.max_length]
    of = jax.jit(functools.partial(decoder.forward, config=self.config, dtype=jnp.float32))
    return of(params, jnp.asarray(text, jnp.int32)[None])

  def error(self, params: Any) -> report.LogitError:
    """How far the logits of params are from what was trained."""
    return report.logit_error(
      self.logits(adapters.bind(self.stored, self.stored_adapter)), self.logits(params)
    )


def _trained(run: runs.Run, source: Path) -> _Trained:
  folder, base = fetch.resolve(run.field("model.name")), run.field("model.base")
  with_head = lambda params, config: use.scoring(source, params, config)
  original, plain = hf.load(folder, storage="dense")
  original, config = with_head(original, plain)
  *below, (adapter, adapter_config) = over.load(source, original, config)
  lengths = [described.context_length for _, described in (*below, (adapter, adapter_config))]
  config = rotary.stretched(config, max(lengths))
  original = over.bound(original, below)
  if base in (None, "dense"):
    stored, stored_adapter = original, adapter
  elif _starts_from_base(run):
    stored, stored_adapter = _started(run, folder, config, adapter)
    stored, _ = with_head(stored, plain)
  else:
    stored, _ = with_head(*hf.load(folder, storage=base))
    # DoRA's node holds norms of its base: that of the stored one is another
    *below, (stored_adapter, _) = over.load(source, stored, config)
    stored = over.bound(stored, below)
  return _Trained(
    folder,
    config,
    adapter_config,
    original,
    adapter,
    stored,
    stored_adapter,
    below=tuple(described.method for _, described in below),
    in_weights=all(described.in_weights for _, described in (*below, (adapter, adapter_config))),
  )


def _started(run: runs.Run, folder: Path, config: ModelConfig, adapter: Any) -> tuple[Any, Any]:
  """(the base that was left of the original, as it was stored; the adapter on it)."""
  asked = settings.restored(run.record["config"])
  described = adapter_lib.described(asked)
  starting = None if described is None else described.starting
  if starting is None:
    raise ValueError(f"{run.field('adapter.method')}: the run's config names no start")
  started = start.plan(jax.random.key(asked.seed), starting, config, asked.model.base)
  nodes = dict(tree.items(adapter))
  nodes |= {path: nodes[path].from_the_original() for path in started.names}
  dtype = decisions.recorded(run.record)
  read = functools.partial(hf.load, folder, dtype=dtype, storage="dense")
  to_device = lambda _, leaf: jax.tree.map(jnp.asarray, leaf)
  # LoftQ's turns are made again: the adapter has the last of them alone
  if starting.init_lora_weights == "loftq":
    stored, _ = read(place=started.begin(to_device))
    _check_start(started, nodes)
  else:
    stored, _ = read(place=started.resume(nodes, to_device))
  for path in started.names:
    node = dataclasses.replace(nodes[path], start=None)
    if isinstance(tree.get(adapter, path), dora.DoRA):
      magnitude = tree.get(adapter, path).magnitude
      node = dataclasses.replace(dora.over(node, tree.get(stored, path)), magnitude=magnitude)
    nodes[path] = node
  return stored, tree.unflatten(nodes)


def _check_start(started: start.Start, nodes: Mapping[str, Any]) -> None:
  """Raises unless the adapter began with the factors that were found again."""
  for path, node in started.nodes.items():
    found, kept = (np.asarray(n.start.a @ n.start.b) for n in (node, nodes[path]))
    if not np.linalg.norm(found - kept) <= 1e-3 * np.linalg.norm(kept):
      raise ValueError(
        f"{path}: LoftQ's start is found otherwise on this machine than where the run began, so that its base cannot be"
        " made again; export with merge_base=original, or where it was trained"
      )


def _merge(run: runs.Run, source: Path, out: Path, merge_base: str) -> list[str]:
  """Writes the merged model; what its card is to say of that."""
  trained = _trained(run, source)
  methods = " over a ".join([trained.adapter_config.method, *reversed(trained.below)])
  if not trained.in_weights:
    raise ValueError(
      f"merge: a {methods} stands before the text and is in no weight, so no merged model can hold it;"
      " export without merge, and load the folder as an adapter: posttrain chat --adapter=DIR, or peft"
    )
  merged, notes = None, []
  if run.field("model.base") in (None, "dense"):
    merged = adapters.merge(trained.original, trained.adapter)
  else:
    merged, note = _merged_onto(merge_base, run.field("model.base"), trained)
    notes.append(note)
  config = trained.config
  if config.scores and not decisions.writes(settings.restored(run.record["config"])):
    merged = {name: part for name, part in merged.items() if name != "lm_head"}
    config = dataclasses.replace(config, writes=False)
  for path, leaf in tree.items(merged):
    _check_finite(source, path, leaf)
  hf.save(out, merged, config, tokenizer_from=trained.folder)
  return notes


def _merged_onto(merge_base: str, base: str, trained: _Trained) -> tuple[Any, str]:
  """(the adapter in what is asked for, the dense weights or the stored ones; a sentence that says how near it is).

  The error of either is logged, and which is the nearer.
  """
  makers = {
    "original": lambda: adapters.merge(trained.original, trained.adapter),
    "dequantised": lambda: adapters.merge(trained.stored, trained.stored_adapter),
  }
  log.warning("trained on a base in %s, merged onto the %s weights", base, merge_base)
  merged, off = None, {}
  for name in sorted(
    MERGE_BASES, key=lambda name: name == merge_base
  ):  # the one to keep is the last
    merged = None  # of the two no more than one is in memory
    merged = makers[name]()
    off[name] = trained.error(merged)
    log.info("logits off from what was trained, merged onto %s: %s", name, off[name])
  nearest = min(off, key=lambda name: off[name].kl)
  if off[merge_base].kl > 2 * off[nearest].kl + 1e-6:
    far, near = f"{off[merge_base].kl:.2g}", f"{off[nearest].kl:.2g}"
    log.warning(
      "--merge_base=%s is nearer to what was trained: KL %s nats, not %s", nearest, near, far
    )
  else:
    log.info("--merge_base=%s is as near to what was trained as the other, or nearer", merge_base)
  note = (
    f"It was trained on a base in {base} and merged onto the {merge_base} weights: on a probe text the logits are off"
    f" from what was trained by {off[merge_base]}."
  )
  return merged, note


def _say_how_far(run: runs.Run, source: Path) -> None:
  """Of a start that was taken out of a quantised base: what its adapter lacks on the original, measured."""
  base = run.field("model.base")
  if base in (None, "dense") or not _starts_from_base(run):
    return
  trained = _trained(run, source)
  log.warning(
    "%s took its start out of the base before that was stored in %s, and this adapter is for the original: its logits"
    " are off from what was trained, %s. What was trained, to the bit, is written by posttrain export --keep_base, or"
    " in one model by --merge --merge_base=dequantised",
    run.field("adapter.method"),
    base,
    trained.error(adapters.bind(trained.original, trained.adapter)),
  )


def _keep_base(run: runs.Run, source: Path, new: Path, out: Path) -> None:
  trained = _trained(run, source)
  base = trained.stored
  if trained.below:
    if not trained.in_weights:
      raise ValueError(
        "keep_base: a soft prompt or prefix is in no weight, so the base under this adapter cannot be written; export"
        " without it, and load the folder as an adapter: posttrain chat --adapter=DIR"
      )
    base = adapters.merge(base)
    log.info("base: with the frozen %s merged into it", " and ".join(trained.below))
  hf.save(new / "base", base, trained.config, tokenizer_from=trained.folder)
  peft_format.save(
    new / ADAPTER,
    trained.stored_adapter,
    trained.adapter_config,
    trained.config,
    base_name=str(out.absolute() / "base"),
  )
  for folder in (new / "base", new / ADAPTER):
    _accompany(run, folder, is_merged=True)  # the base's own files say how it is stored


def _starts_from_base(run: runs.Run) -> bool:
  starts = {options.get("init_lora_weights") for options in run.adapters().values()}
  said = " ".join(map(str, [*run.adapters(), *starts]))
  return any(name in said for name in START_FROM_BASE)


def write_template(folder: Path, name: str | None) -> None:
  """The chat template that the model was trained with, and every end it was trained to write among the ends of a text.

  The tokenizer's own template ("tokenizer") is there already, but its end of a turn need not be the tokenizer's EOS.
  """
  tokenizer = chat.load_tokenizer(folder)
  own = name in (None, "tokenizer")
  if own and not tokenizer.chat_template:
    template = None
  else:
    template = chat.template(tokenizer, None if own else name)
  if template is not None and not own:
    files.write_text(folder / "chat_template.jinja", template.text)
    _edit(folder / "tokenizer_config.json", lambda old: {**old, "chat_template": template.text})
    # rows with tools were rendered with the template that was named, and with no other
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
  turn = None if template is None else templates.end_of_turn(tokenizer, template)
  written = [end for end in (turn, tokenizer.eos_token_id) if end is not None]
  path = folder / "generation_config.json"
  # without the one the other is read for it; beside an adapter stands neither
  said = next((p for p in (path, folder / "config.json") if p.exists()), None)
  old = {} if said is None else files.read_json(said)
  known = as_ids(old.get("eos_token_id"))
  if not {*written} <= {*known}:
    beside = {key: old[key] for key in ("bos_token_id", "pad_token_id") if key in old}
    ends = [*known, *dict.fromkeys(end for end in written if end not in known)]
    _edit(path, lambda config: {**beside, **config, "eos_token_id": ends})


def _edit(path: Path, change) -> None:
  old = files.read_json(path) if path.exists() else {}
  files.write_json(path, change(old))
