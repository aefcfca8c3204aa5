"""What counts is the ids and the positions in use."""

import dataclasses

import numpy as np
import pytest

from posttrain_jax.data import bounds
from posttrain_jax.data.bounds import Bounds
from posttrain_jax.data.errors import RowError
from tests import tiny
from tests.objectives import batches


def kept(examples, rows=300, positions=100, taken=0, truncate="error", on_error="raise"):
  given = Bounds(rows, positions, taken)
  within, skipped = bounds.kept(examples, given, truncate=truncate, on_error=on_error)
  return list(within), dict(skipped.counts)


def highest(examples):
  return max(int(example.tokens.max()) for example in examples)


def test_a_token_needs_a_row_and_no_token_that_does_not_occur():
  examples = tiny.examples(9)
  top = highest(examples)
  assert kept(examples, rows=top + 1) == (examples, {})
  (worst,) = [example.origin for example in examples if example.tokens.max() == top]
  with pytest.raises(RowError, match=rf"^{worst}: token {top} has no row .* which has {top}"):
    kept(examples, rows=top)
  rest, counts = kept(examples, rows=top, on_error="skip")
  assert (len(rest), counts) == (8, {"unknown token": 1})


def test_text_needs_a_position_for_each_token_behind_a_soft_prompt():
  examples = tiny.examples(9)
  longest = max(map(len, examples))
  assert kept(examples, positions=longest) == (examples, {})
  assert kept(examples, positions=longest + 4, taken=4) == (examples, {})
  with pytest.raises(RowError, match=rf"the model has {longest + 4} positions, 5 of them taken"):
    kept(examples, positions=longest + 4, taken=5)
  rest, counts = kept(examples, positions=longest - 1, truncate="drop")
  assert counts == {"too long": 9 - len(rest)}


@pytest.mark.parametrize("share", [True, False])
def test_answers_need_the_positions_of_the_longest_of_them(share):
  """A row of several is longer than each; a prompt gives way where it may."""
  pairs = batches.pairs(share=share)
  needed = max(bounds.positions(pair) for pair in pairs)
  assert needed < max(map(len, pairs))
  assert kept(pairs, positions=needed) == (pairs, {})
  with pytest.raises(RowError, match="the model has"):
    kept(pairs, positions=needed - 1)
  cut, _ = kept(pairs, positions=needed - 1, truncate="prompt")
  assert max(bounds.positions(pair) for pair in cut) == needed - 1
  for before, after in zip(pairs, cut):
    assert after.lengths == before.lengths


def test_nothing_left_is_an_error():
  example = dataclasses.replace(tiny.examples(1)[0], tokens=np.full(4, 999, np.int32))
  with pytest.raises(ValueError, match="no row gave an example"):
    kept([example], on_error="skip")
