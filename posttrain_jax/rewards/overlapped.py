"""Scores that are made while other answers are still being written."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Self

from posttrain_jax.rewards.ledger import Ledger
from posttrain_jax.rewards.reward import Result, Reward, together
from posttrain_jax.rewards.verifier import OUTSIDE, Answer, TrainerState

GROUPS = 16  # at most, of a call: what it gave is kept when all of it is there


class Overlapped:
  """Scores groups of answers as they come, in a thread; the result is that of one call with all of them.

  A reward that compares answers, or is given them as a list, is asked once, when all are there.
  """

  def __init__(
    self,
    reward: Reward,
    ledger: Ledger | None = None,
    identity: str = "",
    trainer_state: TrainerState = OUTSIDE,
  ) -> None:
    """ledger: knows what was scored before under this identity, and is told what is scored now."""
    self._reward, self._ledger, self._identity = reward, ledger, identity
    self._trainer_state = trainer_state
    self._waiting: collections.deque[tuple[int, Sequence[Answer]]] = collections.deque()
    self._scored: list[tuple[list[int], Result]] = []  # (the number of each answer's group, ...)
    self._thread = futures.ThreadPoolExecutor(1)
    self._calls: list[futures.Future[None]] = []

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self._thread.shutdown(cancel_futures=True)

  def put(self, group: int, answers: Sequence[Answer]) -> None:
    """A group that is whole; groups are put in any order."""
    self._waiting.append((group, answers))
    if self._reward.is_per_answer:
      self._calls.append(self._thread.submit(self._score))

  def result(self) -> Result:
    """Of all that were put, by the groups' numbers."""
    for call in self._calls:
      call.result()
    self._score()
    whole = together([result for _, result in self._scored])
    groups = [group for numbers, _ in self._scored for group in numbers]
    order = sorted(range(len(groups)), key=groups.__getitem__)
    columns = {name: [values[i] for i in order] for name, values in whole.columns.items()}
    return Result(tuple(whole.answers[i] for i in order), columns, whole.logged, whole.retried)

  def _score(self) -> None:
    """What has come since the last call, at once: as many as there are keep every worker busy."""
    most = GROUPS if self._reward.is_per_answer else len(self._waiting)
    some = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
    if not some:
      return
    groups = dict(sorted(some, key=lambda pair: pair[0]))
    known = self._known(groups)
    self._scored += [([number] * len(groups[number]), result) for number, result in known.items()]
    groups = {number: answers for number, answers in groups.items() if number not in known}
    if not groups:
      return
    result = self._reward.score(
      [answer for answers in groups.values() for answer in answers],
      trainer_state=self._trainer_state,
    )
    if self._ledger is not None:
      self._ledger.put(self._identity, groups, result)
    self._scored.append(([number for number, answers in groups.items() for _ in answers], result))

  def _known(self, groups: Mapping[int, Sequence[Answer]]) -> dict[int, Result]:
    """What the ledger has; of a reward that is asked once for all of them, all or nothing."""
    if self._ledger is None:
      return {}
    every = {
      number: self._ledger.known(self._identity, number, answers)
      for number, answers in groups.items()
    }
    known = {
      number: dataclasses.replace(
        result, answers=tuple(self._reward.renamed(one) for one in result.answers)
      )
      for number, result in every.items()
      if result is not None
    }
    return known if self._reward.is_per_answer or len(known) == len(groups) else {}
