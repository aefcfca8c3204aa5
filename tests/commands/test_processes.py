"""Two and four processes learn what one learns, of every objective: the same answers, losses and weights."""

import json
import re

import jax
import numpy as np
import pytest

from posttrain_jax.__main__ import main
from posttrain_jax.core.ending import PREEMPTED
from posttrain_jax.models import decoder, hf
from posttrain_jax.runs import completions
from tests import tiny
from tests.commands import test_rl, test_train_answers
from tests.commands.processes import launched
from tests.commands.test_train import assert_equal, environment, lines, weights

pytestmark = pytest.mark.usefixtures("in_float32")

# plain gradient descent: Adam would divide the rounding of small gradients by their size
COMMON = {
  "steps": 2,
  "batch.rows": 4,
  "data.length": 128,
  "optimizer.name": "sgd",
  "optimizer.lr": 0.1,
  "adapter.r": 2,
  "adapter.target_modules": "('q_proj','down_proj')",
}
OF_DATA = {"data.eval_rows": 4, "eval.rows": 4, "eval.every": 2}
ONLINE = {"online.samples": 3, "online.max_new_tokens": 6, "checkpoint.every": 0}
PPO = {"online.passes": 2, "online.kl_in_reward": 0.1, "online.kl_target": 0.5}
# {name: (config, its arguments, fields)}
CASES = {
  "sft": ("sft", "data={folder}/rows.jsonl", OF_DATA),
  "dpo": ("preference", "data={folder}/pairs.jsonl", OF_DATA),
  "kto": ("kto", "data={folder}/labels.jsonl", OF_DATA),
  "reward": ("reward", "data={folder}/pairs.jsonl", OF_DATA),
  "grouped": ("grouped", "data={folder}/scored.jsonl", OF_DATA),
  "distil": ("distil", "data={folder}/rows.jsonl,teacher={folder}/teacher", OF_DATA),
  "distil_kept": (
    "distil",
    "data={folder}/rows.jsonl,teacher={folder}/teacher,top_k=8",
    OF_DATA,
  ),
  "grpo": ("rl", "method=grpo,reward={folder}/verify.py:early", ONLINE),
  "dapo": ("rl", "method=dapo,reward={folder}/verify.py:rare", ONLINE),
  "ppo": ("rl", "method=ppo,reward={folder}/verify.py:early", {**ONLINE, **PPO}),
  "online_dpo": ("rl", "method=online_dpo,reward={folder}/verify.py:listed", ONLINE),
}
OTHERS = """
import contextlib, os, pathlib, signal

def stops(prompt, completion, example):  # one of the processes, once, amid a batch
  if "completion_ids" in example:  # not one that is tried before the run
    here = pathlib.Path(__file__)
    with here.with_name("calls").open("a") as calls:
      calls.write("x")
    if here.with_name("calls").stat().st_size >= 18:
      with contextlib.suppress(FileExistsError), here.with_name("asked").open("x"):
        os.kill(os.getppid(), signal.SIGTERM)
  return early(prompt, completion, example)

def listed(prompts, completions, completion_ids, **columns):  # of the whole batch
  values = [sum(map(ord, str(completion))) % 97 for completion in completions]
  return [value / max([*values, 1]) for value in values]
"""


@pytest.fixture(autouse=True)
def one_device(monkeypatch, tmp_path):
  devices = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda *args: devices)
  monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  made = tmp_path_factory.mktemp("processes")
  tiny.tiny_model_folder(made / "model")
  larger = tiny.config(hidden_size=96, num_hidden_layers=3)
  hf.save(made / "teacher", decoder.init(jax.random.key(3), larger, std=0.3), larger)
  tiny.tokenizer().save_pretrained(made / "teacher")
  tiny.write_jsonl(made / "rows.jsonl", tiny.rows(20))
  for kind, make in test_train_answers.ROWS.items():
    tiny.write_jsonl(made / f"{kind}.jsonl", [make(i) for i in range(20)])
  prompts = [{"prompt": f"Say {word}", "answer": word} for word in test_rl.WORDS]
  tiny.write_jsonl(made / "prompts.jsonl", prompts)
  (made / "verify.py").write_text(test_rl.VERIFIERS + OTHERS)
  return made


def command(folder, case, workdir, **fields):
  config, arguments, own = CASES[case]
  given = COMMON | own | fields
  if config == "rl":
    arguments = f"data={folder}/prompts.jsonl,{arguments}"
    name = arguments.format(folder=folder).partition("reward=")[2]
    given |= {"reward.untested": f"({name!r},)"}
  return [
    "train",
    f"--config={config}:model={folder}/model,{arguments.format(folder=folder)}",
    f"--workdir={workdir}",
    *(f"--config.{name}={value}" for name, value in given.items()),
  ]


def asked(workdir):
  """Every answer of a run with its scores."""
  names = ("number", "sample", "tokens", "reward", "used")
  return [
    tuple(row[name] for name in names)
    for number in completions.numbers(workdir)
    for row in completions.rows(workdir, number)
  ]


def assert_learned_alike(one, other):
  """What was written is the same; losses and weights are to the rounding of sums in another order."""
  assert asked(one) == asked(other)
  for line, theirs in zip(lines(one), lines(other), strict=True):
    assert line.keys() == theirs.keys()
    for name in line.keys() & {"loss", "eval_loss", "grad_norm", "reward", "tokens", "kl"}:
      assert theirs[name] == pytest.approx(line[name], rel=2e-5, abs=1e-6), (one.name, name)
  ours, theirs = weights(one), weights(other)
  assert ours.keys() == theirs.keys()
  for name, array in ours.items():
    apart = np.linalg.norm(theirs[name] - array)
    assert apart <= 2e-5 * np.linalg.norm(array), (one.name, name)


def learn(folder, tmp_path, cases, counts):
  """The cases, run by one process and by each count of them."""
  for case in cases:
    assert main(command(folder, case, tmp_path / "1" / case)) == 0
  for count in counts:
    of = {"mesh.fsdp": -1}
    where = tmp_path / str(count)
    cache = {"POSTTRAIN_CACHE": str(where / "cache")}
    every = [command(folder, case, where / case, **of) for case in cases]
    yield launched(every, count, environment() | cache)
    for case in cases:
      assert_learned_alike(tmp_path / "1" / case, where / case)


def test_two_processes_write_and_learn_what_one_does(folder, tmp_path):
  (said,) = learn(folder, tmp_path, ["grpo"], [2])
  assert said.count("] data: 8 prompts") == 1
  journal = json.loads
  for name in ("answers_00001.jsonl", "answers-1_00001.jsonl"):
    header, *written = (tmp_path / "2" / "grpo" / "completions" / name).read_text().splitlines()
    assert len(written) == 2 * 3, name
    assert "writer" in journal(header)


@pytest.mark.slow
def test_a_dry_run_of_two_tells_the_memory_of_the_rows_of_both(
  folder, tmp_path, monkeypatch, capsys
):
  two = jax.local_devices()[:2]
  monkeypatch.setattr(jax, "devices", lambda *args: two)
  many = {"mesh.fsdp": 2, "batch.rows": 64, "data.length": 512}
  told = lambda said: re.findall(r"memory a device: .*(?=; compiled)", said)
  dry = [[*command(folder, case, tmp_path / case, **many), "--dry_run"] for case in ("sft", "grpo")]
  for one in dry:
    assert main(one) == 0
  found = told(launched(dry, 2, environment() | {"POSTTRAIN_CACHE": str(tmp_path / "cache")}))
  assert found == told(capsys.readouterr().out)
  assert len(found) == 2
  assert not any("0.00 GB of temporaries" in line for line in found)


@pytest.mark.slow
def test_a_run_of_two_that_is_stopped_or_goes_on_in_one_ends_as_one_that_is_not(
  folder, tmp_path, monkeypatch
):
  """Where one process is asked to stop, both do, with the answers that they have written."""
  stopped = ("rl", "method=grpo,reward={folder}/verify.py:stops", CASES["grpo"][2])
  monkeypatch.setitem(CASES, "stopped", stopped)
  run = lambda where, case="grpo", **more: command(
    folder, case, tmp_path / where, **{"mesh.fsdp": -1, "steps": 3, "checkpoint.every": 1, **more}
  )
  commands = [
    run("whole"),
    run("one", steps=1),
    run("parts", steps=1),
    run("parts"),
    (run("stopped", "stopped"), PREEMPTED),
    run("stopped", "stopped"),
  ]
  said = launched(commands, 2, environment() | {"POSTTRAIN_CACHE": str(tmp_path / "cache")})
  assert said.count("SIGTERM: stopping after this step") == 1
  assert re.search(r"stopped at step [012] of 3, saved", said)
  assert main(run("one")) == 0
  assert_equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
  assert_equal(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))
  assert_learned_alike(tmp_path / "whole", tmp_path / "one")
  assert asked(tmp_path / "stopped") == asked(tmp_path / "parts") == asked(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_and_four_processes_are_one_of_every_objective(folder, tmp_path):
  for said in learn(folder, tmp_path, CASES, [2, 4]):
    assert said.count("reference: computing log-probabilities of 16 examples") == 2  # DPO's, KTO's
    assert "computed at each step" not in said
    assert said.count("teacher: computing the 8 most likely tokens in 16 examples") == 1
