"""How likely a model finds given tokens: for bits per byte, multiple choice and lm-evaluation-harness.

Hidden states and the head meet in `losses.logprob`, as in training.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.core import sharding, zigzag
from posttrain_jax.losses import logprob
from posttrain_jax.models import before, decoder
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.rollout import engine

TOGETHER = 2048  # tokens that go through the model at once
Ids = Sequence[int]


class Scores:
  """Natural log-probabilities of tokens under one model, each given all that stands before it.

  params: as for `decoder`, adapters bound or merged.
  """

  def __init__(self, params: Any, config: ModelConfig, dtype: Any = None):
    self.params, self.config = params, config
    self.longest = config.max_length - before.slots(params)
    self._program = jax.jit(functools.partial(_logps, config=config, dtype=dtype))

  def of(
    self,
    rows: Sequence[tuple[Ids, Sequence[bool]]],
    progress: Callable[[int, int], None] | None = None,
  ) -> list[tuple[np.ndarray, np.ndarray]]:
    """(log-probabilities, whether each is the likeliest token) of the tokens that are marked, row by row.

    Args:
      rows: (tokens, marks): a token that is marked is scored where it stands; the first cannot be.

    Raises:
      ValueError: a row is longer than the model, or marks its first token.
    """
    for tokens, marks in rows:
      if len(tokens) - 1 > self.longest or (marks and marks[0]) or len(tokens) != len(marks):
        raise ValueError(
          f"a row of {len(tokens)} tokens, {len(marks)} marks: as many of both, at most {self.longest + 1}, the first"
          " token without a mark"
        )
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    for some, length in _batches([len(rows[i][0]) - 1 for i in order], self.longest):
      chosen = [order[i] for i in some]
      shards = sharding.size(sharding.ACTIVATIONS["batch"])
      count = -(-max(1, TOGETHER // length) // shards) * shards
      tokens = np.zeros((count, length + 1), np.int32)
      wanted = np.zeros((count, length + 1), bool)
      segments = np.zeros((count, length), np.int32)
      for place, i in enumerate(chosen):
        n = len(rows[i][0])
        tokens[place, :n], wanted[place, :n] = rows[i]
        segments[place, : n - 1] = 1
      logps, is_best = jax.device_get(
        self._program(self.params, tokens[:, :-1], segments, tokens[:, 1:], wanted[:, 1:])
      )
      for place, i in enumerate(chosen):
        marks = wanted[place, 1:]
        found[i] = logps[place][marks].astype(np.float64), is_best[place][marks] > 0
      if progress is not None:
        progress(len(found), len(rows))
    return [found[i] for i in range(len(rows))]


def _logps(params, tokens, segments, labels, wanted, *, config, dtype):
  time = tokens.shape[1]
  positions = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), tokens.shape)
  each = (tokens, segments, positions, labels, wanted)
  tokens, segments, positions, labels, wanted = (zigzag.cut(jnp.asarray(x)) for x in each)
  hidden = decoder.hidden(
    params, tokens, config, positions=positions, segment_ids=segments, dtype=dtype
  )
  head = decoder.whole_head(params)
  scores = logprob.score(hidden, head, labels, mask=wanted, softcap=config.final_softcap)
  return zigzag.whole(scores.logp, time), zigzag.whole(scores.correct, time)


def _batches(lengths: Sequence[int], longest: int) -> Iterator[tuple[range, int]]:
  """(rows, the length that they are padded to) of rows in falling order of length: few shapes."""
  start = 0
  while start < len(lengths):
    length = min(engine.bucket(lengths[start]), longest)
    end = min(len(lengths), start + max(1, TOGETHER // length))
    yield range(start, end), length
    start = end


def start_of(tokenizer: Any) -> int:
  """The token that the first one of a text is scored behind: BOS, or else EOS, as lm-evaluation-harness takes it.

  Raises:
    ValueError: the tokenizer has neither.
  """
  bos = tokenizer.bos_token_id
  start = tokenizer.eos_token_id if bos is None else bos
  if start is None:
    raise ValueError(
      "the tokenizer has neither BOS nor EOS, and nothing to score a text's first token behind"
    )
  return start


def windows(tokens: Ids, start: int, longest: int) -> Iterator[tuple[list[int], list[bool]]]:
  """A text in rows of which each token is marked once, with as much before it as the model can read.

  The first row begins with `start`; later ones hold the last `longest` tokens and what stands before them.  As
  lm-evaluation-harness cuts texts (context_len=1).

  >>> [tokens for tokens, _ in windows([1, 2, 3, 4, 5], 0, 3)]
  [[0, 1, 2, 3], [2, 3, 4, 5]]
  """
  done = 0
  while done < len(tokens):
    end = min(len(tokens), done + longest)
    behind = [start, *tokens[:end]][max(0, end - longest) :]
    new = end - done
    yield list(behind), [False] * (len(behind) - new) + [True] * new
    done = end


def continued(whole: Ids, context: int, longest: int) -> tuple[list[int], list[bool]]:
  """A row whose tokens behind the first `context` are marked, cut on the left where the model has no room."""
  marks = [False] * context + [True] * (len(whole) - context)
  return list(whole[-longest - 1 :]), marks[-longest - 1 :]


def parts(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], int]:
  """(tokens of both, how many of them are the context's): those of the whole text minus those of the context.

  White space at the end of the context belongs to the continuation, as it does in the harness.
  """
  stripped = context.rstrip()
  whole = _ids(tokenizer, context + continuation)
  count = len(_ids(tokenizer, stripped)) if stripped else 0
  return whole, min(count, len(whole) - 1)


def _ids(tokenizer: Any, text: str) -> list[int]:
  return tokenizer(text, add_special_tokens=False)["input_ids"]


def bits(logps: np.ndarray) -> float:
  """-sum log2 p of natural log-probabilities."""
  return -float(np.sum(logps)) / math.log(2)
