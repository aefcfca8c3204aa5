"""What a log file says of a run: what takes a while besides its steps, and how long it will take."""

import pytest

from posttrain_jax.train import progress
from posttrain_jax.train.progress import EVALUATING, SAVING, Bar

VALUES = dict(loss=1.5, tokens_per_second=1000.0)


@pytest.fixture
def clock(monkeypatch):
  """Seconds, moved by hand."""
  now = [100.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  return now


def run(bar, clock, steps, *, step=1.0, compiling=60.0, evaluating=5.0, saving=3.0):
  """The text of the time left at each step, as a loop asks for it."""
  left = {}

  def compiled():
    clock[0] += compiling

  called = bar.compiled(compiled, lambda: None)
  for at in range(1, steps + 1):
    called() if at == 1 else None
    clock[0] += step
    bar.update(at, VALUES)
    left[at] = bar.left(at, clock[0])
    if at % 10 == 0:
      with bar.phase(EVALUATING):
        clock[0] += evaluating
    if at % 20 == 0:
      with bar.phase(SAVING):
        clock[0] += saving
  return left


def test_the_time_left_is_without_compilation_and_with_evaluations_and_saves(clock):
  left = run(Bar(40, eval_every=10, save_every=20), clock, 40)
  assert left[1] == ""  # nothing has been measured
  assert left[2] == "0:38 left, 4 evaluations not counted"
  assert left[11] == "0:44 left"  # 29 steps and 3 evaluations of 5 s
  assert left[21] == "0:32 left"  # 19 steps, 2 evaluations, 1 save of 3 s
  assert left[40] == "0:08 left"  # the last evaluation and save


def test_the_first_evaluation_compiles_and_the_next_say_how_long_they_take(clock):
  bar = Bar(40, eval_every=10)
  for seconds in (30.0, 5.0, 6.0):
    with bar.phase(EVALUATING):
      clock[0] += seconds
  assert bar.took[EVALUATING] == 5.0


def test_a_log_file_says_what_takes_long(clock, capsys):
  bar = Bar(20, eval_every=10, save_every=20)
  run(bar, clock, 20, evaluating=0.2)
  lines = capsys.readouterr().out.splitlines()
  assert lines == [
    "compiling ...",
    "compiling: 1:00 min",
    "training ...",  # whose first values come behind the second step
    "step 1/20  loss 1.5000  1,000 tokens/s",
    "evaluating ...",  # it was not known to be short
    "step 16/20  loss 1.5000  1,000 tokens/s  0:04 left",
    "step 20/20  loss 1.5000  1,000 tokens/s  0:00 left",
    "saving ...",
    "saving: 3.0 s",
  ]


def test_a_silent_bar_says_nothing(clock, capsys):
  run(Bar(20, eval_every=10, silent=True), clock, 20)
  assert capsys.readouterr() == ("", "")


def test_of_answers_that_are_compared_the_reward_is_told_on_one_line(capsys):
  online = {"loss": 0.0, "tokens_per_second": 9.5, "frac_groups_dead": 0.375, progress.CUT: 0.1}
  bar = Bar(200)
  bar.update(1, {**online, "reward": 0.3125, "pass@1": 0.25})
  bar.last = -progress.EVERY
  bar.update(2, online)
  one, other = capsys.readouterr().out.splitlines()
  assert one == "step 1/200  reward 0.312  pass@1 0.25  agree 0.38  cut 0.10"
  assert other.startswith("step 2/200  no scores  agree 0.38  cut 0.10")
  assert max(len(one), len(other)) <= 80
