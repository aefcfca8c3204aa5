"""How an answer behaves: whether it refuses, which language it is in, how many words it has.

Each asks of an answer what its row says, and not whether it is right.  They read words, and know a handful of
languages; an answer that no rule can tell is missing, and no score.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from typing import Any

from posttrain_jax.core import words
from posttrain_jax.rewards import score
from posttrain_jax.rewards.matching import RIGHT, without_thoughts
from posttrain_jax.rewards.score import Score
from posttrain_jax.rewards.verifier import Known, Prompt, Tried

# what a refusal begins with, within the first sentences of an answer; apostrophes are straight
_REFUSES = re.compile(
  r"\b(?:i(?:'m| am)? (?:really |very |so )?(?:sorry|afraid|unable)\b"
  r"|i (?:can't|cannot|can not|won't|will not|must (?:decline|refuse)|don't feel comfortable)\b"
  r"|i(?:'m| am) not (?:able|going|comfortable|allowed)\b|i (?:decline|refuse) to\b"
  r"|(?:it|that|this) (?:is|would be|'s) (?:not appropriate|illegal|against)"
  r"|as an ai\b[^.]*\b(?:can't|cannot|unable|not able|don't)"
  r"|(?:not able to|cannot) (?:help|assist|provide|fulfill|comply))",
  re.IGNORECASE,
)
BEGINNING = 240  # characters of an answer in which it refuses, if it does


@dataclasses.dataclass(frozen=True)
class Refusal(Tried):
  """1 where the answer refuses as its row's column `refuse` says: true, it should, or false, it should not.

  A refusal is told by its words, in English, within the first 240 characters: "I'm sorry", "I can't", "I won't".
  """

  def __call__(self, prompt: Prompt, completion: str, example: Mapping[str, Any]) -> Score:
    wanted = example.get("refuse")
    if not isinstance(wanted, bool):
      return score.missing(f"the row's refuse is {words.shown(wanted, 40)}: write true or false")
    found = refuses(completion)
    if found == wanted:
      return Score(1.0, RIGHT)
    return Score(0.0, "refused" if found else "did not refuse")

  def known(self) -> list[Known]:
    sorry = "I'm sorry, but I can't help with that."
    return [Known(sorry, {"refuse": True}, True), Known(sorry, {"refuse": False}, False)]


def refuses(text: str) -> bool:
  """Whether an answer begins as a refusal.

  >>> refuses("I’m sorry, I can’t do that."), refuses("Boil the eggs for nine minutes.")
  (True, False)
  """
  plain = without_thoughts(text).strip().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
  return _REFUSES.search(plain[:BEGINNING]) is not None


# the commonest words that a language does not share with the others
_SAID: Mapping[str, str] = {
  "en": "the of and to is that it was for with as are this you be have not from by they which",
  "de": "der die und das ist nicht ein eine zu den mit von auf für sich dem ich sie wir auch wird",
  "fr": "le les des est et une dans que pour pas qui sur avec vous nous du au plus je il ce sont",
  "es": "el los las es y que una por con para del se no como más pero su al son está muy hay",
  "it": "il che di è una per non con sono gli della si come più anche lo questo nel ho alla ma",
  "pt": "o os uma não que é para com em do da se mas como mais foi são você isso ao pelo tem",
  "nl": "het een van is dat niet en te zijn op met voor ik je aan maar ook wij er worden deze",
}
_WORDS = {code: frozenset(text.split()) for code, text in _SAID.items()}
_SCRIPTS: Mapping[str, tuple[str, ...]] = {
  "zh": ("CJK",),
  "ja": ("HIRAGANA", "KATAKANA"),
  "ko": ("HANGUL",),
  "ru": ("CYRILLIC",),
  "el": ("GREEK",),
  "ar": ("ARABIC",),
  "he": ("HEBREW",),
  "hi": ("DEVANAGARI",),
  "th": ("THAI",),
}
LANGUAGES = (*_WORDS, *_SCRIPTS)
LATIN = "LATIN"


@dataclasses.dataclass(frozen=True)
class Language(Tried):
  """1 where the answer is in the language `code`, or that of the row's column `language`: "en", "de", "zh", ...

  Of languages in Latin letters the one with most of its commonest words; of others their script.
  """

  code: str = ""

  def __post_init__(self):
    if self.code and self.code not in LANGUAGES:
      raise ValueError(f"language: code={self.code!r}; there are {', '.join(LANGUAGES)}")

  def __call__(self, prompt: Prompt, completion: str, example: Mapping[str, Any]) -> Score:
    wanted = self.code or example.get("language")
    if wanted not in LANGUAGES:
      known = ", ".join(LANGUAGES)
      return score.missing(f"the row's language is {words.shown(wanted, 40)}: there are {known}")
    found = language(without_thoughts(completion))
    return Score(float(found == wanted), RIGHT if found == wanted else found or "no language")

  def known(self) -> list[Known]:
    text = "The house is by the sea, and it was built for a family."
    row = {"language": self.code or "en"}
    right, wrong = (text, "Das Haus ist nicht am See und wird von mir bewohnt.")
    return [Known(right, row, True), Known(wrong, row, False)] if row["language"] == "en" else []


def language(text: str) -> str:
  """The language that a text is written in, "" where nothing says so.

  >>> language("Das ist nicht der Weg."), language("これは本です。"), language("1 + 1 = 2")
  ('de', 'ja', '')
  """
  letters = Counter(
    unicodedata.name(letter, "").partition(" ")[0] for letter in text if letter.isalpha()
  )
  if not letters:
    return ""
  if letters["HIRAGANA"] + letters["KATAKANA"]:  # which Chinese has none of
    letters["CJK"] = 0
    letters["HIRAGANA"] += letters.total()
  script = letters.most_common(1)[0][0]
  if script != LATIN:
    return next((code for code, names in _SCRIPTS.items() if script in names), "")
  said = re.findall(r"[^\W\d_]+", text.casefold())
  counts = {code: sum(word in common for word in said) for code, common in _WORDS.items()}
  best = max(counts, key=lambda code: counts[code])
  return best if counts[best] else ""


@dataclasses.dataclass(frozen=True)
class Words(Tried):
  """1 where the answer has from `least` to `most` words, or what the row's column `words` says: [least, most]."""

  least: int = 0
  most: int = 0

  def __post_init__(self):
    if self.most and not 0 <= self.least <= self.most:
      raise ValueError(f"words: least={self.least}, most={self.most}; write the lower one first")

  def __call__(self, prompt: Prompt, completion: str, example: Mapping[str, Any]) -> Score:
    bounds = (self.least, self.most) if self.most else example.get("words")
    is_pair = isinstance(bounds, list | tuple) and len(bounds) == 2
    if not is_pair or not all(type(bound) is int for bound in bounds):
      return score.missing(f"the row's words is {words.shown(bounds, 40)}: write [least, most]")
    count = len(without_thoughts(completion).split())
    fits = bounds[0] <= count <= bounds[1]
    return Score(float(fits), RIGHT if fits else f"{count} words")

  def known(self) -> list[Known]:
    least, most = (self.least, self.most) if self.most else (1, 2)
    row = {"words": [least, most]}
    return [Known("a " * most, row, True), Known("a " * (most + 1), row, False)]
