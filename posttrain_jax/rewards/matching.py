"""Texts beside each other: equal, one in the other, or alike to a degree."""

from __future__ import annotations

import unicodedata

RIGHT = "ok"  # what is said of an answer that is right
# (answer, expected): those that are equal, and those that are not
EXACT = ((("Paris", "Paris"),), (("Rome", "Paris"), ("paris", "Paris")))
CONTAINED = ((("It is Paris, of course.", "paris"),), (("a party", "art"), ("13", "3")))
FUZZY = ((("Paris", "paris"),), (("Pairs", "paris"), ("Rome", "Paris")))


def exact(answer: str, gold: str) -> tuple[bool, str]:
  """The answer is the expected text, letter by letter, but for white space.

  Before they are compared both are in Unicode's composed form (NFC), each run of white space is one space, and there is
  none at either end.  Case, punctuation and quotes count: "Paris." is not "Paris".

  >>> exact(" new\\n york ", "new york")[0], exact("New York", "new york")[0]
  (True, False)
  """
  is_same = spaced(answer) == spaced(gold)
  return is_same, RIGHT if is_same else "another text"


def contained(answer: str, gold: str) -> tuple[bool, str]:
  """The expected text stands somewhere in the answer, as whole words and whole numbers, whatever their case.

  White space and Unicode are as for `exact`, case is folded.  A word or number of the expected text is no part of a
  longer one of the answer: "art" is not in "party", 3 is neither in 13 nor in 3.5.  In scripts that put no space
  between words (Chinese, Japanese, Thai) any place is one between words.

  >>> contained("It is Paris, of course.", "paris")[0], contained("13", "3")[0]
  (True, False)
  """
  text, wanted = spaced(answer).casefold(), spaced(gold).casefold()
  at = text.find(wanted)
  while at >= 0:
    if not (_joined(text, at) or _joined(text, at + len(wanted))):
      return True, RIGHT
    at = text.find(wanted, at + 1)
  return False, "not in the answer"


def fuzzy(answer: str, gold: str) -> tuple[float, str]:
  """2 LCS / (|answer| + |gold|), in letters: the share that both have in common, in order; 1 where they are equal.

  LCS is the length of their longest common subsequence (what rapidfuzz calls `ratio`).  White space and Unicode are as
  for `exact`, case is folded.  The time is that of one number of |gold| bits for each letter of the answer.

  >>> fuzzy("Pairs", "paris")[0], fuzzy("Rome", "Paris")[0] < 0.5
  (0.8, True)
  """
  text, wanted = spaced(answer).casefold(), spaced(gold).casefold()
  if not text and not wanted:
    return 1.0, RIGHT
  ratio = 2 * _common(text, wanted) / (len(text) + len(wanted))
  return ratio, RIGHT if ratio == 1 else f"{ratio:.0%} alike"


def _common(text: str, wanted: str) -> int:
  """The length of the longest common subsequence.  Hyyrö 2004: a bit of the row is 0 where the length grows."""
  places: dict[str, int] = {}
  for i, letter in enumerate(wanted):
    places[letter] = places.get(letter, 0) | 1 << i
  every = (1 << len(wanted)) - 1
  row = every
  for letter in text:
    matched = row & places.get(letter, 0)
    row = ((row + matched) | (row - matched)) & every
  return len(wanted) - row.bit_count()


def without_thoughts(text: str) -> str:
  """An answer without the thoughts before it."""
  return text.rpartition("</think>")[2]


def spaced(text: str) -> str:
  """The text in Unicode's composed form, with one space for each run of white space."""
  return " ".join(unicodedata.normalize("NFC", text).split())


def _joined(text: str, at: int) -> bool:
  """Whether a word or a number goes on over a place in a text."""
  before, after = text[:at][-2:], text[at : at + 2]
  if not before or not after:
    return False
  if _in_word(before[-1]) and _in_word(after[0]):
    return True
  digits = lambda left, right: left.isdigit() and right.isdigit()
  return (len(after) > 1 and after[0] in ".," and digits(before[-1], after[1])) or (
    len(before) > 1 and before[-1] in ".," and digits(before[0], after[0])
  )


def _in_word(letter: str) -> bool:
  """Whether spaces part words of such letters."""
  return unicodedata.category(letter) in ("Ll", "Lu", "Lt", "Lm", "Mn", "Mc", "Nd")
