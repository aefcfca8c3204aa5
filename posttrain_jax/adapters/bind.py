"""A frozen base and its adapter are two trees: make the second, bind it to the first, merge it in."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import jax

from posttrain_jax.adapters import lora
from posttrain_jax.adapters.config import AdapterConfig
from posttrain_jax.core import tree, weight
from posttrain_jax.core.weight import Adapted
from posttrain_jax.models import decoder

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Hooks:
  """What a method adds to the training step."""

  penalty: Callable[[Any], Array]  # (adapter) -> what is added to the loss, once an optimizer batch
  after_update: Callable[[Any, Any, Array], Any]  # (adapter, gradient, step) -> adapter


HEAD, EMBEDDING = "lm_head/weight", "embed_tokens/weight"

# method -> init(key, base, modules, config) -> (base, node), for each adapted matrix
METHODS: dict[str, Callable[..., tuple[Any, Any]]] = {"lora": lora.init}
# method -> init(key, params, config) -> {path: node}: nodes without `apply`, which stand alone (soft prompts, prefixes)
STANDING: dict[str, Callable[..., dict[str, Any]]] = {}
# method -> (config, steps) -> Hooks
HOOKS: dict[str, Callable[[AdapterConfig, int], Hooks]] = {}


def init(key: Array, params: Any, config: AdapterConfig) -> tuple[Any, Any]:
  """(params, adapter): a fresh adapter that leaves the outputs as they are.

  Args:
    key: each module draws from its own fold of it, by name: adding a module changes no other's start.
    params: the base; some methods return it changed (what they move into the adapter is taken out).
    config: which modules, which rank.

  Returns:
    The base and a tree with one node at each adapted path.

  Raises:
    ValueError: a method that does not exist, or a target, pattern or layer that matches nothing.
  """
  if config.method in STANDING:
    return params, tree.unflatten(STANDING[config.method](key, params, config))
  if config.method not in METHODS:
    known = ", ".join([*METHODS, *STANDING])
    raise ValueError(f"unknown adapter method {config.method!r}; known: {known}")
  names_at = modules(params)
  _check(config, [name for names in names_at.values() for name in names])
  adapter = {}
  for path, names in names_at.items():
    if any(config.targets(name) for name in names):
      changed, node = METHODS[config.method](key, base(params, path), names, config)
      if path in tree.flatten(params):
        params = tree.put(params, path, changed)
      adapter[path] = node
  return params, tree.unflatten(adapter)


def bind(params: Any, adapter: Any, *, key: Array | None = None) -> Any:
  """params with `Adapted(base, node)` at every path of adapter; free inside `jit`, and binds nest.

  Args:
    key: for adapter dropout, in training only; each path and layer folds its own.
  """
  for path, node in tree.items(adapter):
    if hasattr(node, "apply"):
      frozen = base(params, path)
      node = Adapted(frozen, node, _keys(key, path, node, frozen))
    params = tree.put(params, path, node)
  return params


def hooks(config: AdapterConfig | None, steps: int) -> Hooks | None:
  """What the config's method adds to a training step of `steps` updates; None for most, and for no adapter."""
  made = None if config is None else HOOKS.get(config.method)
  return None if made is None or config is None else made(config, steps)


def merge(params: Any, adapter: Any | None = None) -> Any:
  """Plain weights that compute what the bound tree computes; quantised bases become dense.

  A head tied to an adapted embedding does not see the update: the merged tree has a head of its own.  (PEFT merges in
  place there, which changes the head with the embedding and with it the outputs.)
  """
  bound = bind(params, adapter or {})
  if "lm_head" not in bound and isinstance(tree.get(bound, EMBEDDING), Adapted):
    bound = tree.put(bound, HEAD, decoder.head(bound))
  dense = jax.jit(weight.dense)
  plain = lambda leaf: dense(leaf) if hasattr(leaf, "dense") else leaf
  return tree.unflatten((path, plain(leaf)) for path, leaf in tree.items(bound))


def count(adapter: Any) -> int:
  """Trained parameters in effect (a masked rank does not count)."""
  return sum(leaf.size() if callable(leaf.size) else leaf.size for _, leaf in tree.items(adapter))


def summary(params: Any, adapter: Any) -> str:
  """PEFT's line: `trainable params: 4,884,480 || all params: 139,399,488 || trainable%: 3.5039`."""
  trained = count(adapter)
  total = tree.size(params) + trained
  return f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"


def base(params: Any, path: str) -> Any:
  """The weight that an adapter at path would change; a tied head is a view of the embedding."""
  if path == HEAD and "lm_head" not in params:
    return decoder.head(params)
  return tree.get(params, path)


def modules(params: Any) -> dict[str, list[str]]:
  """path -> expanded module names, for every matrix; the tied head among them."""
  leaves = tree.flatten(params)
  layers = next(
    weight.shape(leaf)[0] for path, leaf in leaves.items() if path.startswith("layers/")
  )
  dimensions = lambda path, leaf: len(weight.shape(leaf)) - path.startswith("layers/")
  paths = [path for path, leaf in leaves.items() if dimensions(path, leaf) == 2]
  return {path: tree.expand(path, layers) for path in dict.fromkeys([*paths, HEAD])}


def _check(config: AdapterConfig, names: list[str]) -> None:
  """Every name that the config gives matches some module."""
  everywhere = config.replace(layers_to_transform=None, exclude_modules=())
  for option, wanted in (
    ("target_modules", config.target_modules),
    ("exclude_modules", config.exclude_modules or ()),
  ):
    for target in wanted if isinstance(wanted, tuple) else (wanted,):
      alone = everywhere.replace(target_modules=(target,) if isinstance(wanted, tuple) else target)
      if not any(alone.targets(name) for name in names):
        raise ValueError(f"{option}: {tree.unknown(target, names, 'module')}")
  adapted = [name for name in names if config.targets(name)]
  if not adapted:
    raise ValueError(
      f"target_modules={config.target_modules!r}, exclude_modules={config.exclude_modules!r} and "
      f"layers_to_transform={config.layers_to_transform} together leave nothing to adapt"
    )
  layers = {int(name.split(".")[1]) for name in names if name.startswith("layers.")}
  if set(config.layers_to_transform or ()) - layers:
    raise ValueError(
      f"layers_to_transform={config.layers_to_transform}: the model has layers 0 to {max(layers)}"
    )
  for option in ("rank_pattern", "alpha_pattern"):
    for pattern in getattr(config, option):
      alone = AdapterConfig(rank_pattern={pattern: config.r + 1}, r=config.r)
      if not any(alone.rank(name) != config.r for name in adapted):
        raise ValueError(f"{option}: {tree.unknown(pattern, adapted, 'adapted module')}")


def _keys(key, path, node, base):
  if key is None or not getattr(node, "dropout", 0.0):
    return None
  own = jax.random.fold_in(key, zlib.crc32(path.encode()))
  lead = weight.shape(base)[:-2]
  return jax.random.split(own, lead) if lead else own
