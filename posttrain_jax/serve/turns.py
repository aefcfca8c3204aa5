"""Who is next: which waiting request gets a row, and which adapter gets a slot.

Rows go to whoever has the fewest of them: an adapter with a hundred requests holds up none with one.  A slot that
nobody uses or waits for goes to whoever asks.  One that others wait for goes round: after `patience` seconds an adapter
without a slot may take that of the one which has had its own for longest, which is given no more rows until then.  So
each adapter's wait is bounded by the answers under way, however many adapters there are.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Iterable
from typing import Any, Protocol

BASE = None  # the content of a request without an adapter


class Waiting(Protocol):
  """A request in the queue."""

  @property
  def content(self) -> Hashable: ...  # the digest of its adapter, or BASE

  @property
  def since(self) -> float: ...


@dataclasses.dataclass
class Slot:
  """What is in a slot, since when, and when a row with it last ended."""

  content: Hashable = BASE
  since: float = 0.0
  used: float = 0.0


@dataclasses.dataclass(frozen=True)
class Turn:
  """The request that is next, its slot (None for the base), and whether its adapter is yet to be put there."""

  request: Any
  slot: int | None
  is_new: bool


class Turns:
  """The slots, and how many rows each adapter has."""

  def __init__(self, slots: int, patience: float = 1.0) -> None:
    self.slots = [Slot() for _ in range(slots)]
    self.patience = patience
    self.live: collections.Counter[Hashable] = collections.Counter()
    self.evictions = 0
    self._leaving: dict[int, Hashable] = {}  # slot -> who waits for it

  def slot_of(self, content: Hashable) -> int | None:
    return next((i for i, slot in enumerate(self.slots) if slot.content == content), None)

  def next(self, waiting: Iterable[Waiting], now: float) -> Turn | None:
    """The turn of one of those that wait, in the order in which they came; None where none can begin."""
    first: dict[Hashable, Waiting] = {}
    for request in waiting:
      first.setdefault(request.content, request)
    has_aged = lambda request: now - request.since >= self.patience
    self._leaving = {i: who for i, who in self._leaving.items() if who in first}
    for content, request in sorted(
      first.items(),
      key=lambda pair: (not has_aged(pair[1]), self.live[pair[0]], pair[1].since),
    ):
      if content is BASE:
        return Turn(request, None, False)
      slot = self.slot_of(content)
      if slot is not None and slot not in self._leaving:
        return Turn(request, slot, False)
      if slot is None:
        slot = self._room(content, first, has_aged(request), now)
        if slot is not None:
          return Turn(request, slot, True)
    return None

  def begin(self, turn: Turn, now: float) -> None:
    """The turn is taken."""
    content = turn.request.content
    if turn.slot is not None and turn.is_new:
      slot = self.slots[turn.slot]
      self.evictions += slot.content is not BASE
      self.slots[turn.slot] = Slot(content, now, now)
      self._leaving.pop(turn.slot, None)
    self.live[content] += 1

  def end(self, content: Hashable, now: float) -> None:
    """A row with that content is free."""
    self.live[content] -= 1
    if not self.live[content]:
      del self.live[content]
    slot = self.slot_of(content)
    if slot is not None:
      self.slots[slot].used = now

  def forget(self, content: Hashable) -> None:
    """Nobody asks for that content any more."""
    slot = self.slot_of(content)
    if slot is not None and not self.live[content]:
      self.slots[slot] = Slot()

  def _room(
    self, content: Hashable, first: dict[Hashable, Waiting], has_aged: bool, now: float
  ) -> int | None:
    """A slot for that content that no row uses; where others have them all and it has waited, one is freed for it."""
    mine = next((i for i, who in self._leaving.items() if who == content), None)
    if mine is not None:
      return None if self.live[self.slots[mine].content] else mine
    open_to_it = [i for i in range(len(self.slots)) if i not in self._leaving]
    idle = [i for i in open_to_it if not self.live[self.slots[i].content]]
    unasked = [i for i in idle if self.slots[i].content not in first or self._is_empty(i)]
    if unasked:
      return min(unasked, key=lambda i: (not self._is_empty(i), self.slots[i].used))
    if not has_aged:
      return None
    held = [i for i in open_to_it if now - self.slots[i].since >= self.patience]
    if not held:
      return None
    asked = lambda i: self.slots[i].content in first
    victim = min(held, key=lambda i: (asked(i), self.slots[i].since))
    self._leaving[victim] = content
    return None if self.live[self.slots[victim].content] else victim

  def _is_empty(self, slot: int) -> bool:
    return self.slots[slot].content is BASE
