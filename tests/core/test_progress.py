"""What is said of things that take a while, in a log file and in a program's output."""

import io
import threading

import pytest

from posttrain_jax.core import progress


@pytest.fixture
def clock(monkeypatch):
  """Seconds, moved by hand."""
  now = [100.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  return now


def test_a_phase_is_said_when_it_begins_and_when_it_took_long(clock, capsys):
  with progress.phase("reading smollm2"):
    assert capsys.readouterr().err == "reading smollm2 ...\n"
    clock[0] += 2.14
  assert capsys.readouterr().err == "reading smollm2: 2.1 s\n"
  with progress.phase("reading the data"):
    clock[0] += 0.9
  assert capsys.readouterr() == ("", "reading the data ...\n")


def test_a_log_file_gets_lines_at_intervals_and_how_long_is_left(clock, capsys):
  with progress.counter("answering") as count:
    for done in range(1, 41):
      clock[0] += 1
      count(done, 40)
  assert capsys.readouterr().err.splitlines() == [
    "answering ...",
    "answering: 15 of 40",
    "answering: 30 of 40, 10.0 s left",
    "answering: 40.0 s",
  ]


def test_how_long_is_left_goes_by_what_came_since_the_first_line(clock, capsys):
  """Programs compile for 45 seconds; then 32 answers a second end, beside 100 that were there before."""
  with progress.counter("answering") as count:
    clock[0] += 45
    for done in range(101, 901):
      clock[0] += 1 / 32
      count(done, 1000)
  assert capsys.readouterr().err.splitlines()[1:3] == [
    "answering: 101 of 1000",
    "answering: 581 of 1000, 13.1 s left",
  ]


def test_nothing_is_said_where_a_program_reads(clock, capsys):
  with progress.muted():
    with progress.phase("reading"), progress.counter("answering") as count:
      clock[0] += 20
      count(1, 2)
    assert list(progress.told([1, 2], "scoring")) == [1, 2]
  assert capsys.readouterr() == ("", "")
  with progress.phase("reading"):
    pass
  assert capsys.readouterr().err == "reading ...\n"


def test_a_terminal_sees_a_spinner_and_afterwards_one_line(clock):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  out = Terminal()
  with progress.phase("reading [bold]", stream=out):
    clock[0] += 3
  assert "reading [bold]" in out.getvalue()
  assert out.getvalue().endswith("reading [bold]: 3.0 s\n")


def test_what_goes_on_for_long_is_said_now_and_then_and_what_is_short_is_not(monkeypatch):
  monkeypatch.setattr(progress, "EVERY", 0.02)
  said, told = [], threading.Event()

  def say(line):
    said.append(line)
    told.set()

  with progress.announced("scoring", say):
    assert told.wait(10)
  assert said[0].startswith("scoring ... 0.")
  monkeypatch.setattr(progress, "EVERY", 15.0)
  said.clear()
  with progress.announced("scoring", say):
    progress.lines("writing", say)(1, 2)
  assert said == []
