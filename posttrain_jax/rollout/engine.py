"""Text generation: one jitted prefill, one jitted decode loop, the cache updated in place."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.core import files, struct, weight
from posttrain_jax.models import before, decoder
from posttrain_jax.models.config import ModelConfig, as_ids
from posttrain_jax.rollout import sampling as samplers
from posttrain_jax.rollout.sampling import GREEDY, Sampling

Array = jax.Array
Params = Any
SHARED = 16  # tokens
CHUNKS = (
  512,
  64,
)  # tokens of a dialogue that are read at once; of the last size is what is left over
SLOTS = 1024  # of a dialogue's cache at first


@dataclasses.dataclass(frozen=True)
class Generation:
  """What was generated, one entry a prompt, in the order of the prompts.

  tokens: the new ids, the stop token included where one was drawn.
  logps: their log-probabilities as `sampling.sample` defines them, float32.
  finished: True where the last token is a stop token, False where max_new_tokens cut the text.
  """

  tokens: list[list[int]]
  logps: list[np.ndarray]
  finished: list[bool]


@struct.dataclass
class State:
  """A batch under way: `count` tokens of each row are drawn, the last of them not yet read into the cache."""

  cache: decoder.Cache
  tokens: Array  # [batch, slots], so that the cache alone decides which program runs
  logps: Array  # [batch, slots]
  lengths: Array  # [batch], tokens up to the stop token
  stopped: Array  # [batch]
  count: Array
  keys: Array  # [batch]
  stop_tokens: Array


@struct.dataclass
class Ready:
  """Parameters as generation wants them, made by `prepare`: once, where they are used for several calls."""

  # reads the prompt: a scan compiles in a tenth of the time that separate layers take
  stacked: Params
  layers_apart: Params  # decodes


def generate(
  params: Params | Ready,
  config: ModelConfig,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  sampling: Sampling = GREEDY,
  stop_tokens: Sequence[int] = (),
  key: Array | None = None,
  batch_size: int = 16,
  dtype: Any = None,
) -> Generation:
  """Continuations of ragged prompts; a row's does not depend on what shares its batch (up to rounding).

  Args:
    params: as for `decoder`, adapters bound or (faster) merged; or `prepare(params, config)` where calls repeat.
      Bound with rows, there is one for each prompt.
    prompts: token ids, at least one each.
    stop_tokens: ids that end a text, see `stop_tokens`; () for none.
    key: token t of row i is drawn with fold_in(fold_in(key, i), t); needed unless greedy.
    batch_size: the most rows at once; prompts are sorted by length first, so that a batch holds little padding.
    dtype: of the computation and the cache; default the embedding's.
  """
  ready = prepare(params, config)
  _check(prompts, max_new_tokens, config, ready.stacked)
  if batch_size < 1:
    raise ValueError(f"batch_size must be at least 1, found {batch_size}")
  keys = _row_keys(key, sampling, len(prompts))
  tokens: list[list[int]] = [[]] * len(prompts)
  logps: list[np.ndarray] = [np.zeros(0, np.float32)] * len(prompts)
  finished = [False] * len(prompts)
  for rows in _batches([len(prompt) for prompt in prompts], batch_size):
    filled = np.maximum(rows, 0)  # -1 marks a row that only fills the batch
    some = [prompts[i] for i in filled]
    shared = (max_new_tokens, stop_tokens, config, sampling, dtype)
    batch_params = weight.take_rows(ready, filled)
    state = _start(batch_params.stacked, some, keys[filled], rows < 0, *shared)
    state = _decode(batch_params.layers_apart, state, max_new_tokens, config, sampling, dtype)
    drawn = jax.device_get((state.tokens, state.logps, state.lengths, state.stopped))
    for row, ids, lps, length, stopped in zip(rows, *drawn):
      if row >= 0:
        tokens[row], logps[row] = ids[:length].tolist(), lps[:length]
        finished[row] = bool(stopped)
  return Generation(tokens, logps, finished)


def stream(
  params: Params | Ready,
  config: ModelConfig,
  prompt: Sequence[int],
  *,
  max_new_tokens: int,
  key: Array | None = None,
  **options: Any,
) -> Iterator[int]:
  """The tokens of `generate` for one prompt, each as soon as it is drawn, the stop token included."""
  return Dialogue(params, config, **options).stream(prompt, max_new_tokens=max_new_tokens, key=key)


class Dialogue:
  """One conversation: what its next prompt has in common with what was read is not read again.

  Few programs serve every length: text is read in pieces of CHUNKS, and slots double from SLOTS on.
  """

  def __init__(
    self,
    params: Params | Ready,
    config: ModelConfig,
    *,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int] = (),
    dtype: Any = None,
  ) -> None:
    self.ready, self.config = prepare(params, config), config
    self.sampling, self.stop_tokens, self.dtype = sampling, stop_tokens, dtype
    self.ended = True  # whether a stop token was the last text's last
    self._read: list[int] = []  # the tokens in the cache
    self._cache: decoder.Cache | None = None

  def stream(
    self, prompt: Sequence[int], *, max_new_tokens: int, key: Array | None = None
  ) -> Iterator[int]:
    """The tokens of `generate`, each as soon as it is drawn, the stop token included."""
    _check([prompt], max_new_tokens, self.config, self.ready.stacked)
    how = (self.config, self.sampling, self.dtype)
    state = self._prompted(prompt, max_new_tokens, _row_keys(key, self.sampling, 1))
    read, token = list(prompt), -1
    for count in range(1, max_new_tokens + 1):
      if count > 1:  # the first came with the prompt
        self._cache = None  # given away until the call ends: what interrupts it leaves none behind
        state = _decode(self.ready.layers_apart, state, count, *how)
        read = [*read, token]
      self._read, self._cache = read, state.cache
      token, self.ended = int(state.tokens[0, count - 1]), bool(state.stopped[0])
      yield token
      if self.ended:
        return

  def _prompted(self, prompt: Sequence[int], max_new_tokens: int, keys: Array) -> State:
    """The prompt read, one token drawn."""
    params, how = self.ready.stacked, (self.config, self.sampling, self.dtype)
    bound = before.slots(params)
    # what is padded behind the last piece is overwritten by what comes next
    cache = self._room(bound + len(prompt) + max_new_tokens + CHUNKS[-1])
    both = zip(self._read, prompt[:-1])  # one token at least is read
    at = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))
    self._read, self._cache = [], None
    stops = _padded_stops(self.stop_tokens)
    while True:
      width = next((size for size in CHUNKS if len(prompt) - at >= size), CHUNKS[-1])
      piece = prompt[at : at + width]
      tokens = np.zeros((1, width), np.int32)
      tokens[0, : len(piece)] = piece
      state = _extend(params, cache, bound + at, tokens, len(piece), keys, stops, *how)
      cache, at = state.cache, at + len(piece)
      if at == len(prompt):
        return state

  def _room(self, wanted: int) -> decoder.Cache:
    """The cache with that many slots at least; an empty one where there is none."""
    slots = SLOTS
    while slots < wanted:
      slots *= 2
    slots = min(slots, self.config.max_length + CHUNKS[-1])
    if self._cache is None:
      self._read = []
      dtype = self.dtype or self.ready.stacked["embed_tokens"]["weight"].dtype
      return _opened(self.ready.stacked, self.config, 1, slots, dtype)
    return self._cache.grown(max(slots - self._cache.segments.shape[1], 0))


def prepare(params: Params | Ready, config: ModelConfig) -> Ready:
  """params in the two forms that generation wants; on a CPU the second is a copy.

  There a scan copies each layer's weights out of the stack at every step: with the layers apart a step of SmolLM2-135M
  takes 45 ms of processor time instead of 87 (batch 1), 190 instead of 270 (batch 16).
  """
  if isinstance(params, Ready):
    return params
  if jax.default_backend() == "cpu" and not isinstance(params["layers"], tuple):
    return Ready(params, decoder.unstack(params, config))
  return Ready(params, params)


def stop_tokens(
  config: ModelConfig, tokenizer: Any = None, folder: str | Path | None = None
) -> tuple[int, ...]:
  """Every id that ends a text: of config.json, generation_config.json and the tokenizer, in rising order."""
  ids = set(config.eos_token_ids)
  if tokenizer is not None and tokenizer.eos_token_id is not None:
    ids.add(tokenizer.eos_token_id)
  if folder is not None and (path := Path(folder) / "generation_config.json").exists():
    ids.update(as_ids(files.read_json(path).get("eos_token_id")))
  return tuple(sorted(ids))


def bucket(length: int) -> int:
  """The least of 32, 48, 64, 96, 128, 192, ... that is no less than length: few shapes, each compiled once.

  >>> [bucket(n) for n in (1, 33, 64, 65, 100)]
  [32, 48, 64, 96, 128]
  """
  size = 32
  while size < length:
    size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
  return size


def _start(
  params: Params,
  prompts: Sequence[Sequence[int]],
  keys: Array,
  stopped: np.ndarray,
  max_new_tokens: int,
  stop_tokens: Sequence[int],
  config: ModelConfig,
  sampling: Sampling,
  dtype: Any,
) -> State:
  """The prompts read, one token of each row drawn."""
  shared = _shared_length(params, prompts)
  rests = [prompt[shared:] for prompt in prompts]
  width = bucket(max(map(len, rests)))
  tokens = np.zeros((len(prompts), width), np.int32)
  segments = np.zeros_like(tokens)
  for row, rest in enumerate(rests):
    tokens[row, width - len(rest) :] = rest
    segments[row, width - len(rest) :] = 1
  beginning = np.asarray([prompts[0][:shared]], np.int32)
  stops = _padded_stops(stop_tokens)
  slots = bucket(before.slots(params) + shared + width + max_new_tokens)
  read = (beginning, tokens, segments)
  return _prefill(params, *read, keys, stopped, stops, slots, config, sampling, dtype)


def _padded_stops(stop_tokens: Sequence[int]) -> np.ndarray:
  """Filled up with -1, which no token is, so that one program serves any few of them."""
  stops = np.full(bucket(len(stop_tokens)), -1, np.int32)
  stops[: len(stop_tokens)] = stop_tokens
  return stops


def _shared_length(params: Params, prompts: Sequence[Sequence[int]]) -> int:
  """How many tokens all prompts begin with, in steps of SHARED so that few shapes compile; at least one is left over.

  Rows that share a system message read it once.
  """
  if len(prompts) == 1 or weight.batch_rows(params) is not None:
    return 0
  in_order = sorted(map(tuple, prompts))
  ends = in_order[0], in_order[-1]  # what the first and last in order share, all do
  most = min(map(len, prompts)) - 1
  same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*(end[:most] for end in ends)))
  return sum(1 for _ in same) // SHARED * SHARED


@functools.partial(jax.jit, static_argnames=("slots", "config", "sampling", "dtype"))
def _prefill(
  params: Params,
  beginning: Array,
  tokens: Array,
  segments: Array,
  keys: Array,
  stopped: Array,
  stop_tokens: Array,
  slots: int,
  config: ModelConfig,
  sampling: Sampling,
  dtype: Any,
) -> State:
  batch = tokens.shape[0]
  cache_dtype = dtype or params["embed_tokens"]["weight"].dtype
  if beginning.shape[1]:
    cache = decoder.start(params, config, 1, slots, cache_dtype)
    _, cache = decoder.step(params, beginning, config, cache, dtype=dtype)
    cache = cache.repeated(batch)
  else:
    cache = decoder.start(params, config, batch, slots, cache_dtype)
  x, cache = decoder.step(params, tokens, config, cache, segment_ids=segments, dtype=dtype)
  state = _undrawn(cache, stopped, keys, stop_tokens)
  return _draw(params, state, x, config, sampling)


_opened = jax.jit(decoder.start, static_argnames=("config", "batch", "slots", "dtype"))


@functools.partial(
  jax.jit, static_argnames=("config", "sampling", "dtype"), donate_argnames=("cache",)
)
def _extend(
  params: Params,
  cache: decoder.Cache,
  start: Array | int,
  tokens: Array,
  count: Array | int,
  keys: Array,
  stop_tokens: Array,
  config: ModelConfig,
  sampling: Sampling,
  dtype: Any,
) -> State:
  """The first `count` of tokens [1, time] read behind the first `start` slots of the cache, one token drawn."""
  segments = (jnp.arange(tokens.shape[1]) < count).astype(jnp.int32)[None]
  x, cache = decoder.step(
    params, tokens, config, cache.cut(start), segment_ids=segments, dtype=dtype
  )
  x = jax.lax.dynamic_slice_in_dim(x, count - 1, 1, axis=1)
  state = _undrawn(cache.cut(start + count), jnp.zeros(1, bool), keys, stop_tokens)
  return _draw(params, state, x, config, sampling)


def _undrawn(cache: decoder.Cache, stopped: Array, keys: Array, stop_tokens: Array) -> State:
  batch, slots = cache.segments.shape
  return State(
    cache=cache,
    tokens=jnp.zeros((batch, slots), jnp.int32),
    logps=jnp.zeros((batch, slots), jnp.float32),
    lengths=jnp.zeros(batch, jnp.int32),
    stopped=stopped,
    count=jnp.zeros((), jnp.int32),
    keys=keys,
    stop_tokens=stop_tokens,
  )


@functools.partial(
  jax.jit, static_argnames=("config", "sampling", "dtype"), donate_argnames=("state",)
)
def _decode(
  params: Params,
  state: State,
  count: Array | int,
  config: ModelConfig,
  sampling: Sampling,
  dtype: Any,
) -> State:
  """state with `count` tokens drawn, or fewer where every row has stopped."""

  def going(state: State) -> Array:
    return (state.count < count) & ~jnp.all(state.stopped)

  def body(state: State) -> State:
    last = jax.lax.dynamic_slice_in_dim(state.tokens, state.count - 1, 1, axis=1)
    x, cache = decoder.step(params, last, config, state.cache, dtype=dtype)
    return _draw(params, dataclasses.replace(state, cache=cache), x, config, sampling)

  return jax.lax.while_loop(going, body, state)


def _draw(params: Params, state: State, x: Array, config: ModelConfig, sampling: Sampling) -> State:
  """state with the token that follows the last hidden state of x: [batch, time, embed]."""
  keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.count)
  logits = decoder.logits(params, x[:, -1], config)
  token, logp = samplers.sample(keys, logits, sampling)
  write = lambda buffer, new: jax.lax.dynamic_update_slice(buffer, new[:, None], (0, state.count))
  ends = jnp.any(token[:, None] == state.stop_tokens, axis=1)
  return dataclasses.replace(
    state,
    tokens=write(state.tokens, token),
    logps=write(state.logps, logp),
    lengths=state.lengths + ~state.stopped,
    stopped=state.stopped | ends,
    count=state.count + 1,
  )


def _batches(lengths: Sequence[int], batch_size: int) -> np.ndarray:
  """Row indices by rising length, in batches of one size (one compilation); -1 fills the first up."""
  if not lengths:
    return np.zeros((0, 0), np.int64)
  count = -(-len(lengths) // batch_size)
  size = -(-len(lengths) // count)
  order = np.argsort(lengths, kind="stable")
  order = np.concatenate([np.full(count * size - len(order), -1), order]).astype(np.int64)
  return order.reshape(count, size)


def _row_keys(key: Array | None, sampling: Sampling, rows: int) -> Array:
  if key is None:
    if sampling.temperature > 0:
      raise ValueError("sampling at a temperature above 0 needs a key, such as jax.random.key(0)")
    key = jax.random.key(0)
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def check_ids(prompt: Sequence[int], config: ModelConfig, name: str = "the prompt") -> None:
  """Raises ValueError where a prompt is empty, or a token has no row in the embedding."""
  if len(prompt) == 0:
    raise ValueError(f"{name} is empty; give it at least the token that starts a text")
  if min(prompt) < 0 or max(prompt) >= config.vocab_size:
    raise ValueError(
      f"{name} holds ids outside 0..{config.vocab_size - 1}: {min(prompt)}..{max(prompt)}"
    )


def _check(
  prompts: Sequence[Sequence[int]], max_new_tokens: int, config: ModelConfig, params: Params
) -> None:
  rows = weight.batch_rows(params)
  if rows is not None and rows != len(prompts):
    raise ValueError(f"{len(prompts)} prompts, but the parameters are bound for {rows} rows")
  bound = before.slots(params)
  if max_new_tokens < 1:
    raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
  for i, prompt in enumerate(prompts):
    check_ids(prompt, config, f"prompt {i}")
    if bound + len(prompt) + max_new_tokens > config.max_length:
      soft = f" and {bound} of a soft prompt or prefix" if bound else ""
      raise ValueError(
        f"prompt {i} has {len(prompt)} tokens{soft}; with max_new_tokens={max_new_tokens} that is more than the "
        f"{config.max_length} positions of the model"
      )
