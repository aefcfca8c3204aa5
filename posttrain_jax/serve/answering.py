"""The answers of one request, under way: asked of the worker, told as text, and ended when nobody wants them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np

from posttrain_jax.serve import asked as asking
from posttrain_jax.serve.asked import Asked, Ended, Failed, Prompt, Started, Tokens
from posttrain_jax.serve.errors import failed
from posttrain_jax.serve.metrics import Metrics
from posttrain_jax.serve.spelling import Spelling

CUT = "abort"  # the reason of an answer that the server's end cut short, as vLLM has it


@dataclasses.dataclass
class Token:
  """A token that was drawn, or read of a prompt; logp: None of a prompt's first; top: (id, logp), likeliest first."""

  id: int
  logp: float | None
  top: list[tuple[int, float]]


@dataclasses.dataclass
class Choice:
  """An answer so far.

  drawn: every token, the one that ended it too; told: those that are part of its text; every: all that were drawn.
  reason: None while it goes on.
  """

  index: int
  asked: Asked
  spelling: Spelling
  drawn: int = 0
  every: list[Token] = dataclasses.field(default_factory=list)
  told: list[Token] = dataclasses.field(default_factory=list)
  prompt: list[Token] = dataclasses.field(default_factory=list)
  text: str = ""
  cached: int = 0
  waited: float = 0.0
  reason: str | None = None
  latest: float | None = None  # when its last tokens came


@dataclasses.dataclass(frozen=True)
class News:
  """What came of an answer: text and tokens that are new; `is_over` with the last of it."""

  choice: Choice
  text: str
  tokens: list[Token]
  is_over: bool


class Answering:
  """Answers that the worker writes, as an iterator of their news.

  What is drawn waits here until somebody reads it: an answer's length bounds it, and the worker waits for nobody.
  """

  def __init__(self, worker: Any, choices: Sequence[Choice], metrics: Metrics) -> None:
    self._worker, self.choices, self._metrics = worker, list(choices), metrics
    self._loop = asyncio.get_running_loop()
    self._news: asyncio.Queue[tuple[Choice, Any]] = asyncio.Queue()
    self._tickets: dict[int, Any] = {}
    self._since = time.monotonic()

  def submit(self) -> None:
    """Asks the worker for all of them, or for none; it may read an adapter, so that it belongs into a thread.

    Raises: what `Worker.submit` does.
    """
    try:
      for choice in self.choices:
        self._tickets[choice.index] = self._worker.submit(choice.asked, self._deliver(choice))
    except BaseException:
      self.cancel()
      raise

  def cancel(self) -> None:
    """Whatever is not over is not wanted any more."""
    for choice in self.choices:
      if choice.reason is None:
        self._cancel(choice)

  def _cancel(self, choice: Choice) -> None:
    if (ticket := self._tickets.pop(choice.index, None)) is not None:
      self._worker.cancel(ticket)

  def _deliver(self, choice: Choice) -> Callable[[Any], None]:
    def deliver(event: Any) -> None:  # on the worker's thread
      with contextlib.suppress(RuntimeError):  # the loop has ended: nobody is left to be told
        self._loop.call_soon_threadsafe(self._news.put_nowait, (choice, event))

    return deliver

  async def news(self) -> AsyncIterator[News]:
    """What comes of each answer, until all are over.

    Raises:
      Refused: one failed; the others are cancelled.
    """
    left = len(self.choices)
    try:
      while left:
        choice, event = await self._news.get()
        if choice.reason is not None:
          continue  # drawn before the worker heard that it was over
        news = self._read(choice, event)
        if news is None:
          continue
        if news.is_over:
          left -= 1
          self._metrics.ended(choice, time.monotonic() - self._since)
        yield news
    finally:
      self.cancel()

  def _read(self, choice: Choice, event: Any) -> News | None:
    if isinstance(event, Started):
      choice.cached, choice.waited = event.cached, event.waited
      self._metrics.started(choice, event)
    elif isinstance(event, Prompt):
      choice.prompt = _of_prompt(choice.asked.prompt, event)
    elif isinstance(event, Tokens):
      return self._grown(choice, event)
    elif isinstance(event, Ended):
      return self._over(choice, CUT if event.reason == asking.CANCELLED else event.reason)
    elif isinstance(event, Failed):
      self._metrics.failed(event.error)
      raise failed()
    return None

  def _grown(self, choice: Choice, event: Tokens) -> News | None:
    now = time.monotonic()
    self._metrics.tokens(choice, len(event.ids), now, self._since)
    choice.latest = now
    text, tokens = "", []
    for token in _tokens(event.ids, event.logps, event.top):
      choice.drawn += 1
      choice.every.append(token)
      if token.id in choice.asked.stop_ids and choice.drawn >= choice.asked.min_new:
        break
      text += choice.spelling.feed(token.id, may_end=choice.drawn > choice.asked.min_new)
      tokens.append(token)
      if choice.spelling.matched is not None:
        break
    choice.text += text
    choice.told += tokens
    if choice.spelling.matched is not None:
      self._cancel(choice)  # where the worker has not seen the string itself
      choice.reason = asking.STOP
    is_over = choice.reason is not None
    return News(choice, text, tokens, is_over) if text or tokens or is_over else None

  def _over(self, choice: Choice, reason: str) -> News:
    text = choice.spelling.close()
    choice.text += text
    choice.reason = asking.STOP if choice.spelling.matched is not None else reason
    self._tickets.pop(choice.index, None)
    return News(choice, text, [], True)


def _of_prompt(prompt: Sequence[int], event: Prompt) -> list[Token]:
  return [Token(int(prompt[0]), None, []), *_tokens(prompt[1:], event.logps, event.top)]


def _tokens(ids: Sequence[int], logps: Any, top: Any) -> list[Token]:
  """Tokens with what is known of them; the same float32 stays the same float."""
  plain = [None] * len(ids) if logps is None else np.asarray(logps, np.float32).tolist()
  if top is None or not np.size(top[0]):
    return [Token(int(token), logp, []) for token, logp in zip(ids, plain)]
  pairs = zip(np.asarray(top[0]).tolist(), np.asarray(top[1], np.float32).tolist())
  return [Token(int(token), logp, list(zip(*pair))) for token, logp, pair in zip(ids, plain, pairs)]
