"""The source of an online run's batches, where what writes and what updates is replaced."""

import functools
import pathlib
import types

import numpy as np
import pytest

from posttrain_jax import settings
from posttrain_jax.__main__ import main
from posttrain_jax.build import checks, online
from posttrain_jax.build.data import Data
from posttrain_jax.build.prompts import Prompt
from posttrain_jax.commands import report
from posttrain_jax.rewards import workers
from posttrain_jax.rollout.requests import Answer, Request
from posttrain_jax.runs import completions
from posttrain_jax.settings import ConfigError
from posttrain_jax.train import loop
from posttrain_jax.train.signals import Stopped
from tests import tiny

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "rl.py:reward=number"
STATE = types.SimpleNamespace(trainable={"w": np.zeros(1)}, carried=None)


class Writes:
  """Answers `7` to everything, a window each."""

  def __init__(self):
    self.asked = 0

  def load(self, trainable, carried):
    pass

  def request(self, prompt, number, sample):
    return Request(prompt.tokens.tolist(), 4, number=number, sample=sample)

  def run(self, requests, before_window):
    for place, request in enumerate(requests):
      before_window()
      self.asked += 1
      yield place, Answer(request, [55], np.zeros(1, np.float32), "stop_token")


def source(folder, gold, *, without=(), **fields):
  """without: places of rows that have no answer."""
  small = {"batch.rows": 2, "online.samples": 2, "steps": 9} | fields
  config = settings.load(str(CONFIG), [settings.override(k, v) for k, v in small.items()])
  rows = [{"id": i} if i in without else {"id": i, "answer": gold} for i in range(4)]
  prompts = [Prompt(np.asarray([5, i]), "?", row, f"row {i}") for i, row in enumerate(rows)]
  model = types.SimpleNamespace(
    tokenizer=tiny.tokenizer(), config=types.SimpleNamespace(vocab_size=256)
  )
  said = []
  made = online.Online(config, model, Data(prompts, (), (), ""), said.append)
  made.folder, made.writer = folder, Writes()

  def of(groups, state, number):
    for group in groups:
      group.advantages = [0.0] * len(group.written)
    return [{"number": number}], {}

  made.updates = types.SimpleNamespace(of=of, kl_coefficient=0.0)
  return made, said


def test_a_run_that_is_to_stop_writes_no_further_than_a_window(tmp_path):
  made, _ = source(tmp_path, "7")
  made.batch(STATE)
  before, answers = made.get_state(), iter([False, False, False, True])
  with pytest.raises(Stopped):  # after two answers of four
    made.batch(STATE, lambda: next(answers))
  assert made.get_state() == before
  assert made.writer.asked == 4 + 2
  assert completions.numbers(tmp_path) == [1]
  assert made.batch(STATE)["number"] == 2
  assert made.writer.asked == 4 + 4  # those two are there


def test_a_run_that_is_to_stop_before_it_writes_writes_nothing(tmp_path):
  made, _ = source(tmp_path, "7")
  with pytest.raises(Stopped):
    made.batch(STATE, lambda: True)
  assert made.writer.asked == 0


def test_batches_without_any_score_are_told_and_end_the_run(tmp_path):
  made, said = source(tmp_path, "no number")
  for _ in range(online.UNSCORED - 1):
    made.batch(STATE)
  assert [line for line in said if "nothing is learned" in line] == [
    f"no answer of batch {number} has a score (number: the row's answer 'no number' cannot be"
    " compared with: no number): nothing is learned from it"
    for number in (1, 2)
  ]
  with pytest.raises(online.Unscored, match="no answer of the batches 1 to 3 has a score"):
    made.batch(STATE)
  assert not [*tmp_path.glob("completions/scores_*")]  # they are asked for anew
  assert len([*tmp_path.glob("completions/answers_*")]) == 3


def test_a_column_that_a_verifier_reads_is_every_row_s(tmp_path):
  """As `posttrain sample` has it: of rows without it a run would write answers that nothing scores."""
  with pytest.raises(
    ConfigError, match="column 'answer', which not all rows have; the first without it is row 2"
  ):
    source(tmp_path, "7", without=(2, 3))
  with pytest.raises(ConfigError, match=r"of the data's columns \(id\) none has a name"):
    source(tmp_path, "7", without=range(4))


def test_what_ends_a_run_by_decision_is_told_in_its_own_words(capsys, monkeypatch):
  for kind in (online.Unscored, loop.Diverged, workers.WorkerError):
    monkeypatch.setattr(report, "run", functools.partial(fails, kind("no answer has a score")))
    assert main(["report", "runs/a"]) == 1
    assert capsys.readouterr().err == "posttrain report: no answer has a score\n"


def fails(error, *_):
  raise error


def test_answers_to_which_no_part_applies_are_told(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text("def mine(completions, **columns):\n  return [None for c in completions]\n")
  made, said = source(tmp_path, "7", **{"reward.parts": f"('{path}:mine',)"})
  made.batch(STATE)
  assert "batch 1: reward was missing 4 times: no part applies to this row" in said


def test_a_score_between_them_starts_the_count_anew(tmp_path):
  made, _ = source(tmp_path, "no number")
  for _ in range(2):
    made.batch(STATE)
  assert made.get_state()["unscored"] == 2
  for prompt in made.prompts:
    prompt.row["answer"] = "7"
  made.batch(STATE)
  assert made.get_state()["unscored"] == 0


def test_the_outcome_is_told_where_it_is_not_the_reward(tmp_path):
  assert "outcome" not in source(tmp_path, "7")[0].stats()
  assert "outcome" not in source(tmp_path, "7", **{"online.outcome": "number"})[0].stats()
  two = {"reward.parts": "('number', 'length')", "reward.weights": "(1.0, 1.0)"}
  two["reward.options"] = "{'length': {'longest': 4, 'soft': 2}}"
  told = source(tmp_path, "7", **two)[0].stats()
  assert "\noutcome: number, without length, says which answers are right and which groups" in told


def test_the_outcome_is_named_as_the_part_is_written_or_called(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text("def style(prompt, completion, example):\n  return 1.0\n")
  for name in (f"{path}:style", "mine.py:style"):
    fields = {"reward.parts": f"('number', '{path}:style')", "online.outcome": name}
    made, _ = source(tmp_path, "7", **fields)
    assert made.outcome.names == ("mine.py:style",)
    checks.check(made.config)
  made.config.online.outcome = "mine.py:other"
  with pytest.raises(
    ConfigError, match=r"the reward has the parts number, mine\.py:style; total is"
  ):
    checks.check(made.config)
