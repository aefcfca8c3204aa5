"""PPO, online DPO and a curriculum on a tiny model, as a user runs them: they learn, and go on bit by bit."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from posttrain_jax.__main__ import main
from posttrain_jax.runs import completions
from tests import tiny
from tests.commands.test_rl import VERIFIERS, WORDS, adapter, command, lines, same

pytestmark = pytest.mark.usefixtures("in_float32", "one_device")

PPO = ("online.passes=2", "critic.warmup=1", "online.kl_in_reward=0.1", "online.kl_target=0.5")
PPO = (*PPO, "online.kl_horizon=10.0", "online.cut_penalty=0.5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("rl")
  tiny.tiny_model_folder(folder / "model")
  rows = [{"prompt": f"Say {word}", "answer": word} for word in WORDS]
  tiny.write_jsonl(folder / "prompts.jsonl", rows)
  (folder / "verify.py").write_text(VERIFIERS)
  return folder


@pytest.mark.parametrize(
  ("method", "changes"),
  [
    ("ppo", (*PPO, "online.curriculum=pass_rate")),
    pytest.param("ppo", ("critic.trunk=shared", "online.samples=1"), marks=pytest.mark.slow),
    pytest.param("online_dpo", ("online.passes=2",), marks=pytest.mark.slow),
  ],
)
def test_a_run_that_is_stopped_ends_as_one_that_is_not(folder, tmp_path, method, changes):
  """The critic's own weights and moments, the coefficient of the KL and the curriculum are in the checkpoint."""
  name = f"{folder / 'verify.py'}:early"
  every = [
    *changes,
    "checkpoint.every=1",
    "checkpoint.keep=9",
    f"reward.ranges={{'{name}': (0, 1)}}",
  ]
  run = lambda where, *more: main(command(folder, tmp_path / where, *every, *more, method=method))
  assert run("whole") == 0
  assert run("parts", "steps=1") == 0
  assert run("parts") == 0
  same(adapter(tmp_path / "whole"), adapter(tmp_path / "parts"))
  clocks = lambda line: {
    k: v for k, v in line.items() if not k.startswith(("timing", "tokens_per"))
  }
  assert [clocks(x) for x in lines(tmp_path / "whole")] == [
    clocks(x) for x in lines(tmp_path / "parts")
  ]
  for number in completions.numbers(tmp_path / "whole"):
    one, other = (completions.rows(tmp_path / where, number) for where in ("whole", "parts"))
    assert one == other


def test_ppo_learns_what_its_critic_expects(folder, tmp_path, capsys):
  """The critic learns alone at first; what is exported is the policy, and has no critic."""
  changes = ["steps=6", "online.passes=3", "critic.warmup=3", "critic.lr=3e-3", "log_every=1"]
  assert main(command(folder, tmp_path / "run", *changes, method="ppo")) == 0
  out = capsys.readouterr().out
  assert "critic: a score head on a trunk of its own" in out
  assert "it learns alone for the first 3 updates" in out
  told = lines(tmp_path / "run")
  assert told[0]["critic/values/mean"] == 0  # a head of zeros
  assert told[2]["kl_to_old"] == 0  # the policy has not moved
  assert told[5]["kl_to_old"] > 0
  assert told[2]["loss/value_avg"] < told[0]["loss/value_avg"]
  assert told[0]["critic/moved"] == 0 < told[1]["critic/moved"]
  assert all(np.isfinite(line["loss"]) for line in told)
  assert not [name for name in adapter(tmp_path / "run") if "score" in name or "critic" in name]


def test_online_dpo_learns_from_the_best_and_the_worst(folder, tmp_path):
  changes = ["steps=2"]
  assert main(command(folder, tmp_path / "run", *changes, method="online_dpo")) == 0
  first, second = lines(tmp_path / "run")
  assert first["loss"] == pytest.approx(np.log(2), rel=1e-5)
  assert first["pairs/tied"] == 0
  assert second["grad_norm"] > 0
  for row in completions.rows(tmp_path / "run", 1):
    assert row["advantage"] in (-1, 0, 1)
  groups = {row["number"] for row in completions.rows(tmp_path / "run", 1)}
  for number in groups:
    rows = [row for row in completions.rows(tmp_path / "run", 1) if row["number"] == number]
    scores = [row["reward"] for row in rows]
    by_advantage = {row["advantage"]: row["reward"] for row in rows}
    assert (by_advantage[1], by_advantage[-1]) == (max(scores), min(scores))


@pytest.mark.slow
def test_in_full_fine_tuning_a_critic_is_a_copy_of_the_model(folder, tmp_path):
  """What is exported is a model without it."""
  changes = ["steps=3", "critic.lr=3e-3", "online.kl_in_reward=0.1", "online.passes=2"]
  run = command(folder, tmp_path / "run", *changes, method="ppo,adapter=none")
  assert main([argument for argument in run if "adapter.r" not in argument]) == 0
  told = lines(tmp_path / "run")
  assert told[0]["critic/moved"] == 0 < told[1]["critic/moved"]
  assert told[0]["reward_kl_penalty"] == pytest.approx(0, abs=1e-4)
  assert told[2]["reward_kl_penalty"] != 0
  names = load_file(tmp_path / "run" / "model" / "model.safetensors")
  assert {*names} == {*load_file(folder / "model" / "model.safetensors")}


@pytest.mark.slow
def test_pairs_that_all_tie_teach_nothing(folder, tmp_path):
  changes = ["steps=1"]
  run = command(folder, tmp_path / "run", *changes, method="online_dpo", verifier="tells_nothing")
  assert main(run) == 0
  (line,) = lines(tmp_path / "run")
  assert (line["pairs/tied"], line["grad_norm"]) == (1, 0)
  assert "loss" not in line  # a mean over no pair


REFUSED = {
  "a critic without gae": (("objective.advantage=group",), "ppo", "is what a critic gives"),
  "gae without a critic": (("objective.advantage=gae",), "grpo", "is what a critic gives"),
  "one answer": (("online.samples=1",), "grpo", "an answer is compared with others"),
  "half a pair": (("online.samples=1",), "online_dpo", "a pair has two answers"),
  "offloaded": (("optimizer.offload=state",), "ppo", "keeps all on its devices"),
  "a pair's reward": (("online.kl_in_reward=0.1",), "online_dpo", "objective.beta holds"),
  "no target": (("online.kl_target=0.1",), "ppo", "is not read where online.kl_in_reward is 0"),
  "no horizon": (
    ("online.kl_in_reward=0.1", "online.kl_horizon=5.0"),
    "ppo",
    "is not read where online.kl_target is None",
  ),
  "a trunk": (("critic.trunk=both",), "ppo", "known are own, shared"),
  "a lambda": (("critic.lam=1.5",), "ppo", "critic.lam=1.5"),
  "a critic's field": (("critic.lr=1e-4",), "grpo", "critic.lr"),
  "no bound": (("online.curriculum=pass_rate",), "grpo", "has no bound"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_means_nothing_is_refused_before_anything_is_written(folder, tmp_path, case, capsys):
  changes, method, message = REFUSED[case]
  assert main(command(folder, tmp_path / "run", *changes, method=method)) == 1
  assert message in capsys.readouterr().err
  assert not (tmp_path / "run").exists()
