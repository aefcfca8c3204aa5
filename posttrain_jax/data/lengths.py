"""Rows that have more tokens than there is room for: one message says how many, how long rows are, and the choices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posttrain_jax.data.errors import RowError

QUANTILES = (50, 90, 99)


class TooLong(RowError):
  """A row without room for its `tokens`; where they were not all counted, there are more than that."""

  def __init__(self, origin: str, detail: str, cure: str, tokens: int, *, counted: bool = True):
    super().__init__("too long", origin, detail, cure)
    self.tokens, self.counted = tokens, counted


def summary(
  errors: Sequence[RowError],
  fitting: Sequence[int],
  *,
  limit: int,
  ways: str,
  room: int | None = None,
) -> RowError:
  """What to say of all rows that are too long: the only row by itself, several by their number and lengths.

  Args:
    fitting: tokens of the rows that fit.
    limit: tokens that a row may have, data.length.
    ways: what data.truncate may be, as a sentence has it.
    room: tokens that the model can read of a row; no longer data.length helps.
  """
  if len(errors) + len(fitting) == 1:
    return errors[0]
  said, longest = _lengths(errors, fitting, limit)
  cure = f"write --config.data.truncate={ways}"
  if longest is not None and (room is None or longest <= room):
    cure = f"write --config.data.length={longest}, which takes every row, or --config.data.truncate={ways}"
  elif room is not None and room > limit:
    cure = f"the model reads {room:,} tokens at most (data.length), so write --config.data.truncate={ways}"
  return RowError(
    "too long",
    _file(errors[0].origin),
    f"{len(errors):,} of {len(errors) + len(fitting):,} rows have more than data.length={limit} tokens: {said}",
    cure
    + ", or --config.data.on_error=skip (left out and counted, as every row that cannot be used)",
  )


def _lengths(
  errors: Sequence[RowError], fitting: Sequence[int], limit: int
) -> tuple[str, int | None]:
  """(the lengths of rows in words, the longest where all were counted)."""
  longer = [error.tokens if isinstance(error, TooLong) else limit + 1 for error in errors]
  counted = all(isinstance(error, TooLong) and error.counted for error in errors)
  lengths = sorted([*fitting, *longer])
  quantiles = np.percentile(lengths, QUANTILES, method="inverted_cdf")
  parts = ", ".join(f"{q} % have up to {n:,.0f}" for q, n in zip(QUANTILES, quantiles))
  longest = f"the longest {'has' if counted else 'has more than'} {lengths[-1]:,}"
  return f"{parts}, {longest}; the first too long is {errors[0].origin}", lengths[
    -1
  ] if counted else None


def _file(origin: str) -> str:
  """Where a row's file is, without its line.

  >>> _file("rows.jsonl:12"), _file("row 3")
  ('rows.jsonl', 'the rows')
  """
  return origin.rpartition(":")[0] or "the rows"
