"""What a model can read: ids that have a row in its embedding, positions that it was made for.

A tokenizer may have more tokens than the embedding has rows, or fewer: what counts is the ids that occur.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from posttrain_jax.data import answers
from posttrain_jax.data.answers import SHARED, Answers
from posttrain_jax.data.errors import RowError
from posttrain_jax.data.schema import Skipped


@dataclasses.dataclass(frozen=True)
class Bounds:
  """What the model has: rows of its embedding, positions, and how many of those a soft prompt or prefix takes."""

  rows: int
  positions: int
  before: int = 0

  @property
  def room(self) -> int:
    """Positions that are left for text."""
    return self.positions - self.before


def kept(
  examples: Sequence[Any], bounds: Bounds, *, truncate: str, on_error: str, tokenizer: Any = None
) -> tuple[Sequence[Any], Skipped]:
  """(examples that the model can read, what was left out).

  Raises:
    RowError: an example that it cannot, unless "drop", "prompt" or on_error says what becomes of it.
  """
  within, skipped = [], Skipped()
  too_long: list[RowError] = []
  for example in examples:
    try:
      check_ids(example, bounds, tokenizer)
      within.append(_within(example, bounds, truncate))
    except RowError as error:
      if on_error == "skip" or (truncate == "drop" and error.reason == "too long"):
        skipped.add(error)
      elif error.reason == "too long":
        too_long.append(error)  # the first is told, with the number of all
      else:
        raise
  if too_long:
    raise _told(too_long, len(examples))
  if not within:
    raise ValueError(f"no row gave an example; {skipped}")
  return tuple(within), skipped


def _told(errors: Sequence[RowError], count: int) -> RowError:
  first = errors[0]
  if count == 1:
    return first
  are = "is" if len(errors) == 1 else "are"
  others = f"{len(errors):,} of {count:,} rows {are} too long for the model, the first with "
  return RowError(first.reason, first.origin, others + first.detail, first.cure)


def check_ids(example: Any, bounds: Bounds, tokenizer: Any = None) -> None:
  """Raises RowError where a token has no row in the embedding."""
  highest = int(example.tokens.max(initial=0))
  if highest >= bounds.rows:
    text = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(highest)!r})"
    raise RowError(
      "unknown token",
      example.origin,
      f"token {highest}{text} has no row in the model's embedding, which has {bounds.rows}; the tokenizer is another"
      " model's, or has tokens that were added later: resize the model's embedding, or leave such rows out",
    )


def positions(example: Any) -> int:
  """How many positions an example takes: of answers that share their prompt, of the longest."""
  if isinstance(example, Answers):
    return int(example.positions.max(initial=-1)) + 1
  return len(example.tokens)


def _within(example: Any, bounds: Bounds, truncate: str) -> Any:
  excess = positions(example) - bounds.room
  if excess <= 0:
    return example
  if truncate == "prompt" and isinstance(example, Answers):
    shared = int((example.answer == SHARED).sum())
    spare = (
      shared if example.shares else min(len(example.prompt(i)) for i in range(example.count)) - 1
    )
    if excess <= spare:
      return answers.cut(example, excess)
  soft = f", {bounds.before} of them taken by what stands before the text" if bounds.before else ""
  ways = "prompt or drop" if isinstance(example, Answers) else "keep_start, split or drop"
  raise RowError(
    "too long",
    example.origin,
    f"{positions(example)} tokens, but the model has {bounds.positions} positions{soft}",
    f"write --config.data.truncate={ways}, or stretch the context (adapter=longlora, adapter.context_length)",
  )
