"""A run's result, or any model, as one GGUF file: what llama.cpp and Ollama run."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax import settings
from posttrain_jax.adapters import peft_format
from posttrain_jax.adapters.lora import LoRA
from posttrain_jax.build import decisions, merge_inputs
from posttrain_jax.build import export as folders
from posttrain_jax.core import files, tree
from posttrain_jax.data import chat, templates
from posttrain_jax.merge.recipe import ModelRef
from posttrain_jax.models import decoder, fetch, gguf_tokenizer, gguf_write, hf
from posttrain_jax.models import gguf as gguf_read
from posttrain_jax.models.config import ModelConfig, as_ids, from_hf
from posttrain_jax.quant import report
from posttrain_jax.runs import record as runs

log = logging.getLogger(__name__)

SUFFIX = ".gguf"
MUCH = 0.05  # nats a token: 8 bits change models of every size by less
MERGE = "add --merge for one file that holds the base and what was trained"


def export(
  workdir: str | Path,
  out: str | Path,
  *,
  kind: str,
  merge: bool = False,
  merge_base: str = "original",
) -> Path:
  """The file `out` that a run's result was written to, whole or not at all.

  What is in it is what `export.export` would put into a folder: an adapter, a GGUF LoRA to be loaded beside a GGUF file
  of the base; with `merge`, or after full fine-tuning, the whole model with its tokenizer and chat template.

  Args:
    kind: a key of `gguf_write.KINDS`; an adapter is "f16".

  Raises:
    FileNotFoundError, ValueError: as `export.export`; or what a GGUF file cannot hold, by name.
    FileExistsError: out is there already.
  """
  out = _named(out)
  run = folders.read(workdir)
  if decisions.has_score(settings.restored(run.record["config"])):
    raise ValueError(gguf_write.NO_SCORES)
  if run.field("adapter.method") == "none" or merge:
    gguf_write.check(hf.read_config(fetch.resolve(run.field("model.name"))))
    with files.beside(out) as scratch:
      folder = scratch / "model"
      folders.export(workdir, folder, merge=True, merge_base=merge_base)
      return of_model(folder, out, kind=kind, base=run.field("model.name"))
  if kind != "f16":
    raise ValueError(
      f"--gguf={kind} of an adapter: its factors are small and are kept in f16; write --gguf=f16, or {MERGE} in {kind}"
    )
  return _adapter(run, out)


def of_model(name: str | Path, out: str | Path, *, kind: str, base: str | None = None) -> Path:
  """The file `out` of a model's folder, a hub name or a built-in one, its tokenizer and chat template inside.

  Tensors pass one at a time.  The file is read back and its logits compared with the folder's, a layer at a time.

  Args:
    base: the model that it was made from, for the file to say so.
  """
  out = _named(out)
  folder = fetch.resolve(name)
  config = hf.read_config(folder)
  gguf_write.check(config)
  ref = ModelRef(str(folder))
  tensors = merge_inputs.opened([ref], {ref: folder})[ref]
  tokenizer = chat.load_tokenizer(folder)
  about = {"general.name": out.stem, **_based_on(base)}
  with files.beside(out) as scratch:
    path = scratch / out.name
    described = _described(tokenizer, config, folder)
    gguf_write.write(path, tensors, config, described, kind=kind, about=about)
    file = gguf_read.File(path)
    _check_same(config, from_hf(file.described))
    text = tokenizer(folders.PROBE)["input_ids"][: config.max_length]
    off = _error(tensors, file, config, text)
    log.info("%s: logits off from the model's: %s", out, off)
    if kind != "f16" and off.kl > MUCH:
      log.warning("--gguf=%s changes what this model answers; a kind of more bits is nearer", kind)
    path.rename(out)
  return out


def _named(out: str | Path) -> Path:
  out = Path(out)
  if out.suffix != SUFFIX:
    raise ValueError(f"--out={out}: with --gguf the result is one file; write --out={out}{SUFFIX}")
  if out.exists():
    raise FileExistsError(f"{out} exists; name a new file, or remove it first")
  return out


def _based_on(base: str | None) -> dict[str, Any]:
  """What a file says of the model that it was made from; a folder's path would say nothing to others."""
  hub_id = None if base is None else fetch.hub_id(base)
  if hub_id is None:
    return {}
  return {
    "general.base_model.count": 1,
    "general.base_model.0.name": hub_id.rpartition("/")[2],
    "general.base_model.0.organization": hub_id.partition("/")[0],
    "general.base_model.0.repo_url": f"https://huggingface.co/{hub_id}",
  }


def _described(tokenizer: Any, config: ModelConfig, folder: Path) -> dict[str, Any]:
  """The metadata of the tokenizer, of the chat template, and of what ends an answer."""
  path = folder / "generation_config.json"
  said = as_ids(files.read_json(path).get("eos_token_id")) if path.exists() else ()
  stops = list(said or config.eos_token_ids)
  template = chat.template(tokenizer) if tokenizer.chat_template else None
  turn = None if template is None else templates.end_of_turn(tokenizer, template)
  if turn is not None:  # the first of those beside EOS is the end of a turn
    stops = [turn, *stops]
  ids = {
    "bos": tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.bos_token_id,
    "eos": tokenizer.eos_token_id,
    "unknown": tokenizer.unk_token_id,
    "padding": tokenizer.pad_token_id,
  }
  try:
    return gguf_tokenizer.describe(
      tokenizer.backend_tokenizer,
      config.vocab_size,
      ids=ids,
      stops=stops,
      template=None if template is None else template.text,
    )
  except ValueError as error:
    raise ValueError(f"{folder}: {error}") from error


# What was written, read again


def _check_same(config: ModelConfig, found: ModelConfig) -> None:
  """The file describes the same computation."""
  free = ("family", "source", "bos_token_id", "eos_token_ids", "pad_token_id")
  wanted, got = (
    {k: v for k, v in dataclasses.asdict(c).items() if k not in free} for c in (config, found)
  )
  # () is full attention everywhere, too
  wanted["layer_types"], got["layer_types"] = config.kinds, found.kinds
  wanted["window"] = got["window"] = None  # no layer has one
  for key, value in wanted.items():
    if got[key] != value:
      raise ValueError(
        f"a GGUF file says {key}={got[key]!r} of this model, which has {value!r}; nothing was written"
      )


def _error(
  tensors: gguf_write.Tensors, file: gguf_write.Tensors, config: ModelConfig, text: list[int]
) -> report.LogitError:
  """How far the file's logits for a text are from the model's; no more than a layer of each is in memory."""
  return report.logit_error(_logits(tensors, config, text), _logits(file, config, text))


def _logits(tensors: gguf_write.Tensors, config: ModelConfig, text: list[int]) -> jax.Array:
  alone = dataclasses.replace(config, num_layers=1, layer_types=())
  paths = [path for path, _ in tree.items(decoder.specs(alone))]
  inner = [path for path in paths if path.startswith("layers/")]
  through = jax.jit(functools.partial(decoder.through, config=alone))

  def leaf(path, i=None):
    array = np.asarray(tensors.get(hf.hf_name(path, () if i is None else (i,))), np.float32)
    array = array.T if tree.turned(path) else array
    return array if i is None else array[None]

  outer = tree.unflatten((path, leaf(path)) for path in paths if path not in inner)
  x = jnp.asarray(outer["embed_tokens"]["weight"][np.asarray(text)])[None]
  for i in range(config.num_layers):
    layer = tree.unflatten((path, leaf(path, i)) for path in inner)["layers"]
    if i < config.num_layers - 1:
      x = through(layer, x)
  return decoder.logits(
    outer, decoder.hidden({**outer, "layers": layer}, None, alone, embeddings=x), alone
  )


# Adapters


def _adapter(run: runs.Run, out: Path) -> Path:
  """The run's LoRA as llama.cpp takes it beside a GGUF file of the base."""
  source = run.folder / folders.ADAPTER
  config = hf.read_config(fetch.resolve(run.field("model.name")))
  gguf_write.check(config)
  if (source / peft_format.CONFIG).exists():
    _check_pair(run, source)
  with files.beside(out) as scratch:
    folders.export(run.folder, scratch / "adapter")  # whole, finite, and said if unfinished
    nodes, adapter_config = peft_format.load(source, decoder.abstract(config), config)
    if adapter_config.context_length:
      raise ValueError(
        f"this adapter stretches the positions of its base, which a GGUF LoRA cannot; {MERGE}"
      )
    factors = dict(pairs(nodes, config))
    path = scratch / out.name
    about = {"general.name": out.stem, **_based_on(run.field("model.name"))}
    gguf_write.write_adapter(path, factors, config, about=about)
    _check_factors(factors, gguf_read.read_adapter(path, config))
    path.rename(out)
  beside = f"a GGUF file of the base (posttrain export --model={run.field('model.name')} --gguf=q8_0 --out=base.gguf)"
  log.info("an adapter, to be loaded beside %s: llama-cli -m base.gguf --lora %s", beside, out)
  return out


def _check_pair(run: runs.Run, source: Path) -> None:
  """Raises unless every change is scale * a @ b of a matrix."""
  described = files.read_json(source / peft_format.CONFIG)
  record = source / peft_format.RECORD
  methods = run.field("adapter.method")
  several = files.read_json(record).get("with_methods") if record.exists() else None
  if several or described.get("peft_type") != "LORA":
    raise ValueError(
      f"--gguf: an adapter of method {methods!r} is no plain LoRA, which is all that a GGUF adapter is; {_way(methods)}"
    )
  if described.get("use_dora"):
    raise ValueError(f"--gguf: DoRA's magnitudes have no place in a GGUF adapter; {MERGE}")
  if described.get("modules_to_save"):
    whole = ", ".join(described["modules_to_save"])
    raise ValueError(
      f"--gguf: {whole} trained whole (modules_to_save), which a GGUF adapter cannot hold; {MERGE}"
    )


def _way(methods: str) -> str:
  if {"prompt", "prefix"} & {*methods.split("+")}:
    return "what stands before the text is in no weight either: export it as a PEFT folder, without --gguf"
  return MERGE


def pairs(nodes: Any, config: ModelConfig):
  """(Hugging Face name, (a, b, scale)) of every matrix that changes."""
  for path, node in tree.items(nodes):
    assert isinstance(node, LoRA)
    if config.tied and path in ("embed_tokens/weight", "lm_head/weight"):
      raise ValueError(
        f"--gguf: the adapter changes {path.partition('/')[0]}, which shares its matrix with the model's other end; "
        f"llama.cpp cannot tell them apart; {MERGE}"
      )
    scales = np.atleast_1d(np.asarray(node.scale))
    for at, (a, b), scale in zip(hf.places(path, config), node.split(), scales):
      if a.shape[1]:
        yield hf.hf_name(path, at), (a, b, float(scale))


def _check_factors(factors: Mapping[str, Any], found: Mapping[str, Any]) -> None:
  for name, (a, b, scale) in factors.items():
    product = scale * (a @ b)
    got = found[name][1] @ found[name][0]
    # an embedding's change is [vocab, out] in both
    got = got if name == "model.embed_tokens.weight" else got.T
    off = float(np.linalg.norm(product - got)) / max(float(np.linalg.norm(product)), 1e-30)
    if off > 0.01 and float(np.abs(product - got).max()) > 1e-6:
      raise ValueError(
        f"{name}: float16 keeps the adapter's change no nearer than {off:.1%}; nothing was written; {MERGE}"
      )
