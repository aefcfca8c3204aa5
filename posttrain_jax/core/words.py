"""What a sentence shows of a value that came from outside, cut short, and of a number of things."""

from __future__ import annotations

import reprlib
from typing import Any


def shown(value: Any, length: int = 100) -> str:
  """The value as Python writes it, at most so long.

  >>> shown("a" * 1000, 12), shown([1, 2]), shown(10**5000)
  ("'aaaaaaaa...", '[1, 2]', 'a number of thousands of digits')
  """
  short = reprlib.Repr()
  # aliases of YAML may nest a value so that all of it would fill the memory
  short.maxlevel, short.maxlist, short.maxtuple, short.maxdict, short.maxset = 4, 8, 8, 8, 8
  short.maxstring = short.maxother = 2 * length
  try:
    text = " ".join(line.strip() for line in short.repr(value).split("\n"))  # of arrays: many lines
  except ValueError:  # a number of more digits than Python writes
    text = "a number of thousands of digits"
  return cut(text, length)


def cut(text: str, length: int) -> str:
  """The text, at most so long.

  >>> cut("a" * 1000, 12), cut("a", 12)
  ('aaaaaaaaa...', 'a')
  """
  return text if len(text) <= length else text[: length - 3] + "..."


def whole(text: str) -> str:
  """The text with ? for each half of a surrogate pair, which no tokenizer reads and no file holds.

  >>> whole("a\\ud83d"), whole("\\U0001f600") == "\\U0001f600"
  ('a?', True)
  """
  return text.encode("utf-8", "replace").decode()


def count(number: int, what: str) -> str:
  """So many of what is counted.

  >>> count(0, "score"), count(1, "score"), count(2, "score")
  ('0 scores', '1 score', '2 scores')
  """
  return f"{number} {what}{'' if number == 1 else 's'}"
