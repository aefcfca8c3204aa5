"""Where a prompt ends that no column says: what texts have in common, up to a border of words and of tokens."""

import unicodedata
from collections.abc import Sequence
from typing import Any

NEAR = 200  # characters on either side, which decide how a text is tokenised there
TRIED = 8  # places before the last common one


def common(texts: Sequence[str], tokenizer: Any) -> int:
  """How many leading characters the texts share, up to the last place that is a border in all of them; 0 for none.

  A word that answers begin with belongs to them, and so does the space before it; something is left of each.
  """
  at = _before_word(texts, min(_shared(texts), min(map(len, texts)) - 1))
  for place in range(at, max(at - TRIED, 0), -1):
    if _before_word(texts, place) == place and all(_is_border(t, place, tokenizer) for t in texts):
      return place
  return at


def _shared(texts):
  """How many leading characters are the same, found by halves: a text may be a library."""
  same, differ = 0, min(map(len, texts)) + 1
  while differ - same > 1:
    middle = (same + differ) // 2
    if all(text[same:middle] == texts[0][same:middle] for text in texts[1:]):
      same = middle
    else:
      differ = middle
  return same


def _before_word(texts, at):
  """The place, or the beginning of the word that it is in, and of the space before it."""
  while at and _in_word(texts[0][at - 1]) and any(_in_word(text[at]) for text in texts):
    at -= 1
  while at and texts[0][at - 1] == " ":
    at -= 1
  return at


def _in_word(letter):
  """Whether spaces part words of such letters: of Chinese, Japanese or Thai each may be one."""
  return unicodedata.category(letter) in ("Ll", "Lu", "Lt", "Lm", "Mn", "Mc", "Nd")


def _is_border(text, at, tokenizer):
  """Whether the tokens of the text up to a place are the first of the whole text's."""
  start = max(at - NEAR, 0)
  before, both = tokenizer(
    [text[start:at], text[start : at + NEAR]], add_special_tokens=False, verbose=False
  )["input_ids"]
  return both[: len(before)] == before
