"""A frozen base and its adapter are two trees: make the second, bind it to the first, merge it in."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from posttrain_jax.adapters import adalora, allocation, ia3, inits, prefix, prompt, replaced, vera
from posttrain_jax.adapters.combination import AnyConfig, parts_of
from posttrain_jax.adapters.config import AdapterConfig
from posttrain_jax.adapters.hooks import Hooks
from posttrain_jax.adapters.node import Change, Common, Node, PerRow, Standing
from posttrain_jax.core import memory, tree, weight
from posttrain_jax.core.weight import Adapted
from posttrain_jax.models import before, decoder
from posttrain_jax.models.config import ModelConfig

Array = jax.Array
HEAD, EMBEDDING = "lm_head/weight", "embed_tokens/weight"

# method -> init(key, base, modules, config) -> (base, node), for each adapted matrix
METHODS: dict[str, Callable[..., tuple[Any, Any]]] = {
  **dict.fromkeys(("lora", "dora", "pissa", "olora", "loftq", "longlora"), inits.init),
  "vera": vera.init,
  "adalora": adalora.init,
  "ia3": ia3.init,
}
# method -> shared(weights, nodes, config) -> {path: value}: what the nodes of a tree read in common.  It stands in the
# tree once, under SHARED_PATH; a node takes it by its verb `completed(adapter)`, and params have no such path.
SHARED_PATH = "shared/"
SHARED: dict[str, Callable[..., dict[str, Any]]] = {"vera": vera.shared}
# method -> init(key, params, config) -> {path: node}: nodes without `apply`, which stand alone (soft prompts, prefixes)
STANDING: dict[str, Callable[..., dict[str, Any]]] = {"prompt": prompt.init, "prefix": prefix.init}
STANDING_AT = {"prompt": before.PROMPT, "prefix": before.PREFIX}
# method -> (config, steps) -> Hooks
HOOKS: dict[str, Callable[[AdapterConfig, int], Hooks]] = {"adalora": allocation.hooks}


def init(
  key: Array,
  params: Any,
  config: AnyConfig | Sequence[AdapterConfig],
  *,
  store: Callable[[str], Callable[[Array], Any] | None] | None = None,
  started: Mapping[str, Any] | None = None,
  text_tokens: Sequence[int] | None = None,
  model: ModelConfig | None = None,
) -> tuple[Any, Any]:
  """(params, adapter): a fresh adapter that leaves the outputs as they are; soft prompts and prefixes alone do not.

  Args:
    key: each module draws from its own fold of it, by name: adding a module changes no other's start.
    params: the base; some methods return it changed (what they move into the adapter is taken out).
    config: which modules, which rank; several for methods that train together, each at paths of its own.
    store: path -> how a base that the method changes is kept, a function of one layer's matrix; None: as it came.
    started: nodes of methods that change the base, by path, where params are what they left of it.
    text_tokens: what a soft prompt with prompt_tuning_init="TEXT" starts from: the ids of prompt_tuning_init_text.
    model: for a soft prompt that starts from tokens, in a family that scales their embeddings (Gemma).

  Returns:
    The base and a tree with one node at each adapted path.

  Raises:
    ValueError: a target, pattern or layer that matches nothing, or two methods at one path.
  """
  parts = parts_of(config)
  _check_apart(params, parts)
  if text_tokens is not None and all(part.method != "prompt" for part in parts):
    methods = "+".join(part.method for part in parts)
    raise ValueError(f"text_tokens are for method='prompt', found {methods!r}")
  adapter: dict[str, Any] = {}
  for part in parts:
    if part.method == "prompt":
      nodes = prompt.init(key, params, part, text_tokens=text_tokens, model=model)
    elif part.method in STANDING:
      nodes = STANDING[part.method](key, params, part)
    else:
      began = started if part.changes_base else None
      params, nodes = _at_matrices(key, params, part, store, began)
    if part.modules_to_save:
      nodes = {**nodes, **replaced.init(params, functools.partial(base, params), part, nodes)}
    adapter |= nodes
  return params, tree.unflatten(adapter)


def _at_matrices(key, params, config, store, started):
  """(params, {path: node}) of a method that adapts matrices."""
  bases, nodes, names_at = {}, {}, targeted(params, config)
  config = config.for_layers(max(map(len, names_at.values())))
  for path, names in names_at.items():
    bases[path] = base(params, path)
    if started is not None:
      nodes[path] = started[path]
      continue
    keep = {"store": store(path)} if store and config.changes_base else {}
    given = memory.fetch(bases[path])
    changed, nodes[path] = METHODS[config.method](key, given, names, config, **keep)
    if changed is not given and path in tree.flatten(params):
      params = tree.put(params, path, changed)
  if config.method in SHARED:
    nodes |= SHARED[config.method](bases, nodes, config)
  return params, nodes


def paths(params: Any, config: AdapterConfig) -> list[str]:
  """Where an adapter of this config has its nodes; params may be shapes.

  Whether every pattern matches something is not asked: a config `for_layers` has some of layers that it leaves alone.
  """
  whole = replaced.paths(params, config)
  if config.method in STANDING_AT:
    return [STANDING_AT[config.method], *whole]
  shared = [vera.PATH] if config.method in SHARED else []
  return [*_targeted(modules(params), config), *shared, *whole]


def _check_apart(params: Any, parts: Sequence[AdapterConfig]) -> None:
  """Raises ValueError where two of the methods would have a node at one path."""
  owners: dict[str, str] = {}
  for part in parts if len(parts) > 1 else ():
    for path in paths(params, part):
      if path in owners:
        raise ValueError(
          f"{owners[path]} and {part.method} both adapt {path}, and of what trains together a path has one: leave it "
          "out of one of them (exclude_modules, modules_to_save), or train the one over the other, frozen"
        )
      owners[path] = part.method


def bind(params: Any, adapter: Any, *, key: Array | None = None, rows: Any = None) -> Any:
  """params with `Adapted(base, node)` at every path of adapter; free inside `jit`, and binds nest.

  Args:
    key: for adapter dropout, in training only; each path and layer folds its own.
    rows: [batch], for an adapter that `stack` made: which of them each row has, -1 for none.
  """
  standing = [path for path in (before.PROMPT, before.PREFIX) if path in tree.flatten(params)]
  for path, node in tree.items(adapter):
    if isinstance(node, Common):
      continue
    if isinstance(node, Standing) and path in standing:
      raise ValueError(f"params have a node at {path} already, and it does not nest")
    if isinstance(node, PerRow) != (rows is not None):
      raise ValueError("rows go with what adapters.stack made, and what it made with rows")
    if isinstance(node, PerRow):
      node = node.of_rows(rows)
    params = (
      _changed(params, adapter, path, node, key)
      if isinstance(node, Change)
      else tree.put(params, path, node)
    )
  return params


def _changed(params, adapter, path, node, key):
  """params with the weight at path adapted, and what goes with it."""
  node = node.completed(adapter)
  for other, leaf in node.beside(path, params).items():
    params = tree.put(params, other, leaf)
  frozen = base(params, path)
  return tree.put(params, path, Adapted(frozen, node, _keys(key, path, node, frozen)))


def original(params: Any, adapter: Any) -> Any:
  """The policy before any training: params with what the adapter's start took out of them (PiSSA, OLoRA, LoftQ) bound.

  The fixed part of an adapter will do; params themselves where nothing was taken out.
  """
  taken = {path: node.at_start() for path, node in tree.items(adapter) if isinstance(node, Change)}
  return bind(
    params, tree.unflatten((path, node) for path, node in taken.items() if node is not None)
  )


def hooks(config: AnyConfig | None, steps: int) -> Hooks | None:
  """What the config's methods add to a training step of `steps` updates; None for most, and for no adapter."""
  parts = () if config is None else parts_of(config)
  # one method has hooks, and a method is in a config once
  return next((HOOKS[part.method](part, steps) for part in parts if part.method in HOOKS), None)


def merge(params: Any, adapter: Any | None = None) -> Any:
  """Plain weights that compute what the bound tree computes, on the device; quantised bases become dense.

  A head tied to an adapted embedding does not see the update: the merged tree has a head of its own.  (PEFT merges in
  place there, which changes the head with the embedding and with it the outputs.)
  """
  bound = bind(memory.fetch(params), memory.fetch(adapter or {}))
  if "lm_head" not in bound and isinstance(tree.get(bound, EMBEDDING), Adapted):
    bound = tree.put(bound, HEAD, decoder.head(bound))
  dense = jax.jit(weight.dense)
  plain = lambda leaf: dense(leaf) if isinstance(leaf, weight.Weight) else leaf
  return tree.unflatten((path, plain(leaf)) for path, leaf in tree.items(bound))


def count(adapter: Any) -> int:
  """Trained parameters in effect (a masked rank does not count)."""
  return sum(
    leaf.size() if isinstance(leaf, Node) else leaf.size for _, leaf in tree.items(adapter)
  )


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


def targeted(params: Any, config: AdapterConfig) -> dict[str, list[str]]:
  """path -> expanded module names, of every matrix with a module that the config targets; params may be shapes.

  Raises:
    ValueError: a target, pattern or layer that matches nothing.
  """
  names_at = modules(params)
  _check(config, [name for names in names_at.values() for name in names])
  return _targeted(names_at, config)


def _targeted(names_at: dict[str, list[str]], config: AdapterConfig) -> dict[str, list[str]]:
  return {
    path: names for path, names in names_at.items() if any(config.targets(name) for name in names)
  }


def modules(params: Any) -> dict[str, list[str]]:
  """path -> expanded module names, for every matrix; the tied head among them."""
  standing = (before.PROMPT, before.PREFIX)
  shapes = {p: weight.shape(leaf) for p, leaf in tree.items(params) if p not in standing}
  paths = [path for path, shape in shapes.items() if len(shape) - tree.leads(path) == 2]
  return {path: tree.expand(path, shapes.get(path, ())) for path in dict.fromkeys([*paths, HEAD])}


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
  if config.method == "ia3":
    ia3.check(adapted, config)
  of_experts = next((name for name in adapted if ".mlp.experts." in name), None)
  if of_experts and METHODS[config.method] is not inits.init:
    raise ValueError(
      f"method={config.method!r} does not adapt experts, such as {of_experts!r}; LoRA and its kinds do: write "
      'target_modules=("q_proj", "k_proj", "v_proj", "o_proj") for attention alone, or another method'
    )
  layers = {int(name.split(".")[1]) for name in names if name.startswith("layers.")}
  if set(config.layers_to_transform or ()) - layers:
    raise ValueError(
      f"layers_to_transform={config.layers_to_transform}: the model has layers 0 to {max(layers)}"
    )
  for option in ("rank_pattern", "alpha_pattern"):
    for pattern in vars(config)[option]:
      alone = AdapterConfig(rank_pattern={pattern: config.r + 1}, r=config.r)
      if not any(alone.rank(name) != config.r for name in adapted):
        raise ValueError(f"{option}: {tree.unknown(pattern, adapted, 'adapted module')}")


def _keys(key, path, node, base):
  if key is None or not node.dropout:
    return None
  node_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
  lead = weight.shape(base)[:-2]
  return jax.random.split(node_key, lead) if lead else node_key
