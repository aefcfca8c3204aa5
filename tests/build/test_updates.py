"""From groups of scored answers to batches: rewards less the KL, and what was drawn among."""

import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import adapters, settings
from posttrain_jax.build import objective, updates
from posttrain_jax.build.groups import Group
from posttrain_jax.build.model import Model
from posttrain_jax.build.prompts import Prompt
from posttrain_jax.core import bits, tree
from posttrain_jax.losses import advantage
from posttrain_jax.models import decoder
from posttrain_jax.rewards import score
from posttrain_jax.rewards.reward import Scored
from posttrain_jax.rollout.requests import Answer, Request
from tests import tiny

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "rl.py"
MODEL, TRAINABLE, CONTEXT = tiny.setup("lora")
STATE = types.SimpleNamespace(trainable=TRAINABLE, context=lambda context: context)
POLICY = adapters.bind(CONTEXT.base, tree.combine(TRAINABLE, CONTEXT.fixed))
HEAT = 0.7


def made(**fields):
  small = {"online.temperature": HEAT, "batch.rows": 2, "online.samples": 3, "data.length": 64}
  fields = small | fields
  config = settings.load(str(CONFIG), [settings.override(k, v) for k, v in fields.items()])
  model = Model(pathlib.Path(), None, MODEL, None, None, jnp.float32)
  result = updates.Updates(config, MODEL.vocab_size)
  result.bind(types.SimpleNamespace(context=CONTEXT), objective.make(config, model, ()))
  return result


def group(number, prompt, scores):
  """Answers of 2, 3 and 4 tokens, drawn among two tokens in three."""
  rng = np.random.default_rng(number)
  written = []
  for length in (2, 3, 4):
    tokens = rng.integers(3, 250, length)
    kept = rng.random((length, MODEL.vocab_size)) < 2 / 3
    kept[np.arange(length), tokens] = True
    packed = np.asarray(bits.pack(jnp.asarray(kept)))
    logps = np.zeros(length, np.float32)
    written.append(Answer(Request(prompt, 4), tokens.tolist(), logps, "stop_token", packed))
  scored = [Scored(score.of(s) if s is not None else score.missing("-"), {}) for s in scores]
  asked = Prompt(np.asarray(prompt, np.int32), "?", {}, "row")
  return Group(number, asked, dict(enumerate(written)), [""] * 3, scored)


GROUPS = [
  group(0, [5, 6, 7], (1.0, 0.0, 0.5)),
  group(1, [8, 9], (0.2, None, 0.9)),
]


@jax.jit
def every_logit(params, tokens):
  return decoder.logits(params, decoder.hidden(params, tokens[None], MODEL), MODEL)[0] / HEAT


def logps_of(params, group, among):
  """[tokens] of each answer alone, by the whole logits."""
  start = len(group.prompt.tokens)
  of_answers = []
  for answer in group.answers:
    count = len(answer.tokens)
    text = np.zeros(8, np.int32)  # what follows is not seen
    text[: start + count] = [*group.prompt.tokens, *answer.tokens]
    logits = every_logit(params, jnp.asarray(text))[start - 1 : start - 1 + count]
    if among:
      logits = jnp.where(bits.unpack(jnp.asarray(answer.kept), MODEL.vocab_size), logits, -jnp.inf)
    logps = jax.nn.log_softmax(logits)[np.arange(count), np.asarray(answer.tokens)]
    of_answers.append(np.asarray(logps, np.float64))
  return of_answers


def divergence(group, estimate, among):
  """[answers]."""
  sums = []
  for ours, theirs in zip(*(logps_of(params, group, among) for params in (POLICY, CONTEXT.base))):
    u = theirs - ours
    sums.append((-u if estimate == "k1" else np.exp(u) - 1 - u).sum())
  return np.asarray(sums)


@pytest.mark.parametrize(("estimate", "among"), [("k1", True), ("k3", False)])
def test_the_kl_is_taken_off_the_reward_before_the_advantage(estimate, among):
  """Of the distribution that was drawn from: at its temperature, among what was kept."""
  weight = 0.3
  made_updates = made(
    **{
      "online.kl_in_reward": weight,
      "online.kl_in_reward_estimator": estimate,
      "online.top_p": 0.9 if among else 1.0,
      "objective.advantage": "none",
    }
  )
  ((batch,), told) = made_updates.of(GROUPS, STATE, 1)
  expected, penalties = [], []
  for one in GROUPS:
    penalty = divergence(one, estimate, among)
    expected.append(one.scores - weight * penalty)
    penalties.append(penalty[~np.isnan(one.scores)])
  assert np.abs(np.concatenate(penalties)).min() > 1e-3
  wanted = np.asarray(advantage.named("none", jnp.asarray(expected, jnp.float32)))
  np.testing.assert_allclose(batch["advantage"][0], wanted[0], rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(batch["advantage"][1], [*wanted[1, [0, 2]], 0], rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(told["reward_kl_penalty"], np.concatenate(penalties).mean(), rtol=1e-3)
  np.testing.assert_array_equal(batch["score"][0], np.float32([1.0, 0.0, 0.5]))  # as it was scored
  assert ("kept" in batch) == among


def test_old_log_probabilities_are_of_what_was_kept():
  made_updates = made(**{"online.top_p": 0.9, "batch.rows": 1, "online.minibatches": 2})
  batches, _ = made_updates.of(GROUPS, STATE, 1)
  for one, batch in zip(GROUPS, batches, strict=True):
    known = [x for x, s in zip(logps_of(POLICY, one, True), one.scores) if not np.isnan(s)]
    found = batch["old_logps"][batch["old_logps"] != 0]
    np.testing.assert_allclose(np.sort(found), np.sort(np.concatenate(known)), rtol=1e-4)


def test_a_batch_without_any_score_has_no_kl_to_tell():
  blank = [group(i, [5, 6], (None, None, None)) for i in range(2)]
  ((batch,), told) = made(**{"online.kl_in_reward": 0.1}).of(blank, STATE, 1)
  assert told == {}
  np.testing.assert_array_equal(batch["advantage"], 0)


def test_a_group_without_any_score_counts_nowhere():
  """Not in what a loss is divided by, in no mean, and no token of it under a KL in the loss."""
  blank = group(2, [5, 6], (None, None, None))
  ((alone,), _) = made().of(GROUPS, STATE, 1)
  ((beside,), _) = made(**{"batch.rows": 3}).of([GROUPS[0], blank, GROUPS[1]], STATE, 1)
  np.testing.assert_array_equal(beside["present"].sum(axis=1), [3, 0, 2])
  assert not beside["segment_ids"][1].any()
  for name, value in alone.items():
    np.testing.assert_array_equal(beside[name][[0, 2]], value, err_msg=name)


def test_rewards_are_not_rounded_before_their_advantage():
  offset, huge = [1000.0, 1000.001, 1000.0005], [0.0, 1e30, 3e30]
  groups = [group(0, [5, 6, 7], offset), group(1, [8, 9], huge)]
  ((batch,), _) = made().of(groups, STATE, 1)
  for found, rewards in zip(batch["advantage"], np.asarray([offset, huge])):
    wanted = (rewards - rewards.mean()) / (rewards.std(ddof=1) + advantage.EPSILON)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
