"""Parameter trees: nested dicts of arrays or weights, addressed by paths (`layers/mlp/up_proj/weight`)."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.core import memory, weight, words
from posttrain_jax.core.leaf import Leaf

Tree = Any

ROUTER = (
  "layers/mlp/gate/weight"  # of a mixture of experts; stays plain where matrices are quantised
)
EXPERTS = "layers/mlp/experts/"  # leaves with a second leading axis, the expert


def items(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """(path, leaf) pairs in the tree's order; anything that is not a dict is a leaf."""
  if not isinstance(tree, Mapping):
    yield prefix, tree
    return
  for name, child in tree.items():
    yield from items(child, f"{prefix}/{name}" if prefix else str(name))


def turned(path: str) -> bool:
  """True for matrices that Hugging Face's files hold [out, in] and trees [in, out]; embeddings are alike in both.

  >>> turned("layers/mlp/up_proj/weight"), turned("lm_head/weight"), turned("embed_tokens/weight")
  (True, True, False)
  """
  return path.endswith("_proj/weight") or path in ("lm_head/weight", "score/weight", ROUTER)


def leads(path: str) -> int:
  """Leading axes of a leaf that are no part of one module's: layers, and experts.

  >>> leads("layers/mlp/experts/up_proj/weight"), leads("layers/norm/weight"), leads("norm/weight")
  (2, 1, 0)
  """
  return path.startswith("layers/") + path.startswith(EXPERTS)


def flatten(tree: Tree) -> dict[str, Any]:
  """{path: leaf}."""
  return dict(items(tree))


def unflatten(leaves: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> Tree:
  """The nested dicts that `flatten` came from."""
  tree: dict[str, Any] = {}
  for path, leaf in dict(leaves).items():
    *parents, last = path.split("/")
    node = tree
    for name in parents:
      node = node.setdefault(name, {})
    node[last] = leaf
  return tree


def get(tree: Tree, path: str) -> Any:
  """The leaf or branch at path.

  Raises:
    KeyError: names the path and the nearest that exists.
  """
  node = tree
  for name in path.split("/"):
    if not isinstance(node, Mapping) or name not in node:
      raise KeyError(unknown(path, flatten(tree)))
    node = node[name]
  return node


def put(tree: Tree, path: str, leaf: Any) -> Tree:
  """A copy of tree with leaf at path; branches are made as needed, nothing else is copied."""
  name, _, rest = path.partition("/")
  return {**tree, name: put(tree.get(name, {}), rest, leaf) if rest else leaf}


def unknown(name: str, known: Iterable[str], what: str = "parameter") -> str:
  """The sentence for a name that matches nothing, with the real name nearest to it."""
  known = list(known)
  near = difflib.get_close_matches(name[:1000], known, n=1, cutoff=0.0)
  example = f"; names look like {near[0]!r}" if near else ""
  return f"no {what} matches {words.shown(name)}{example}"


def without(tree: Tree, name: str) -> Tree:
  """tree without the branch of that name; a tree that has none, or None, as it is.

  >>> without({"layers": 1, "critic": 2}, "critic"), without(None, "critic")
  ({'layers': 1}, None)
  """
  if not isinstance(tree, Mapping) or name not in tree:
    return tree
  return {key: branch for key, branch in tree.items() if key != name}


def map_weights(tree: Tree, rules: Sequence[tuple[str, Callable[[Any], Any]]]) -> Tree:
  """tree with each leaf changed by the first (pattern, function) rule that matches its whole path.

  A leaf that no rule matches stays as it is.

  Raises:
    ValueError: when a pattern matches no path at all.
  """
  leaves = flatten(tree)
  for pattern, _ in rules:
    if not any(re.fullmatch(pattern, path) for path in leaves):
      raise ValueError(unknown(pattern, leaves))
  return unflatten((path, _first(rules, path)(leaf)) for path, leaf in leaves.items())


def _first(rules, path):
  return next((rule for pattern, rule in rules if re.fullmatch(pattern, path)), lambda leaf: leaf)


def partition(tree: Tree) -> tuple[Tree, Tree]:
  """(trained, fixed): two trees of the same structure; what one holds is None in the other.

  An adapter node declares its trained fields in `TRAINED`; a plain array is trained; a weight without the
  declaration (a quantised base, say) is fixed.
  """
  split = {path: _partition(leaf) for path, leaf in items(tree)}
  return (
    unflatten((path, pair[0]) for path, pair in split.items()),
    unflatten((path, pair[1]) for path, pair in split.items()),
  )


def _partition(leaf):
  if not isinstance(leaf, Leaf):
    return leaf, None
  fields: Any = leaf
  names = {f.name for f in dataclasses.fields(fields) if f.metadata.get("pytree_node", True)}
  trained = set(leaf.TRAINED)
  without = lambda drop: dataclasses.replace(fields, **dict.fromkeys(drop))
  return (without(names - trained) if trained else None), without(trained)


def combine(trained: Tree, fixed: Tree) -> Tree:
  """The tree that `partition` split."""
  fixed_leaves = flatten(fixed)
  return unflatten((path, _combine(leaf, fixed_leaves.get(path))) for path, leaf in items(trained))


def _combine(trained, fixed):
  if trained is None or fixed is None:
    return fixed if trained is None else trained
  return dataclasses.replace(fixed, **{name: vars(trained)[name] for name in trained.TRAINED})


def expand(path: str, shape: Sequence[int]) -> list[str]:
  """The Hugging Face module names of a stacked path, by the leading axes of its shape.

  >>> expand("layers/mlp/up_proj/weight", (2, 64, 128))
  ['layers.0.mlp.up_proj', 'layers.1.mlp.up_proj']
  >>> expand("layers/mlp/experts/up_proj/weight", (1, 2, 64, 128))
  ['layers.0.mlp.experts.0.up_proj', 'layers.0.mlp.experts.1.up_proj']
  >>> expand("embed_tokens/weight", (96, 64))
  ['embed_tokens']
  """
  module = path.removesuffix("/weight")
  return [numbered(module, at) for at in places(path, shape)]


def places(path: str, shape: Sequence[int]) -> list[tuple[int, ...]]:
  """The indices of a leaf's modules: (layer,) or (layer, expert), and () for what is not stacked."""
  return list(itertools.product(*[range(size) for size in shape[: leads(path)]]))


def numbered(path: str, at: Sequence[int]) -> str:
  """The name of the module at an index of a stacked leaf.

  >>> numbered("layers/mlp/experts/up_proj/weight", (3, 1))
  'layers.3.mlp.experts.1.up_proj.weight'
  """
  name = path.replace("/", ".")
  for word, i in zip(("layers.", "experts."), at):
    name = name.replace(word, f"{word}{i}.", 1)
  return name


def size(tree: Tree) -> int:
  """Logical parameters: what the tree would count if every weight were dense."""
  return sum(int(np.prod(weight.shape(leaf), dtype=np.int64)) for _, leaf in items(tree))


def nbytes(tree: Tree) -> int:
  """Bytes that the tree's arrays take as stored."""
  return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


@jax.jit
def checksum(x: jax.Array) -> jax.Array:
  """A sum that changes when any one element does, whatever the sharding: integer addition is associative."""
  x = memory.fetch(x)
  if x.dtype.itemsize < 8 and not jnp.issubdtype(x.dtype, jnp.floating):
    words = x.astype(jnp.uint32)
  else:
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}"))
  index = jnp.zeros((), jnp.uint32)
  for axis, size in enumerate(words.shape):
    index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
  # an odd factor loses nothing modulo 2^32, and one for each position sees elements that change places
  return jnp.sum((words.astype(jnp.uint32) + 1) * (index * jnp.uint32(0x9E3779B2) | 1))


def digest(tree: Tree) -> str:
  """A name for the values of all leaves, each in its place: 64 hex digits."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  sums = {jax.tree_util.keystr(path): int(checksum(leaf)) for path, leaf in leaves}
  return hashlib.sha256(json.dumps(sums).encode()).hexdigest()
