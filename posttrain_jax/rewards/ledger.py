"""Scores that were paid for, in a file: whoever asks again for those of the same answers has them from there.

What was final for who asked first is final here, a missing score with its reason included.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from posttrain_jax.core.journal import Journal
from posttrain_jax.rewards.reward import Result, Scored
from posttrain_jax.rewards.verifier import Answer


class Ledger:
  """The scores that rewards gave groups of answers; a call of a reward is a line.

  A score is taken up where the reward goes by the same identity, and answers, prompt and row are the same.
  """

  def __init__(self, path: Path, others: Iterable[Path] = ()) -> None:
    """others: files of scores that other processes write, or have written; they are read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    self._journal = Journal(path).begin({"scores": 1})
    journals = [*(Journal(other) for other in others if other != path), self._journal]
    every = (call for one in journals for call in one.each(lambda line: list(_read(line))))
    self._known = {key: result for call in every for key, result in call}

  def known(self, reward: str, group: int, answers: Sequence[Answer]) -> Result | None:
    """What the reward of this identity said of the group."""
    return self._known.get((reward, _key(group, answers)))

  def put(self, reward: str, groups: Mapping[int, Sequence[Answer]], result: Result) -> None:
    """What one call said of the answers of these groups, in their order; from any thread."""
    self._journal.write(
      {
        "reward": reward,
        "groups": [_key(group, answers) for group, answers in groups.items()],
        "sizes": [len(answers) for answers in groups.values()],
        "answers": [one.as_json() for one in result.answers],
        "columns": result.columns,
        "logged": result.logged,
        "retried": result.retried,
      }
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self._journal.__exit__(kind, error, trace)


def _read(line: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], Result]]:
  """((reward, group), result) of a call; what was counted of it as a whole is with its first group."""
  start, logged, retried = 0, line["logged"], line["retried"]
  for group, size in zip(line["groups"], line["sizes"], strict=True):
    here = slice(start, start + size)
    columns = {name: values[here] for name, values in line["columns"].items()}
    answers = tuple(Scored.from_json(one) for one in line["answers"][here])
    yield (line["reward"], group), Result(answers, columns, logged, retried)
    start, logged, retried = start + size, {}, 0


def _key(group: int, answers: Sequence[Answer]) -> str:
  said = [(a.prompt, a.completion, a.row) for a in answers]
  text = json.dumps([group, said], default=str)
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
