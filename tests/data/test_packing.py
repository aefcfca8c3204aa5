import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain_jax.data.encoded import Example
from posttrain_jax.data.packing import best_fit, bucket_edges, pack

lengths_and_capacity = st.integers(1, 40).flatmap(
  lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=60), st.just(capacity))
)


def example(start, length, channel=None):
  mask = np.arange(length) >= 1
  return Example(np.arange(start, start + length, dtype=np.int32), mask, channel)


def slow_best_fit(lengths, capacity):
  """Best-fit decreasing as a textbook has it: how full each row ends up, sorted."""
  rows = []
  for length in sorted(lengths, reverse=True):
    fitting = [row for row in rows if sum(row) + length <= capacity]
    if not fitting:
      rows.append(fitting_row := [])
      fitting = [fitting_row]
    max(fitting, key=sum).append(length)
  return sorted(map(sum, rows))


@settings(deadline=None)
@given(lengths_and_capacity)
def test_best_fit_is_the_textbooks(case):
  lengths, capacity = case
  rows = best_fit(lengths, capacity)
  assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
  assert sorted(sum(lengths[i] for i in row) for row in rows) == slow_best_fit(lengths, capacity)


def test_best_fit_by_hand():
  assert best_fit([3, 7, 5, 5, 2, 8], 10) == [[5, 4], [1, 0], [2, 3]]
  assert best_fit([], 10) == []
  with pytest.raises(ValueError, match="item 1 has length 11, more than a row's 10"):
    best_fit([3, 11], 10)


def test_best_fit_takes_a_real_data_set_in_seconds():
  lengths = np.random.default_rng(0).integers(20, 400, 100_000)
  rows = best_fit(lengths, 1024)
  assert lengths.sum() / (len(rows) * 1024) > 0.995


def test_pack_by_hand():
  examples = [example(10, 3, "b"), example(20, 2), example(30, 4, "a")]
  examples[2].mask[1] = False
  batch = pack(examples, [[2, 1], [0], []], 7, channels=("a", "b"))
  np.testing.assert_array_equal(batch["tokens"][0], [30, 31, 32, 33, 20, 21, 0])
  np.testing.assert_array_equal(batch["segment_ids"][0], [1, 1, 1, 1, 2, 2, 0])
  np.testing.assert_array_equal(batch["positions"][0], [0, 1, 2, 3, 0, 1, 0])
  np.testing.assert_array_equal(batch["loss_mask"][0], [0, 0, 1, 1, 0, 1, 0])
  np.testing.assert_array_equal(batch["channel"][0], [0, 0, 0, 0, -1, -1, -1])
  np.testing.assert_array_equal(batch["channel"][1], [1, 1, 1, -1, -1, -1, -1])
  assert not batch["segment_ids"][2].any()
  assert not batch["loss_mask"][2].any()
  dtypes = {name: str(array.dtype) for name, array in batch.items()}
  assert dtypes == {
    "tokens": "int32",
    "loss_mask": "bool",
    "segment_ids": "int32",
    "positions": "int32",
    "channel": "int32",
  }


def test_the_first_token_of_a_segment_is_never_a_target():
  wrong = Example(np.arange(3, dtype=np.int32), np.ones(3, bool))
  batch = pack([wrong, wrong], [[0, 1]], 6)
  np.testing.assert_array_equal(batch["loss_mask"][0], [0, 1, 1, 0, 1, 1])


def test_pack_refuses_a_row_that_overflows():
  with pytest.raises(ValueError, match="row 0 holds 5 tokens"):
    pack([example(0, 3), example(0, 2)], [[0, 1]], 4)


@settings(deadline=None)
@given(lengths_and_capacity)
def test_packing_changes_no_example(case):
  lengths, capacity = case
  examples = [example(100 * i, length) for i, length in enumerate(lengths)]
  rows = best_fit(lengths, capacity)
  batch = pack(examples, rows, capacity)
  assert (batch["segment_ids"] > 0).sum() == sum(lengths)
  for r, row in enumerate(rows):
    for segment, index in enumerate(row, 1):
      here = batch["segment_ids"][r] == segment
      np.testing.assert_array_equal(batch["tokens"][r, here], examples[index].tokens)
      np.testing.assert_array_equal(batch["loss_mask"][r, here], examples[index].mask)
      np.testing.assert_array_equal(batch["positions"][r, here], np.arange(lengths[index]))


def padded(lengths, edges):
  return sum(min(edge for edge in edges if edge >= length) for length in lengths)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 4))
def test_bucket_edges_pad_least(lengths, count):
  edges = bucket_edges(lengths, count=count, multiple=8)
  top = -(-max(lengths) // 8) * 8
  assert len(edges) <= count
  assert edges[-1] == top
  assert all(edge % 8 == 0 for edge in edges)
  choices = itertools.combinations(range(8, top, 8), min(count - 1, len(range(8, top, 8))))
  best = min(padded(lengths, (*choice, top)) for choice in choices)
  assert padded(lengths, edges) == best


def test_the_last_edge_keeps_to_the_sequence_length():
  assert bucket_edges([100], multiple=64, longest=100) == (100,)
  assert bucket_edges([10, 60, 70, 100], count=2, multiple=64, longest=100) == (64, 100)
  with pytest.raises(ValueError, match="at least one"):
    bucket_edges([])
