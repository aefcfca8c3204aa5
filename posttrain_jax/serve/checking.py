"""What is asked of the worker becomes what the engine is asked, or is refused before it waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from posttrain_jax.core import bits
from posttrain_jax.rollout import requests
from posttrain_jax.rollout.engine import Engine
from posttrain_jax.rollout.requests import Request
from posttrain_jax.serve.adapters import Version
from posttrain_jax.serve.asked import Asked

Grammar = Callable[[Sequence[int]], np.ndarray]


def request(asked: Asked, version: Version | None, engine: Engine) -> Request:
  """What the engine is asked; its row is known when its turn comes.

  Raises:
    ValueError: it cannot be answered.
  """
  if asked.max_new == 0 and not asked.echo_logprobs:
    raise ValueError("max_new=0 without echo_logprobs asks for nothing")
  if not 0 <= asked.top <= engine.top:
    raise ValueError(f"top={asked.top}: at most {engine.top} likely tokens are told")
  tokenizer = engine.tokenizer if asked.tokenizer is None else asked.tokenizer
  ids, strings = requests.parted(asked.stop_strings, tokenizer)
  bound = 0 if version is None else version.bound
  made = Request(
    asked.prompt,
    max(asked.max_new, 1),
    asked.min_new,
    asked.sampling,
    tuple(sorted(ids | asked.stop_ids)),
    tuple(strings),
    asked.seed,
    asked.number,
    asked.sample,
    bound=bound,
    whose=("base",) if version is None else ("adapter", version.digest),
    top=asked.top,
    scores_prompt=asked.echo_logprobs,
    tokenizer=tokenizer,
  )
  requests.check(made, engine.config, engine.length, bound, None)
  return made


def guarded(
  allowed: Grammar | None, vocab: int, failed: Callable[[Exception], None]
) -> Grammar | None:
  """The grammar in words of bits; an error in it is told, ends its request and no other."""
  if allowed is None:
    return None

  def safe(ids: Sequence[int]) -> np.ndarray:
    try:
      return requests.packed(allowed(ids), vocab)
    except Exception as error:
      failed(error)
      return np.full(bits.words(vocab), -1, np.int32)

  return safe
