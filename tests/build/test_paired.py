"""Online DPO's batches: the best and the worst answer to each prompt, and what is no pair."""

import dataclasses
import types

import numpy as np
import pytest

from posttrain_jax import settings
from posttrain_jax.build import methods
from tests.build.test_updates import CONFIG, GROUPS, MODEL, group

STATE = types.SimpleNamespace()


def made(**fields):
  fields = {"batch.rows": 2, "online.samples": 3, "data.length": 64} | fields
  overrides = [settings.override(k, v) for k, v in fields.items()]
  return methods.make(settings.load(f"{CONFIG}:method=online_dpo", overrides), MODEL.vocab_size)


def texts(batch, row):
  """What the answers of a row are, slot by slot."""
  of = lambda slot: batch["tokens"][row][batch["loss_mask"][row] & (batch["answer"][row] == slot)]
  return [of(slot).tolist() for slot in (0, 1)]


def test_a_pair_is_the_best_and_the_worst_answer():
  """One without a score is neither."""
  ((batch,), told) = made().of(GROUPS, STATE, 1)
  tokens = lambda g, i: GROUPS[g].written[i].tokens
  assert texts(batch, 0) == [tokens(0, 0), tokens(0, 1)]  # 1.0 and 0.0
  assert texts(batch, 1) == [tokens(1, 2), tokens(1, 0)]  # 0.9 and 0.2
  assert batch["present"].all()
  assert told == {"pairs/tied": 0}
  np.testing.assert_array_equal(GROUPS[1].advantages, [-1, 0, 1])
  assert "sampling_logps" not in batch


@pytest.mark.parametrize("scores", [(0.5, 0.5, 0.5), (0.3, 0.1 + 0.2, None), (None, 1.0, None)])
def test_a_group_that_ties_is_no_pair_and_counted(scores):
  """Where one is better by rounding alone, and where there is no other, too."""
  ((batch,), told) = made().of([GROUPS[0], group(1, [8, 9], scores)], STATE, 1)
  np.testing.assert_array_equal(batch["present"], [[True, True], [False, False]])
  assert not batch["segment_ids"][1].any()
  assert told == {"pairs/tied": 0.5}


def test_a_group_without_a_score_is_no_tie():
  nothing = group(1, [8, 9], (None, None, None))
  ((batch,), told) = made().of([GROUPS[0], nothing], STATE, 1)
  assert told == {"pairs/tied": 0}
  assert not batch["present"][1].any()
  assert made().of([nothing, nothing], STATE, 1)[1] == {}


def test_two_answers_of_the_same_words_are_no_pair():
  """However they were scored."""
  first = GROUPS[0].written[0]
  same = dataclasses.replace(GROUPS[0], written=dict.fromkeys(range(3), first))
  ((batch,), told) = made(**{"batch.rows": 1}).of([same], STATE, 1)
  assert told == {"pairs/tied": 1}
  assert not batch["present"].any()


def test_answers_that_were_cut_are_of_no_pair_where_that_is_asked():
  is_cut = {0: dataclasses.replace(GROUPS[0].written[0], ended="max_new_tokens")}
  one = dataclasses.replace(GROUPS[0], written=GROUPS[0].written | is_cut)
  ((batch,), _) = made(**{"online.mask_cut": True, "batch.rows": 1}).of([one], STATE, 1)
  assert texts(batch, 0) == [one.written[2].tokens, one.written[1].tokens]  # 0.5 and 0.0
  ((batch,), _) = made(**{"online.cut_penalty": 0.7, "batch.rows": 1}).of([one], STATE, 1)
  assert texts(batch, 0) == [one.written[2].tokens, one.written[1].tokens]


def test_later_passes_have_the_same_pairs():
  batches, _ = made(**{"online.passes": 2, "online.minibatches": 2, "batch.rows": 1}).of(
    GROUPS, STATE, 1
  )
  assert len(batches) == 4
  first = sorted(batch["tokens"].tobytes() for batch in batches[:2])
  assert sorted(batch["tokens"].tobytes() for batch in batches[2:]) == first
  assert {*made().blank()} == {*batches[0]}
