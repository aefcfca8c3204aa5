"""Rows that hold several answers (`data.answers`), each in a slot of its row.

[rows, slots] is the shape of all that is known of an answer, [rows, time] that of tokens.  Log-probabilities of an
answer are sums over its tokens, end of turn included.
"""

from __future__ import annotations

from posttrain_jax.losses.spans import Spans
from posttrain_jax.objectives.objective import Batch, following, targets


def spans(batch: Batch) -> Spans:
  """Where the answers of a batch lie, as hidden states see them: at the position before each token."""
  _, mask = targets(batch)
  return Spans(mask, following(batch["answer"]), batch["present"])
