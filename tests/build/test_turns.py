"""What an episode is worth, what is told of it, and which of its tokens a batch learns from."""

import types

import numpy as np
import pytest

from posttrain_jax.build import turns, updates
from posttrain_jax.build.groups import Group, table
from posttrain_jax.build.prompts import Prompt
from posttrain_jax.environments import episode as kinds
from posttrain_jax.environments.episode import Episode
from posttrain_jax.rewards import score
from posttrain_jax.rewards.environment import Environment
from posttrain_jax.rewards.reward import Part, Result, Reward, Scored
from posttrain_jax.rewards.trl import Function
from posttrain_jax.rollout.requests import Answer, Request
from tests.build import test_paired, test_updates


def episode(written, ended="stop_token", prompt=(5, 6), **fields):
  written = np.asarray(written, bool)
  tokens = [*range(10, 10 + len(written))]
  logps = np.where(written, -0.5 - np.arange(len(written)), 0.0).astype(np.float32)
  return Episode(Request(prompt, 40), tokens, logps, ended, written=written, **fields)


WHOLE = episode([1, 1, 0, 0, 1], turns=2, calls=1)
UNPARSED = episode([1, 1], kinds.UNPARSED, turns=1, problem="no JSON")
FAILED = episode([1], kinds.FAILED, turns=1, problem="mine.py:3: raised ValueError: x")
CUT = episode([1, 0, 1], kinds.MAX_TURNS, turns=2, calls=3, failures=2)


def scored(*values):
  return Result(tuple(Scored(score.of(v), {"p": score.of(v)}) for v in values), {}, {}, 0)


def test_a_turn_that_cannot_be_read_has_its_own_score_and_a_failed_environment_has_none():
  result = turns.settled(scored(1.0, 1.0, 1.0, 0.25), [WHOLE, UNPARSED, FAILED, CUT], -2.0)
  assert [one.total.value for one in result.answers] == [1.0, -2.0, None, 0.25]
  assert result.answers[2].total.reason == "environment: mine.py:3: raised ValueError: x"
  assert result.metrics["reward"] == pytest.approx((1.0 - 2.0 + 0.25) / 3)
  asked = Reward([Part("p", Environment(), range=(0, 1))]).outcome("p")
  assert [asked.value(one) for one in result.answers] == [1.0, -2.0, None, 0.25]
  assert [asked.is_right(one) for one in result.answers] == [True, False, False, False]
  ((part, reason),) = result.missing
  assert (part, reason) == ("reward", "raised ValueError")


def test_answers_of_one_turn_stay_as_they_are():
  answers = [Answer(Request([5], 2), [7], np.zeros(1, np.float32), "stop_token")]
  given = scored(1.0)
  assert turns.settled(given, answers, -2.0) is given
  assert turns.metrics(answers) == {}
  assert turns.columns(answers[0]) == {}


def test_turns_calls_failures_and_the_share_of_others_tokens_are_told():
  told = turns.metrics([WHOLE, UNPARSED, FAILED, CUT])
  assert told["turns/mean"] == 1.5
  assert told["turns/unparsed"] == told["turns/failed"] == told["turns/cut"] == 0.25
  assert told["turns/masked_share"] == pytest.approx(3 / 11)
  assert told["tools/call_frequency"] == 1.0
  assert told["tools/failure_frequency"] == 0.5
  assert "tools/failure_frequency" not in turns.metrics([UNPARSED])


def test_a_batch_learns_from_what_the_model_wrote_alone_in_all_turns():
  other = episode(
    [1, 0, 1, 1], prompt=(5, 6, 9)
  )  # an environment has said something behind this prompt
  prompt = Prompt(np.asarray([5, 6], np.int32), "?", {}, "row")
  values = [Scored(score.of(v), {}) for v in (1.0, 0.0)]
  group = Group(0, prompt, {0: WHOLE, 1: other}, ["", ""], values)
  made = updates.Updates.__new__(updates.Updates)
  made.config = test_updates.made(**{"online.temperature": 1.0}).config
  made.words = 0
  joined = made._example(group, np.asarray([1.0, -1.0]))
  assert joined is not None
  for place, answer in enumerate((WHOLE, other)):
    of_it = (joined.answer == place) & joined.mask
    assert joined.tokens[of_it].tolist() == [
      t for t, w in zip(answer.tokens, answer.written, strict=True) if w
    ]
    np.testing.assert_array_equal(joined.sampling_logps[of_it], answer.logps[answer.written])
  assert int(joined.mask.sum()) == WHOLE.drawn + other.drawn
  assert not joined.sampling_logps[~joined.mask].any()
  # each reads its own prompt and all that was said
  first = joined.tokens[(joined.answer == 0) | (joined.answer < 0)].tolist()
  assert first == [5, 6, *WHOLE.tokens]
  assert joined.tokens[joined.answer == 1].tolist()[-5:] == [9, *other.tokens]


def test_a_pair_of_episodes_learns_from_what_the_model_wrote_alone():
  other = episode([1, 0, 1, 1], prompt=(5, 6, 9))  # an environment has spoken behind this prompt
  prompt = Prompt(np.asarray([5, 6], np.int32), "?", {}, "row")
  values = [Scored(score.of(v), {}) for v in (0.0, 1.0)]
  group = Group(0, prompt, {0: WHOLE, 1: other}, ["", ""], values)
  ((batch,), _) = test_paired.made(**{"batch.rows": 1, "online.samples": 2}).of([group], None, 1)
  tokens, mask, answer = (batch[name][0] for name in ("tokens", "loss_mask", "answer"))
  for slot, one in enumerate((other, WHOLE)):
    wrote = [t for t, w in zip(one.tokens, one.written, strict=True) if w]
    assert tokens[(answer == slot) & mask.astype(bool)].tolist() == wrote
    here = tokens[(answer == slot) & (batch["segment_ids"][0] > 0)].tolist()
    assert here[-len(one.tokens) :] == one.tokens
  assert 9 in tokens[answer == 0].tolist()


def test_the_table_of_answers_has_turns_and_messages():
  said = [{"role": "assistant", "content": "a"}]
  one = episode([1], turns=1, calls=0, messages=said)
  part = Scored(score.of(1.0), {"p": score.of(1.0)})
  prompt = Prompt(np.asarray([5], np.int32), "?", {}, "row")
  group = Group(0, prompt, {0: one}, ["a"], [part], advantages=[0.0])
  reward = Reward([Part("p", lambda *_: 1.0)])
  (row,) = table(1, [group], [group], reward)
  assert (row["turns"], row["calls"], row["messages"]) == (
    1,
    0,
    '[{"role": "assistant", "content": "a"}]',
  )


def test_parts_that_read_an_environment_are_not_tried_before_there_is_one():
  reads = lambda environments, **columns: []
  plain = Part("p", lambda *_: 1.0)
  both = Reward([plain, Part("e", Environment()), Part("f", Function(reads, "f"))])
  assert turns.testable(both).names == ("p",)
  assert turns.testable(Reward([Part("e", Environment())])) is None


def test_options_of_what_is_built_in_are_the_runs():
  config = types.SimpleNamespace(
    online=types.SimpleNamespace(environment="python", tools=("python",)),
    reward=types.SimpleNamespace(unsafe_code=True),
  )
  source = turns.tools.source(config)
  assert dict(source.options) == {"unsafe_code": True}
  assert source.name == "python"
