"""Scores that are made while other answers are still being written."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from concurrent import futures
from typing import Self

from posttrain_jax.rewards.reward import Result, Reward, together
from posttrain_jax.rewards.verifier import Answer


class Overlapped:
  """Scores groups of answers as they come, in a thread; the result is that of one call with all of them.

  A reward that compares answers, or is given them as a list, is asked once, when all are there.
  """

  def __init__(self, reward: Reward) -> None:
    self._reward = reward
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
    some = [self._waiting.popleft() for _ in range(len(self._waiting))]
    if not some:
      return
    some.sort(key=lambda pair: pair[0])
    numbers = [group for group, answers in some for _ in answers]
    result = self._reward.score([answer for _, answers in some for answer in answers])
    self._scored.append((numbers, result))
