"""Hugging Face folders, both ways: single or sharded safetensors, tied heads, one tensor at a time.

Quantised weights are read and written in bitsandbytes' format (`models.quantised`, `quant.bnb`).

A missing, unknown or misshapen tensor is an error that names it; what may stay unread is `UNREAD`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.core import files, shards, tree
from posttrain_jax.models import decoder, fetch, quantised
from posttrain_jax.models.config import ModelConfig, from_hf, to_hf
from posttrain_jax.models.names import theirs
from posttrain_jax.quant import bnb

log = logging.getLogger(__name__)

# Tensors that a decoder has no use for: pattern over the file's names -> why it may stay unread.
ROTARY = r".*rotary_emb\.inv_freq"
UNREAD = {
  ROTARY: "computed from rope_theta",
  r"(.*\.)?vision_tower\..*": "this is the text model",
  r"(.*\.)?multi_modal_projector\..*": "this is the text model",
}
HEADS = ("lm_head", "score")  # outside `model`
TIED_HEAD = r"(.*\.)?lm_head\.weight"
TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
  "additional_chat_templates",  # a folder: what a tokenizer has beside its default, tool_use.jinja above all
  "tokenizer.model",
  "vocab.json",
  "merges.txt",
  "generation_config.json",
)

Place = Callable[[str, Any], Any]


class Reader(Protocol):
  """What a model's heads are looked up in: `shards.Reader`, and what a merge reads."""

  @property
  def where(self) -> Mapping[str, Any]: ...
  def shape(self, name: str) -> tuple[int, ...]: ...
  def get(self, name: str) -> np.ndarray: ...


def load(
  name_or_dir: str | Path,
  *,
  dtype: Any = None,
  storage: str | None = None,
  exclude: Sequence[str] = (),
  place: Place | None = None,
) -> tuple[Any, ModelConfig]:
  """(params, config) of a folder, a hub name, or `"smollm2"`: the user's cache, fetched if absent.

  Args:
    name_or_dir: what to load.
    dtype: of the parameters; None keeps what the files hold.
    storage: how the linear weights of the layers are kept: "dense", or a type of `quant.STORAGES`, which they are
      turned into matrix by matrix as they are read, so that a model fits that would not in its own dtype.  None: as
      the files have them, which may be quantised by bitsandbytes or by `save`.
    exclude: patterns of weights that `storage` leaves dense, as `quant.quantize_params` takes them.
    place: called with (path, stacked leaf in host memory) as soon as a leaf is read, a numpy array or a weight of
      numpy arrays; what it returns (a sharded array, say) goes into the tree.  Default: the default device.

  Raises:
    FileNotFoundError: no such folder, or a shard that the index names is missing.
    ValueError: a tensor missing, unknown or misshapen, a file cut short, or weights quantised in a way that is not
      read or cannot become `storage`; the message names it.
  """
  folder = fetch.resolve(name_or_dir)
  reader = shards.Reader(folder)
  config = as_held(read_config(folder), reader, folder)
  place = place or (lambda _, leaf: jax.tree.map(jax.device_put, leaf))
  specs = dict(tree.items(decoder.specs(config)))
  located = _match(specs, reader, config, folder)
  kept = quantised.storages(folder, specs, located, reader.where, storage, exclude)
  leaves = {
    path: place(path, _leaf(reader, path, names, specs[path], dtype, kept[path]))
    for path, names in located.items()
  }
  return tree.unflatten(leaves), config


def as_held(config: ModelConfig, reader: Reader, folder: Path) -> ModelConfig:
  """The config of what the files hold, of whose heads it may say less: they win, as in transformers.

  A head in the file of a model that the config calls tied is a copy of the embedding, and read once, or another matrix,
  and then the model is not tied.  A reward model's files may hold a head for logits beside that for scores.
  """
  prefix = prefix_of(reader.where)
  head = held_name("lm_head.weight", prefix, reader.where)
  if head not in reader.where:
    return config
  if config.tied and not same_matrix(reader, head, prefix + "embed_tokens.weight"):
    log.info(
      "%s: its config.json says tied, its %s is not the embedding: the head is used", folder, head
    )
    config = dataclasses.replace(config, tied=False)
  return dataclasses.replace(config, writes=True) if config.scores and not config.tied else config


def same_matrix(reader: Reader, one: str, other: str) -> bool:
  """Whether two tensors are one matrix; a head that is the embedding is tied to it."""
  if other not in reader.where or reader.shape(one) != reader.shape(other):
    return False
  return np.array_equal(reader.get(one), reader.get(other))


def read_config(folder: str | Path) -> ModelConfig:
  """The ModelConfig of a folder's `config.json`.

  Raises:
    FileNotFoundError: the folder has none.
    ValueError: it is not JSON, or describes a model that the decoder does not compute.
  """
  path = Path(folder) / "config.json"
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist: {folder} is not a Hugging Face model folder")
  described = files.read_json(path)
  try:
    bnb.check_config(described)
    config = from_hf(described)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  if config.num_heads % config.num_kv_heads:
    raise ValueError(
      f"{path}: num_attention_heads={config.num_heads} is no multiple of num_key_value_heads={config.num_kv_heads}"
    )
  return config


def save(
  folder: str | Path,
  params: Any,
  config: ModelConfig,
  *,
  tokenizer_from: str | Path | None = None,
  finish: Callable[[Path], None] = lambda folder: None,
) -> None:
  """A folder that any server loads: safetensors, `config.json` with every key it came with, tokenizer files.

  Written beside `folder` and renamed at the end: a killed save leaves nothing that looks whole.

  Args:
    params: adapters merged; plain weights, or those of a type that bitsandbytes has too (NF4, FP4, Int8), which
      are written in its format: transformers loads them, and `load` the same bits.
    tokenizer_from: the folder whose tokenizer, chat template and generation config are copied.
    finish: called with the folder before it is there for others, to lay more into it.

  Raises:
    ValueError: a parameter is no plain array, or is missing, unknown or misshapen for the config.
  """
  leaves = dict(tree.items(params))
  writable = (jax.Array, np.ndarray, *quantised.TYPES)
  others = {path: leaf for path, leaf in leaves.items() if not isinstance(leaf, writable)}
  if others:
    path, leaf = next(iter(others.items()))
    raise ValueError(
      f"{path} is a {type(leaf).__name__}, not a plain array; call adapters.merge(params, adapter) first, "
      "which also turns quantised weights into dense ones"
    )
  tied = config.tied if config.scores else "lm_head/weight" not in leaves
  _check(leaves, dataclasses.replace(config, tied=tied and config.tied))
  storage = quantised.config(leaves, tied, config.family)
  if tokenizer_from is not None and not Path(tokenizer_from).is_dir():
    raise FileNotFoundError(f"tokenizer_from={str(tokenizer_from)!r} is not a folder")
  with files.publish(folder) as new:
    shards.write(new, _tensors(leaves, config))
    dtype = str(leaves["embed_tokens/weight"].dtype)
    described = to_hf(config, tied=tied, dtype=dtype) | storage
    files.write_json(new / "config.json", described)
    if tokenizer_from is not None:
      copy_tokenizer(Path(tokenizer_from), new)
    finish(new)


def copy_tokenizer(source: Path, folder: Path, names: Sequence[str] = TOKENIZER_FILES) -> None:
  for name in names:
    if (source / name).is_dir():
      shutil.copytree(source / name, folder / name, dirs_exist_ok=True)
    elif (source / name).exists():
      shutil.copy(source / name, folder / name)


def _check(leaves: Mapping[str, Any], config: ModelConfig) -> None:
  """Raises unless the leaves are those that the config declares."""
  wanted = {path: spec.shape for path, spec in tree.items(decoder.specs(config))}
  if leaves.keys() != wanted.keys():
    raise ValueError(
      "params are not what the config describes: "
      + _listed("missing", sorted(wanted.keys() - leaves.keys()))
      + _listed("unknown", sorted(leaves.keys() - wanted.keys()))
    )
  for path, leaf in leaves.items():
    if tuple(leaf.shape) != wanted[path]:
      raise ValueError(f"{path} has shape {leaf.shape}, the config asks for {wanted[path]}")


def hf_name(path: str, at: Sequence[int] = (), family: str = "") -> str:
  """The Hugging Face tensor name of a parameter path, of one module of a stacked one.

  >>> hf_name("layers/self_attn/q_proj/weight", (3,))
  'model.layers.3.self_attn.q_proj.weight'
  >>> hf_name("layers/mlp/experts/up_proj/weight", (3, 1), "mixtral")
  'model.layers.3.block_sparse_moe.experts.1.w3.weight'
  >>> hf_name("lm_head/weight")
  'lm_head.weight'
  """
  name = theirs(tree.numbered(path, at), family)
  return name if path.startswith(HEADS) else f"model.{name}"


def hf_names(path: str, config: ModelConfig) -> list[str]:
  """The Hugging Face tensor names of all modules of a leaf."""
  return [hf_name(path, at, config.family) for at in places(path, config)]


def places(path: str, config: ModelConfig) -> list[tuple[int, ...]]:
  """The indices of a leaf's modules, as `tree.places` has them."""
  return tree.places(path, (config.num_layers, config.experts))


def _check_stored(reader: shards.Reader, name: str, wanted: tuple[int, ...]) -> None:
  """Raises unless the tensor has that shape and holds floating-point numbers."""
  shape, dtype = reader.shape(name), reader.stored(name)
  if shape != wanted:
    raise ValueError(
      f"{reader.where[name]}: tensor {name!r} has shape {shape}, config.json asks for {wanted}"
    )
  if dtype not in shards.FLOATS:
    raise ValueError(
      f"{reader.where[name]}: tensor {name!r} is {dtype}, not one of {', '.join(shards.FLOATS)}; of quantised tensors"
      f" those are read that have bitsandbytes' {name}.absmax or {bnb.tensor(name, bnb.SCALES)} beside them"
    )


def _match(
  specs: Mapping[str, decoder.Spec], reader: shards.Reader, config: ModelConfig, folder: Path
) -> dict[str, list[str]]:
  """path -> the file's tensor names, one or one a layer; everything wanted is there and nothing else."""
  prefix = prefix_of(reader.where)
  located: dict[str, list[str]] = {}
  for path in specs:
    located[path] = [held_name(name, prefix, reader.where) for name in hf_names(path, config)]
  weights = {name for names in located.values() for name in names}
  wanted = {part for name in weights for part in bnb.parts(name, reader.where).values()}
  missing = sorted(wanted - set(reader.where))
  extra = sorted(set(reader.where) - wanted)
  unread = {name: why for name in extra if (why := _why_unread(name, config)) is not None}
  unknown = [name for name in extra if name not in unread]
  if missing or unknown:
    raise ValueError(
      f"{folder} does not hold what its config.json describes: "
      + _listed("missing", missing)
      + _listed("unknown", unknown)
    )
  for path, spec in specs.items():
    for name in located[path]:
      if bnb.storage(bnb.parts(name, reader.where)) == quantised.DENSE:
        _check_stored(reader, name, _stored_shape(path, spec))
  for why, count in collections.Counter(unread.values()).items():
    log.info("%s: %d tensors left unread (%s)", folder, count, why)
  return located


def _listed(what: str, names: list[str]) -> str:
  if not names:
    return ""
  rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
  return f"{what} {', '.join(names[:5])}{rest}. "


def _why_unread(name: str, config: ModelConfig) -> str | None:
  if config.tied and re.fullmatch(TIED_HEAD, name):
    return "the head is tied to the embedding"
  return next((why for pattern, why in UNREAD.items() if re.fullmatch(pattern, name)), None)


def prefix_of(names: Iterable[str]) -> str:
  """What stands before `embed_tokens.weight`: `model.`, nothing, or the path of a text model inside a larger one."""
  for name in names:
    if name.endswith("embed_tokens.weight"):
      return name.removesuffix("embed_tokens.weight")
  return "model."


def held_name(name: str, prefix: str, held: Mapping[str, Any]) -> str:
  """What files call a tensor of `hf_name`'s, whose text model stands behind a prefix."""
  if name.startswith(HEADS):
    inner = prefix.removesuffix("model.") + name  # language_model.lm_head.weight
    return inner if inner in held else name
  return prefix + name.removeprefix("model.")


def _stored_shape(path: str, spec: decoder.Spec) -> tuple[int, ...]:
  """The shape that each of the file's tensors of a leaf must have."""
  shape = spec.shape[tree.leads(path) :]
  return shape[::-1] if tree.turned(path) else shape


def _leaf(
  reader: shards.Reader,
  path: str,
  names: Sequence[str],
  spec: decoder.Spec,
  dtype: Any,
  storage: str,
) -> Any:
  """The leaf at path in host memory, stored as asked."""
  held = {bnb.storage(bnb.parts(name, reader.where)) for name in names}
  if storage == quantised.DENSE and held == {quantised.DENSE}:
    return _stack(reader, path, names, spec, dtype)
  if held == {quantised.DENSE}:
    dtype = dtype or _widest(reader, names)
  return quantised.load(
    reader,
    path,
    names,
    spec.shape,
    turn=tree.turned(path),
    dtype=dtype,
    storage=storage,
  )


def _stack(
  reader: shards.Reader, path: str, names: Sequence[str], spec: decoder.Spec, dtype: Any
) -> np.ndarray:
  """The leaf that the tensors make, matrices turned to [in, out]; filled layer by layer."""
  result = files.room(spec.shape, jnp.dtype(dtype or _widest(reader, names)))
  for at, name in zip(tree.places(path, spec.shape), names):
    tensor = files.narrowed(name, reader.get(name), str(result.dtype))
    result[at or ...] = tensor.T if tree.turned(path) else tensor
  return result


def _widest(reader: shards.Reader, names: Sequence[str]) -> Any:
  return functools.reduce(jnp.promote_types, {reader.dtype(name) for name in names})


def _tensors(leaves: Mapping[str, Any], config: ModelConfig):
  """name -> (shape, dtype, function that makes the array), in the order of the tree."""
  for path, leaf in leaves.items():
    if isinstance(leaf, quantised.TYPES):
      yield from _quantised_tensors(path, leaf, config)
      continue
    dtype, turn, lead = str(leaf.dtype), tree.turned(path), tree.leads(path)
    shape = leaf.shape[lead:][::-1] if turn else leaf.shape[lead:]
    for at in places(path, config):
      make = lambda leaf=leaf, turn=turn, at=at: _host(leaf[at] if at else leaf, turn)
      yield hf_name(path, at, config.family), (shape, dtype, make)


def _quantised_tensors(path: str, leaf: Any, config: ModelConfig):
  for at in places(path, config):
    for part, entry in bnb.write(leaf, at).items():
      yield bnb.tensor(hf_name(path, at, config.family), part), entry


def _host(leaf, turn):
  array = np.asarray(leaf)
  return array.T if turn else array
