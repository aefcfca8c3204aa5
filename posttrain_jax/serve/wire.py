"""What both ways of asking share: how tokens are drawn, what ends an answer, how it is told."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from posttrain_jax.rollout.sampling import BIASED, LEAST, MOST, MOST_K, Sampling
from posttrain_jax.serve.errors import wrong
from posttrain_jax.serve.fields import Fields, whole_text
from posttrain_jax.serve.limits import Limits

# Names that say who asks or how a bill is written, and nothing of the answer.
LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")


@dataclasses.dataclass(frozen=True)
class Wanted:
  """How the answers of a request are to be drawn and told.

  max_new: None for as many as there is room for.
  seed: of the request, 64 bits; where it has none, one that nobody knows.
  top: alternatives told with each token; None: no log-probabilities at all.
  ends: ids beside the model's own; ignore_eos: the model's own end nothing.
  """

  n: int
  max_new: int | None
  min_new: int
  sampling: Sampling
  seed: int
  stops: tuple[str, ...]
  ends: frozenset[int]
  ignore_eos: bool
  top: int | None
  stream: bool
  usage: bool


def wanted(
  body: Fields, limits: Limits, *, vocab: int, max_new: int | None, top: int | None
) -> Wanted:
  """The shared fields of a body.

  Raises:
    Refused: a field has no value of its kind, or one that is not honoured.
  """
  for label in LABELS:
    body.take(label)
  body.only("store", False, why="nothing of a request is kept")
  body.only("service_tier", "auto", "default", why="there is one tier")
  n = body.whole("n", 1, 1, limits.n)
  stream = body.flag("stream")
  options = body.object("stream_options")
  if options is not None and not stream:
    raise wrong("stream_options without stream: write stream=true beside it", "stream_options")
  usage = options is not None and options.flag("include_usage")
  if options is not None:
    options.only("include_obfuscation", False, why="no padding is written into streams")
    options.close()
  return Wanted(
    n=n,
    max_new=max_new,
    min_new=body.whole("min_tokens", 0, 0, 2**31 - 1),
    sampling=sampling(body, vocab),
    seed=body.whole("seed", int.from_bytes(os.urandom(8)), -(2**63), 2**64 - 1) % 2**64,
    stops=_stops(body, limits),
    ends=_ends(body, limits, vocab),
    ignore_eos=body.flag("ignore_eos"),
    top=top,
    stream=stream,
    usage=usage,
  )


def sampling(body: Fields, vocab: int) -> Sampling:
  """How a token is drawn."""
  temperature = body.number("temperature", 1.0, 0.0, 2.0)
  if 0 < temperature < LEAST:
    raise wrong(f"temperature must be 0 (greedy), or from {LEAST:g} to 2", "temperature")
  top_p = body.number("top_p", 1.0, 0.0, 1.0)
  if top_p == 0:
    raise wrong("top_p must be above 0; temperature=0 takes the likeliest token", "top_p")
  return Sampling(
    temperature=temperature,
    top_p=top_p,
    top_k=max(body.whole("top_k", 0, -1, MOST_K), 0),
    min_p=body.number("min_p", 0.0, 0.0, 1.0),
    repetition_penalty=body.number("repetition_penalty", 1.0, LEAST, MOST),
    presence_penalty=body.number("presence_penalty", 0.0, -2.0, 2.0),
    frequency_penalty=body.number("frequency_penalty", 0.0, -2.0, 2.0),
    bias=_bias(body, vocab),
  )


def _bias(body: Fields, vocab: int) -> tuple[tuple[int, float], ...]:
  values = body.mapping("logit_bias")
  if len(values) > BIASED:
    raise wrong(f"logit_bias has {len(values)} entries, at most {BIASED}", "logit_bias")
  each = Fields(values, "logit_bias")
  pairs = []
  for key in values:
    if not (key.isascii() and key.isdecimal() and len(key) < 12 and int(key) < vocab):
      raise each.error(key, f"under a token's id from 0 to {vocab - 1}, as a string")
    pairs.append((int(key), each.number(key, 0.0, -100.0, 100.0)))
  if len(dict(pairs)) < len(pairs):
    raise wrong("logit_bias names a token twice", "logit_bias")
  return tuple(sorted(pairs))


def _stops(body: Fields, limits: Limits) -> tuple[str, ...]:
  value = body.take("stop")
  given = [value] if isinstance(value, str) else ([] if value is None else value)
  if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
    raise body.error("stop", "a string or a list of strings")
  if len(given) > limits.stops:
    raise wrong(f"stop has {len(given)} strings, at most {limits.stops}", "stop")
  for one in given:
    whole_text(one, "stop")
    if not one or len(one) > limits.stop:
      raise wrong(f"a stop string has from 1 to {limits.stop} characters, found {len(one)}", "stop")
  return tuple(dict.fromkeys(given))


def _ends(body: Fields, limits: Limits, vocab: int) -> frozenset[int]:
  ids = body.listed("stop_token_ids")
  if len(ids) > limits.ends or not all(is_id(one, vocab) for one in ids):
    raise body.error("stop_token_ids", f"at most {limits.ends} tokens' ids from 0 to {vocab - 1}")
  return frozenset(ids)


def is_id(value: Any, vocab: int) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
  """What was read and written, in tokens; cached: of the prompt's, those that were read before."""
  return dict(
    prompt_tokens=prompt,
    completion_tokens=completion,
    total_tokens=prompt + completion,
    prompt_tokens_details=dict(cached_tokens=cached),
  )
