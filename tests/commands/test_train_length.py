"""How long a run is: epochs for steps, more steps than a run was to have, and an end where nothing improves."""

import shutil
from unittest import mock

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from posttrain_jax import settings
from posttrain_jax.__main__ import main
from posttrain_jax.build import mesh, run_length
from posttrain_jax.core import metrics
from posttrain_jax.data.loader import Loader
from posttrain_jax.evals import report
from posttrain_jax.runs import folder as run_folder
from posttrain_jax.runs import record
from posttrain_jax.runs.metrics_log import Journal
from posttrain_jax.train import loop
from tests.commands.test_train import arguments, assert_equal, lines, steps, train, weights

BARE = dict(eval__every=0, data__eval_rows=0, checkpoint__every=2)


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
  """A cache of its own, and one device of the eight: a program for it compiles sooner."""
  monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(mesh, "make", lambda config: None)


class Killed(BaseException):
  """The end of a process, as far as its files can tell."""


def killed_at(step, shared, folder, **fields):
  """A run that is over when it tells of this step, which no checkpoint holds yet."""
  write = Journal.write

  def written(self, at, values):
    write(self, at, values)
    if at == step:
      raise Killed

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Journal, "write", written)
    with pytest.raises(Killed):
      train(shared, folder, **fields)


# --- epochs ----------------------------------------------------------------------------------------------------------


def in_epochs(shared, folder, epochs, **fields):
  *given, _ = arguments(shared, folder, **fields, epochs=epochs)
  return main([a for a in given if "config.steps" not in a] + [f"--config.epochs={epochs}"])


def test_epochs_are_steps_for_the_schedule_and_the_record(shared, tmp_path, capsys):
  fields = dict(BARE, optimizer__schedule="linear", optimizer__warmup=0)
  assert in_epochs(shared, tmp_path, 0.6, **fields) == 0  # of five batches
  assert "length: 3 steps, which are 0.6 epochs" in capsys.readouterr().out
  config = record.config(tmp_path)
  assert (config["steps"], config["epochs"]) == (3, 0.6)
  assert steps(tmp_path) == [1, 2, 3]
  rates = [line["learning_rate"] for line in lines(tmp_path)]
  assert rates == pytest.approx([0.02, 0.02 * 2 / 3, 0.02 / 3])
  assert in_epochs(shared, tmp_path, 0.6, **fields) == 0
  assert "is complete" in capsys.readouterr().out
  assert in_epochs(shared, tmp_path, 0.2, **fields) == 1
  assert "has done 3 steps, and steps=1 (epochs=0.2) would take" in capsys.readouterr().err
  assert record.read(tmp_path).done is not None


# --- another number of steps -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_was_given_more_steps_and_killed_is_as_one_that_was_not(
  shared, tmp_path, capsys
):
  assert train(shared, tmp_path / "a", steps=4, **BARE) == 0
  shutil.copytree(tmp_path / "a", tmp_path / "b")
  assert train(shared, tmp_path / "a", steps=8, **BARE) == 0
  said = capsys.readouterr().out
  assert "steps are raised from 4 to 8, and the run goes on from step 4; the learning rate" in said
  rate = next(line["learning_rate"] for line in lines(tmp_path / "a") if line["step"] == 5)
  assert f"from step 5 on: it is {rate:.3g} there, and had ended at 0" in said
  killed_at(5, shared, tmp_path / "b", steps=8, **BARE)
  assert record.read(tmp_path / "b").done is None
  assert train(shared, tmp_path / "b", steps=8, **BARE) == 0
  assert "going on from step 4 of 8" in capsys.readouterr().out
  assert_equal(weights(tmp_path / "b"), weights(tmp_path / "a"))
  for folder in (tmp_path / "a", tmp_path / "b"):
    run = record.read(folder)
    assert steps(folder) == [*range(1, 9)]
    (former,) = run.history
    assert (former["step"], former["reached"], former["steps"]) == (4, 4, 4)
    assert (run.done["steps"], run.done["history"]) == (8, [former])
    assert "Up to step 4 it was a run of 4 steps" in (folder / report.NAME).read_text()


@pytest.mark.slow
def test_steps_are_lowered_to_those_done_and_no_further(shared, tmp_path, capsys):
  killed_at(3, shared, tmp_path, steps=6, **BARE)
  before = (tmp_path / "config.json").read_bytes()
  assert train(shared, tmp_path, steps=2, **BARE) == 1
  assert "has done 3 steps, and steps=2 would take some" in capsys.readouterr().err
  assert (tmp_path / "config.json").read_bytes() == before
  assert train(shared, tmp_path, steps=3, **BARE) == 0
  assert "steps are lowered from 6 to 3" in capsys.readouterr().out
  assert record.read(tmp_path).done["steps"] == 3


def test_steps_that_were_done_are_not_taken_back(tmp_path):
  config = settings.load("sft", ["steps=9"])
  with run_folder.claimed(tmp_path, config):
    (tmp_path / "metrics.jsonl").write_text('{"step": 4}\n')
    (tmp_path / "done.json").write_text("{}")
  before = (tmp_path / "config.json").read_bytes()
  fewer = settings.load("sft", ["steps=3"])
  assert run_folder.check(tmp_path, fewer) == tmp_path
  with pytest.raises(settings.ConfigError, match=r"has done 4 steps, .* write steps=4 or more"):
    run_length.check_change(tmp_path, fewer)
  assert (tmp_path / "config.json").read_bytes() == before
  as_many = settings.load("sft", ["steps=4"])
  run_length.check_change(tmp_path, as_many)
  assert not run_folder.is_complete(tmp_path, settings.plain(as_many))
  assert "lowered from 9 to 4, and the run goes on from step 0" in run_length.told(
    tmp_path, as_many
  )
  with run_folder.claimed(tmp_path, as_many):
    assert not (tmp_path / "done.json").exists()
  assert record.config(tmp_path)["steps"] == 4
  (former,) = record.read(tmp_path).history
  assert (former["step"], former["reached"], former["steps"]) == (0, 4, 9)


def test_rows_that_have_changed_are_not_another_length(tmp_path):
  config = settings.load("sft:data=mine.jsonl", ["epochs=3"])
  with run_folder.claimed(tmp_path, run_length.resolved(config, 120)):
    (tmp_path / "metrics.jsonl").write_text('{"step": 4}\n')
  with pytest.raises(
    settings.ConfigError, match=r"were 120 steps .* are 130 now: the rows of mine"
  ):
    run_length.check_change(tmp_path, run_length.resolved(config, 130))


def test_ranks_that_were_spent_by_the_number_of_steps_keep_it(tmp_path):
  config = settings.load("sft:adapter=adalora", ["steps=4"])
  with run_folder.claimed(tmp_path, config):
    (tmp_path / "metrics.jsonl").write_text('{"step": 4}\n')
  run_length.check_change(tmp_path, config)
  longer = settings.load("sft:adapter=adalora", ["steps=9"])
  with pytest.raises(settings.ConfigError, match="by which AdaLoRA has spent its ranks"):
    run_length.check_change(tmp_path, longer)
  with longer.unlocked():
    longer.adapter.total_step = 4
  run_length.check_change(tmp_path, longer)


# --- the best step ---------------------------------------------------------------------------------------------------


LOSSES = (4.0, 3.0, 5.0, np.nan, 5.0, 3.5, 3.0, 6.0, 6.0)  # of one evaluation after the other


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
  """Evaluations give LOSSES; what stands in adapter/ after the second is kept."""
  kept = {}

  def measured(measure, batches, *_):
    folder = tmp_path / "run"
    done = len([line for line in lines(folder) if "eval_loss" in line])
    if done == 2:
      kept.update(weights(folder))
    return {"loss": metrics.Mean(jnp.asarray(LOSSES[done]), jnp.ones(()))}

  monkeypatch.setattr(loop, "measured", measured)
  return kept


STOPPED = dict(steps=20, eval__every=1, checkpoint__every=4, checkpoint__keep=1, eval__stop_after=3)


def checkpoints(folder):
  return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_run_ends_where_nothing_improves_and_gives_its_best(shared, tmp_path, evaluated, capsys):
  folder = tmp_path / "run"
  killed_at(5, shared, folder, **STOPPED)
  assert checkpoints(folder) == [2, 4]  # the best has not made way for the newest
  assert train(shared, folder, **STOPPED) == 0
  said = capsys.readouterr().out
  assert "the lowest eval_loss; the run ends after 3 evaluations without a better one" in said
  assert "step 2: eval_loss 3.0000, the best so far" in said
  assert "step 3: eval_loss 5.0000; the best is 3.0000 of step 2, 1 of 3 without" in said
  assert "ending at step 5 of 20: eval_loss has not improved in 3 evaluations" in said
  assert checkpoints(folder) == [2, 5]
  done = record.read(folder).done
  best = {"step": 2, "metric": "eval_loss", "value": 3.0, "is_exported": True}
  assert (done["steps"], done["best"]) == (5, best)
  assert done["ended_early"] == {"after": 3, "of": 20}
  assert (done["final"]["eval_loss"], record.read(folder).given()["eval_loss"]) == (5.0, 3.0)
  assert_equal(weights(folder), evaluated)
  page = (folder / report.NAME).read_text()
  assert "Finished after 5 of 20 steps, since 3 evaluations had brought no better" in page
  assert "What was exported is of step 2, the best one (eval_loss 3)" in page
  assert train(shared, folder, **STOPPED) == 0
  assert "is complete" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_ended_early_goes_on_to_more_steps_and_counts_anew(shared, tmp_path, evaluated):
  folder = tmp_path / "run"
  assert train(shared, folder, **STOPPED) == 0
  assert train(shared, folder, **STOPPED | dict(steps=21)) == 0
  assert record.read(folder).done["steps"] == 8
  assert record.read(folder).given_step == 2
  assert_equal(weights(folder), evaluated)


@pytest.mark.parametrize(
  ("fields", "said"),
  [
    (dict(eval__best="los"), "eval.best=los: nothing says which way of it is better"),
    (dict(eval__best="entropy"), "nothing says which way of it is better"),
    (dict(eval__best="loss/jokes"), "have no such metric; of theirs there are loss, loss/special"),
    (dict(eval__stop_after=2, eval__every=0), "eval.every=0 leaves the last alone"),
    (dict(eval__best="loss", eval__every=0), "eval.best=loss chooses among evaluations, and"),
    (dict(eval__stop_after=2, data__eval_rows=0), "eval.stop_after=2: the best step is told by"),
  ],
)
def test_a_best_that_nothing_tells_is_refused_before_the_start(
  shared, tmp_path, capsys, fields, said
):
  assert train(shared, tmp_path / "run", **fields) == 1
  assert said in capsys.readouterr().err
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("steps", "passes", "said"),
  [
    (1, 0.25, "length: 1 step, which are 0.25 epochs"),
    (100, 20.0, "length: 100 steps, which are 20.0 epochs"),
    (
      100,
      100.0,
      "length: 100 steps, which are 100.0 epochs: every row is seen that often; --config.epochs=3 says fewer",
    ),
  ],
)
def test_both_measures_of_a_length_are_said_and_many_epochs_questioned(steps, passes, said):
  loader = mock.create_autospec(Loader, instance=True)
  loader.epochs.return_value = passes
  assert run_length.describe(ml_collections.ConfigDict({"steps": steps}), loader) == said
