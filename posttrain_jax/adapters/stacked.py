"""Several adapters in one tree, of which each row of a batch has its own: for inference.

`bind(params, stack(adapters), rows=index)` gives row i the adapter index[i], and -1 none.  What an adapter lacks (a
module, a rank, slots of a prompt) is zeros, so one program serves every index.  Of ranks those zeros are not kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec

from posttrain_jax.adapters.adalora import AdaLoRA
from posttrain_jax.adapters.bind import base
from posttrain_jax.adapters.dora import DoRA
from posttrain_jax.adapters.lora import LoRA
from posttrain_jax.adapters.node import Change, PerRow, Standing
from posttrain_jax.adapters.prefix import Prefix
from posttrain_jax.adapters.prompt import SoftPrompt
from posttrain_jax.adapters.seated import Seated
from posttrain_jax.core import sharding, struct, tree, weight
from posttrain_jax.core.product import precision
from posttrain_jax.core.weight import Adapted, Rows, Shared, embed
from posttrain_jax.models import attention, before

Array = jax.Array


@struct.dataclass
class Stacked(Change, PerRow):
  """y = x @ W + (x @ a[n].T) @ b[n], then y * columns[n], where n is the adapter of x's row.

  The last of the adapters is none.  It multiplies as `Seated`; who multiplies often does that once (`taken`).  On two
  CPU cores (batch 16, 8 adapters of rank 16, 576 x 576, 32 tokens a row) the gathered factors took 4.2 ms beside 3.2 ms
  of the base, one product with the factors of all adapters 5.6 ms (when a rank's numbers did not lie side by side).
  """

  a: Array  # [layers, places, block, in], or without layers: an adapter's ranks are the blocks at its places
  b: Array  # [layers, places, block, out], scales and masks multiplied in
  places: Shared  # [adapters + 1, blocks]; the last of them is zeros, for what an adapter lacks
  columns: Array | None = None  # [layers, adapters + 1, out]: DoRA's factors, 1 for other adapters
  dora: DoRA | None = None  # those adapters' nodes where the factors are still to be computed
  # [layers, adapters + 1]: whether it changes anything here; None where that is not asked
  acts: Array | None = None
  index: Rows | None = None  # [batch], once bound

  def of_rows(self, index: Array) -> Stacked:
    return dataclasses.replace(self, index=_indices(index, len(self.places.value) - 1))

  def seated(self) -> Seated:
    """The same, once bound, with each row's factors beside it; columns that are still to be computed are left out."""
    assert self.index is not None
    index = self.index.value
    take = lambda x, behind: (
      x if x is None else jnp.take(x, index, x.ndim - 1 - behind, mode="clip")
    )
    return Seated(*self.factors(index), take(self.columns, 1), take(self.acts, 0))

  def factors(self, index: Array) -> tuple[Array, Array]:
    """Of those adapters a: [layers, adapters, rank, in] and b: [layers, adapters, rank, out]."""

    def of(x: Array) -> Array:
      taken = jnp.take(x, self.places.value[index], x.ndim - 3, mode="clip")
      return jax.lax.collapse(taken, taken.ndim - 3, taken.ndim - 1)

    return of(self.a), of(self.b)

  def apply(self, x: Array, base: Any, key: Array | None = None) -> Array:
    """x: [batch, ..., in]."""
    _rows_of(self.index, x.shape[0])
    return self._whole(base).seated().apply(x, base)

  def rows(self, ids: Array, base: Any, key: Array | None = None) -> Array:
    index = _rows_of(self.index, ids.shape[0])
    embedded = embed(ids, base)
    block = self.a.shape[-2]
    ranks = (self.places.value[index, :, None] * block + jnp.arange(block)).reshape(len(index), -1)
    of_row = jax.vmap(
      lambda ranks, ids: self.a.reshape(-1, self.a.shape[-1])[ranks, ids[..., None]]
    )
    down, b = of_row(ranks, ids), self.factors(index)[1]
    y = embedded + jnp.einsum("n...r,nro->n...o", down, b, precision=precision(down, b))
    return self._whole(base).seated().scaled(y, embedded.dtype)

  def _whole(self, base: Any) -> Stacked:
    """With the columns that are still to be computed, of one layer."""
    if self.dora is None:
      return self
    return dataclasses.replace(self, columns=_factors(self.dora, base, jnp.float32), dora=None)

  def dense(self, base: Any, dtype: Any = None) -> Array:
    raise ValueError("a stack of adapters is many matrices: merge its adapters one at a time")

  def size(self) -> int:
    """Numbers as stored; none of them trains."""
    return sum(leaf.size for leaf in jax.tree.leaves((self.a, self.b, self.columns)))

  def partition_specs(self, spec: PartitionSpec) -> Stacked:
    *lead, rows, columns = [*[None] * (self.a.ndim - 1 - len(spec)), *spec]
    none, wide = PartitionSpec(), PartitionSpec(*lead, None, columns)
    a, b = PartitionSpec(*lead, None, rows, None), PartitionSpec(*lead, None, None, columns)
    fields = dict(a=a, b=b, scale=none, mask=none, magnitude=wide, norm=wide)
    return dataclasses.replace(
      self,
      a=PartitionSpec(*lead, None, None, rows),
      b=b,
      places=Shared(none),
      columns=None if self.columns is None else wide,
      acts=None if self.acts is None else none,
      dora=None if self.dora is None else dataclasses.replace(self.dora, **fields),
      index=None if self.index is None else Rows(none),
    )


@struct.dataclass
class StackedPrompts(Standing, PerRow):
  """embeddings: [prompts + 1, slots, embed], used: [prompts + 1, slots], 1 for its own slots; the last is none."""

  embeddings: Array
  used: Array
  index: Rows | None = None

  def of_rows(self, index: Array) -> StackedPrompts:
    return dataclasses.replace(self, index=_indices(index, self.used.shape[0] - 1))

  def segments(self, batch: int) -> Array:
    return self.used[_rows_of(self.index, batch)] * attention.EVERYONE

  def read(self, batch: int) -> Array:
    return self.embeddings[_rows_of(self.index, batch)]

  @property
  def slots(self) -> int:
    return self.used.shape[-1]

  @property
  def shape(self) -> tuple[int, ...]:
    return self.embeddings.shape

  def size(self) -> int:
    return self.embeddings.size

  def partition_specs(self, spec: PartitionSpec) -> StackedPrompts:
    index = None if self.index is None else Rows(PartitionSpec())
    return dataclasses.replace(self, embeddings=spec, used=PartitionSpec(), index=index)


@struct.dataclass
class StackedPrefixes(Standing, PerRow):
  """k, v: [layers, prefixes + 1, slots, kv_heads * head_dim], used: [layers, prefixes + 1, slots]; the last is none."""

  k: Array
  v: Array
  used: Array
  index: Rows | None = None

  def of_rows(self, index: Array) -> StackedPrefixes:
    return dataclasses.replace(self, index=_indices(index, self.k.shape[-3] - 1))

  def segments(self, batch: int) -> Array:
    used = self.used if self.used.ndim == 2 else self.used[0]  # every layer's is the same
    return used[_rows_of(self.index, batch)] * attention.EVERYONE

  def read(self, batch: int) -> tuple[Array, Array]:
    index = _rows_of(self.index, batch)
    return jnp.take(self.k, index, axis=-3), jnp.take(self.v, index, axis=-3)

  @property
  def slots(self) -> int:
    return self.used.shape[-1]

  @property
  def shape(self) -> tuple[int, ...]:
    return (2, *self.k.shape)

  def size(self) -> int:
    return self.k.size + self.v.size

  def partition_specs(self, spec: PartitionSpec) -> StackedPrefixes:
    *lead, columns = [*[None] * (self.k.ndim - 1 - len(spec)), *spec]
    none = PartitionSpec()
    kv_spec = PartitionSpec(*lead[:-1], None, lead[-1], columns)
    index = None if self.index is None else Rows(none)
    return dataclasses.replace(self, k=kv_spec, v=kv_spec, used=none, index=index)


def stack(adapters: Sequence[Any], params: Any = None) -> Any:
  """One tree of several adapters, for `bind(params, stacked, rows=index)`.

  LoRA (DoRA, AdaLoRA) of any ranks and modules, soft prompts and prefixes of any lengths, mixed.

  Args:
    adapters: trees as `init` or `peft_format.load` make them, all of one base.
    params: the base; with it the column norms of DoRA are computed here, once, without it in every product.

  Raises:
    ValueError: an adapter of another kind, or one whose base is not the one that the others share.
  """
  if not adapters:
    raise ValueError("adapters.stack: there is no adapter to stack")
  flat = [tree.flatten(adapter) for adapter in adapters]
  stacked = {}
  for path in dict.fromkeys(path for nodes in flat for path in nodes):
    nodes = [adapter_nodes.get(path) for adapter_nodes in flat]
    if path == before.PROMPT:
      stacked[path] = _prompts(nodes)
    elif path == before.PREFIX:
      stacked[path] = _prefixes(nodes)
    else:
      stacked[path] = _matrices(path, nodes, params)
  return tree.unflatten(stacked)


@dataclasses.dataclass(frozen=True)
class Room:
  """What a stack has room for, made before its adapters are known: so each is put in without a new program.

  rank: the largest of a module; prompt, prefix: the most slots of a soft prompt and of a prefix, 0 for none.
  """

  adapters: int
  rank: int
  paths: tuple[str, ...]  # of the matrices
  prompt: int = 0
  prefix: int = 0


def empty(params: Any, room: Room, embed: int, dtype: Any = jnp.float32) -> dict[str, Any]:
  """{path: node} of a stack whose adapters are all none, for `put` to fill.

  Args:
    embed: the width of the residual stream.
  """
  nodes: dict[str, Any] = {}
  count = room.adapters + 1
  for path in room.paths:
    *lead, rows, columns = weight.shape(base(params, path))
    nodes[path] = Stacked(
      jnp.zeros((*lead, count, room.rank, rows), dtype),
      jnp.zeros((*lead, count, room.rank, columns), dtype),
      Shared(jnp.arange(count, dtype=jnp.int32)[:, None]),
      jnp.ones((*lead, count, columns), jnp.float32),
      acts=jnp.zeros((*lead, count), bool),
    )
  if room.prompt:
    used = jnp.zeros((count, room.prompt), jnp.int32)
    nodes[before.PROMPT] = StackedPrompts(jnp.zeros((count, room.prompt, embed)), used)
  if room.prefix:
    layers, _, width = weight.shape(base(params, "layers/self_attn/k_proj/weight"))
    k, v = (jnp.zeros((layers, count, room.prefix, width)) for _ in range(2))
    nodes[before.PREFIX] = StackedPrefixes(k, v, jnp.zeros((layers, count, room.prefix), jnp.int32))
  return nodes


def entry(adapter: Any, params: Any, room: Room, like: Mapping[str, Any]) -> dict[str, Any]:
  """{path: arrays} of one adapter on the host, as `put` takes them; what it lacks is zeros.

  Raises:
    ValueError: it is of a kind that rows do not mix, or the room is too small for it; the message names the path.
  """
  nodes = tree.flatten(adapter)
  for path, node in nodes.items():
    _check_room(path, node, room)
  rank = max((node.a.shape[-1] for node in nodes.values() if hasattr(node, "a")), default=0)
  if rank > room.rank:
    raise ValueError(too_large("rank", rank, room.rank))
  stacked = tree.flatten(stack([adapter], params))
  made: dict[str, Any] = {}
  for path, slots in like.items():
    arrays = _arrays(slots)
    given = _arrays(stacked[path]) if path in stacked else {}
    one = {name: _filled(x, given.get(name), slots, name) for name, x in arrays.items()}
    if "acts" in one:
      pairs = np.any(one["a"] != 0, (-1, -2)) & np.any(one["b"] != 0, (-1, -2))
      one["acts"] = pairs | np.any(one["columns"] != 1, -1)
    made[path] = one
  return made


def is_seatable(leaf: Any) -> bool:
  """Whether it is a matrix with a stack bound, all of whose factors are known without the base."""
  return isinstance(leaf, Adapted) and isinstance(leaf.node, Stacked) and leaf.node.dora is None


def taken(params: Any, rows: Array) -> Any:
  """params bound for those rows of its batch, and in the layers each row's factors beside it: gathered once.

  On a mesh, where nobody measured that, they are gathered in each product.
  """
  if sharding.active():
    return weight.take_rows(params, rows)

  def one(leaf: Any) -> Any:
    leaf = weight.take_rows(leaf, rows)
    return leaf.replace(node=leaf.node.seated()) if is_seatable(leaf) else leaf

  apart = lambda leaf: is_seatable(leaf) or weight.is_shared(leaf)
  layers = jax.tree.map(one, params["layers"], is_leaf=apart)
  others = {name: part for name, part in params.items() if name != "layers"}
  return {**params, **weight.take_rows(others, rows), "layers": layers}


def put(nodes: Mapping[str, Any], index: Array, entry: Mapping[str, Any]) -> dict[str, Any]:
  """The stack with that adapter at an index; jitted by whoever owns the stack, which is donated."""
  return {
    path: dataclasses.replace(
      node,
      **{
        name: jax.lax.dynamic_update_index_in_dim(x, entry[path][name].astype(x.dtype), index, axis)
        for name, x in _arrays(node).items()
        for axis in (_axis(node, name),)
      },
    )
    for path, node in nodes.items()
  }


def _check_room(path: str, node: Any, room: Room) -> None:
  if path in (before.PROMPT, before.PREFIX):
    kind, most = ("prompt", room.prompt) if path == before.PROMPT else ("prefix", room.prefix)
    if node.slots > most:
      raise ValueError(too_large(f"{kind}_slots", node.slots, most))
    return
  _check(path, 0, node)
  if path not in room.paths:
    raise ValueError(
      f"it has a {type(node).__name__} at {path}; there is room at {', '.join(room.paths)} alone"
    )


def too_large(kind: str, size: int, room: int) -> str:
  """Why an adapter has no place in a stack; kind: rank, prompt_slots or prefix_slots."""
  what, option = {
    "rank": (f"its rank is {size}", "--max_rank"),
    "prompt_slots": (f"it is a soft prompt of {size} slots", "--prompt_slots"),
    "prefix_slots": (f"it is a prefix of {size} slots", "--prefix_slots"),
  }[kind]
  more = f"start the server with {option}={size}, which every slot has then"
  return f"{what}; there is room for {room}: {more}"


def _arrays(node: Any) -> dict[str, Array]:
  """The fields of a stack that hold adapters."""
  names = ("a", "b", "columns", "acts", "embeddings", "k", "v", "used")
  return {name: vars(node)[name] for name in names if vars(node).get(name) is not None}


def _axis(node: Any, name: str) -> int:
  """Of the adapters, in a field of a stack."""
  behind = dict(acts=0, columns=1, used=1).get(name, 2)
  return vars(node)[name].ndim - behind - 1


def _filled(slots: Array, given: Array | None, node: Any, name: str) -> np.ndarray:
  """One adapter's part of a field, padded to the room that there is."""
  shape = list(slots.shape)
  del shape[_axis(node, name)]
  kind: Any = dict(used=np.int32, acts=np.bool_).get(name, np.float32)
  whole = np.full(shape, 1 if name == "columns" else 0, kind)
  if given is not None:
    one = np.take(np.asarray(given), 0, axis=_axis(node, name))
    whole[tuple(slice(size) for size in one.shape)] = one
  return whole


def _matrices(path: str, nodes: Sequence[Any], params: Any) -> Stacked:
  for i, node in enumerate(nodes):
    _check(path, i, node)
  shapes = {(*n.a.shape[:-1], n.b.shape[-1]) for n in nodes if n is not None}
  if len(shapes) > 1:
    raise ValueError(f"{path}: adapters of different bases, {sorted(shapes)}")
  *lead, rows, columns = shapes.pop()
  pairs = [_pair(node) for node in nodes if node is not None]
  ranks = [0 if node is None else node.b.shape[-2] for node in nodes]
  block = math.gcd(*ranks) or 1
  in_blocks = lambda x: x.reshape(*lead, -1, block, x.shape[-1])
  zeros = lambda width: jnp.zeros((*lead, 1, block, width))
  a = jnp.concatenate([*(in_blocks(a) for a, _ in pairs), zeros(rows)], len(lead))
  b = jnp.concatenate([*(in_blocks(b) for _, b in pairs), zeros(columns)], len(lead))
  places = _places([rank // block for rank in ranks])
  factors = Stacked(a, b, Shared(jnp.asarray(places, jnp.int32)))
  if not any(isinstance(node, DoRA) for node in nodes):
    return factors
  dora = _doras(factors, nodes, lead, columns)
  if params is None:
    return dataclasses.replace(factors, dora=dora)
  matrix, of = base(params, path), jax.jit(_factors, static_argnums=2)
  if not lead:
    return dataclasses.replace(factors, columns=of(dora, matrix, jnp.float32))
  layers = [of(weight.layer(dora, i), weight.layer(matrix, i), jnp.float32) for i in range(lead[0])]
  return dataclasses.replace(factors, columns=jnp.stack(layers))


def _places(blocks: Sequence[int]) -> np.ndarray:
  """[adapters + 1, most]: where adapters of so many blocks have them, one behind the other, and behind all the zeros.

  >>> _places([1, 2]).tolist()
  [[0, 3], [1, 2], [3, 3]]
  """
  firsts = np.cumsum([0, *blocks])
  at = np.arange(max(blocks))
  own = at < np.asarray([*blocks, 0])[:, None]
  return np.where(own, firsts[:, None] + at, firsts[-1])


def _check(path: str, i: int, node: Any) -> None:
  if path.startswith(tree.EXPERTS):
    raise ValueError(
      f"adapter {i} has a {type(node).__name__} at {path}: the rows of a batch do not mix adapters of experts; serve "
      "this one alone, bound or merged"
    )
  if node is None:
    return
  if not isinstance(node, LoRA | AdaLoRA):
    raise ValueError(
      f"adapter {i} has a {type(node).__name__} at {path}: a batch can mix LoRA, DoRA, AdaLoRA, soft prompts and "
      "prefixes; serve this one alone, bound or merged"
    )
  if isinstance(node, LoRA) and node.start is not None:
    raise ValueError(
      f"adapter {i} began with a part of its base at {path}, so it has a base of its own: save it with "
      "peft_format.save and load it again, as a plain LoRA of the original base"
    )


def _pair(node: Any) -> tuple[Array, Array]:
  """(a: [layers, rank, in], b: [layers, rank, out]) with x @ a.T @ b the update."""
  scales = node._values() if isinstance(node, AdaLoRA) else node._scales()
  scales = jnp.broadcast_to(scales, node.b.shape[:-1])
  return jnp.swapaxes(jnp.asarray(node.a, jnp.float32), -1, -2), node.b * scales[..., None]


def _doras(factors: Stacked, nodes, lead, columns) -> DoRA:
  """The adapters as DoRA nodes, adapters behind layers; masked where an adapter is none."""
  one = jnp.ones((*lead, columns))
  magnitudes, norms, masks = [], [], []
  a, b = factors.factors(jnp.arange(len(nodes) + 1))
  for node in [*nodes, None]:
    is_dora = isinstance(node, DoRA)
    magnitudes.append(node.magnitude if is_dora else one)
    norms.append(node.norm if is_dora else one)
    adapted = (node.ranks() > 0) if is_dora else np.zeros(lead, bool)
    rank = b.shape[-2]
    masks.append(jnp.asarray(np.broadcast_to(adapted[..., None], (*lead, rank)), jnp.float32))
  axis = len(lead)
  fields = dict(zip(("magnitude", "norm", "mask"), (magnitudes, norms, masks)))
  stacked: Any = {name: jnp.stack(values, axis) for name, values in fields.items()}
  return DoRA(jnp.swapaxes(a, -1, -2), b, jnp.ones(a.shape[: axis + 1]), **stacked)


def _factors(dora: DoRA, base: Any, dtype: Any) -> Array:
  """[adapters + 1, out] of one layer."""
  return jax.vmap(lambda node: node.factor(base, dtype))(dora)


def _prompts(nodes: Sequence[SoftPrompt | None]) -> StackedPrompts:
  per_adapter = [None if node is None else (node.embeddings,) for node in nodes]
  (embeddings,), used = _padded(per_adapter)
  return StackedPrompts(embeddings, used)


def _prefixes(nodes: Sequence[Prefix | None]) -> StackedPrefixes:
  per_adapter = [None if node is None else (node.k, node.v) for node in nodes]
  (k, v), used = _padded(per_adapter)
  return StackedPrefixes(k, v, jnp.broadcast_to(used, (len(k), *used.shape)))


def _padded(per_adapter):
  """([each array stacked before its slots, padded to the most], used: [adapters + 1, slots])."""
  some = next(arrays for arrays in per_adapter if arrays is not None)
  lengths = [0 if arrays is None else arrays[0].shape[-2] for arrays in [*per_adapter, None]]
  most = max(lengths)
  stacked = []
  for i, like in enumerate(some):
    none = jnp.zeros((*like.shape[:-2], 0, like.shape[-1]))
    filled = [none if arrays is None else arrays[i] for arrays in [*per_adapter, None]]
    pad = lambda x: jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, most - x.shape[-2]), (0, 0)])
    stacked.append(jnp.stack([pad(x) for x in filled], like.ndim - 2))
  used = np.arange(most) < np.asarray(lengths)[:, None]
  return stacked, jnp.asarray(used, jnp.int32)


def _indices(index: Any, none: int) -> Rows:
  """The rows' adapters, -1 being none; checked where the numbers are known."""
  if not isinstance(index, Tracer):
    known = np.asarray(index)
    if known.ndim != 1 or known.size == 0 or known.min() < -1 or known.max() > none:
      raise ValueError(
        f"rows={known.tolist()}: write one number a row, 0 to {none - 1} for the stacked adapters, -1 for none"
      )
  index = jnp.asarray(index, jnp.int32)
  return Rows(jnp.where(index < 0, none, index))


def _rows_of(index: Rows | None, batch: int) -> Array:
  if index is None:
    raise ValueError("a stack of adapters is bound with rows=index, one number a row")
  if index.value.shape[0] != batch:
    raise ValueError(f"parameters are bound for {index.value.shape[0]} rows, the batch has {batch}")
  return index.value
