"""What curves of a known shape are said to be."""

import numpy as np
import pytest

from posttrain_jax.evals import curve_advice
from posttrain_jax.runs import record
from tests.evals import runs
from tests.evals.test_report import ONLINE

DRAW = np.random.default_rng(0)
T = np.arange(100)


def said(folder, series, config=None):
  """All sentences about these series: {metric: values}, of 100 steps, held-out ones every tenth."""
  lines = []
  for t in T:
    row = {n: float(v[t]) for n, v in series.items() if not n.startswith("eval_")}
    lines.append({"step": int(t) + 1, **row})
    held_out = {n: float(v[t]) for n, v in series.items() if n.startswith("eval_")}
    if held_out and t % 10 == 9:
      lines.append({"step": int(t) + 1, **held_out})
  return " ".join(curve_advice.read(record.read(runs.write(folder, lines=lines, config=config))))


def of(objective):
  return dict(runs.CONFIG, objective=objective)


def noisy(values):
  return np.asarray(values) + 0.02 * DRAW.standard_normal(100)


FALLING, RISING, FLAT = noisy(2 - T / 100), noisy(1 + T / 100), noisy(np.full(100, 1.5))


@pytest.mark.parametrize(
  ("series", "sentence"),
  [
    ({"loss": FALLING}, "The training loss fell, from 1.9"),
    ({"loss": RISING}, "The training loss rose, from 1.0"),
    ({"loss": RISING}, "optimizer.lr (now 0.0002)"),
    ({"loss": FLAT}, "The training loss is flat, from 1.5 to 1.5"),
    ({"loss": FALLING, "eval_loss": 2.1 - T / 100}, "The held-out loss fell, from 2.01 to 1.11"),
    (
      {"loss": FALLING, "eval_loss": 1 + ((T - 39) / 60) ** 2},
      "was lowest at step 40 (1) and ended at 2 while the training loss fell: they part",
    ),
    ({"loss": FALLING, "eval_loss": np.full(100, 1.5)}, "The held-out loss is flat"),
    (
      {"loss": np.where(T == 60, 9.0, FALLING)},
      "The training loss spikes at step 61 and comes back",
    ),
    (
      {"loss": FALLING, "grad_norm": np.where(T % 30 == 29, 50, 1.0)},
      "spikes at 3 steps (30, 60, 90)",
    ),
    ({"loss": np.where(T == 7, np.nan, FALLING)}, "is not a number at step 8"),
    ({"loss": FALLING, "skipped": np.minimum(T, 3)}, "3 updates were skipped"),
    (
      {"loss": FALLING, "eval_loss/sql": 2 - T / 100, "eval_loss/chat": 1 + T / 100},
      "The held-out loss of 'chat' rose while that of other channels fell",
    ),
    (
      {"loss": FALLING, "loss/special/end_of_turn": np.full(100, 2.3)},
      "The loss of end of turn tokens is still 2.3: the model gives them 10%",
    ),
  ],
)
def test_curves_of_fine_tuning(series, sentence, tmp_path):
  assert sentence in said(tmp_path / "a", series)


def test_a_healthy_run_is_not_complained_of(tmp_path):
  text = said(
    tmp_path / "a", {"loss": FALLING, "eval_loss": FALLING, "grad_norm": noisy(np.ones(100))}
  )
  assert "spike" not in text
  assert "flat" not in text
  assert "rose" not in text


LEARNED = 1 - np.exp(-T / 30)


@pytest.mark.parametrize(
  ("series", "sentence"),
  [
    (
      {"eval_rewards/accuracies": 0.5 + 0.3 * LEARNED},
      "79% of the held-out pairs are ordered right",
    ),
    (
      {"rewards/accuracies": np.full(100, 0.51)},
      "51% of the training pairs are ordered right, which is hardly",
    ),
    (
      {"rewards/accuracies": np.full(100, 1.0), "eval_rewards/accuracies": np.full(100, 0.7)},
      "Training accuracy (100%) and held-out accuracy (70%) part",
    ),
    ({"rewards/margins": np.zeros(100)}, "The margin is flat at 0"),
    (
      {"rewards/chosen": -LEARNED, "rewards/rejected": -3 * LEARNED},
      "Rewards of chosen and rejected answers both fell",
    ),
    (
      {
        "rewards/accuracies/chosen_longer": np.ones(100),
        "rewards/accuracies/chosen_shorter": np.full(100, 0.4),
      },
      "ordered right in 100%, those where it is shorter in 40%: the run has learned length",
    ),
    ({"eval_kl": 0.9 * LEARNED}, "The KL to the reference is 0.87 nats a token, which is far"),
    ({"eval_kl": 0.1 * LEARNED}, "The policy is 0.096 nats a token from its reference"),
  ],
)
def test_curves_of_preferences(series, sentence, tmp_path):
  assert sentence in said(tmp_path / "a", {"loss": FALLING, **series}, of(runs.PREFERENCE))


def test_rewards_that_part_are_not_displacement(tmp_path):
  series = {"loss": FALLING, "rewards/chosen": LEARNED, "rewards/rejected": -LEARNED}
  assert "displacement" not in said(tmp_path / "a", series, of(runs.PREFERENCE))


@pytest.mark.parametrize(
  ("changes", "is_zero"),
  [
    ({}, True),
    ({"old": "reference"}, False),
    ({"loss": "cispo"}, False),
    ({"kl_weight": 0.1}, False),
  ],
)
def test_a_loss_of_zero_is_explained_where_it_is_zero(changes, is_zero, tmp_path):
  text = said(tmp_path / "a", {"loss": 1e-9 * FLAT}, of({**runs.GROUPED, **changes}))
  assert ("The loss stays near 0, and that is right" in text) is is_zero
  assert ("The value of a policy-gradient loss does not say" in text) is not is_zero
  assert "raise optimizer.lr" not in text


def test_groups_that_teach_nothing_and_clipped_tokens(tmp_path):
  series = {
    "loss": FLAT,
    "frac_reward_zero_std": np.full(100, 0.6),
    "clip_ratio/high_mean": 0.4 * LEARNED,
  }
  text = said(tmp_path / "a", series, of(runs.GROUPED))
  assert "60% of the answers are in groups of one score" in text
  assert "of the tokens are clipped (high)" in text


def test_the_noise_of_a_short_run_is_no_trend(tmp_path):
  assert curve_advice.curve([1], [2.0]) is None
  assert curve_advice.spikes([1, 2], [1.0, 99.0]) == []
  assert curve_advice.read(record.read(runs.write(tmp_path / "a"))) == []


def test_one_held_out_loss_is_not_said_to_be_none(tmp_path):
  lines = [{"step": t, "loss": 3 - t / 10} for t in range(1, 25)]
  lines.append({"step": 24, "eval_loss": 0.7})
  (sentence, *_) = curve_advice.read(record.read(runs.write(tmp_path / "run", lines=lines)))
  assert "fell" in sentence
  assert sentence.endswith("two held-out losses or more: set eval.every.")


@pytest.mark.parametrize(
  ("lost", "sentence"),
  [
    ({"rewards/missing": 0.5, "rewards/mine.py:f/missing": 0.0}, "50% of the answers have no reward, and nothing is"),
    ({"rewards/missing": 0.5, "rewards/mine.py:f/missing": 0.0}, "No part of the reward applies to their rows"),
    ({"rewards/missing": 0.1, "rewards/mine.py:f/missing": 0.1}, "On them mine.py:f failed: the column missing"),
    ({"rewards/missing": 0.01, "rewards/mine.py:f/missing": 0.01}, None),
  ],
)  # fmt: skip
def test_answers_without_a_reward_are_said(lost, sentence, tmp_path):
  series = {name: np.full(100, share) for name, share in lost.items()}
  text = said(tmp_path / "a", {"reward": RISING, **series}, ONLINE)
  assert (sentence in text) if sentence else ("no reward" not in text)
