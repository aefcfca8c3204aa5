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

from posttrain_jax import adapters
from posttrain_jax.adapters import peft_format
from posttrain_jax.build import model_card, use
from posttrain_jax.core import files, tree
from posttrain_jax.data import chat, templates
from posttrain_jax.models import decoder, fetch, hf, rotary
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
  name: str = model_card.HERE,
) -> Path:
  """The folder `out` that a run's result was written to, whole or not at all.

  A run with an adapter gives a PEFT folder, or with `merge` the base and the adapter as one model; full fine-tuning
  gives its model either way.  A run that is not finished gives what it has saved so far, and says so.

  Args:
    merge_base: what an adapter of a quantised base is added to: the "original" weights (what PEFT users do: closer
      to the base, not quite what was trained), or the "dequantised" ones that it was trained on.  How far the logits
      of each are from what was trained is logged, on a text of a hundred tokens.
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
  with files.publish(out) as new:
    if merge and not is_full:
      _merge(run, source, new, merge_base)
    else:
      shutil.copytree(source, new, dirs_exist_ok=True)
    if manner.read(new) is None:
      _accompany(run, new, is_merged=merge and not is_full)
    model_card.write(new, run, name=name)
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
  if template != "tokenizer":
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
  accompany(folder, fetch.resolve(run.field("model.name")), template, how)


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
  hf.load(folder, place=lambda path, array: _check_finite(folder, path, array))


def _check_finite(where: Path, name: str, array: np.ndarray) -> None:
  if not np.isfinite(np.asarray(array, np.float32)).all():
    raise ValueError(f"{where}: {name} holds numbers that are not finite; nothing was exported")


# Merging


def _merge(run: runs.Run, source: Path, out: Path, merge_base: str) -> None:
  folder = fetch.resolve(run.field("model.name"))
  params, config = hf.load(folder, storage="dense")
  adapter, adapter_config = peft_format.load(source, params, config)
  if not adapter_config.in_weights:
    raise ValueError(
      f"merge: a {adapter_config.method} stands before the text and is in no weight, so no merged model can hold it;"
      " export without merge, and load the folder as an adapter: posttrain chat --adapter=DIR, or peft"
    )
  config = rotary.stretched(config, adapter_config.context_length)
  base = run.field("model.base")
  if base in (None, "dense"):
    merged = adapters.merge(params, adapter)
  elif _starts_from_base(run):
    merged = _merged_onto_original(run, params, adapter, merge_base)
  else:
    stored, _ = hf.load(folder, storage=base)
    text = chat.load_tokenizer(folder)(PROBE)["input_ids"][: config.max_length]
    # DoRA's node holds norms of its base: that of the stored one is another
    stored_adapter, _ = peft_format.load(source, stored, config)
    merged = _merged_onto(merge_base, base, params, stored, adapter, stored_adapter, config, text)
  for path, leaf in tree.items(merged):
    _check_finite(source, path, leaf)
  hf.save(out, merged, config, tokenizer_from=folder)


def _merged_onto(merge_base, base, params, stored, adapter, stored_adapter, config, text) -> Any:
  """The adapter in what is asked for, of the dense params and the stored ones; the error of either is logged."""
  logits = jax.jit(functools.partial(decoder.forward, config=config, dtype=jnp.float32))
  tokens = jnp.asarray(text, jnp.int32)[None]
  trained = logits(adapters.bind(stored, stored_adapter), tokens)
  makers = {"original": lambda: params, "dequantised": lambda: adapters.merge(stored)}
  log.warning("trained on a base in %s, merged onto the %s weights", base, merge_base)
  merged, off = None, {}
  for name in sorted(
    MERGE_BASES, key=lambda name: name == merge_base
  ):  # the one to keep is the last
    merged = None  # of the two no more than one is in memory
    merged = adapters.merge(makers[name](), adapter)
    off[name] = report.logit_error(trained, logits(merged, tokens))
    log.info("logits off from what was trained, merged onto %s: %s", name, off[name])
  nearest = min(off, key=lambda name: off[name].kl)
  if off[merge_base].kl > 2 * off[nearest].kl + 1e-6:
    far, near = f"{off[merge_base].kl:.2g}", f"{off[nearest].kl:.2g}"
    log.warning(
      "--merge_base=%s is nearer to what was trained: KL %s nats, not %s", nearest, near, far
    )
  return merged


def _merged_onto_original(run, params, adapter, merge_base) -> Any:
  method = run.field("adapter.method")
  if merge_base != "original":
    raise ValueError(
      f"merge_base={merge_base!r}: {method} took its start out of the base before that was quantised, and what was "
      "left is not in the run's folder; write merge_base=original, for which its adapter is exported"
    )
  log.warning("trained on a quantised base, merged onto the original weights")
  return adapters.merge(params, adapter)


def _starts_from_base(run: runs.Run) -> bool:
  starts = {options.get("init_lora_weights") for options in run.adapters().values()}
  said = " ".join(map(str, [*run.adapters(), *starts]))
  return any(name in said for name in START_FROM_BASE)


def write_template(folder: Path, name: str) -> None:
  """The chat template that the model was trained with, and its end of a turn among the ends of a text."""
  tokenizer = chat.load_tokenizer(folder)
  template = chat.template(tokenizer, name)
  files.write_text(folder / "chat_template.jinja", template.text)
  _edit(folder / "tokenizer_config.json", lambda old: {**old, "chat_template": template.text})
  end = templates.end_of_turn(tokenizer, template)
  if end is not None:
    _edit(
      folder / "generation_config.json", lambda old: _with_end(old, end, tokenizer.eos_token_id)
    )


def _with_end(old: Mapping[str, Any], end: int, eos: int | None) -> dict[str, Any]:
  ids = old.get("eos_token_id", eos)
  known = [ids] if isinstance(ids, int) else list(ids or [])
  return {**old, "eos_token_id": known if end in known else [*known, end]}


def _edit(path: Path, change) -> None:
  old = files.read_json(path) if path.exists() else {}
  files.write_json(path, change(old))
