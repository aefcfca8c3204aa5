"""Several answers to one question, and the one that most of them are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def normalised(answer: str) -> str:
  """An answer without what does not distinguish it: runs of white space, a full stop or semicolon at its end.

  >>> normalised(" SELECT a\\n  FROM t ; ")
  'SELECT a FROM t'
  """
  return " ".join(answer.split()).rstrip(" ;.")


def majority(answers: Sequence[str]) -> int:
  """The index of the first answer that is, normalised, the commonest; of equally common ones the earliest.

  >>> majority(["no", "yes", " yes.", "no"]), majority(["a", "b", "b"])
  (0, 1)
  """
  if not answers:
    raise ValueError("there is no answer to vote on")
  plain = [normalised(answer) for answer in answers]
  counts = Counter(plain)  # keeps the order of first appearance, and max takes the first of equals
  return plain.index(max(counts, key=lambda answer: counts[answer]))
