"""Talk to a model, from a terminal or line by line from a file."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

import jax

from posttrain_jax.data import templates
from posttrain_jax.models import before
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.rollout import engine
from posttrain_jax.rollout.sampling import Sampling

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C cuts an answer short"


@dataclasses.dataclass(frozen=True)
class Speaker:
  """A model with all that turns a conversation into its next turn."""

  params: engine.Ready
  config: ModelConfig
  tokenizer: Any
  template: templates.Template | None  # None: a base model, which continues text
  stop_tokens: tuple[int, ...]
  sampling: Sampling
  max_new_tokens: int

  dtype: Any = None  # of the computation; None: the parameters' own

  @property
  def positions(self) -> int:
    """How many the model has for a conversation."""
    return self.config.max_length - before.slots(self.params.stacked)

  def tokens(self, messages: list[dict]) -> list[int]:
    """The prompt, which no EOS ends; without a template the last message's text, as it is.

    Raises:
      ValueError: a message is not text, or not what the template takes.
    """
    for message in messages:
      _check_text(message["content"])
    if self.template is None:
      return templates.opening(self.tokenizer, messages[-1]["content"])
    text = self.template.render(messages, add_generation_prompt=True)
    return self.tokenizer(text, add_special_tokens=False)["input_ids"]

  def text(self, tokens: list[int]) -> str:
    return self.tokenizer.decode(
      tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )

  def room(self, prompt: Sequence[int]) -> int:
    """How many tokens an answer may have.

    Raises:
      ValueError: none is left.
    """
    left = self.positions - len(prompt)
    if left < 1:
      raise ValueError(
        f"the conversation has {len(prompt)} tokens, the model {self.positions} positions"
      )
    return min(left, self.max_new_tokens)

  def stream(self, messages: list[dict], key: Any) -> Iterator[str]:
    """The next turn in pieces, each of whole characters."""
    prompt = self.tokens(messages)
    drawn: list[int] = []
    shown = ""
    for token in engine.stream(
      self.params, self.config, prompt, max_new_tokens=self.room(prompt), **self.how(key)
    ):
      drawn.append(token)
      text = self.text(drawn)
      if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may take several tokens
        yield text[len(shown) :]
        shown = text
    yield self.text(drawn)[len(shown) :]

  def answer(self, conversations: Iterable[list[dict]], key: Any) -> list[str | ValueError]:
    """The next turn of each conversation, in batches; of one that cannot be answered, why.

    Where a conversation leaves fewer positions than `max_new_tokens`, its answer has as many as are left.
    """
    answers: dict[int, str | ValueError] = {}
    by_room: dict[int, list[tuple[int, list[int]]]] = {}
    for at, messages in enumerate(conversations):
      try:
        prompt = self.tokens(messages)
        engine.check_ids(prompt, self.config)
        by_room.setdefault(self.room(prompt), []).append((at, prompt))
      except ValueError as error:
        answers[at] = error
    for room, asked in by_room.items():
      drawn = engine.generate(
        self.params, self.config, [p for _, p in asked], max_new_tokens=room, **self.how(key)
      )
      answers |= {at: self.text(tokens) for (at, _), tokens in zip(asked, drawn.tokens)}
    return [answers[at] for at in sorted(answers)]

  def how(self, key: Any) -> dict:
    return dict(sampling=self.sampling, stop_tokens=self.stop_tokens, key=key, dtype=self.dtype)


def chat(
  speaker: Speaker,
  *,
  system: str | None = None,
  seed: int = 0,
  stdin: TextIO | None = None,
  stdout: TextIO | None = None,
  stderr: TextIO | None = None,
) -> int:
  """A conversation where stdin is a terminal; else each line of it is a prompt of its own, answered in order.

  An answer is printed as it is, its own line breaks included, with a line break behind it; empty lines are skipped.
  A prompt that cannot be answered leaves an empty line, and its reason on stderr.

  Returns:
    How many prompts could not be answered.
  """
  stdin, stdout, stderr = stdin or sys.stdin, stdout or sys.stdout, stderr or sys.stderr
  if isinstance(stdin, io.TextIOWrapper):  # a line that is not UTF-8 is a mistake of its own
    stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
  opening = [dict(role="system", content=system)] if system else []
  if system:
    _check_text(system, "the system message: ")
  key = jax.random.key(seed)
  if stdin.isatty():
    _converse(speaker, opening, key, stdin, stdout, stderr)
    return 0
  lines = [(at, line.rstrip("\r\n")) for at, line in enumerate(stdin, 1) if line.strip()]
  answers = speaker.answer(([*opening, _user(prompt)] for _, prompt in lines), key)
  for (at, _), answer in zip(lines, answers):
    if isinstance(answer, ValueError):
      print(f"line {at}: {answer}", file=stderr)
      answer = ""
    print(answer, file=stdout, flush=True)
  return sum(isinstance(answer, ValueError) for answer in answers)


def _converse(
  speaker: Speaker,
  opening: list[dict],
  key: jax.Array,
  stdin: TextIO,
  stdout: TextIO,
  stderr: TextIO,
) -> None:
  print(HELP, file=stderr)
  messages = opening
  for turn in itertools.count():
    line = _ask(stdin, stdout)
    if not line or line.strip() == "/exit":
      return
    if line.strip() == "/reset":
      messages = opening
    elif line.strip():
      asked = [*messages, _user(line.rstrip("\r\n"))]
      try:
        said = _say(speaker, asked, jax.random.fold_in(key, turn), stdout)
      except ValueError as error:
        # too long, or not what the template takes: the turn did not happen
        print(f"{error}; /reset starts anew", file=stderr)
        continue
      if said:  # cut short before its first word, it did not happen either
        messages = [*asked, dict(role="assistant", content=said)]


def _ask(stdin: TextIO, stdout: TextIO) -> str:
  """The next line, '' at the end of input or at Ctrl-C."""
  stdout.write("> ")
  stdout.flush()
  try:
    return stdin.readline()
  except KeyboardInterrupt:
    stdout.write("\n")
    return ""


def _say(speaker: Speaker, messages: list[dict], key: jax.Array, stdout: TextIO) -> str:
  said = ""
  with contextlib.suppress(KeyboardInterrupt):
    for piece in speaker.stream(messages, key):
      said += piece
      stdout.write(piece)
      stdout.flush()
  stdout.write("\n")
  return said


def _check_text(text: str, where: str = "") -> None:
  """Raises where bytes came through that are not UTF-8, which Python holds as halves of surrogate pairs."""
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    byte = ord(text[error.start]) - 0xDC00
    what = f"byte 0x{byte:02x}" if 0x80 <= byte <= 0xFF else "half of a surrogate pair"
    raise ValueError(
      f"{where}{what} at character {error.start + 1} is not UTF-8; convert the text, as in `iconv -f latin1 -t utf-8`"
    ) from None


def _user(content: str) -> dict:
  return dict(role="user", content=content)
