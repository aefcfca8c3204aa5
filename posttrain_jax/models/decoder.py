"""The decoder: embeddings, one scan over stacked layers, a norm; then the head.

Families (Llama, Mistral, Qwen 2/3, Gemma 2/3; with experts Mixtral and Qwen 3 MoE) differ by `ModelConfig` alone.
Parameters are nested dicts named as in Hugging Face files, matrices stored `[in, out]`, every per-layer leaf with a
leading `layers` axis, and every expert's with an `experts` axis behind it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from posttrain_jax.core import memory, sharding, tree, weight, words
from posttrain_jax.core.sharding import constrain
from posttrain_jax.core.weight import (
  BITS,
  PRODUCT,
  Adapted,
  Bfloat16,
  Transposed,
  Weight,
  dense,
  embed,
  is_shared,
  linear,
  linear32,
  multiplied,
  unadapted,
)
from posttrain_jax.models import attention, backends, before, experts, rotary
from posttrain_jax.models.attention import Places
from posttrain_jax.models.cache import Cache, empty_cache, written
from posttrain_jax.models.config import SLIDING, ModelConfig
from posttrain_jax.models.partition import RULES

Array = jax.Array
Params = Any


# ---------------------------------------------------------------------------------------------------------------------
# Declaration: shape, axes and initialiser of every leaf, once
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Spec:
  """One parameter: its shape, the name of each axis, and how a fresh one is drawn.

  Axes: vocab, embed (the residual stream), heads (whole heads of queries or keys), values (of the heads), mlp, norm
  (the scales of a norm), experts, layers.
  """

  shape: tuple[int, ...]
  axes: str
  init: str  # normal | zeros | ones


def specs(config: ModelConfig) -> Params:
  """The tree of `Spec`s: what a checkpoint must hold, no more and no less."""
  c, layer = config, {}
  heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
  norm = lambda size: Spec((size,), "norm", "zeros" if c.norm_plus_one else "ones")

  def dense(path: str, rows: int, columns: int, axes: str, bias: bool):
    layer[f"{path}/weight"] = Spec((rows, columns), axes, "normal")
    if bias:
      layer[f"{path}/bias"] = Spec((columns,), axes.split()[1], "zeros")

  layer["input_layernorm/weight"] = norm(c.hidden_size)
  dense("self_attn/q_proj", c.hidden_size, heads, "embed heads", c.qkv_bias)
  dense("self_attn/k_proj", c.hidden_size, kv, "embed heads", c.qkv_bias)
  dense("self_attn/v_proj", c.hidden_size, kv, "embed values", c.qkv_bias)
  dense("self_attn/o_proj", heads, c.hidden_size, "values embed", c.out_bias)
  if c.qk_norm:
    layer["self_attn/q_norm/weight"] = norm(c.head_dim)
    layer["self_attn/k_norm/weight"] = norm(c.head_dim)
  layer["post_attention_layernorm/weight"] = norm(c.hidden_size)
  if c.sandwich_norms:
    layer["pre_feedforward_layernorm/weight"] = norm(c.hidden_size)
    layer["post_feedforward_layernorm/weight"] = norm(c.hidden_size)
  mlp = "mlp"
  if c.experts:
    dense("mlp/gate", c.hidden_size, c.experts, "embed experts", False)
    mlp = "mlp/experts"
  dense(f"{mlp}/gate_proj", c.hidden_size, c.intermediate_size, "embed mlp", c.mlp_bias)
  dense(f"{mlp}/up_proj", c.hidden_size, c.intermediate_size, "embed mlp", c.mlp_bias)
  dense(f"{mlp}/down_proj", c.intermediate_size, c.hidden_size, "mlp embed", c.mlp_bias)

  leaves = {"embed_tokens/weight": Spec((c.vocab_size, c.hidden_size), "vocab embed", "normal")}
  for path, spec in layer.items():
    lead, axes = (c.num_layers,), f"layers {spec.axes}"
    if f"layers/{path}".startswith(tree.EXPERTS):
      lead, axes = (c.num_layers, c.experts), f"layers experts {spec.axes}"
    leaves[f"layers/{path}"] = Spec((*lead, *spec.shape), axes, spec.init)
  leaves["norm/weight"] = norm(c.hidden_size)
  if c.scores:
    leaves["score/weight"] = Spec((c.hidden_size, c.scores), "embed scores", "normal")
  if not c.tied and (c.writes or not c.scores):
    leaves["lm_head/weight"] = Spec((c.hidden_size, c.vocab_size), "embed vocab", "normal")
  return tree.unflatten(leaves)


def abstract(config: ModelConfig, dtype: Any = jnp.float32) -> Params:
  """The parameter tree as `jax.ShapeDtypeStruct`s, for compiling without weights."""
  return tree.unflatten(
    (path, jax.ShapeDtypeStruct(spec.shape, dtype)) for path, spec in tree.items(specs(config))
  )


def check(params: Params, config: ModelConfig) -> None:
  """Raises ValueError where params, adapters bound or not, are not those of such a model."""
  leaves = tree.flatten(params) if isinstance(params, Mapping) else {}
  if isinstance(layers := leaves.pop("layers", None), tuple):  # apart
    leaves |= {f"layers/{path}": leaf for path, leaf in tree.items(layers[0])}
  for path, spec in tree.items(specs(config)):
    if path not in leaves:
      names = words.shown(sorted(leaves), 200) if leaves else f"a {type(params).__name__}"
      raise ValueError(
        f"these are no parameters of this model: it reads {path}, here are {names}; load them with its config"
      )
    wanted = (
      spec.shape[1:] if isinstance(layers, tuple) and path.startswith("layers/") else spec.shape
    )
    if weight.shape(leaves[path]) != wanted:
      raise ValueError(
        f"{path} has the shape {weight.shape(leaves[path])}, this model's has {wanted}: the parameters are another's"
      )


def init(key: Array, config: ModelConfig, dtype: Any = jnp.float32, std: float = 0.02) -> Params:
  """Fresh parameters: normal(0, std) matrices, neutral norms, zero biases.  For tests and benchmarks."""
  leaves = tree.flatten(specs(config))
  draw: dict[str, Callable[..., Array]] = {
    "normal": lambda key, shape: (std * jax.random.normal(key, shape)).astype(dtype),
    "ones": lambda key, shape: jnp.ones(shape, dtype),
    "zeros": lambda key, shape: jnp.zeros(shape, dtype),
  }
  keys = jax.random.split(key, len(leaves))
  return tree.unflatten(
    (path, draw[spec.init](key, spec.shape)) for key, (path, spec) in zip(keys, leaves.items())
  )


# ---------------------------------------------------------------------------------------------------------------------
# Computation
# ---------------------------------------------------------------------------------------------------------------------


def forward(
  params: Params,
  tokens: Array | None,
  config: ModelConfig,
  *,
  positions: Array | None = None,
  segment_ids: Array | None = None,
  **options: Any,
) -> Array:
  """Logits [batch, time, vocab] in float32; arguments as `hidden`'s."""
  x = hidden(params, tokens, config, positions=positions, segment_ids=segment_ids, **options)
  return logits(params, x, config)


def hidden(
  params: Params,
  tokens: Array | None,
  config: ModelConfig,
  *,
  positions: Array | None = None,
  segment_ids: Array | None = None,
  prefix_ids: Array | None = None,
  embeddings: Array | None = None,
  dtype: Any = None,
  remat: str = "none",
  attention_group: int = 0,
  attention_by: str = "xla",
) -> Array:
  """What the head reads: [batch, time, embed], for the given tokens alone.

  What is bound to stand before them, a soft prompt or a prefix of keys and values, is seen by every document of a row
  and computed once a row; positions go on behind it.

  Args:
    params: the tree of `specs`, its matrices plain or any `Weight`.
    tokens: [batch, time] ids; None where `embeddings` [batch, time, embed] (scaled already) stand in for them.
    positions: [batch, time], counted within each document, whose tokens stand in order; default 0, 1, 2, ...
    segment_ids: [batch, time], equal within a packed document, 0 for padding; default one document a row.
    prefix_ids: [batch, time], one more segment that a token sees, 0 for none (`attention.visible`).
    dtype: of the computation; default the embedding's.
    remat: what the backward pass recomputes, a key of `REMAT`.
    attention_group: tokens of a group of shifted sparse attention (LongLoRA, in training); 0 for full attention.
    attention_by: a key of `backends.ATTEND`; where tokens are seen by several documents it is "xla".
  """
  return hidden_and_load(
    params,
    tokens,
    config,
    positions=positions,
    segment_ids=segment_ids,
    prefix_ids=prefix_ids,
    embeddings=embeddings,
    dtype=dtype,
    remat=remat,
    attention_group=attention_group,
    attention_by=attention_by,
  )[0]


def hidden_and_load(
  params: Params,
  tokens: Array | None,
  config: ModelConfig,
  *,
  positions: Array | None = None,
  segment_ids: Array | None = None,
  prefix_ids: Array | None = None,
  embeddings: Array | None = None,
  dtype: Any = None,
  remat: str = "none",
  attention_group: int = 0,
  attention_by: str = "xla",
) -> tuple[Array, experts.Load | None]:
  """(`hidden`, what the routers of each layer did with the tokens); None for a model without experts."""
  x = _inputs(params, tokens, embeddings, config, dtype, _looked_up)
  batch, time = x.shape[:2]
  if positions is None:
    positions = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (batch, time))
  if segment_ids is None:
    segment_ids = jnp.ones((batch, time), jnp.int32)
  places = Places(positions, segment_ids, prefix_ids)
  x, keys, queries = before.put(params, x, places)
  is_shared = x.shape[1] > time or keys is not queries or prefix_ids is not None
  look = functools.partial(
    backends.ATTEND["xla" if is_shared else attention_by],
    windows=(config.window,) if SLIDING in config.kinds else (),
  )
  if attention_group:
    if is_shared:
      raise ValueError(
        f"attention_group={attention_group}: shifted groups have no room for a soft prompt, a prefix or prefix_ids"
      )
    if sharding.size("context") > 1:
      raise ValueError(
        f"attention_group={attention_group}: shifted groups read rows in their order, which a context axis cuts"
      )
    look = functools.partial(attention.attend_shifted, group=attention_group)
  # places of keys are on every device once, and not gathered in each layer
  keys = jax.tree.map(lambda x: constrain(x, "batch -"), keys)
  look = _seeing(look, queries, keys)
  shared = _by_kind(config, queries.positions, _reach(config, keys.positions.shape[1]))

  def layer(x, p, kind):
    return _layer(
      x, p, _pick(shared, kind), config, before.extend(p, batch), look, queries.segments != 0
    )

  x, load = _over_layers(REMAT[remat](layer), x, params["layers"], config)
  return _norm(x[:, x.shape[1] - time :], params["norm"]["weight"], config), load


def through(layers: Params, x: Array, config: ModelConfig) -> Array:
  """x: [batch, time, embed] behind a stack of plain layers, before the last norm.

  A model too large to be held goes through in parts: `config` has as many layers as the part.
  """
  batch, time = x.shape[:2]
  positions = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (batch, time))
  places = Places(positions, jnp.ones((batch, time), jnp.int32))
  look = _seeing(attention.attend, places, places)
  shared = _by_kind(config, positions, _reach(config, time))

  def layer(x, p, kind):
    return _layer(
      x, p, _pick(shared, kind), config, before.extend(p, batch), look, places.segments != 0
    )

  return _over_layers(layer, x, layers, config)[0]


def start(params: Params, config: ModelConfig, rows: int, slots: int, dtype: Any) -> Cache:
  """A cache of `slots` a row that holds what is bound to stand before the tokens, `before.slots` of them at most.

  dtype: of keys and values; of a soft prompt's way through the layers too, in float32 where they are kept as bits.
  """
  cache = empty_cache(config, rows, slots, dtype)
  prefix, prompt = before.bound(params)
  if prefix is not None:
    by_head = lambda x: x.reshape(*x.shape[:3], -1, config.head_dim)  # [layers, rows, slots, ...]
    put = jax.vmap(written, in_axes=(0, 0, 0, 0, None, None))
    k, v = put(
      cache.k[:, None], cache.v[:, None], *map(by_head, prefix.read(rows)), 0, cache.lengths
    )
    cache = Cache(k[:, 0], v[:, 0], _used(prefix.segments(rows)))
  if prompt is not None:
    wide = jnp.float32 if dtype == BITS else dtype
    x = constrain(prompt.read(rows).astype(wide), "batch time embed")
    _, cache = _read(params, x, _used(prompt.segments(rows)), config, cache)
  return cache


def step(
  params: Params,
  tokens: Array,
  config: ModelConfig,
  cache: Cache,
  *,
  counts: Array | None = None,
  dtype: Any = None,
) -> tuple[Array, Cache]:
  """(hidden [rows, time, embed], cache) after reading `tokens` [rows, time] behind what each row holds.

  counts: [rows], how many of a row's tokens are read; what is behind them is padding, and its hidden states mean
  nothing.  Default all of them.  The cache needs `time` free slots behind every row that reads any.
  What is bound to stand before the tokens is in the cache already: `start` made it.
  """
  if counts is None:
    counts = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
  return _read(params, _inputs(params, tokens, None, config, dtype), counts, config, cache)


def _read(params, x, counts, config, cache):
  """(hidden, cache) after reading the first counts of x: [rows, time, embed]."""
  positions = cache.lengths[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)
  lengths = cache.lengths + counts
  read = jnp.arange(x.shape[1]) < counts[:, None]
  end = jnp.max(jnp.where(counts > 0, lengths, 0))
  shared = _by_kind(config, positions, _reach(config, cache.slots))

  def layer(carry, p, kind, index):
    x, keys, values = carry

    def extend(k, v):
      nonlocal keys, values
      keys, values = written(keys, values, k, v, index, cache.lengths)
      return keys, values

    def look(q, k, v, window, **how):
      return attention.attend_cached(q, k, v, index, positions, end, window, **how)

    x, load = _layer(x, p, _pick(shared, kind), config, extend, look, read)
    return (x, keys, values), load

  carry = (x, cache.k, cache.v)
  (x, keys, values), _ = _over_layers(layer, carry, params["layers"], config, indexed=True)
  return _norm(x, params["norm"]["weight"], config), Cache(keys, values, lengths)


def _used(segments):
  """[rows]: how many of the slots in front are a row's own; they come first."""
  return jnp.sum(segments != 0, axis=1, dtype=jnp.int32)


def multiplied_in(params: Params, dtype: Any) -> Params:
  """params whose float32 matrices are rounded to bfloat16 for each product where dtype is that; None: as they are.

  An adapter's factors are not among them: products with so few columns are no faster.
  """
  if dtype != jnp.bfloat16:
    return params
  table = "embed_tokens/weight"
  is_matrix = lambda path: path == table or (tree.turned(path) and not path.startswith("score/"))

  def one(path: str, leaf: Any) -> Any:
    is_rounded = is_matrix(path) and not isinstance(leaf, Weight) and leaf.dtype == jnp.float32
    return Bfloat16(leaf) if is_rounded else leaf

  return tree.unflatten((path, one(path, leaf)) for path, leaf in tree.items(params))


def head(params: Params) -> Any:
  """The weight that turns hidden states into logits; a tied one is the transposed unadapted embedding."""
  if "lm_head" in params:
    return params["lm_head"]["weight"]
  return Transposed(unadapted(params["embed_tokens"]["weight"]))


def whole_head(params: Params) -> Any:
  """`head`, gathered along fsdp: for a loop over tokens, which a TPU's compiler has gather it at every turn."""
  spec = sharding.spec_for("lm_head/weight", RULES)
  return _whole(head(params), spec, in_parts=False)


def scored(
  key: Array, params: Params, config: ModelConfig, count: int = 1, *, writes: bool = False
) -> tuple[Params, ModelConfig]:
  """(params, config) of a reward model on a language model's base, with a new, random score head.

  writes: whether it keeps the language model's head beside that, to write as well as to judge.
  """
  std = json.loads(config.source).get("initializer_range", 0.02)
  kept = {name: part for name, part in params.items() if writes or name != "lm_head"}
  dtype = params["norm"]["weight"].dtype
  value = std * jax.random.normal(key, (config.hidden_size, count), jnp.float32)
  return {**kept, "score": {"weight": value.astype(dtype)}}, dataclasses.replace(
    config, scores=count, writes=writes
  )


def scores(params: Params, x: Array) -> Array:
  """[..., embed] -> [..., scores] in float32: a reward model's numbers for each token."""
  return linear32(x, params["score"]["weight"])


def logits(params: Params, x: Array, config: ModelConfig) -> Array:
  """[..., embed] -> [..., vocab] in float32, soft-capped where the family does."""
  out = linear32(x, head(params))
  return (
    out
    if config.final_softcap is None
    else config.final_softcap * jnp.tanh(out / config.final_softcap)
  )


def unstack(params: Params, config: ModelConfig) -> Params:
  """params with its layers apart, each a tree of its own.

  The decode loop on a CPU wants them so: a scan copies each layer's weights out of the stack at every step.
  """
  of_layer = lambda i: lambda leaf: leaf if is_shared(leaf) else leaf[i]
  slices = tuple(
    jax.tree.map(of_layer(i), params["layers"], is_leaf=is_shared) for i in range(config.num_layers)
  )
  return {**params, "layers": slices}


# What `names` keeps of a layer for the backward pass: products whose recomputation is dear, not norms and activations.
# On two CPU cores a LoRA step took 12.1 CPU-seconds with it and 13.4 with `dots`; accelerators are not measured.
KEPT = (
  *("query", "key", "value", "normaliser", "context", "middle", "gate", "up"),
  *("down", "direction", "column_norm"),
)


def _checkpoint(policy):
  return lambda layer: jax.checkpoint(layer, policy=policy, prevent_cse=False)


_policies = jax.checkpoint_policies
REMAT: dict[str, Callable] = {
  "none": lambda layer: layer,
  "names": _checkpoint(_policies.save_only_these_names(*KEPT)),
  "dots": _checkpoint(
    _policies.save_from_both_policies(
      _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(PRODUCT)
    )
  ),
  "full": _checkpoint(None),
  # as full, with the layers' inputs in the host's memory until the backward pass comes to them
  "host": _checkpoint(
    _policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[],
      names_which_can_be_offloaded=["entering"],
      offload_src="device",
      offload_dst=memory.KIND,
    )
  ),
}


def _over_layers(layer, carry, layers, config, indexed=False):
  """(carry after every layer, what each says): a scan over the stack, or a loop over layers apart (`unstack`)."""
  kinds = np.asarray([config.sliding(i) for i in range(config.num_layers)], np.int32)
  if isinstance(layers, tuple):
    said = []
    for index, (p, kind) in enumerate(zip(layers, kinds)):
      carry, one = layer(carry, p, kind, index) if indexed else layer(carry, p, kind)
      said.append(one)
    return carry, jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *said)

  leaves, structure = jax.tree.flatten(layers, is_leaf=is_shared)
  stacked = [None if is_shared(leaf) else leaf for leaf in leaves]

  def body(carry, xs):
    slices, kind, index = xs
    p = structure.unflatten(leaf if mine is None else mine for mine, leaf in zip(slices, leaves))
    return layer(carry, p, kind, index) if indexed else layer(carry, p, kind)

  return jax.lax.scan(body, carry, (stacked, kinds, np.arange(config.num_layers)))


def _inputs(params, tokens, embeddings, config, dtype, look_up=embed):
  if embeddings is None:
    embeddings = look_up(tokens, params["embed_tokens"]["weight"])
    embeddings = embeddings if dtype is None else embeddings.astype(dtype)
    if config.scale_embeddings:
      embeddings *= jnp.asarray(config.hidden_size**0.5, embeddings.dtype)
  return constrain(embeddings, "batch time embed")


def _looked_up(tokens, table):
  """Rows of the table, which is cut along fsdp: devices along it read each other's tokens, and exchange what they find.

  Left to itself the compiler had every device read the tokens of all, and sent what it found from slice to slice too.
  """
  found = embed(sharding.pinned(tokens, "readers -"), table)
  # along one axis after the other: over both at once the compiler makes them whole first
  return sharding.pinned(sharding.pinned(found, "readers - columns"), "readers time columns")


def _reach(config, length):
  """window -> how far back a query of that kind of layer sees; None where all layers see everything."""
  return lambda window: None if SLIDING not in config.kinds else jnp.int32(window or length)


def _seeing(attend, queries, keys):
  return lambda q, k, v, window, **how: attend(q, k, v, queries, keys, window, **how)


def _by_kind(config, positions, reach):
  """(reach, cos, sin) for full layers and, where the model has such, for sliding ones: a list of one or two."""
  kinds = [(None, config.rope)]
  if SLIDING in config.kinds:
    kinds.append((config.window, config.local_rope or config.rope))
  return [
    (reach(window), *rotary.angles(positions, rope, config.head_dim)) for window, rope in kinds
  ]


def _pick(by_kind, kind):
  if len(by_kind) == 1:
    return by_kind[0]
  return jax.tree.map(lambda full, sliding: jnp.where(kind, sliding, full), *by_kind)


def _layer(x, p, shared, config, extend, look, valid):
  """(x behind one block, the load of its experts or None).

  `extend(k, v)` returns all keys and values there are to look at, `look` is the attention; valid: [batch, time], false
  for padding.
  """
  window, cos, sin = shared
  x = checkpoint_name(x, "entering")  # named within the layer: what a scan carries is not moved
  p = _gathered(memory.fetch(p))
  h = _norm(x, p["input_layernorm"]["weight"], config)
  h = _attention(h, p["self_attn"], window, cos, sin, config, extend, look)
  after = p["post_attention_layernorm"]["weight"]
  if config.sandwich_norms:
    x = x + _norm(h, after, config)
    before = p["pre_feedforward_layernorm"]["weight"]
  else:
    x, before = x + h, after
  x = checkpoint_name(constrain(x, "batch time embed"), "middle")
  h, load = _norm(x, before, config), None
  if config.experts:
    h, load = experts.mlp(h, p["mlp"], config, valid)
  else:
    h = _mlp(h, p["mlp"], config)
  if config.sandwich_norms:
    h = _norm(h, p["post_feedforward_layernorm"]["weight"], config)
  return constrain(x + h, "batch time embed"), load


def _gathered(p):
  """One layer's parameters whole along fsdp; inside the layer, so that the backward pass gathers them again."""
  if not sharding.active():
    return p
  specs = {path: sharding.spec_for(f"layers/{path}", RULES) for path, _ in tree.items(p)}
  return tree.unflatten((path, _whole(leaf, P(*specs[path][1:]))) for path, leaf in tree.items(p))


def _whole(leaf, spec, *, in_parts=True):
  """The factors of an adapter are small: a layer's 14 are summed at once, where 16 devices would take 238 turns."""
  if isinstance(leaf, Adapted):
    base = _whole(leaf.base, spec, in_parts=in_parts)
    return leaf.replace(base=base, node=_whole(leaf.node, spec, in_parts=False))
  return sharding.gather(leaf, spec, in_parts=in_parts)


def _attention(h, p, window, cos, sin, config, extend, look):
  heads = lambda name: _project(h, p[name]).reshape(*h.shape[:2], -1, config.head_dim)
  q, k, v = heads("q_proj"), heads("k_proj"), heads("v_proj")
  if config.qk_norm:
    q = _norm(q, p["q_norm"]["weight"], config)
    k = _norm(k, p["k_norm"]["weight"], config)
  # rounded to what the products with matrices are, which those of attention then are as well
  rounded = lambda x: x.astype(multiplied(x.dtype, p["q_proj"]["weight"].dtype))
  q = rounded(checkpoint_name(attention.rotate(q, cos, sin), "query"))
  k = rounded(checkpoint_name(attention.rotate(k, cos, sin), "key"))
  v = rounded(checkpoint_name(constrain(v, "batch time heads head_dim"), "value"))
  how = dict(scale=config.softmax_scale, softcap=config.attention_softcap, dtype=h.dtype)
  out = look(q, *extend(k, v), window, **how)
  return _project(out.reshape(*h.shape[:2], -1), p["o_proj"])


def _mlp(h, p, config):
  gate = constrain(checkpoint_name(_project(h, p["gate_proj"]), "gate"), "batch time mlp")
  up = constrain(checkpoint_name(_project(h, p["up_proj"]), "up"), "batch time mlp")
  return _project(experts.ACTIVATIONS[config.activation](gate) * up, p["down_proj"])


def _project(x, p):
  y = linear(x, p["weight"])
  return y + dense(p["bias"], y.dtype) if "bias" in p else y


def _norm(x, w, config):
  """x / rms(x) * w (Gemma: * (1 + w)), in float32."""
  wide = x.astype(jnp.float32)
  wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + config.norm_eps)
  w = dense(w, jnp.float32)  # a norm that is trained beside an adapter is a bound weight too
  return (wide * (1.0 + w if config.norm_plus_one else w)).astype(x.dtype)
