"""A conversation with a tiny model, as somebody at a terminal has it: turns, commands, Ctrl-C."""

import io

import pytest

from posttrain_jax.rollout.conversation import AGAIN, HELP, Conversation, Interrupted
from posttrain_jax.rollout.dialogue import Dialogue
from tests.rollout import test_speaker
from tests.rollout.test_speaker import NEW, assistant, expected, ready, user

base = test_speaker.base
CTRL_C, CTRL_D = object(), object()


def asking(*lines):
  """What is typed, one after the other: a text, CTRL_C, (a text, CTRL_C) or CTRL_D."""
  left = list(lines)

  def ask():
    line = left.pop(0)
    if line is CTRL_D:
      raise EOFError
    if line is CTRL_C:
      raise Interrupted
    if isinstance(line, tuple):
      raise Interrupted(line[0])
    return line

  return ask, left


def talk(speaker, *lines, system=None):
  """(stdout, what is said beside the answers, what was never asked)"""
  ask, left = asking(*lines)
  out, err = io.StringIO(), io.StringIO()
  Conversation(speaker, system, stdout=out, stderr=err, history="~/questions").run(ask)
  return out.getvalue(), err.getvalue().splitlines()[1:], left


@pytest.fixture(scope="module")
def speaker(base):
  return ready(base[0], template="chatml")[0]


def answers(base, *conversations):
  return expected(base, *conversations)


def test_turns_are_remembered_until_told_not_to(base, speaker):
  system = dict(role="system", content="Four")
  lines = ("Hello there", "What is two?", "/reset", "What is two?", "/exit", "never read")
  out, err, left = talk(speaker, *lines, system="Four")
  (first,) = answers(base, [system, user("Hello there")])
  turns = [system, user("Hello there"), assistant(first), user("What is two?")]
  second, anew = answers(base, turns, [system, user("What is two?")])
  assert second != anew
  assert out == f"{first}\n{second}\n{anew}\n"
  assert left == ["never read"]
  assert "the conversation is forgotten" in err


def test_a_system_message_is_set_shown_and_removed(base, speaker):
  lines = ("/system Four", "Hello there", "/system", '/system ""', "/clear", "Hello there", CTRL_D)
  out, err, _ = talk(speaker, *lines)
  with_it, without = answers(
    base, [dict(role="system", content="Four"), user("Hello there")], [user("Hello there")]
  )
  assert with_it != without
  assert out == f"{with_it}\n{without}\n"
  said = [line for line in err if "system" in line]
  assert said == ["system message: Four"] * 2 + ["there is no system message"]


def test_a_turn_is_taken_back_and_asked_anew(base, speaker):
  lines = ("/undo", "Hello there", "Wrong", "/undo", "What is two?", "/again", CTRL_D)
  out, err, _ = talk(speaker, *lines)
  (first,) = answers(base, [user("Hello there")])
  so_far = [user("Hello there"), assistant(first)]
  wrong, second = answers(base, [*so_far, user("Wrong")], [*so_far, user("What is two?")])
  assert out == f"{first}\n{wrong}\n{second}\n{second}\n"
  assert "there is nothing to take back" in err
  assert "taken back: Wrong" in err


def test_help_names_every_command_and_the_file_of_questions(speaker):
  out, err, _ = talk(speaker, "/help", "/?", "/nothing", "/etc/hosts is what?", "/bye")
  assert err[: len(HELP.splitlines()) + 1] == [
    *HELP.splitlines(),
    "Earlier questions are kept in ~/questions.",
  ]
  assert "/nothing is no command: /help lists them; a space before it makes it a question" in err
  assert out.count("\n") == 1  # a path is a question


def test_a_block_of_lines_is_one_question(base, speaker):
  block = "Hello there\nWhat is two?\n"
  assert talk(speaker, block, CTRL_D)[0] == answers(base, [user(block)])[0] + "\n"


def test_ctrl_c_ends_an_answer_and_what_was_said_is_the_turn(base, speaker, monkeypatch):
  whole, cut = Dialogue.stream, []

  def interrupted(self, *args, **options):
    drawn = whole(self, *args, **options)
    for _ in range(3):
      cut.append(next(drawn))
      yield cut[-1]
    monkeypatch.setattr(Dialogue, "stream", whole)
    raise KeyboardInterrupt

  monkeypatch.setattr(Dialogue, "stream", interrupted)
  out, err, left = talk(speaker, "Hello there", "What is two?", CTRL_C, CTRL_C, "never")
  said = speaker.text(cut)
  (second,) = answers(base, [user("Hello there"), assistant(said), user("What is two?")])
  assert said
  assert out == f"{said}\n{second}\n"
  assert left == ["never"]
  assert AGAIN in err


def test_ctrl_c_before_the_first_word_is_no_turn(base, speaker, monkeypatch):
  whole = Dialogue.stream

  def interrupted(self, *args, **options):
    monkeypatch.setattr(Dialogue, "stream", whole)
    raise KeyboardInterrupt
    yield

  monkeypatch.setattr(Dialogue, "stream", interrupted)
  out, _, _ = talk(speaker, "What is two?", "Hello there", CTRL_D)
  assert out == f"\n{answers(base, [user('Hello there')])[0]}\n"


def test_a_second_ctrl_c_at_an_empty_prompt_leaves(speaker):
  assert talk(speaker, CTRL_C, CTRL_C, "never")[2] == ["never"]
  # what was typed is thrown away, which is the first; a question between makes it a first again
  assert talk(speaker, ("half a quest",), CTRL_C, "never")[2] == ["never"]
  assert talk(speaker, CTRL_C, ("half",), ("other",), CTRL_C, "never")[2] == ["never"]
  assert talk(speaker, CTRL_C, "/help", CTRL_C, CTRL_D)[2] == []


def test_a_conversation_that_fills_the_model_forgets_its_beginning_and_goes_on(base, speaker):
  long = "Hello there " * 30
  too_long = "Hello " * 200
  out, err, _ = talk(speaker, "Hello", too_long, long, "What is two?", CTRL_D)
  (first,) = answers(base, [user("Hello")])
  (second,) = answers(base, [user("Hello"), assistant(first), user(long)])
  turns = [user("Hello"), assistant(first), user(long), assistant(second), user("What is two?")]
  fits = [at for at in (0, 2, 4) if len(speaker.tokens(turns[at:])) + NEW <= 160]
  assert fits[0] == 2  # the first turn has to go
  (third,) = answers(base, turns[2:])
  assert out == f"{first}\n{second}\n{third}\n"
  said = [line for line in err if "cut after" not in line]
  assert said[0].startswith("the conversation has")  # of the question that was not asked
  assert said[1:] == [
    "the earliest turn is forgotten: the model has 160 positions, and the answer needs some"
  ]


def test_an_answer_that_was_cut_says_how_it_gets_longer(speaker):
  _, err, _ = talk(speaker, "Hello there", CTRL_D)
  assert err == [f"(cut after {NEW} tokens; --max_new_tokens=N gives more)"]


def test_a_base_model_has_no_place_for_a_system_message(base):
  speaker, _ = ready(base[0])
  _, err, _ = talk(speaker, "/system Four", CTRL_D)
  assert err == [
    "this model has no chat template, so a system message has no place; start with --template"
  ]
