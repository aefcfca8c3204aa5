"""A model that answers: conversations turn by turn, and the lines of a pipe."""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

from posttrain_jax.data import templates
from posttrain_jax.models import before
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.rollout import engine, requests
from posttrain_jax.rollout.dialogue import Dialogue
from posttrain_jax.rollout.sampling import Sampling


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
  stop_strings: tuple[str, ...] = ()
  min_new_tokens: int = 0

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

  def dialogue(self) -> Dialogue:
    """What remembers a conversation's tokens from one `stream` to the next."""
    return Dialogue(
      self.params,
      self.config,
      sampling=self.sampling,
      stop_tokens=self.stop_tokens,
      stop_strings=self.stop_strings,
      min_new_tokens=self.min_new_tokens,
      tokenizer=self.tokenizer,
      dtype=self.dtype,
    )

  def stream(
    self,
    messages: list[dict],
    seed: int,
    dialogue: Dialogue | None = None,
    *,
    turn: int = 0,
  ) -> Iterator[str]:
    """The next turn in pieces, each of whole characters, and none that a later token changes."""
    prompt = self.tokens(messages)
    requests.check_ids(prompt, self.config)
    drawn: list[int] = []
    shown = ""
    reader = dialogue or self.dialogue()
    room = self.room(prompt)
    for token in reader.stream(prompt, max_new_tokens=room, seed=seed, number=turn):
      drawn.append(token)
      text = self.text(drawn)
      # a character may take several tokens, and a decoder that cleans up may wait for the next word
      if not text.endswith("\N{REPLACEMENT CHARACTER}") and text.startswith(shown):
        yield text[len(shown) :]
        shown = text
    whole = self.text(drawn)
    if whole.startswith(shown):
      yield whole[len(shown) :]

  def answer(self, conversations: Iterable[list[dict]], seed: int) -> list[str | ValueError]:
    """The next turn of each conversation; of one that cannot be answered, why.

    Where a conversation leaves fewer positions than `max_new_tokens`, its answer has as many as are left.
    """
    answers: dict[int, str | ValueError] = {}
    prompts: dict[int, list[int]] = {}
    rooms: list[int] = []
    for at, messages in enumerate(conversations):
      try:
        prompt = self.tokens(messages)
        requests.check_ids(prompt, self.config)
        rooms.append(self.room(prompt))
        prompts[at] = prompt
      except ValueError as error:
        answers[at] = error
    drawn = engine.generate(
      self.params,
      self.config,
      list(prompts.values()),
      max_new_tokens=rooms,
      sampling=self.sampling,
      stop_tokens=self.stop_tokens,
      stop_strings=self.stop_strings,
      min_new_tokens=self.min_new_tokens,
      tokenizer=self.tokenizer,
      seed=seed,
      dtype=self.dtype,
    )
    answers |= {at: self.text(tokens) for at, tokens in zip(prompts, drawn.tokens)}
    return [answers[at] for at in sorted(answers)]


def answer_lines(
  speaker: Speaker,
  *,
  system: str | None = None,
  seed: int = 0,
  stdin: TextIO | None = None,
  stdout: TextIO | None = None,
  stderr: TextIO | None = None,
) -> int:
  """Each line of stdin is a prompt of its own, answered in order.

  An answer is printed as it is, its own line breaks included, with a line break behind it; empty lines are skipped.
  A prompt that cannot be answered leaves an empty line, and its reason on stderr.

  Returns:
    How many prompts could not be answered.
  """
  stdin, stdout, stderr = stdin or sys.stdin, stdout or sys.stdout, stderr or sys.stderr
  if isinstance(stdin, io.TextIOWrapper):  # a line that is not UTF-8 is a mistake of its own
    stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
  first = opening(system)
  lines = [(at, line.rstrip("\r\n")) for at, line in enumerate(stdin, 1) if line.strip()]
  asked = ([*first, message("user", prompt)] for _, prompt in lines)
  answers = speaker.answer(asked, seed)
  for (at, _), answer in zip(lines, answers):
    if isinstance(answer, ValueError):
      print(f"line {at}: {answer}", file=stderr)
      answer = ""
    print(answer, file=stdout, flush=True)
  return sum(isinstance(answer, ValueError) for answer in answers)


def opening(system: str | None) -> list[dict]:
  """What a conversation begins with."""
  if not system:
    return []
  _check_text(system, "the system message: ")
  return [message("system", system)]


def message(role: str, content: str) -> dict:
  return dict(role=role, content=content)


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
