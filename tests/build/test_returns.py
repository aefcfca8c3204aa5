"""PPO's batches: what each token is paid, what was expected there, and what of it the policy and the critic learn."""

import dataclasses
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import settings
from posttrain_jax.build import critic, methods, objective
from posttrain_jax.build.model import Model
from posttrain_jax.models import decoder
from posttrain_jax.objectives import CRITIC, Context
from posttrain_jax.rewards import score
from posttrain_jax.rewards.reward import Scored
from tests.build.test_updates import (
  CONFIG,
  CONTEXT,
  GROUPS,
  HEAT,
  MODEL,
  POLICY,
  TRAINABLE,
  logps_of,
)
from tests.build.test_updates import group as group_of

HEAD = np.random.default_rng(9).normal(0, 0.4, (MODEL.hidden_size, 1)).astype(np.float32)
OTHER = {**TRAINABLE, CRITIC: {"score": {"weight": jnp.asarray(HEAD)}}}
FIXED = {**CONTEXT.fixed, CRITIC: {"score": {"weight": None}}}
THERE = Context(CONTEXT.base, FIXED)
STATE = types.SimpleNamespace(trainable=OTHER, context=lambda context: context)


def made(**fields):
  small = {"online.temperature": HEAT, "batch.rows": 2, "online.samples": 3, "data.length": 64}
  fields = small | {"critic.trunk": "shared", "online.passes": 1} | fields
  config = settings.load(
    f"{CONFIG}:method=ppo", [settings.override(k, v) for k, v in fields.items()]
  )
  model = Model(pathlib.Path(), None, MODEL, None, None, jnp.float32)
  result = methods.make(config, MODEL.vocab_size)
  result.bind(types.SimpleNamespace(context=THERE), objective.make(config, model, ()))
  return result


@jax.jit
def every_value(params, tokens):
  return (decoder.hidden(params, tokens[None], MODEL) @ HEAD)[0, :, 0]


def values_of(group):
  """[tokens] of each answer alone: the value of the text before each."""
  start, of_answers = len(group.prompt.tokens), []
  for answer in group.answers:
    text = np.zeros(8, np.int32)
    count = len(answer.tokens)
    text[: start + count] = [*group.prompt.tokens, *answer.tokens]
    values = every_value(POLICY, jnp.asarray(text))
    of_answers.append(np.asarray(values[start - 1 : start - 1 + count], np.float64))
  return of_answers


def collected(rewards, values, gamma, lam):
  """(advantages, returns), by their sums."""
  v = np.append(values, 0)
  delta = rewards + gamma * v[1:] - v[:-1]
  count = len(rewards)
  advantages = np.asarray(
    [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, count)) for t in range(count)]
  )
  return advantages, advantages + values


def expected(groups, *, gamma=1.0, lam=1.0, kl_weight=0.0, penalty=0.0):
  """{(group, answer): (advantages, returns, values, rewards)} of what has a score; KL by k1."""
  known = {}
  for g, group in enumerate(groups):
    ours, theirs = (logps_of(p, group, False) for p in (POLICY, CONTEXT.base))
    for a, (answer, value) in enumerate(zip(group.answers, group.scores)):
      if np.isnan(value):
        continue
      rewards = -kl_weight * (ours[a] - theirs[a])
      rewards[-1] += value - penalty * (not answer.finished)
      values = values_of(group)[a]
      known[g, a] = (*collected(rewards, values, gamma, lam), values, rewards)
  return known


def told_of(batch, row, slot):
  """{name: [tokens]} of an answer, in the order of its text."""
  answer = np.roll(batch["answer"][row], -1)
  mask = np.roll(batch["loss_mask"][row], -1)
  mask[-1] = False
  at = np.flatnonzero(mask & (answer == slot))
  names = ("advantages", "returns", "old_values")
  return {name: batch[name][row][at] for name in names}


def test_what_tokens_learn_is_gae_of_their_rewards_whitened_over_the_batch():
  """Of two groups, one of which has an answer without a score; the KL is each token's, the score the last one's."""
  how = dict(gamma=0.9, lam=0.8)
  updates = made(**{f"critic.{k}": v for k, v in how.items()} | {"online.kl_in_reward": 0.3})
  ((batch,), told) = updates.of(GROUPS, STATE, 1)
  known = expected(GROUPS, **how, kl_weight=0.3)
  every = np.concatenate([x[0] for x in known.values()])
  white = lambda x: (x - every.mean()) / np.sqrt(every.var(ddof=1) + 1e-8)
  slots = {(0, 0): 0, (0, 1): 1, (0, 2): 2, (1, 0): 0, (1, 2): 1}
  for (g, a), (advantages, returns, values, _) in known.items():
    found = told_of(batch, g, slots[g, a])
    np.testing.assert_allclose(found["old_values"], values, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["returns"], returns, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["advantages"], white(advantages), rtol=2e-3, atol=1e-3)
    assert batch["advantage"][g, slots[g, a]] == pytest.approx(white(advantages).mean(), abs=1e-3)
    assert GROUPS[g].advantages[a] == pytest.approx(white(advantages).mean(), abs=1e-3)
  assert np.isnan(GROUPS[1].advantages[1])
  r, v = (np.concatenate([x[i] for x in known.values()]) for i in (1, 2))
  assert told["critic/vf_explained_var"] == pytest.approx(1 - np.var(r - v) / np.var(r), rel=1e-3)
  paid = [logps_of(POLICY, g, False)[a] - logps_of(CONTEXT.base, g, False)[a]
          for g in GROUPS for a in range(3) if not np.isnan(g.scores[a])]  # fmt: skip
  assert told["reward_kl_penalty"] == pytest.approx(np.mean([x.sum() for x in paid]), rel=1e-3)


def test_returns_may_have_a_lambda_of_their_own():
  """VAPO's: the critic learns whole returns, the policy from advantages of less variance."""
  updates = made(**{"critic.lam": 0.5, "critic.returns_lam": 1.0, "critic.whiten": False})
  ((batch,), _) = updates.of(GROUPS, STATE, 1)
  near, far = expected(GROUPS, lam=0.5), expected(GROUPS, lam=1.0)
  found = told_of(batch, 0, 2)
  np.testing.assert_allclose(found["advantages"], near[0, 2][0], rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(found["returns"], far[0, 2][1], rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(far[0, 2][1], 0.5, atol=1e-9)  # its score, from each token on


def cut(group, *which):
  """The group, these of whose answers were cut."""
  written = {
    i: dataclasses.replace(a, ended="max_new_tokens" if i in which else a.ended)
    for i, a in group.written.items()
  }
  return dataclasses.replace(group, written=written)


def test_an_answer_that_was_cut_is_charged_for_it():
  groups = [cut(GROUPS[0], 1), GROUPS[1]]
  ((batch,), _) = made(**{"online.cut_penalty": 0.7}).of(groups, STATE, 1)
  np.testing.assert_allclose(told_of(batch, 0, 1)["returns"], -0.7, atol=1e-6)
  np.testing.assert_allclose(told_of(batch, 0, 0)["returns"], 1.0, atol=1e-6)


def test_an_answer_without_a_token_is_paid_nowhere():
  """Its score is no other answer's: not that before it in the row, and not at the row's end."""
  groups = [cut(GROUPS[0], 0, 1, 2), cut(GROUPS[1], 2)]
  ((batch,), told) = made(**{"online.mask_cut": True, "critic.whiten": False}).of(groups, STATE, 1)
  for name in ("advantages", "returns", "old_values", "advantage"):
    assert not batch[name][0].any()
    assert np.isfinite(batch[name]).all()
  np.testing.assert_allclose(told_of(batch, 1, 0)["returns"], 0.2, atol=1e-6)
  assert np.count_nonzero(batch["returns"]) == 2
  assert "critic/vf_explained_var" not in told  # returns of one answer agree


def test_a_batch_without_any_score_teaches_nothing():
  blank = [group_of(i, [5, 6], (None, None, None)) for i in range(2)]
  ((batch,), told) = made(**{"online.kl_in_reward": 0.1}).of(blank, STATE, 1)
  assert told == {}
  assert not batch["present"].any()
  assert not batch["advantages"].any()


def test_rows_of_later_passes_keep_what_is_known_of_them():
  """Log-probabilities, values and advantages are those before the first update, and of the whole written batch."""
  updates = made(**{"online.passes": 3, "online.minibatches": 2, "batch.rows": 1})
  batches, _ = updates.of(GROUPS, STATE, 1)
  assert len(batches) == 6
  by_prompt = {}
  for batch in batches:
    by_prompt.setdefault(batch["tokens"].tobytes(), []).append(batch)
  assert [len(same) for same in by_prompt.values()] == [3, 3]
  for same in by_prompt.values():
    for other in same[1:]:
      jax.tree.map(np.testing.assert_array_equal, same[0], other)
  assert jax.tree.structure(updates.blank()) == jax.tree.structure(batches[0])
  ((whole,), _) = made().of(GROUPS, STATE, 1)
  np.testing.assert_allclose(batches[1]["advantages"][0], whole["advantages"][1], atol=1e-5)


def test_the_weight_of_the_kl_is_moved_for_the_next_batch():
  updates = made(
    **{"online.kl_in_reward": 0.2, "online.kl_target": 1e-3, "online.kl_horizon": 10.0}
  )
  _, told = updates.of(GROUPS, STATE, 1)
  assert told["reward_kl_coefficient"] == pytest.approx(0.2)
  assert updates.kl_coefficient == pytest.approx(0.2 * (1 + 0.2 * 5 / 10))  # five answers
  _, told = updates.of(GROUPS, STATE, 2)
  assert told["reward_kl_coefficient"] == pytest.approx(0.22)


def test_a_run_whose_critic_learns_alone_to_its_end_says_so():
  config = made(**{"critic.warmup": 4, "steps": 9}).config
  assert "policy stays" not in critic.told(config, OTHER)
  config = made(**{"critic.warmup": 4, "steps": 4}).config
  assert "the run has 4: the policy stays as it is; lower critic.warmup" in critic.told(
    config, OTHER
  )


def test_one_answer_a_prompt_is_enough():
  one = [dataclasses.replace(g, written={0: g.written[0]}, scored=g.scored[:1]) for g in GROUPS]
  ((batch,), _) = made(**{"online.samples": 1}).of(one, STATE, 1)
  np.testing.assert_allclose(told_of(batch, 0, 0)["returns"], 1.0, atol=1e-6)
  np.testing.assert_allclose(told_of(batch, 1, 0)["returns"], 0.2, atol=1e-6)


def test_huge_scores_are_not_rounded_before_their_advantage():
  group = dataclasses.replace(
    GROUPS[0], scored=[Scored(score.of(s), {}) for s in (1000.0, 1000.001, 1000.002)]
  )
  ((batch,), _) = made(**{"batch.rows": 1}).of([group], STATE, 1)
  values = values_of(group)
  raw = np.concatenate([s - v for s, v in zip(group.scores, values)])
  wanted = (raw - raw.mean()) / np.sqrt(raw.var(ddof=1) + 1e-8)
  found = np.concatenate([told_of(batch, 0, i)["advantages"] for i in range(3)])
  np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
