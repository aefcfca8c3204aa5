"""A conversation in a terminal: what is typed becomes turns, and commands that begin with a slash change it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from posttrain_jax.core import progress
from posttrain_jax.rollout.speaker import Speaker, message, opening

HELP = """\
/system TEXT  the system message from here on; alone it shows it, and "" removes it
/reset        forgets the conversation, not the system message
/undo         takes the last question and its answer back
/again        answers the last question anew
/help         this list
/exit         leaves, as Ctrl-D does
Ctrl-C ends an answer, what was said remains; at an empty prompt a second one leaves.
Enter sends, Alt-Enter starts a new line, a pasted block is one question. The arrows bring back earlier ones."""
ALSO = {  # what other programs call them
  "/?": "/help",
  "/clear": "/reset",
  "/bye": "/exit",
  "/quit": "/exit",
  "/regen": "/again",
  "/regenerate": "/again",
}
AGAIN = "Ctrl-C again, or Ctrl-D, leaves"


class Interrupted(Exception):
  """Ctrl-C at the prompt; `typed` is what stood there."""

  def __init__(self, typed: str = "") -> None:
    super().__init__(typed)
    self.typed = typed


@dataclasses.dataclass
class Conversation:
  """Turns so far, and what answers the next one.

  said: user and assistant by turns, without the system message.
  """

  speaker: Speaker
  system: str | None
  seed: int = 0
  stdout: TextIO = dataclasses.field(default_factory=lambda: sys.stdout)
  stderr: TextIO = dataclasses.field(default_factory=lambda: sys.stderr)
  history: str = ""  # the file of earlier questions
  said: list[dict] = dataclasses.field(default_factory=list)

  def __post_init__(self) -> None:
    opening(self.system)  # a mistake in it is found before the first question
    self._dialogue = self.speaker.dialogue()
    self._turns = itertools.count()

  def run(self, ask: Callable[[], str]) -> None:
    """Until somebody leaves.

    Args:
      ask: the next question; EOFError at Ctrl-D, Interrupted at Ctrl-C.
    """
    self._tell("/help lists what can be done, Ctrl-D leaves")
    was_interrupted = False
    while True:
      try:
        text = ask()
      except EOFError:
        return
      except Interrupted as interrupt:
        if was_interrupted and not interrupt.typed:
          return
        was_interrupted = True
        if not interrupt.typed:
          self._tell(AGAIN)
        continue
      if ALSO.get(text.strip(), text.strip()) == "/exit":
        return
      was_interrupted = text.strip() != "" and not self.take(text)

  def take(self, text: str) -> bool:
    """A question answered, or a command done; False where Ctrl-C ended the answer."""
    name, _, rest = text.strip().partition(" ")
    if re.fullmatch(r"/[a-z?]+", name):
      return self._command(ALSO.get(name, name), rest.strip())
    return self._answer(text) if text.strip() else True

  def _command(self, name: str, rest: str) -> bool:
    if name == "/help":
      self._tell(
        HELP + (f"\nEarlier questions are kept in {self.history}." if self.history else "")
      )
    elif name == "/reset":
      self.said = []
      self._tell("the conversation is forgotten")
    elif name == "/undo":
      gone = self._taken_back()
      self._tell(f"taken back: {_short(gone)}" if gone else "there is nothing to take back")
    elif name == "/again":
      if question := self._taken_back():
        return self._answer(question)
      self._tell("no question was asked yet")
    elif name == "/system":
      self._set_system(rest)
    else:
      self._tell(f"{name} is no command: /help lists them; a space before it makes it a question")
    return True

  def _set_system(self, text: str) -> None:
    if text and self.speaker.template is None:
      self._tell(
        "this model has no chat template, so a system message has no place; start with --template"
      )
      return
    if text:
      self.system = None if text in ('""', "''") else text
    self._tell(f"system message: {self.system}" if self.system else "there is no system message")

  def _taken_back(self) -> str:
    """The last question, which is forgotten with its answer; "" where there is none."""
    if not self.said:
      return ""
    question, self.said = self.said[-2]["content"], self.said[:-2]
    return question

  def _answer(self, question: str) -> bool:
    asked = [*self.said, message("user", question)]
    answer, is_whole = "", True
    try:
      before = opening(self.system)
      asked = self._fitting(before, asked)
      turn = next(self._turns)
      pieces = self.speaker.stream([*before, *asked], self.seed, self._dialogue, turn=turn)
      for piece in _after_a_while(pieces):
        answer += piece
        self.stdout.write(piece)
        self.stdout.flush()
    except KeyboardInterrupt:
      is_whole = False
    except ValueError as error:
      # too long by itself, or not what the template takes: the turn did not happen
      self._tell(str(error))
      return True
    with contextlib.suppress(KeyboardInterrupt):  # pressed twice
      self.stdout.write("\n")
      self.stdout.flush()
    if is_whole and not self._dialogue.ended:
      self._tell(f"(cut after {self.speaker.max_new_tokens} tokens; --max_new_tokens=N gives more)")
    if answer:  # cut short before its first word, it did not happen either
      self.said = [*asked, message("assistant", answer)]
    return is_whole

  def _fitting(self, before: list[dict], asked: list[dict]) -> list[dict]:
    """The turns without the earliest ones, where all of them leave no room for an answer."""
    positions, speaker = self.speaker.positions, self.speaker
    wanted = min(speaker.max_new_tokens, positions // 4)
    speaker.room(speaker.tokens([*before, asked[-1]]))  # too long by itself: nothing is forgotten
    kept = asked
    while len(kept) > 1 and len(speaker.tokens([*before, *kept])) + wanted > positions:
      kept = kept[2:]
    if gone := (len(asked) - len(kept)) // 2:
      turns = "the earliest turn is" if gone == 1 else f"the {gone} earliest turns are"
      self._tell(
        f"{turns} forgotten: the model has {positions} positions, and the answer needs some"
      )
    return kept

  def _tell(self, text: str) -> None:
    print(text, file=self.stderr, flush=True)


def _after_a_while(pieces: Iterator[str]) -> Iterator[str]:
  """The pieces; until the first of them comes a terminal shows that something is done."""
  with progress.waiting("reading"):
    first = next(pieces, "")
  yield first
  yield from pieces


def _short(text: str) -> str:
  line = " ".join(text.split())
  return line if len(line) <= 60 else f"{line[:57]}..."
