"""Rows in use and rows held out are a sample, the same one each time, and no prompt is on both sides."""

import numpy as np
import pytest

from posttrain_jax.data import held_out
from posttrain_jax.data.encoded import Example
from tests.objectives import batches


def texts(prompts):
  """An example for each number: a prompt of two tokens and one that is its own."""
  tokens = [np.asarray([p, p, 100 + i], np.int32) for i, p in enumerate(prompts)]
  mask = np.asarray([False, False, True])
  return [Example(t, mask, origin=f"row {i}") for i, t in enumerate(tokens)]


def labelled(labels, prompts=None):
  """A completion for each label, each to a prompt of its own."""
  examples = batches.labels(len(labels))
  prompts = prompts or range(len(labels))
  result = []
  for example, label, p in zip(examples, labels, prompts):
    tokens = example.tokens.copy()
    tokens[0] = p
    values = {"label": (float(label),)}
    result.append(batches.dataclasses.replace(example, tokens=tokens, values=values))
  return result


def names(examples):
  return [example.origin for example in examples]


def test_held_out_rows_are_a_sample_and_both_sides_keep_their_order():
  examples = texts(range(40))
  rest, taken, note = held_out.parted(examples, 10, seed=0)
  assert (len(rest), len(taken), note) == (30, 10, "")
  numbers = [int(name.split()[1]) for name in names(taken)]
  assert numbers == sorted(numbers)
  assert numbers not in (list(range(30, 40)), list(range(10)))
  assert sorted([*names(rest), *names(taken)]) == sorted(names(examples))
  assert names(held_out.parted(examples, 10, seed=0)[1]) == names(taken)
  assert names(held_out.parted(examples, 10, seed=1)[1]) != names(taken)
  assert len(held_out.limited(examples, 15, seed=0)) == 15
  assert held_out.limited(examples, 99, seed=0) is examples


@pytest.mark.parametrize(("yes", "no", "count"), [(16, 16, 16), (30, 2, 4), (3, 3, 2)])
def test_rows_sorted_by_label_leave_both_labels_on_both_sides(yes, no, count):
  examples = labelled([True] * yes + [False] * no)
  rest, taken, _ = held_out.parted(examples, count, seed=0)
  for side in (rest, taken, held_out.limited(examples, count, seed=0)):
    assert {held_out.label(example) for example in side} == {0.0, 1.0}
  assert len(taken) == count
  share = sum(held_out.label(example) for example in taken) / count
  assert share == pytest.approx(yes / (yes + no), abs=1 / count)


def test_all_rows_of_a_prompt_stay_on_one_side():
  examples = texts([i // 3 for i in range(30)])
  rest, taken, note = held_out.parted(examples, 7, seed=0)
  prompts = lambda side: {example.tokens[0] for example in side}
  assert not prompts(rest) & prompts(taken)
  assert len(taken) == 6
  assert "6 rows, not 7" in note


def test_rows_of_one_prompt_are_told_apart_by_nothing_which_is_said():
  rest, taken, note = held_out.parted(texts([5] * 12), 4, seed=0)
  assert (len(rest), len(taken)) == (8, 4)
  assert "prompts of held-out rows are trained on too" in note
