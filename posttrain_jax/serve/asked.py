"""What is asked of the worker, what it tells, and how it says no."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from posttrain_jax.rollout.sampling import GREEDY, Sampling

STOP, LENGTH, CANCELLED = "stop", "length", "cancelled"
Top = tuple[
  np.ndarray, np.ndarray
]  # (ids, log-probabilities): [tokens, n] each, the most likely first


@dataclasses.dataclass(frozen=True)
class Asked:
  """One answer to write.  Several answers to one prompt are several of these, which share its reading.

  Token t is drawn by (seed, number, sample, t) and the adapter's content, whatever else is under way.

  prompt: token ids, at least one.
  max_new: 0 where the prompt's log-probabilities alone are wanted.
  min_new: so many are drawn before one that ends the text.
  stop_ids: ids that end the text; the one drawn is its last token.
  stop_strings: the text ends with the token by which it holds one.  One that is the text of a special token ends it by
    that token's id; one that no text can hold ends nothing.
  tokenizer: writes the text that they are looked for in; None: the worker's.
  adapter: the name of a registered adapter, or of a folder under the root; None is the base.
  top: so many most likely tokens are told with each token, at most `asked.MOST_TOP`.
  echo_logprobs: the log-probabilities of the prompt's tokens are told too (`Prompt`).
  allowed: a grammar: called on the worker's thread with the ids drawn so far -> which ids may come next: [vocab] of
    booleans, or their bits as `core.bits.pack` lays them (llguidance's and xgrammar's layout too), uint32 or int32.
  """

  prompt: Sequence[int]
  max_new: int
  sampling: Sampling = GREEDY
  min_new: int = 0
  stop_ids: frozenset[int] = frozenset()
  stop_strings: tuple[str, ...] = ()
  tokenizer: Any = None
  adapter: str | None = None
  top: int = 0
  echo_logprobs: bool = False
  allowed: Callable[[Sequence[int]], np.ndarray] | None = None
  seed: int = 0
  number: int = 0
  sample: int = 0


MOST_TOP = 20


@dataclasses.dataclass(frozen=True)
class Started:
  """A row is the request's; its prompt is read, the first `cached` tokens of it from what was read before."""

  waited: float  # seconds in the queue
  cached: int


@dataclasses.dataclass(frozen=True)
class Prompt:
  """Of the prompt's tokens from the second on, under the model at temperature 1: logps [tokens - 1], float32."""

  logps: np.ndarray
  top: Top | None


@dataclasses.dataclass(frozen=True)
class Tokens:
  """New tokens; their log-probabilities are the model's own at temperature 1, before any filter, bias or penalty."""

  ids: list[int]
  logps: np.ndarray
  top: Top | None


@dataclasses.dataclass(frozen=True)
class Ended:
  """The last event of an answer: STOP, LENGTH or CANCELLED; matched: the stop string that ended it."""

  reason: str
  matched: str | None = None


@dataclasses.dataclass(frozen=True)
class Failed:
  """The last event of an answer that came to nothing; others go on."""

  error: Exception


Event = Started | Prompt | Tokens | Ended | Failed
Deliver = Callable[[Event], None]


class Full(RuntimeError):
  """The queue is full (429); retry_after: seconds after which there may be room."""

  def __init__(self, waiting: int, retry_after: float) -> None:
    super().__init__(f"{waiting} requests are waiting already; ask again in {retry_after:.0f} s")
    self.retry_after = retry_after


class Closed(RuntimeError):
  """The server takes no more requests (503): it is draining, or its worker has ended."""


class UnknownAdapter(LookupError):
  """No adapter has that name (404)."""

  def __str__(self) -> str:
    return str(self.args[0])


class BadAdapter(ValueError):
  """An adapter that cannot be served on this base, and why (400); what was served under its name still is."""
