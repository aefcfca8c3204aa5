"""Online learning on a tiny model, as a user runs it: it learns, resumes bit by bit, and says what is wrong."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pyarrow.parquet
import pytest
from safetensors.numpy import load_file

from posttrain_jax.__main__ import main
from posttrain_jax.build import updates
from posttrain_jax.core.ending import PREEMPTED
from posttrain_jax.objectives import groups
from posttrain_jax.objectives.reference import reference_logps
from posttrain_jax.runs import completions, metrics_log, record
from tests import tiny
from tests.commands.test_train import environment

pytestmark = pytest.mark.usefixtures("in_float32")

WORDS = ["one", "two", "red", "sky", "sea", "hat", "cat", "dog"]
VERIFIERS = """
def early(prompt, completion, example):  # of two answers one is better but for chance
  return sum(ord(letter) for letter in completion) % 97 / 97

def rare(prompt, completion, example):  # most groups agree
  return float(sum(ord(letter) for letter in completion) % 5 == 0)

def length(prompt, completion, example):
  return len(completion)

def raises(prompt, completion, example):
  raise KeyError("no such column")

def tells_nothing(prompts, completions, **columns):
  return [0.5] * len(completions)

def too_few(prompts, completions, **columns):
  return [0.5]

def first(prompt, completion, example):
  if len(completion) % 5 == 0:
    return float("nan")
  return float(len(completion) % 2)
"""
PAID = """
import json, pathlib, random

def asked(what):
  with pathlib.Path(__file__).with_name("calls.jsonl").open("a") as file:
    file.write(json.dumps(what) + "\\n")

def one(prompt, completion, example):
  if "completion_ids" in example:  # not one that is tried before the run
    asked([prompt, completion])
  value = random.SystemRandom().random()
  return float("nan") if value < 0.3 else value

def listed(prompts, completions, completion_ids, log_metric, log_extra, trainer_state, **columns):
  if trainer_state.max_steps > 1:  # not of the answers that are tried before the run
    asked(completions)
  log_metric("mine", random.SystemRandom().random())
  log_extra("at", [trainer_state.global_step / trainer_state.max_steps for _ in completions])
  return [random.SystemRandom().random() for _ in completions]
"""
WAITS = """
import os, signal, time

def listed(prompts, completions, trainer_state, **columns):
  if trainer_state.max_steps > 1:  # not one of the answers that are tried before the run
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(40)
  return [0.5] * len(completions)
"""
FILTERS = ("online.top_k=40", "online.top_p=0.9", "online.min_p=0.02")


@pytest.fixture(autouse=True)
def one_device(monkeypatch, request):
  if "on_a_mesh" not in request.node.name:
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *args: devices)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("rl")
  tiny.tiny_model_folder(folder / "model")
  rows = [{"prompt": f"Say {word}", "answer": word} for word in WORDS]
  tiny.write_jsonl(folder / "prompts.jsonl", rows)
  (folder / "verify.py").write_text(VERIFIERS)
  return folder


def command(folder, workdir, *changes, method="grpo", verifier="early"):
  name = f"{folder / 'verify.py'}:{verifier}"
  small = ["steps=3", "batch.rows=2", "online.samples=3", "online.max_new_tokens=6"]
  small += ["data.length=128", "optimizer.lr=1e-2", "adapter.r=2", f"reward.untested=({name!r},)"]
  config = (
    f"rl:model={folder / 'model'},data={folder / 'prompts.jsonl'},method={method},reward={name}"
  )
  return [
    "train",
    f"--config={config}",
    f"--workdir={workdir}",
    *(f"--config.{change}" for change in [*small, *changes]),
  ]


def adapter(workdir):
  return load_file(workdir / "adapter" / "adapter_model.safetensors")


def lines(workdir):
  return [json.loads(line) for line in (workdir / record.METRICS).read_text().splitlines()]


def same(one, other):
  assert one.keys() == other.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], other[name])


def test_a_run_writes_scores_and_learns(folder, tmp_path, capsys, caplog):
  assert main(command(folder, tmp_path / "run")) == 0
  out = capsys.readouterr().out
  assert "8 prompts; a batch is 2 prompts x 3 = 6 answers of at most 6 tokens" in out
  assert "the engine has 6 programs" in caplog.text
  assert "rows of" not in caplog.text  # which they are is said at debug level
  last = lines(tmp_path / "run")[-1]
  assert last["sampling/logp_difference"] < 1e-4
  assert last["grad_norm"] > 0
  assert 0 <= last["reward"] <= 1
  tables = sorted((tmp_path / "run" / "completions").glob("*.parquet"))
  rows = pyarrow.parquet.read_table(tables[0]).to_pylist()
  assert len(tables) == 3
  assert [(row["number"], row["sample"]) for row in rows] == [
    (n, s) for n in (0, 1) for s in range(3)
  ]
  assert all(len(row["tokens"]) <= 6 for row in rows)
  name = "rewards/verify.py:early"
  assert [row[name] for row in rows] == [
    pytest.approx(sum(map(ord, row["completion"])) % 97 / 97) for row in rows
  ]
  spent = [f"timing_share/{name}" for name in ("writing", "scoring", "updating")]
  for line in lines(tmp_path / "run"):
    assert sum(line[name] for name in spent) == pytest.approx(1)
  assert last["timing_share/updating"] > 0


@pytest.mark.parametrize(
  "changes",
  [
    FILTERS,
    pytest.param((), marks=pytest.mark.slow),
    pytest.param(
      (*FILTERS, "online.passes=2", "online.minibatches=2", "batch.rows=1"), marks=pytest.mark.slow
    ),
  ],
)
def test_a_run_that_is_stopped_ends_as_one_that_is_not(folder, tmp_path, changes, capsys):
  """Stopped behind the first step, in the middle of a batch that is used four times; its verifier gets a comment."""
  every = [*changes, "checkpoint.every=1", "checkpoint.keep=5"]
  assert main(command(folder, tmp_path / "whole", *every)) == 0
  assert main(command(folder, tmp_path / "parts", *every, "steps=1")) == 0
  verifier = folder / "verify.py"
  verifier.write_text(f"{verifier.read_text()}# {len(changes)}\n")
  capsys.readouterr()
  assert main(command(folder, tmp_path / "parts", *every)) == 0
  assert f"warning: {verifier} has changed since this run scored with it: from step 1 on" in (
    capsys.readouterr().out
  )
  assert (
    "After step 1 answers were scored by another"
    in (tmp_path / "parts" / "report.html").read_text()
  )
  same(adapter(tmp_path / "whole"), adapter(tmp_path / "parts"))
  assert all(line["sampling/logp_difference"] < 1e-4 for line in lines(tmp_path / "parts"))
  for number in (1, 2):
    table = f"completions/completions_{number:05d}.parquet"
    if (tmp_path / "whole" / table).exists():
      one, other = (pyarrow.parquet.read_table(tmp_path / w / table) for w in ("whole", "parts"))
      assert one.equals(other)


@pytest.mark.slow
def test_what_a_filter_kept_is_what_the_loss_is_of(folder, tmp_path):
  """Sampler and trainer agree in every update of a batch, over what was kept at the sampler's temperature."""
  changes = [*FILTERS, "batch.rows=1", "online.minibatches=2", "online.temperature=0.7"]
  assert main(command(folder, tmp_path / "run", *changes)) == 0
  for line in lines(tmp_path / "run"):
    assert line["sampling/logp_difference"] < 1e-4
    assert line["grad_norm"] > 0


@pytest.mark.slow
def test_a_second_score_is_told_and_both_are_of_every_round(folder, tmp_path):
  """Those of groups that were replaced included."""
  other = f"{folder / 'verify.py'}:length"
  second = [f"holdout_reward.parts=({other!r},)", f"holdout_reward.untested=({other!r},)"]
  changes = ["steps=2", "online.dynamic=true", "online.most_rounds=3"]
  assert main(command(folder, tmp_path / "run", *changes, *second, verifier="rare")) == 0
  rounds = set()
  for number, line in enumerate(lines(tmp_path / "run"), 1):
    table = tmp_path / "run" / "completions" / f"completions_{number:05d}.parquet"
    rows = pyarrow.parquet.read_table(table).to_pylist()
    assert line["reward"] == pytest.approx(np.mean([row["reward"] for row in rows]))
    assert line["holdout/reward"] == pytest.approx(np.mean([row["holdout"] for row in rows]))
    assert all(row["holdout"] == len(row["completion"]) for row in rows)
    rounds.add(line["dynamic_sampling/rounds"])
  assert max(rounds) > 1


@pytest.mark.slow
@pytest.mark.timeout(900)  # it starts twenty times, and compiles each time
def test_a_run_that_is_killed_anywhere_ends_as_one_that_is_not(folder, tmp_path):
  arguments = [sys.executable, "-m", "posttrain_jax"]
  changes = ["steps=24", "checkpoint.every=2", "checkpoint.keep=5"]
  env = environment()
  # A process of its own, as those that are killed: what this processor multiplies in, and not what tests are pinned to.
  whole = [*arguments, *command(folder, tmp_path / "whole", *changes)]
  assert subprocess.run(whole, stdout=subprocess.DEVNULL, env=env, check=False).returncode == 0
  killed = command(folder, tmp_path / "killed", *changes)
  rng = np.random.default_rng(0)
  files = lambda: {*(tmp_path / "killed").glob("completions/*")}
  kills = 0
  for _ in range(20):
    before, more = files(), rng.integers(2, 9)
    run = subprocess.Popen([*arguments, *killed], stdout=subprocess.DEVNULL, env=env)
    # by what it has written, not by the clock: it may be done in three seconds, or have just begun
    while run.poll() is None and len(files() - before) < more:
      time.sleep(0.02)
    time.sleep(float(rng.uniform(0, 0.1)))
    if run.poll() is not None:
      break
    run.send_signal(signal.SIGKILL)
    run.wait()
    kills += 1
  assert kills > 1
  assert subprocess.run([*arguments, *killed], env=env, check=False).returncode == 0
  same(adapter(tmp_path / "whole"), adapter(tmp_path / "killed"))
  assert [line["step"] for line in lines(tmp_path / "killed")] == [*range(1, 25)]


@pytest.mark.parametrize(
  "method",
  [
    "dapo",
    *(
      pytest.param(m, marks=pytest.mark.slow)
      for m in (
        "dr_grpo",
        "gspo",
        "cispo",
        "rloo",
        "dppo",
        "dppo_kl",
        "reinforce_pp",
        "max_rl",
        "centred",
      )
    ),
  ],
)
def test_every_method_steps(folder, tmp_path, method):
  changes = ["steps=1"] + (["online.most_rounds=2"] if method == "dapo" else [])
  changes += [f"reward.ranges={{'{folder / 'verify.py'}:early': (0, 1)}}"]  # which max_rl asks for
  assert main(command(folder, tmp_path / "run", *changes, method=method)) == 0
  (line,) = lines(tmp_path / "run")
  assert np.isfinite(line["loss"])
  assert line["grad_norm"] > 0


class Killed(BaseException):
  """Nobody handles it."""


@pytest.mark.slow
def test_a_signal_while_it_writes_saves_the_finished_update_and_writes_no_more(
  folder, tmp_path, monkeypatch, capsys
):
  changes = ["steps=3", "online.rows=2"]
  assert main(command(folder, tmp_path / "whole", *changes)) == 0
  put, count = completions.Journal.put, []

  def puts(self, *arguments, **fields):
    put(self, *arguments, **fields)
    count.append(1)
    if len(count) == 6 + 2:  # two of the second batch
      os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(completions.Journal, "put", puts)
  stopped = command(folder, tmp_path / "stopped", *changes)
  assert main(stopped) == PREEMPTED
  assert "stopped at step 1 of 3, saved, with the answers" in capsys.readouterr().out
  assert len(count) < 6 + 6
  assert main(stopped) == 0
  assert len(count) == 18
  same(adapter(tmp_path / "whole"), adapter(tmp_path / "stopped"))


@pytest.mark.slow
def test_a_signal_while_a_verifier_runs_does_not_wait_for_it(folder, tmp_path, capsys):
  (folder / "waits.py").write_text(WAITS)
  name, began = f"{folder / 'waits.py'}:listed", time.monotonic()
  changes = [f"reward.parts=({name!r},)", f"reward.untested=({name!r},)", "reward.seconds=60"]
  assert main(command(folder, tmp_path / "run", *changes)) == PREEMPTED
  assert "stopped at step 0 of 3" in capsys.readouterr().out
  assert time.monotonic() - began < 40


@pytest.mark.slow
def test_answers_that_were_whole_before_a_kill_are_not_written_again(folder, tmp_path, monkeypatch):
  """With what each of their tokens was drawn among."""
  changes = ["steps=1", *FILTERS]
  assert main(command(folder, tmp_path / "whole", *changes)) == 0
  put, count = completions.Journal.put, []

  def until_the_fourth(self, number, sample, **said):
    put(self, number, sample, **said)
    count.append((number, sample))
    if len(count) == 4:
      raise Killed

  monkeypatch.setattr(completions.Journal, "put", until_the_fourth)
  with pytest.raises(Killed):
    main(command(folder, tmp_path / "killed", *changes))
  before = set(count)
  assert main(command(folder, tmp_path / "killed", *changes)) == 0
  assert len(count) == 6
  assert before.isdisjoint(count[4:])
  same(adapter(tmp_path / "whole"), adapter(tmp_path / "killed"))


@pytest.mark.slow
def test_answers_that_were_drawn_otherwise_are_not_taken_up(folder, tmp_path, monkeypatch):
  """A run in which no step was taken may be begun again with other fields."""
  put = completions.Journal.put

  def until_the_first(self, number, sample, **said):
    put(self, number, sample, **said)
    raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(completions.Journal, "put", until_the_first)
    with pytest.raises(Killed):
      main(command(folder, tmp_path / "killed", "steps=1"))
  changes = ["steps=1", "online.temperature=0.01"]
  assert main(command(folder, tmp_path / "killed", *changes)) == 0
  assert main(command(folder, tmp_path / "whole", *changes)) == 0
  same(adapter(tmp_path / "whole"), adapter(tmp_path / "killed"))


def stop_before_the_update(patch):
  def stop(*args):
    raise Killed

  patch.setattr(updates.Updates, "of", stop)
  return {}


def stop_behind_two_updates(patch):
  """What these were to tell, by step; no checkpoint has them."""
  write, told = metrics_log.Journal.write, {}

  def written(self, step, values):
    write(self, step, values)
    told[step] = dict(values)
    if step == 2:
      raise Killed

  patch.setattr(metrics_log.Journal, "write", written)
  return told


@pytest.mark.parametrize(
  ("verifier", "stop", "batches"),
  [
    pytest.param("one", stop_before_the_update, 1, marks=pytest.mark.slow),
    ("listed", stop_behind_two_updates, 2),
  ],
)
def test_what_was_scored_before_a_kill_is_not_scored_again(
  folder, tmp_path, monkeypatch, verifier, stop, batches
):
  """By a verifier that says something else each time; what it left missing stays so, and what is told is the same."""
  (tmp_path / "paid.py").write_text(PAID)
  name, other = f"{tmp_path / 'paid.py'}:{verifier}", f"{folder / 'verify.py'}:length"
  changes = ["steps=2", f"reward.parts=({name!r},)", f"reward.untested=({name!r},)"]
  changes += [f"holdout_reward.parts=({other!r},)", f"holdout_reward.untested=({other!r},)"]
  run = lambda: main(command(folder, tmp_path / "run", *changes, "reward.retries=0"))
  calls = lambda: (tmp_path / "calls.jsonl").read_text().splitlines()
  put, written = completions.Journal.put, []
  monkeypatch.setattr(
    completions.Journal,
    "put",
    lambda self, *at, **said: written.append(at) or put(self, *at, **said),
  )
  with monkeypatch.context() as patch:
    told = stop(patch)
    with pytest.raises(Killed):
      run()
  asked, scores = calls(), sorted((tmp_path / "run" / "completions").glob("scores_*"))
  paid = [path.read_text() for path in scores]
  assert run() == 0
  assert len(calls()) == len(asked) * 2 / batches
  assert len(written) == len(set(written)) == 12  # and none is written again
  if verifier == "listed":
    for number in (1, 2):
      rows = completions.rows(tmp_path / "run", number)
      assert {row["at"] for row in rows} == {(number - 1) / 2}
      assert all(row["advantage"] is not None for row in rows)
  assert [path.read_text() for path in scores] == paid
  assert len(paid) == batches
  by_step = {line["step"]: line for line in lines(tmp_path / "run")}
  for step, values in told.items():
    assert values.keys() - by_step[step].keys() == set()
    assert "logged/mine" in values
    for metric, value in values.items():
      if "timing" not in metric and metric != "tokens_per_second":
        assert by_step[step][metric] == value, metric


def test_answers_of_other_weights_are_not_taken_up(tmp_path):
  """Those of the same weights are, but for the line that a kill cut short."""
  logps, kept = (
    np.asarray([-1.5, -0.25], np.float32),
    np.asarray([[1, 2, 3], [4, 5, 2**31]], np.uint32),
  )
  journal = completions.Journal(tmp_path, 3, "abc")
  journal.put(7, 0, tokens=[4, 5], logps=logps, ended="stop_token", kept=kept)
  (path,) = (tmp_path / "completions").glob("answers_*")
  path.write_text(path.read_text() + '{"number": 7, "sam')
  again = completions.Journal(tmp_path, 3, "abc")
  answer = again.written(7, 0)
  assert (answer["tokens"], answer["ended"]) == ([4, 5], "stop_token")
  np.testing.assert_array_equal(answer["logps"], logps)
  np.testing.assert_array_equal(answer["kept"], kept)
  again.put(7, 1, tokens=[6], logps=logps[:1], ended="stop_token", kept=None)
  assert completions.Journal(tmp_path, 3, "abc").written(7, 1)["kept"] is None
  assert completions.Journal(tmp_path, 3, "xyz").written(7, 0) is None


def test_batches_that_a_checkpoint_may_stand_in_are_kept(tmp_path):
  for number in range(1, 9):
    completions.keep(tmp_path, number, [{"tokens": np.full(2, number)}] * 2, last=4)
    completions.scores(tmp_path, number, last=3).touch()
    completions.Journal(tmp_path, number, "abc", last=2).close()
  assert completions.arrays(tmp_path, 4)[1]["tokens"].tolist() == [4, 4]
  names = lambda pattern: sorted(path.name for path in (tmp_path / "completions").glob(pattern))
  assert len(names("batches_*.npz")) == 5
  assert names("answers_*") == [f"answers_0000{number}.jsonl" for number in (6, 7, 8)]
  assert names("scores_*") == [f"scores_0000{number}.jsonl" for number in (5, 6, 7, 8)]
  completions.scores(tmp_path, 20, last=None)
  assert len(names("scores_*")) == 4


def test_groups_that_agree_are_replaced_until_it_is_said(folder, tmp_path, capsys):
  """On the outcome, which is said where it is not the reward: how long answers are does not count."""
  name = f"{folder / 'verify.py'}:tells_nothing"
  changes = ["steps=1", "online.dynamic=true", "online.most_rounds=2", f"online.outcome={name}"]
  changes += [f"reward.parts=({name!r}, 'length')", "reward.weights=(1.0, 0.5)"]
  changes += ["reward.options={'length': {'longest': 7, 'soft': 7}}"]
  assert main(command(folder, tmp_path / "run", *changes, verifier="tells_nothing")) == 0
  said = capsys.readouterr().out
  assert "only 0 of 4 groups of 2 rounds have answers that differ (mean outcome 0.50)" in said
  assert "outcome: verify.py:tells_nothing, without length, says which answers are right" in said
  (line,) = lines(tmp_path / "run")
  assert line["frac_groups_dead"] == 1
  assert line["rewards/length/mean"] < 0


def test_a_score_that_is_missing_is_left_out_and_counted(folder, tmp_path, capsys):
  assert main(command(folder, tmp_path / "run", "steps=2", verifier="first")) == 0
  table = tmp_path / "run" / "completions" / "completions_00001.parquet"
  rows = pyarrow.parquet.read_table(table).to_pylist()
  missing = [row for row in rows if len(row["completion"]) % 5 == 0]
  assert all(row["reward"] is None and row["missing"] for row in missing)
  assert all(row["reward"] is not None for row in rows if row not in missing)
  assert "was missing" in capsys.readouterr().out or not missing


@pytest.mark.slow
def test_a_sampler_of_fewer_bits_is_corrected_for(folder, tmp_path):
  """It draws by other numbers than the trainer's, which are told, and the ratio of the two weighs each token."""
  how = ["online.storage=int8", "objective.importance=token", "online.most_drift=0.5"]
  assert main(command(folder, tmp_path / "int8", *how)) == 0
  assert main(command(folder, tmp_path / "same")) == 0
  few, whole = lines(tmp_path / "int8")[0], lines(tmp_path / "same")[0]
  assert whole["sampling/logp_difference"] < 1e-5 < few["sampling/logp_difference"] < 0.5
  assert few["rollout_corr/rollout_is_std"] > 0


@pytest.mark.parametrize(
  ("changes", "verifier", "message"),
  [
    (("online.samples=1",), "early", "online.samples=1"),
    (("data.length=20",), "early", "data.length=20: a row holds the answers to one prompt"),
    (("online.max_new_tokens=5000",), "early", "leaves too few for online.max_new_tokens=5000"),
    (("objective.cache_reference=true", "objective.kl_weight=0.1"), "early", "cache_reference"),
    (("online.outcome=other",), "early", "online.outcome='other': the reward has the parts"),
    (
      ("online.kl_in_reward=0.1", "objective.advantage=max_rl"),
      "early",
      "advantage=max_rl divides by the mean reward",
    ),
    (
      ("online.cut_penalty=0.5", "objective.advantage=max_rl"),
      "early",
      "online.cut_penalty: advantage=max_rl divides",
    ),
    (
      ("online.tools=('python',)", "online.unparsed=-1.0", "objective.advantage=max_rl"),
      "early",
      "online.unparsed: advantage=max_rl divides",
    ),
    (("objective.advantage=max_rl",), "early", "nothing says that its scores are from 0 on"),
    (("online.kl_in_reward_estimator=k2",), "early", "k2 is of the KL's gradient in a loss"),
    (("data.replay=x.jsonl",), "early", "data.replay='x.jsonl'"),
    (("reward.parts=('environment',)",), "early", "this run has none; write environment=sql"),
    (("online.storage=int8",), "early", "write --config.objective.importance=token too"),
    ((), "raises", "on all 8 rows that were tried"),
    ((), "too_few", "returned 1 reward for 8 completions"),
  ],
)
def test_what_cannot_run_is_said_before_anything_is_written(
  folder, tmp_path, capsys, changes, verifier, message
):
  assert main(command(folder, tmp_path / "run", *changes, verifier=verifier)) in (1, 2)
  assert message in capsys.readouterr().err
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_policy_that_stays_drifts_from_nothing(folder, tmp_path):
  """With a learning rate of 0: not from its reference, who wrote the batch, or the sampler."""
  changes = [
    "steps=8",
    "optimizer.lr=0.0",
    "batch.rows=1",
    "online.passes=2",
    "online.minibatches=2",
  ]
  changes += ["objective.kl_weight=0.1", "online.kl_in_reward=0.1"]
  assert main(command(folder, tmp_path / "run", *changes)) == 0
  told = ["kl", "kl_to_old", "reward_kl_penalty", "clip_ratio/low_mean", "clip_ratio/high_mean"]
  for line in lines(tmp_path / "run"):
    assert line["sampling/logp_difference"] < 1e-5
    assert [line[name] for name in told] == pytest.approx([0] * len(told), abs=1e-6)


@pytest.mark.slow
def test_a_reference_of_other_weights_ends_the_run(folder, tmp_path, monkeypatch, capsys):
  shifted = lambda *args, **how: reference_logps(*args, **how) - 0.5
  monkeypatch.setattr(groups, "reference_logps", shifted)
  assert main(command(folder, tmp_path / "run", "objective.kl_weight=0.1")) == 1
  assert "before any training the policy is 0.107 nats a token" in capsys.readouterr().err


@pytest.mark.slow
def test_drift_between_sampler_and_trainer_ends_the_run(folder, tmp_path, capsys):
  assert main(command(folder, tmp_path / "run", "online.most_drift=1e-12")) == 1
  assert "above online.most_drift=1e-12" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tensor", "context"])
def test_eight_devices_learn_the_same_on_a_mesh(folder, tmp_path, monkeypatch, axis):
  """Two rows of data by four of another axis write the answers that one device writes, and take the same step."""
  changes = ["steps=2", "mesh.fsdp=2", f"mesh.{axis}=4", *FILTERS]
  assert main(command(folder, tmp_path / "mesh", *changes)) == 0
  devices = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda *args: devices)
  assert main(command(folder, tmp_path / "one", "steps=2", *FILTERS)) == 0
  one, mesh = lines(tmp_path / "one"), lines(tmp_path / "mesh")
  for a, b in zip(one, mesh, strict=True):
    assert a["reward"] == pytest.approx(b["reward"], rel=1e-4)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-2)


def asks(folder, workdir, rows, reward, *changes):
  """The metrics and answers of a step on a file of rows, as docs/rl.md does it."""
  tiny.write_jsonl(folder / f"{reward}.jsonl", rows)
  small = ["steps=1", "batch.rows=2", "online.samples=2", "online.max_new_tokens=4"]
  small += ["data.length=256", "adapter.r=2", *changes]
  config = f"rl:model={folder / 'model'},data={folder / f'{reward}.jsonl'},reward={reward}"
  fields = [f"--config.{field}" for field in small]
  assert main(["train", f"--config={config}", f"--workdir={workdir}", *fields]) == 0
  (line,) = lines(workdir)
  return line, pyarrow.parquet.read_table(completions.table(workdir, 1)).to_pylist()


@pytest.mark.slow
def test_rows_of_gsm8k_are_prompts_with_numbers(folder, tmp_path):
  rows = [{"question": f"{n} + 1?", "answer": f"So it is.\n#### {n + 1}"} for n in range(4)]
  columns = ["data.columns.prompt=question", "data.columns.completion=answer"]
  line, answers = asks(folder, tmp_path / "run", rows, "number", *columns)
  assert line["rewards/missing"] == 0
  assert all(answer["rewards/number"] in (0, 1) for answer in answers)


def test_questions_of_reasoning_gym_are_prompts(folder, tmp_path):
  pytest.importorskip("reasoning_gym", reason="gym needs an extra")
  from posttrain_jax.rewards import gym

  line, answers = asks(
    folder, tmp_path / "run", gym.rows("basic_arithmetic", 4, max_digits=1), "gym"
  )
  assert line["rewards/missing"] == 0
  assert all(0 <= answer["rewards/gym"] <= 1 for answer in answers)
