"""How good an answer is, by name or by a function of one's own: a number, higher is better.

Built in are `exact`, `contained`, `json` and `number`, which compare an answer with the expected one and give 1 or 0.
What a model thought aloud before its answer, up to the last `</think>`, is compared by none of them.
"""

from __future__ import annotations

import copy
import dataclasses
import decimal
import difflib
import fractions
import functools
import hashlib
import json
import math
import re
import traceback
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from posttrain_jax import settings
from posttrain_jax.data.errors import RowError
from posttrain_jax.settings import ConfigError

RIGHT = "ok"


@dataclasses.dataclass(frozen=True)
class Grader:
  """score: (answer, question) -> (a number, what is to be said of it), of a question as `data.questions` makes them.

  digest: of the code, where it is the user's.
  """

  name: str
  score: Callable[[str, Mapping[str, Any]], tuple[float, str]]
  needs_gold: bool = True
  digest: str = ""


def exact(answer: str, gold: str) -> tuple[bool, str]:
  """The answer is the expected text, letter by letter, but for white space.

  Before they are compared both are in Unicode's composed form (NFC), each run of white space is one space, and there is
  none at either end.  Case, punctuation and quotes count: "Paris." is not "Paris".

  >>> exact(" new\\n york ", "new york")[0], exact("New York", "new york")[0]
  (True, False)
  """
  is_same = _spaced(answer) == _spaced(gold)
  return is_same, RIGHT if is_same else "another text"


def contained(answer: str, gold: str) -> tuple[bool, str]:
  """The expected text stands somewhere in the answer, as whole words and whole numbers, whatever their case.

  White space and Unicode are as for `exact`, case is folded.  A word or number of the expected text is no part of a
  longer one of the answer: "art" is not in "party", 3 is neither in 13 nor in 3.5.  In scripts that put no space
  between words (Chinese, Japanese, Thai) any place is one between words.

  >>> contained("It is Paris, of course.", "paris")[0], contained("13", "3")[0]
  (True, False)
  """
  text, wanted = _spaced(answer).casefold(), _spaced(gold).casefold()
  at = text.find(wanted)
  while at >= 0:
    if not (_joined(text, at) or _joined(text, at + len(wanted))):
      return True, RIGHT
    at = text.find(wanted, at + 1)
  return False, "not in the answer"


def json_equal(answer: str, gold: str) -> tuple[bool, str]:
  """Both are JSON (RFC 8259) of the same value.

  The order of an object's keys and white space do not matter, the order of an array does; numbers are compared exactly
  as numbers (1 is 1.0 and 1e0), true is not 1, and strings are compared letter by letter.  A key that stands twice in
  one object, NaN and Infinity are no JSON.  Where the whole answer is none, the text inside its last code fence (```)
  is read.

  >>> json_equal('```json\\n{"b": [1.0], "a": null}\\n```', '{"a": null, "b": [1]}')[0]
  True
  """
  try:
    value = _json(answer)
    is_same = _same(value, _json(gold))
  except RecursionError:
    return False, "nested too deeply"
  except ValueError as error:
    return False, f"not JSON: {error}"
  return is_same, RIGHT if is_same else "another value"


def number(answer: str, gold: str) -> tuple[bool, str]:
  """The last number of the answer is the last number of the expected text, as GSM8K is graded.

  Of a text with `####` it is the first number after the last of them, if there is one.  Numbers are compared
  exactly, as fractions: 18 is 18.00, 1/2 is 0.5, 0.333 is not 1/3.  A number has a sign (-, +, or Unicode's minus),
  thousands parted by commas, apostrophes or narrow spaces, a decimal point, an exponent (1e5), or is a fraction a/b,
  1 a/b, or LaTeX's \\frac.  A unit, a currency and a percent sign are not compared: $5, 5 kg and 5 % are 5.  Digits
  behind a letter (m2, x1) are no number.  Digits that are joined otherwise (3,5 or 12:30 or 1.2.3 or 10^5 or 3-5)
  can be read in several ways and are taken for no number.

  >>> [number(f"So it is {text}.", "#### 1234")[0] for text in ("$1,234.00", "12 + 34 = 1234 eggs", "1234:1")]
  [True, True, False]
  """
  try:
    value = last_number(answer)
  except ValueError as error:
    return False, str(error)
  is_same = value == last_number(gold)
  return is_same, RIGHT if is_same else "another number"


def last_number(text: str) -> fractions.Fraction:
  """What `number` compares.

  Raises:
    ValueError: there is none, or it can be read in several ways.
  """
  _, marked, rest = text.rpartition("####")
  final = _TOKEN.findall(_plainly(rest))[:1] if marked else []
  tokens = final or _TOKEN.findall(_plainly(text))
  if not tokens:
    raise ValueError("no number")
  before, inside, digits = tokens[-1]
  value = _value(digits)
  return -value if before in _MINUS or inside in _MINUS else value


_MINUS = ("-", "\N{MINUS SIGN}")
# a sign before or behind a currency; digits, with what may join them; no letter, digit, power or root stands before
_TOKEN = re.compile(
  r"(?:(?<![\w)\]])([-+\u2212])[$€£¥]?|[$€£¥]([-+\u2212])|)"
  r"((?:(?<![\w.^√])\.|(?<![\w^√]))\d(?:[\d.,:/^\-\u2013\u2212]*\d)?(?:[eE][-+]?\d+(?!\w))?)"
)


def _plainly(text: str) -> str:
  """The text without LaTeX, signs between thousands, and mixed numbers such as 1 1/2."""
  text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
  text = text.replace("{,}", ",").replace(r"\,", "").replace(r"\$", "$")
  text = re.sub(r"(?<=\d)['’_\u00a0\u2009\u202f](?=\d{3}(?!\d))", "", text)
  return re.sub(r"(?<![\w.,:/^-])(\d{1,9}) (\d{1,9})/(\d{1,9})(?![\w/^])", _mixed, text)


def _mixed(match: re.Match[str]) -> str:
  whole, over, under = map(int, match.groups())
  return f"{whole * under + over}/{under}"


def _value(digits: str) -> fractions.Fraction:
  over, slash, under = digits.partition("/")
  if slash and "/" not in under:
    below = _value(under)
    if below == 0:
      raise ValueError(f"{digits} is no number")
    return _value(over) / below
  mantissa, _, exponent = digits.lower().partition("e")
  if re.fullmatch(r"[1-9]\d{0,2}(,\d{2,3})*,\d{3}(\.\d+)?", mantissa):
    mantissa = mantissa.replace(",", "")
  if not re.fullmatch(r"\d*\.?\d+", mantissa) or len(exponent) > 5:
    raise ValueError(f"{digits} can be read in several ways")
  return fractions.Fraction(decimal.Decimal(f"{mantissa}e{exponent or 0}"))


def _spaced(text: str) -> str:
  return " ".join(unicodedata.normalize("NFC", text).split())


def _answer(text: str) -> str:
  """An answer without the thoughts before it."""
  return text.rpartition("</think>")[2]


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


_FENCE = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)


def _json(text: str) -> Any:
  try:
    return _DECODER.decode(text.strip())
  except ValueError:
    fenced = _FENCE.findall(text)
    if not fenced:
      raise
  return _DECODER.decode(fenced[-1].strip())


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  value = dict(pairs)
  if len(value) < len(pairs):
    raise ValueError("a key stands twice in an object")
  return value


def _no_constant(name: str) -> Any:
  raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(
  object_pairs_hook=_object, parse_float=decimal.Decimal, parse_constant=_no_constant
)


def _same(one: Any, other: Any) -> bool:
  if isinstance(one, dict) and isinstance(other, dict):
    return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
  if isinstance(one, list) and isinstance(other, list):
    return len(one) == len(other) and all(map(_same, one, other))
  if isinstance(one, bool) or isinstance(other, bool):
    return one is other
  return one == other


BUILT_IN: Mapping[str, Callable[[str, str], tuple[bool, str]]] = {
  "exact": exact,
  "contained": contained,
  "json": json_equal,
  "number": number,
}


def load(names: str) -> tuple[Grader, ...]:
  """The graders of a list with commas: built in, or `FILE.py:name`.

  Raises:
    ConfigError: there is no such grader, no such file, or no such function in it.
  """
  graders = [_of(name.strip()) for name in names.split(",")] if names.strip() else []
  if len({grader.name for grader in graders}) < len(graders):
    raise ConfigError(f"eval.metric={names}: a metric is named twice; write each once")
  return tuple(graders)


def _of(name: str) -> Grader:
  if name in BUILT_IN:
    return Grader(name, functools.partial(_compared, BUILT_IN[name]))
  path, colon, function = name.rpartition(":")
  if not colon or not path.endswith(".py"):
    near = difflib.get_close_matches(name, BUILT_IN, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    known = ", ".join(BUILT_IN)
    raise ConfigError(
      f"eval.metric: there is no {name!r}: known are {known}, or a function of yours as FILE.py:name{hint}"
    )
  try:
    called, file = settings.function(path, function), Path(path).expanduser()
  except ConfigError as error:
    raise ConfigError(f"eval.metric: {error}") from error
  return Grader(
    f"{file.name}:{function}",
    functools.partial(_called, called, file, function),
    needs_gold=False,
    digest=hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest(),
  )


def check(grader: Grader, question: Mapping[str, Any]) -> float:
  """What the grader gives for the expected answer itself, 1 where there is none: an answer is right that has as much.

  Raises:
    RowError: the built-in metric cannot compare with this row's expected answer.
  """
  gold = question["gold"]
  if not grader.needs_gold:
    return 1.0 if gold is None else grader.score(gold, question)[0]
  why = "there is none" if gold is None else "it is empty" if not _answer(gold).strip() else ""
  if not why:
    value, why = grader.score(gold, question)
    if value == 1:
      return value
  raise RowError(
    "nothing to compare with",
    question["origin"],
    f"the metric {grader.name!r} compares with the row's expected answer: {why}"
    + ("" if gold is None else f" ({_shown(gold)})"),
    "mend the row, or name another metric",
  )


def _compared(compare, answer, question):
  same, why = compare(_answer(answer), _answer(question["gold"]))
  return float(same), why


def _called(called, file, name, answer, question):
  """What the user's function says, whose mistakes are told with file, line and row."""
  row = copy.deepcopy(dict(question["row"]))  # what it does to the row is not seen by the next
  if question["gold"] is not None:
    row.setdefault("gold", question["gold"])
  try:
    with settings.beside(file.parent):
      value = called(answer, row)
  except (Exception, SystemExit) as error:
    frames = traceback.extract_tb(error.__traceback__)
    at = [frame for frame in frames if Path(frame.filename).resolve() == file.resolve()]
    place = f"{file}:{at[-1].lineno}" if at else str(file)
    raise ConfigError(
      f"{place}: {name} raised {type(error).__name__}: {error} (row {question['origin']}, answer {_shown(answer)})"
    ) from error
  if not _is_score(value):
    raise ConfigError(
      f"{file}: {name} returned {value!r} (row {question['origin']}, answer {_shown(answer)}); return a finite number,"
      " higher is better"
    )
  return float(value), ""


def _is_score(value: Any) -> bool:
  """Whether a metric's value is a number that a mean can be taken of."""
  if not isinstance(value, bool | int | float | np.bool_ | np.integer | np.floating):
    return False
  try:
    return math.isfinite(value)
  except OverflowError:  # an integer beyond what floats hold
    return False


def _shown(text: str) -> str:
  return repr(text if len(text) <= 60 else text[:57] + "...")
