"""How prompts are read: in pieces of few sizes, what they share once.

A piece has the size of a program and not of a prompt, so that few are compiled.  Where pieces end decides what two
prompts share, since what was computed in one piece differs by rounding from what is computed in two.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable, Iterator, Sequence

import jax
import numpy as np

from posttrain_jax.rollout.requests import Scores

PIECES = (256, 128, 64, 32, 16)  # tokens of a prompt that are read at once
TOGETHER = 256  # tokens of several prompts that are read at once
SPARE = 32  # filling that the last piece may have rather than be two


@dataclasses.dataclass
class Held:
  """What a row of the cache holds behind what is bound to stand before it.

  ends: after how many tokens a piece that was read ends; what lies between cannot be told apart from another reading.
  """

  known_by: Hashable
  tokens: list[int]
  ends: list[int]

  def shared(self, other: Held, *, anywhere: bool) -> int:
    """How many tokens of other's it holds as other's own reading would have left them.

    anywhere: whether a reading may go on from any token, and not from the end of a piece alone.
    """
    if self.known_by != other.known_by:
      return 0
    both = zip(self.tokens, other.tokens)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))
    if anywhere:
      return same
    ends = zip(self.ends, other.ends)
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1] and pair[0] <= same, ends)
    return max((end for end, _ in alike), default=0)


@dataclasses.dataclass
class Reading:
  """A prompt on its way into a row: `at` tokens of it are read, or will be once `source` is copied.

  following: the token behind each, where the prompt is scored as it is read.
  """

  index: int
  row: int
  prompt: list[int]
  at: int
  source: int | None = None
  following: list[int] | None = None
  logps: list[np.ndarray] = dataclasses.field(default_factory=list)
  top: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)

  @property
  def left(self) -> bool:
    return self.source is not None or self.at < len(self.prompt)


def pieces(start: int, end: int, sizes: Sequence[int] = PIECES) -> Iterator[tuple[int, int, int]]:
  """(first token, size, how many of it are tokens) of the pieces in which tokens start to end are read.

  >>> list(pieces(0, 90)), list(pieces(0, 300))
  ([(0, 64, 64), (64, 32, 26)], [(0, 256, 256), (256, 64, 44)])
  """
  while start < end:
    left = end - start
    over = next((size for size in reversed(sizes) if size >= left), None)
    under = next((size for size in sizes if size <= left), sizes[-1])
    size = over if over is not None and over - left <= SPARE else under
    count = min(size, left)
    yield start, size, count
    start += count


def together(size: int, waiting: int) -> int:
  """How many pieces of a size are read at once where so many wait: as many as there are at most, or one by one.

  Several at once are another program than one, whose sums round otherwise.  On a CPU, where several save little, it is
  always one, so that an answer does not depend on what was read beside its prompt.
  """
  if jax.default_backend() == "cpu":
    return 1
  most = max(1, TOGETHER // size)
  return most if 2 * waiting >= most else 1


def counts(size: int, rows: int) -> list[int]:
  """Every number of pieces of a size that are read at once by an engine of so many rows."""
  return sorted({together(size, waiting) for waiting in range(1, rows + 1)})


def ends(length: int, sizes: Sequence[int] = PIECES) -> Iterator[int]:
  """Where the pieces of so many tokens end."""
  return (at + count for at, _, count in pieces(0, length, sizes))


def scores(reading: Reading) -> Scores:
  if not reading.logps:
    return Scores(np.zeros(0, np.float32))
  top = [np.concatenate(parts) for parts in zip(*reading.top)] if reading.top else None
  return Scores(np.concatenate(reading.logps), None if top is None else (top[0], top[1]))
