"""The tensors that go into a merge, as their folders mean them.

What bitsandbytes quantised is dense, an adapter is merged in, and buffers that follow from the config are left out.  A
head is what the model computes with: a copy of the embedding is none, and where some models have a head of their own
the others' is their embedding.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.adapters import peft_format
from posttrain_jax.core import files, shards, tree, weight
from posttrain_jax.core.weight import Adapted
from posttrain_jax.merge import stream, vocabulary
from posttrain_jax.merge.recipe import ModelRef, RecipeError
from posttrain_jax.models import decoder, hf
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.quant import bnb

log = logging.getLogger(__name__)

QUANTISED = "quantization_config"  # of a config.json, where matrices are not stored as they are
HEAD, EMBEDDING = "lm_head/weight", "embed_tokens/weight"


def opened(
  models: Sequence[ModelRef], folders: Mapping[ModelRef, Path]
) -> dict[ModelRef, stream.Tensors]:
  """The tensors of every model.

  Raises:
    RecipeError: an adapter that is in no weight, or changes what the folder does not hold.
  """
  every = {model: _opened(model, folders[model]) for model in models}
  heads = {name for held in every.values() if (name := _head(held)) is not None}
  if len(heads) == 1:
    (head,) = heads
    tied = [str(model) for model, held in every.items() if head not in held.where]
    if tied:
      log.info("%s: tied, so that the embedding stands for the head", ", ".join(tied))
    every = {m: held if head in held.where else _WithHead(held, head) for m, held in every.items()}
  return every


def text_config(described: dict[str, Any]) -> dict[str, Any]:
  """The part of a `config.json` that is of the text model: all of it, but in a model that also sees."""
  inner = described.get("text_config")
  return inner if isinstance(inner, dict) else described


def _opened(model: ModelRef, folder: Path) -> stream.Tensors:
  reader: stream.Tensors = shards.Reader(folder)
  described = files.read_json(folder / "config.json")
  if QUANTISED in described:
    reader = _Dequantised(reader)
  tied = text_config(described).get("tie_word_embeddings", described.get("tie_word_embeddings"))
  reader = _Used(reader, tied=bool(tied))
  return reader if model.adapter is None else _with_adapter(reader, folder, model.adapter)


def _head(held: stream.Tensors) -> str | None:
  name = hf.held_name("lm_head.weight", hf.prefix_of(held.where), held.where)
  return name if name in held.where else None


class _View:
  """A model's tensors, some of them otherwise."""

  def __init__(self, reader: stream.Tensors, where: Mapping[str, Path]):
    self.reader, self.where = reader, where

  def shape(self, name: str) -> tuple[int, ...]:
    return self.reader.shape(name)

  def stored(self, name: str) -> str:
    return self.reader.stored(name)

  def get(self, name: str) -> np.ndarray:
    return self.reader.get(name)

  def place(self, name: str) -> shards.Place | None:
    return self.reader.place(name)


class _Used(_View):
  """Those that a model computes with."""

  def __init__(self, reader: stream.Tensors, *, tied: bool):
    embedding, head = vocabulary.embedding(reader.where), _head(reader)
    copy = tied and head and embedding and hf.same_matrix(reader, head, embedding)
    left = {name for name in reader.where if re.fullmatch(hf.ROTARY, name)}
    left |= {str(head)} if copy else set()
    super().__init__(reader, {name: at for name, at in reader.where.items() if name not in left})


class _WithHead(_View):
  """A model that has no head of its own, with its embedding under the head's name."""

  def __init__(self, reader: stream.Tensors, head: str):
    self.embedding, self.head = vocabulary.embedding(reader.where), head
    where = dict(reader.where)
    if self.embedding is not None:
      where[head] = where[self.embedding]
    super().__init__(reader, where)

  def shape(self, name: str) -> tuple[int, ...]:
    return self.reader.shape(self._of(name))

  def stored(self, name: str) -> str:
    return self.reader.stored(self._of(name))

  def get(self, name: str) -> np.ndarray:
    return self.reader.get(self._of(name))

  def place(self, name: str) -> shards.Place | None:
    return self.reader.place(self._of(name))

  def _of(self, name: str) -> str:
    return str(self.embedding) if name == self.head else name


class _Dequantised(_View):
  """A model whose matrices bitsandbytes quantised, each made dense when it is read: what an adapter was trained on."""

  def __init__(self, reader: stream.Tensors):
    parts = {name: bnb.parts(name, reader.where) for name in reader.where}
    self.parts = {
      name: tensor_names
      for name, tensor_names in parts.items()
      if bnb.storage(tensor_names) != "dense"
    }
    inner = {
      part for tensor_names in self.parts.values() for what, part in tensor_names.items() if what
    }
    super().__init__(reader, {n: at for n, at in reader.where.items() if n not in inner})

  def shape(self, name: str) -> tuple[int, ...]:
    return self._weight(name).shape[::-1] if name in self.parts else self.reader.shape(name)

  def stored(self, name: str) -> str:
    if name not in self.parts:
      return self.reader.stored(name)
    return files.DTYPES[str(np.dtype(self._weight(name).dtype))]

  def get(self, name: str) -> np.ndarray:
    if name not in self.parts:
      return self.reader.get(name)
    return np.asarray(weight.dense(jax.tree.map(jnp.asarray, self._weight(name)))).T

  def place(self, name: str) -> shards.Place | None:
    return None if name in self.parts else self.reader.place(name)

  def _weight(self, name: str) -> Any:
    tensors = {part: self.reader.get(tensor_name) for part, tensor_name in self.parts[name].items()}
    return bnb.read(name, tensors, bnb.shape(tensors))


def _with_adapter(reader: stream.Tensors, folder: Path, adapter: str) -> stream.Tensors:
  config = hf.as_held(hf.read_config(folder), reader, folder)
  names = _Names(reader, config)
  nodes, adapter_config = peft_format.load(adapter, names.tree(reader), config)
  if not adapter_config.in_weights:
    raise RecipeError(
      f"{adapter}: a {adapter_config.method} stands before the text and is in no weight"
    )
  if adapter_config.context_length:
    raise RecipeError(
      f"{adapter} was trained on positions stretched to {adapter_config.context_length} tokens, which is in no weight:"
      " write base and adapter as one model first (posttrain export --merge), and merge that"
    )
  nodes = dict(tree.items(nodes))
  if (
    config.tied and {HEAD, EMBEDDING} & nodes.keys()
  ):  # as in PEFT the head keeps to the embedding that was
    reader = _WithHead(reader, names.of(HEAD, ()))
  return _WithAdapter(reader, names, nodes, folder, adapter)


class _WithAdapter(_View):
  """A model's tensors with an adapter merged in, each when it is read."""

  def __init__(self, reader: stream.Tensors, names: _Names, nodes, folder: Path, adapter: str):
    super().__init__(reader, reader.where)
    self.places = {}
    for path, node in nodes.items():
      at = hf.places(path, names.config)
      self.places |= {names.of(path, i): (path, i, node) for i in at}
    lacking = sorted(set(self.places) - set(self.where))
    if lacking:
      raise RecipeError(f"{adapter} changes {lacking[0]!r}, which {folder} does not hold")

  def get(self, name: str) -> np.ndarray:
    array = self.reader.get(name)
    if name not in self.places:
      return array
    path, i, node = self.places[name]
    layer_node = weight.layer(node, i) if i else node
    turn = (lambda x: x.T) if tree.turned(path) else (lambda x: x)
    return np.asarray(turn(_merged(jnp.asarray(turn(array)), layer_node)))

  def place(self, name: str) -> shards.Place | None:
    return None if name in self.places else self.reader.place(name)


class _Names:
  """What a folder's files call the decoder's parameters."""

  def __init__(self, reader: stream.Tensors, config: ModelConfig):
    self.where, self.config = reader.where, config
    self.prefix = hf.prefix_of(reader.where)

  def of(self, path: str, at: Sequence[int]) -> str:
    return hf.held_name(hf.hf_name(path, at, self.config.family), self.prefix, self.where)

  def tree(self, reader: stream.Tensors) -> Any:
    """The parameters that the files hold, those of layers unread."""
    paths = [path for path, _ in tree.items(decoder.specs(self.config))]
    first = lambda path: self.of(path, hf.places(path, self.config)[0])
    held = [path for path in paths if first(path) in self.where]
    return tree.unflatten((path, self._leaf(reader, path)) for path in held)

  def _leaf(self, reader: stream.Tensors, path: str) -> Any:
    if path.startswith("layers/"):
      return _Stacked(reader, path, {at: self.of(path, at) for at in hf.places(path, self.config)})
    array = reader.get(self.of(path, ()))
    return array.T if tree.turned(path) else array


class _Stacked:
  """A leaf [layers, ...] of which a matrix is read when it is asked for: DoRA's norms are of its base."""

  def __init__(self, reader: stream.Tensors, path: str, names: Mapping[tuple[int, ...], str]):
    self.reader, self.path, self.names = reader, path, names
    last = max(names)
    shape = reader.shape(names[last])
    self.shape = (*[i + 1 for i in last], *(shape[::-1] if tree.turned(path) else shape))
    self.dtype = np.dtype(np.float32)

  def __getitem__(self, at: int | tuple[int, ...]) -> np.ndarray:
    array = self.reader.get(self.names[at if isinstance(at, tuple) else (at,)])
    return array.T if tree.turned(self.path) else array


@jax.jit
def _merged(base, node):
  """The base with its adapter in float32, whatever the base's dtype: it is rounded once, with the result."""
  return weight.dense(Adapted(base.astype(jnp.float32), node), jnp.float32)
