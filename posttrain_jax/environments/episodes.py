"""Episodes: turns of a model and what answers them, many at once in one engine.

A turn is an ordinary request whose prompt is all that was said before, as the ids that they are: what the model wrote
is never decoded and read again.  While the tools of one episode run, others are written: a row that waits has no place
in the engine.  A token depends on (seed, number, sample, turn, place in the turn), so that nothing hangs on who is
quicker.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from posttrain_jax.data.tool_calls import Continuation, Form, Turn
from posttrain_jax.environments import episode as kinds
from posttrain_jax.environments import host as host_lib
from posttrain_jax.environments.episode import Episode
from posttrain_jax.environments.host import Described, Failed, Host, Hosts
from posttrain_jax.rollout import requests
from posttrain_jax.rollout.engine import Engine
from posttrain_jax.rollout.requests import Answer, Request

TURN_BITS = 20  # a request's sample is that of its episode in the low bits, and its turn above
MOST_TURNS = 1 << (32 - TURN_BITS)
LETTERS = 128  # of what is said that are read for each token of the bound: few tokens are as long


class Sampler(Protocol):
  """What writes turns: an engine."""

  @property
  def rows(self) -> int:
    """How many it writes at once."""
    ...

  def submit(self, request: Request) -> int: ...

  def advance(self) -> list[tuple[int, Answer]]:
    """Some more tokens of what is under way; (ticket, answer) of those that are whole by then."""
    ...

  def drop(self, ticket: int) -> None: ...


@dataclasses.dataclass(frozen=True)
class InEngine:
  """An engine of this program as what writes turns."""

  engine: Engine

  @property
  def rows(self) -> int:
    return self.engine.rows

  def submit(self, request: Request) -> int:
    return self.engine.submit(request)

  def advance(self) -> list[tuple[int, Answer]]:
    told = self.engine.advance()
    return [(one.ticket, one.answer) for one in told if one.answer is not None]

  def drop(self, ticket: int) -> None:
    self.engine.drop(ticket)


@dataclasses.dataclass(frozen=True)
class Asked:
  """An episode to be written.

  request: of its first turn; max_new_tokens is of the whole episode, what tools say included.
  row: what the environment is reset with.
  opening: the prompt's ids where the environment says something before the first turn.
  """

  request: Request
  row: Mapping[str, Any]
  opening: Callable[[str], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Rules:
  """How an episode goes on and when it ends.

  form: how calls are written; None where turns are actions as a whole.
  tool_tokens: of what is said to the model at once; beyond, it is cut.
  seconds: of one answer of the environment.
  """

  described: Described
  form: Form | None
  continuation: Continuation
  tokenizer: Any
  max_turns: int
  tool_tokens: int
  seconds: float
  keeps_state: bool

  def read(self, tokens: Sequence[int], stops: Sequence[int]) -> Turn:
    """What a turn of these ids says."""
    body = [*tokens[:-1]] if tokens and tokens[-1] in stops else [*tokens]
    if self.form is None:
      return Turn(self.text(body))
    # marks of calls are special tokens of some tokenizers
    turn = self.form.read(self.tokenizer.decode(body, skip_special_tokens=False))
    plain = turn.calls or turn.problem
    return turn if plain else dataclasses.replace(turn, text=self.text(body))

  def text(self, tokens: Sequence[int]) -> str:
    return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

  def cut(self, said: str) -> str:
    """What is said to the model, at most `tool_tokens` of it."""
    some = said[: LETTERS * self.tool_tokens]
    ids = self.tokenizer(some, add_special_tokens=False)["input_ids"]
    if len(ids) <= self.tool_tokens and some == said:
      return said
    return self.tokenizer.decode(ids[: self.tool_tokens]) + "..."


@dataclasses.dataclass
class _Open:
  """An episode under way."""

  place: int
  asked: Asked
  prompt: list[int]
  host: Host | None = None
  ticket: int | None = None
  doing: str = ""  # the verb under way in its host
  tokens: list[int] = dataclasses.field(default_factory=list)
  logps: list[np.ndarray] = dataclasses.field(default_factory=list)
  kept: list[np.ndarray] = dataclasses.field(default_factory=list)
  written: list[bool] = dataclasses.field(default_factory=list)
  messages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  waiting: tuple[str, tuple[Any, ...]] | None = None  # a question for which no process is free
  pending: Turn | None = None
  turns: int = 0
  calls: int = 0
  failures: int = 0
  ended: str = ""
  final: str = ""
  problem: str = ""

  def add(self, answer: Answer) -> None:
    """The model's next turn."""
    self.turns += 1
    self.tokens += answer.tokens
    self.logps.append(answer.logps)
    self.written += [True] * len(answer.tokens)
    if answer.kept is not None:
      self.kept.append(answer.kept)

  def hear(self, ids: Sequence[int]) -> None:
    """What was said to the model."""
    self.tokens += ids
    self.logps.append(np.zeros(len(ids), np.float32))
    self.written += [False] * len(ids)
    if self.kept:
      self.kept.append(np.zeros((len(ids), self.kept[0].shape[1]), np.uint32))

  def whole(self, reward: float | None, left: Mapping[str, Any]) -> Episode:
    return Episode(
      request=dataclasses.replace(self.asked.request, prompt=self.prompt),
      tokens=self.tokens,
      logps=np.concatenate([np.zeros(0, np.float32), *self.logps]),
      ended=self.ended,
      kept=np.concatenate(self.kept) if self.kept else None,
      written=np.asarray(self.written, bool),
      turns=self.turns,
      calls=self.calls,
      failures=self.failures,
      messages=tuple(self.messages),
      final=self.final,
      problem=self.problem,
      reward=reward,
      left=left,
    )


class Episodes:
  """Episodes in an engine, each with its environment."""

  def __init__(self, sampler: Sampler, hosts: Hosts, rules: Rules) -> None:
    self.sampler, self.hosts, self.rules = sampler, hosts, rules

  def run(
    self, asked: Iterable[Asked], before_window: Callable[[], None] | None = None
  ) -> Iterator[tuple[int, Episode]]:
    """(place in `asked`, episode), each when it is whole.

    before_window: as for `Engine.run`; it may raise, where nobody waits for the rest.
    """
    left = enumerate(asked)
    self._open: list[_Open] = []
    self._done: collections.deque[tuple[int, Episode]] = collections.deque()
    looks = before_window or (lambda: None)
    try:
      while True:
        # as many again wait for their tools as there are rows
        while len(self._open) < 2 * self.sampler.rows and (more := next(left, None)) is not None:
          self._begin(*more)
        while self._done:
          yield self._done.popleft()
        if not self._open:
          return
        looks()
        self._hear()
        by_ticket = {one.ticket: one for one in self._open if one.ticket is not None}
        if by_ticket:
          for ticket, answer in self.sampler.advance():
            by_ticket[ticket].ticket = None
            self._turn(by_ticket[ticket], answer)
        elif not self._done and self._open:
          host_lib.wait([one.host for one in self._open if one.host is not None and one.doing])
    finally:
      for one in self._open:
        if one.ticket is not None:
          self.sampler.drop(one.ticket)
        if one.host is not None:
          self.hosts.give_back(one.host)
      self._open = []

  def _begin(self, place: int, asked: Asked) -> None:
    one = _Open(place, asked, [*map(int, asked.request.prompt)])
    self._open.append(one)
    if self.rules.keeps_state:
      r = asked.request
      seed = (r.seed * 1_000_003 + r.number) % 2**31  # one for all answers to a prompt
      self._ask(one, "reset", dict(asked.row), seed, f"{r.number}-{r.sample}")
    else:
      self._submit(one)

  def _ask(self, one: _Open, verb: str, *arguments: Any) -> None:
    """A question for the episode's process; it waits where none is free."""
    if one.host is None:
      one.host = self.hosts.take()
    if one.host is None:
      one.waiting = (verb, arguments)
      return
    one.waiting, one.doing = None, verb
    one.host.ask(verb, *arguments, seconds=self.rules.seconds)

  def _hear(self) -> None:
    """What processes have answered since."""
    for one in [*self._open]:
      if one.waiting is not None:
        self._ask(one, one.waiting[0], *one.waiting[1])
      if one.host is None or not one.doing:
        continue
      reply = one.host.reply()
      if reply is None:
        continue
      verb, one.doing = one.doing, ""
      if isinstance(reply, Failed):
        self._failed(one, verb, reply)
      elif verb == "reset":
        if reply["said"] is not None:
          one.prompt = [*map(int, one.asked.opening(self.rules.cut(reply["said"])))]
        self._submit(one)
      elif verb == "call":
        self._answered(one, reply["results"])
      elif verb == "act":
        self._acted(one, reply)
      else:
        self._close(one, reply["reward"], reply["left"])

  def _failed(self, one: _Open, verb: str, why: Failed) -> None:
    assert one.host is not None
    if why.is_lost:
      self.hosts.give_back(one.host)
      one.host = None
    if not self.rules.keeps_state:  # a tool that keeps nothing: the next call has another process
      assert one.pending is not None
      self._answered(one, [(str({"error": why.reason}), True)] * len(one.pending.calls))
      return
    if verb == "reset" and one.host is not None:
      one.host.end()  # what should bring it back did not: the next episode has another process
    one.problem = f"the environment {why.reason}" if why.is_late else why.reason
    one.ended = kinds.FAILED
    self._close(one, None, {})

  def _submit(self, one: _Open) -> None:
    """The model's next turn."""
    first = one.asked.request
    room = first.max_new_tokens - len(one.tokens)
    one.ticket = self.sampler.submit(
      dataclasses.replace(
        first,
        prompt=[*one.prompt, *one.tokens],
        max_new_tokens=room,
        sample=first.sample | one.turns << TURN_BITS,
      )
    )

  def _turn(self, one: _Open, answer: Answer) -> None:
    """A turn is written: it is read, and acted on."""
    one.add(answer)
    turn = self.rules.read(answer.tokens, answer.request.stop_tokens)
    one.messages.append(turn.message)
    if not answer.finished:
      self._end(one, requests.FULL)
    elif turn.problem:
      one.problem = turn.problem
      self._end(one, kinds.UNPARSED)
    elif self.rules.form is None:
      one.final = turn.text
      self._ask(one, "act", turn.text)
    elif not turn.calls:
      one.final = turn.text
      self._end(one, answer.ended)
    elif one.turns >= self.rules.max_turns:
      self._end(one, kinds.MAX_TURNS)
    else:
      one.pending = turn
      self._ask(one, "call", [dict(call) for call in turn.calls])

  def _answered(self, one: _Open, results: Sequence[Sequence[Any]]) -> None:
    """What the calls of a turn gave."""
    assert one.pending is not None
    turn, one.pending = one.pending, None
    one.calls += len(results)
    one.failures += sum(bool(failed) for _, failed in results)
    if not self.rules.keeps_state and one.host is not None:
      self.hosts.give_back(one.host)
      one.host = None
    self._go_on(
      one,
      [
        {"role": "tool", "name": call["name"], "content": self.rules.cut(said)}
        for call, (said, _) in zip(turn.calls, results, strict=True)
      ],
    )

  def _acted(self, one: _Open, reply: Mapping[str, Any]) -> None:
    """What an action brought."""
    if "unreadable" in reply:
      one.problem, one.final = reply["unreadable"], ""
      self._end(one, kinds.UNPARSED)
    elif reply["done"]:
      self._end(one, kinds.DONE)
    elif one.turns >= self.rules.max_turns:
      self._end(one, kinds.MAX_TURNS)
    else:
      said = self.rules.cut(reply["said"] or "")
      self._go_on(one, [{"role": "user", "content": said}])

  def _go_on(self, one: _Open, said: list[dict[str, Any]]) -> None:
    """The next turn behind what was said, where there is room for it."""
    ids = self.rules.continuation.ids(said, one.tokens)
    if len(one.tokens) + len(ids) >= one.asked.request.max_new_tokens:
      self._end(one, requests.FULL)
      return
    one.hear(ids)
    one.messages += said
    self._submit(one)

  def _end(self, one: _Open, ended: str) -> None:
    """No turn follows; the environment is asked what it was worth."""
    one.ended = ended
    if ended in (requests.FULL, kinds.UNPARSED):
      one.final = ""
    if self.rules.keeps_state:
      self._ask(one, "end")
    else:
      self._close(one, None, {})

  def _close(self, one: _Open, reward: float | None, left: Mapping[str, Any]) -> None:
    if one.host is not None:
      self.hosts.give_back(one.host)
      one.host = None
    self._open.remove(one)
    self._done.append((one.place, one.whole(reward, left)))
