"""Reward functions as TRL's users write them."""

import asyncio
import math

import numpy as np
import pytest

from posttrain_jax.rewards import selftest, trl
from posttrain_jax.rewards.overlapped import Overlapped
from posttrain_jax.rewards.reward import Part, Reward
from posttrain_jax.rewards.verifier import Answer, TrainerState
from posttrain_jax.rewards.workers import Workers


def right(completions, solution, **columns):
  return [float(c == s) for c, s in zip(completions, solution)]


def of_ids(completion_ids, **columns):
  return [len(ids) for ids in completion_ids]


async def later(completions, **columns):
  await asyncio.sleep(0)
  return [len(completion) for completion in completions]


def of_messages(prompts, completions, trainer_state, log_extra, log_metric):
  log_extra("said", [c[0]["content"] for c in completions])
  log_metric("steps", trainer_state)
  return [
    c[0]["role"] == "assistant" and p[0]["role"] == "user" for p, c in zip(prompts, completions)
  ]


def fades(completions, trainer_state, **columns):
  left = 1 - trainer_state.global_step / trainer_state.max_steps
  return [len(completion) * left for completion in completions]


def not_always(completions, task, **columns):
  return [None if t != "math" else 1.0 for t in task]


def with_nan(completions, **columns):
  return [math.nan if c == "?" else 1.0 for c in completions]


def too_few(completions, **columns):
  return [1.0] * (len(completions) - 1)


def logs_too_few(completions, log_extra, **columns):
  log_extra("x", [1])
  return [1.0] * len(completions)


def as_a_dict(completions, **columns):
  return dict.fromkeys(range(len(completions)), 1.0)


def as_a_set(completions, **columns):
  return {1.0 * i for i in range(len(completions))}


def one_number(completions, **columns):
  return 1.0


def forgets_to_return(completions, **columns):
  pass


async def yields(completions, **columns):
  yield 1.0


def array(completions, **columns):
  return np.arange(len(completions))


def column_of_an_array(completions, **columns):
  return np.ones((len(completions), 1))


def generator(completions, **columns):
  yield from range(len(completions))


def fails(completions, **columns):
  return [1 / 0 for _ in completions]


def hangs(completions, **columns):
  while True:
    pass


def scored(function, answers, workers=None, **options):
  part = Part("f", trl.Function(function, "f", workers, **options))
  return Reward([part], retries=0).score(answers, trainer_state=3)


def values(result):
  return [one.total.value for one in result.answers]


ANSWERS = [
  Answer("1+1", "2", {"prompt": "1+1", "solution": "2", "task": "math"}, [5]),
  Answer("2+2", "3", {"prompt": "2+2", "solution": "4", "task": "code"}, [6, 7]),
]
TALK = [Answer([{"role": "user", "content": "?"}], text, {}) for text in ("a", "b")]


@pytest.fixture(scope="module")
def workers():
  pool = Workers(1)
  yield pool
  pool.close()


@pytest.mark.parametrize("apart", [False, True], ids=["here", "in a worker"])
def test_functions_work_unchanged(workers, apart):
  pool = workers if apart else None
  assert values(scored(right, ANSWERS, pool)) == [1, 0]
  assert values(scored(of_ids, ANSWERS, pool)) == [1, 2]
  assert values(scored(later, ANSWERS, pool)) == [1, 1]
  result = scored(of_messages, TALK, pool)
  assert values(result) == [1, 1]
  assert result.columns == {"said": ["a", "b"]}
  assert result.metrics["logged/steps"] == 3


@pytest.mark.parametrize("apart", [False, True], ids=["here", "in a worker"])
def test_a_function_is_told_where_the_run_stands(workers, apart):
  """In a run, and outside of one, as in the trial before it."""
  reward = Reward([Part("f", trl.Function(fades, "f", workers if apart else None))], retries=0)
  rows = [Answer("?", text, {"gold": text}) for text in ("aa", "b")]
  assert values(reward.score(rows)) == [2, 1]
  selftest.check(reward, rows)
  with Overlapped(reward, trainer_state=TrainerState(3, 4)) as scores:
    scores.put(0, rows)
    assert values(scores.result()) == [0.5, 0.25]


def test_an_async_function_runs_inside_of_a_loop():
  async def notebook():
    return values(scored(later, ANSWERS))

  assert asyncio.run(notebook()) == [1, 1]


def test_none_does_not_apply_and_nan_is_missing():
  both = Reward(
    [
      Part("f", trl.Function(not_always, "f")),
      Part("g", trl.Function(right, "g"), weight=0.5),
    ]
  ).score(ANSWERS)
  assert values(both) == [1.5, 0]
  result = scored(with_nan, [Answer("", "?", {}), Answer("", "x", {})])
  assert values(result) == [None, 1]
  assert result.answers[0].total.reason == "f: returned nan"


def test_a_function_that_raises_or_hangs_is_missing(workers):
  result = scored(fails, ANSWERS)
  assert values(result) == [None, None]
  assert "test_trl.py:" in result.answers[0].total.reason
  assert "raised ZeroDivisionError: division by zero" in result.answers[0].total.reason
  late = scored(hangs, ANSWERS, workers, seconds=0.2)
  assert {one.total.reason for one in late.answers} == {"f: timed out after 0.4 s"}


@pytest.mark.parametrize("apart", [False, True], ids=["here", "in a worker"])
def test_a_list_of_another_length_stops(workers, apart):
  pool = workers if apart else None
  with pytest.raises(ValueError, match="f returned 1 reward for 2 completions"):
    scored(too_few, ANSWERS, pool)
  with pytest.raises(ValueError, match="f logged 1 value of 'x' for 2 completions"):
    scored(logs_too_few, ANSWERS, pool)


@pytest.mark.parametrize(
  ("function", "said"),
  [
    (as_a_dict, r"\{0: 1.0, 1: 1.0\} \(dict\)"),
    (as_a_set, r"\{0.0, 1.0\} \(set\)"),
    (one_number, r"1.0 \(float\)"),
    (forgets_to_return, r"None \(NoneType\)"),
    (yields, r"\(async_generator\)"),
    (lambda completions: "11", r"'11' \(str\)"),
    (lambda completions: np.ones(()), r"\(ndarray\)"),
    (lambda completions: np.ones((2, 2)), r"\(ndarray\)"),
  ],
)
def test_what_is_no_list_of_scores_is_refused(function, said):
  with pytest.raises(
    ValueError, match=f"^f returned .*{said}; it returns a list with a number for"
  ):
    scored(function, ANSWERS)


def test_arrays_and_generators_are_lists_of_scores():
  assert values(scored(array, ANSWERS)) == [0, 1]
  assert values(scored(column_of_an_array, ANSWERS)) == [1, 1]
  assert values(scored(generator, ANSWERS)) == [0, 1]


def test_what_is_asked_again_keeps_its_place():
  calls = []

  def second_time(completions, log_extra, **columns):
    calls.append(completions)
    log_extra("n", [len(calls)] * len(completions))
    return [math.nan if len(calls) == 1 and c == "3" else 1.0 for c in completions]

  result = Reward([Part("f", trl.Function(second_time, "f"))], retries=1).score(ANSWERS)
  assert calls == [["2", "3"]] * 2  # a function may compare what it is given
  assert result.columns == {"n": [1, 2]}


def test_a_score_that_was_there_stays_when_others_are_asked_for_again():
  calls = []

  def best(completions, **columns):
    calls.append(completions)
    return [
      math.nan if len(calls) == 1 and c == "2" else len(calls) + float(c == max(completions))
      for c in completions
    ]

  result = Reward([Part("f", trl.Function(best, "f"))], retries=1).score(ANSWERS)
  assert [one.total.value for one in result.answers] == [2, 2]


def test_columns_do_not_stand_for_what_is_given():
  def named(completions, completion_ids, **columns):
    return [completion_ids == [[5]] and {*columns} == {"prompts", "solution", *trl.HELPERS}]

  row = {"prompt": "a", "completion": "b", "completion_ids": [9], "solution": "c"}
  assert values(scored(named, [Answer("?", "!", row, [5])])) == [1]


def test_a_column_that_the_data_does_not_have_is_told():
  columns = ["prompt", "answer"]
  with pytest.raises(
    ValueError, match=r"mine reads the column 'solution', .*its columns are answer"
  ):
    trl.check(right, "mine", columns)
  trl.check(right, "mine", [*columns, "solution"])
  trl.check(of_messages, "mine", columns)
  assert [trl.is_one(f) for f in (right, of_ids, later, of_messages)] == [True] * 4
  assert not trl.is_one(lambda prompt, completion, example: 0)
  rows = [Answer("", "", {"a": 1}), Answer("", "", {"b": 2})]  # of a mixture
  assert trl.arguments(rows)["a"] == [1, None]


def logs_as_we_do(completions, log_metric, **columns):
  for name in ("loss", "reward", "step", "rewards/f/mean", "skipped_in_a_row"):
    log_metric(name, 777)
  return [0.25] * len(completions)


def test_what_is_logged_and_not_finite_is_in_no_mean():
  def logs(completions, log_metric, **columns):
    for value in (1.0, math.nan, 3.0, math.inf):
      log_metric("some", value)
    log_metric("none", math.nan)
    return [0.25] * len(completions)

  metrics = scored(logs, ANSWERS).metrics
  assert metrics["logged/some"] == 2
  assert all(map(math.isfinite, metrics.values()))  # a checkpoint has them as JSON


def test_what_a_function_logs_stands_for_no_metric_of_the_run():
  result = scored(logs_as_we_do, [Answer("?", "a", {}), Answer("?", "b", {})])
  assert result.metrics["reward"] == result.metrics["rewards/f/mean"] == 0.25
  logged = {name for name, value in result.metrics.items() if value == 777}
  assert len(logged) == 5
  assert all(name.startswith("logged/") for name in logged)
