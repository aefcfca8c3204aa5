"""Operators over trees: the same function of every tensor, as Hugging Face's files divide and store them.

A stacked leaf is merged a layer at a time, and a matrix [in, out] as [out, in]: what is largest, what a row is and what
is drawn are then those of the files, and merging trees gives the numbers that merging files does.
"""

from __future__ import annotations

import functools
import inspect
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from posttrain_jax.core import tree, weight

Array = jax.Array
P = ParamSpec("P")

LAYERS = "layers/"


def tensor_key(key: Array, name: str) -> Array:
  """fold_in(key, crc32(name)): what one tensor draws with, name as in `layers.3.self_attn.q_proj.weight`.

  It depends on neither the order of tensors nor on who computes them.  The `model.` that stands before it in files is
  no part of the name.
  """
  return jax.random.fold_in(key, zlib.crc32(name.removeprefix("model.").encode()))


def lift(operator: Callable[P, Any]) -> Callable[P, Any]:
  """operator over trees of equal structure, tensor by tensor; a bare array is a tree of one leaf.

  The trees are the operator's positional arguments (a tree each, or a sequence of trees) and `base`; `key` becomes
  `tensor_key(key, name)`; the rest is handed on.  What comes out lies on the devices where base, or else the first
  tree, does.

  Raises:
    ValueError: paths, shapes or vocabularies differ, or a leaf is no floating array: names the path and the trees.
  """
  signature = inspect.signature(operator)
  positional = [p.name for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]

  @functools.wraps(operator)
  def over_trees(*args, **kwargs):
    options = dict(signature.bind(*args, **kwargs).arguments)
    key = options.pop("key", None)
    trees = {name: options.pop(name) for name in ("base", *positional) if name in options}
    trees = {name: _leaves(name, value) for name, value in trees.items() if value is not None}
    first = _agreeing(trees)

    def one(path, layer):
      tensors = {
        name: _over(t, lambda t: _tensor(t[path], path, layer)) for name, t in trees.items()
      }
      arguments = options | {name: t for name, t in tensors.items() if name not in positional}
      if key is not None:
        arguments["key"] = tensor_key(key, _name(path, layer))
      return _turned(path, operator(*(tensors[name] for name in positional), **arguments))

    merged = {path: _whole(path, leaf, one) for path, leaf in first.items()}
    return merged[""] if "" in merged else tree.unflatten(merged)

  return over_trees


def passthrough(slices: Sequence[tuple[Any, int, int]]) -> Any:
  """The layers start to stop - 1 of each (tree, start, stop), one slice on the other: a deeper or shallower model.

  Nothing is averaged.  The embedding is the first slice's; the last norm, the head and all else outside the layers the
  last slice's, as in mergekit.  Each slice has the first's dtypes.  The config's number of layers is the caller's
  to change.

  >>> ones, zeros = ({"layers": {"norm": {"weight": jnp.full((3, 1), x)}}} for x in (1.0, 0.0))
  >>> passthrough([(ones, 0, 2), (zeros, 1, 3)])["layers"]["norm"]["weight"].ravel().tolist()
  [1.0, 1.0, 0.0, 0.0]

  Raises:
    ValueError: no slices, layers that a tree has not got, or trees that differ in paths or in a layer's shapes.
  """
  slices = [(tree.flatten(t), start, stop) for t, start, stop in slices]
  if not slices:
    raise ValueError("no slices: write at least one (tree, start, stop)")
  _agreeing({"slices": [leaves for leaves, _, _ in slices]}, any_depth=True)
  for i, (leaves, start, stop) in enumerate(slices):
    depths = {len(leaf) for path, leaf in leaves.items() if path.startswith(LAYERS)}
    if not depths:
      raise ValueError(f"slices[{i}] has no leaf under {LAYERS!r}: there are no layers to take")
    if not 0 <= start < stop <= min(depths):
      raise ValueError(
        f"slices[{i}] asks for layers {start} to {stop} of {min(depths)}: write 0 <= start < stop <= {min(depths)}"
      )

  def stacked(path, leaf):
    if not path.startswith(LAYERS):
      return slices[0 if path.startswith("embed_tokens/") else -1][0][path].astype(leaf.dtype)
    parts = [leaves[path][start:stop] for leaves, start, stop in slices]
    return _placed(jnp.concatenate(parts).astype(leaf.dtype), leaf)

  return tree.unflatten((path, stacked(path, leaf)) for path, leaf in slices[0][0].items())


def _leaves(name, value):
  several = isinstance(value, list | tuple)
  if several != (name == "models"):
    want, got = ("a list of trees", "one") if name == "models" else ("one tree", "a list")
    raise ValueError(f"{name} is {want}, not {got}")
  return _over(value, tree.flatten)


def _over(value, function):
  """function of the one tree, or of each of a sequence of them."""
  return [function(t) for t in value] if isinstance(value, list | tuple) else function(value)


def _agreeing(trees, any_depth=False):
  """The first tree's leaves; a ValueError where another's are not alike."""
  labelled = {}
  for name, value in trees.items():
    if isinstance(value, Mapping):
      labelled[name] = value
    else:
      labelled |= {f"{name}[{i}]": leaves for i, leaves in enumerate(value)}
  if not labelled:
    raise ValueError("no models: write at least one")
  label, first = next(iter(labelled.items()))
  for other, leaves in labelled.items():
    _same_paths(label, first, other, leaves)
    for path, leaf in leaves.items():
      _array(other, path, leaf)
      depth = int(any_depth and path.startswith(LAYERS))
      if leaf.shape[depth:] != first[path].shape[depth:]:
        raise ValueError(_unlike(path, label, first[path].shape, other, leaf.shape))
  return first


def _same_paths(label, first, other, leaves):
  for have, lack, of in (
    (label, other, first.keys() - leaves),
    (other, label, leaves.keys() - first),
  ):
    if of:
      some = ", ".join(sorted(of)[:3]) + (f" and {len(of) - 3} more" if len(of) > 3 else "")
      tied = "; if one of them has a tied head, write embed_tokens/weight.T as its lm_head/weight"
      raise ValueError(
        f"{have} has {some}, {lack} has not: merge models of one architecture"
        + (tied if "lm_head/weight" in of else "")
      )


def _is_finite(leaf: jax.Array) -> bool:
  with (
    jax.ensure_compile_time_eval()
  ):  # a value that a traced function closes over is known all the same
    return bool(jnp.all(jnp.isfinite(leaf)))


def _array(label, path, leaf):
  if not isinstance(leaf, jax.Array | np.ndarray):
    how = "; write weight.dense(leaf) in its place" if isinstance(leaf, weight.Weight) else ""
    raise ValueError(f"{label} has a {type(leaf).__name__} at {path!r}: only arrays merge{how}")
  if not jnp.issubdtype(leaf.dtype, jnp.floating):
    raise ValueError(f"{label} has {leaf.dtype} at {path!r}: only floating arrays merge")
  # what compares sizes, as TIES does, would leave a NaN out and say nothing
  if not isinstance(leaf, Tracer) and not _is_finite(leaf):
    raise ValueError(
      f"{label} holds NaN or infinity at {path!r}: no merge is made of them; load that model again"
    )


def _unlike(path, label, shape, other, other_shape):
  said = f"{path!r} has shape {other_shape} in {other}, {shape} in {label}: "
  if len(shape) != len(other_shape):
    return said + "merge models of one architecture"
  differ = {axis for axis in range(len(shape)) if shape[axis] != other_shape[axis]}
  if path.startswith(LAYERS) and differ == {0}:
    return said + "the numbers of layers differ; take as many of each with merge.passthrough"
  if differ == {{"embed_tokens/weight": 0, "lm_head/weight": 1}.get(path)}:
    return said + "the vocabularies differ; give all models one tokenizer and its rows first"
  return said + "merge models of one architecture"


def _name(path, layer):
  name = path.replace("/", ".")
  return name if layer is None else name.replace("layers.", f"layers.{layer}.", 1)


def _tensor(leaf, path, layer):
  return _turned(path, leaf if layer is None else leaf[layer])


def _turned(path, array):
  return array.T if tree.turned(path) else array


def _whole(path, leaf, one):
  if not path.startswith(LAYERS):
    return _placed(one(path, None), leaf)
  return _placed(jnp.stack([one(path, layer) for layer in range(len(leaf))]), leaf)


def _placed(array, leaf):
  if not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer):
    return array
  return jax.device_put(array, leaf.sharding)
