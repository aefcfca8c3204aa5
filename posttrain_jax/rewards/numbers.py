"""Numbers in texts: the last one of an answer, compared by value."""

from __future__ import annotations

import decimal
import fractions
import re

from posttrain_jax.rewards.matching import RIGHT

# (answer, expected): those that are equal, and those that are not
EXAMPLES = (
  (("12 + 34 = 46, so $1,234.00.", "#### 1234"), ("-0.5", "-1/2")),
  (("1235", "1234"), ("0.5", "-0.5"), ("none", "0")),
)


def number(answer: str, gold: str, *, tolerance: float = 0.0) -> tuple[bool, str]:
  """The last number of the answer is the last number of the expected text, as GSM8K is graded.

  Of a text with `####` it is the first number after the last of them, if there is one.  Numbers are compared
  exactly, as fractions: 18 is 18.00, 1/2 is 0.5, 0.333 is not 1/3.  A number has a sign (-, +, or Unicode's minus),
  thousands parted by commas, apostrophes or narrow spaces, a decimal point, an exponent (1e5), or is a fraction a/b,
  1 a/b, or LaTeX's \\frac.  A unit, a currency and a percent sign are not compared: $5, 5 kg and 5 % are 5.  Digits
  behind a letter (m2, x1) are no number.  Digits that are joined otherwise (3,5 or 12:30 or 1.2.3 or 10^5 or 3-5)
  can be read in several ways and are taken for no number.

  With a tolerance they may differ by this share of the expected number: 0.01 is one per cent.

  >>> [number(f"So it is {text}.", "#### 1234")[0] for text in ("$1,234.00", "12 + 34 = 1234 eggs", "1234:1")]
  [True, True, False]

  Raises:
    ValueError: the expected text has no such number.
  """
  wanted = last_number(gold)
  try:
    value = last_number(answer)
  except ValueError as error:
    return False, str(error)
  is_same = abs(value - wanted) <= fractions.Fraction(tolerance) * abs(wanted)
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
  return _signed(*tokens[-1])


def only_number(text: str) -> fractions.Fraction:
  """The number that the whole text is, with a currency or a sign.

  Raises:
    ValueError: it is none, or more than a number.
  """
  match = _TOKEN.fullmatch(_plainly(text).strip().lstrip("$€£¥"))
  if match is None:
    raise ValueError("no number")
  return _signed(*match.groups())


def _signed(before: str, inside: str, digits: str) -> fractions.Fraction:
  value = _value(digits)
  return -value if before in _MINUS or inside in _MINUS else value


_MINUS = ("-", "\N{MINUS SIGN}")
# a sign before or behind a currency; digits, with what may join them; no letter, digit, power or root stands before
_TOKEN = re.compile(
  r"(?:(?<![\w)\]])([-+\u2212])[$€£¥]?|[$€£¥]([-+\u2212])|)"
  r"((?:(?<![\w.^√])\.|(?<![\w^√]))\d(?:[\d.,:/^\-\u2013\u2212]*\d)?(?:[eE][-+]?\d+(?!\w))?)"
)


# behind a digit it is the rest of a mixed number; an argument without braces is a digit
_FRACTION = re.compile(r"((?<=\d)\s*)?\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")


def _plainly(text: str) -> str:
  """The text without LaTeX, signs between thousands, and mixed numbers such as 1 1/2."""
  text = _FRACTION.sub(
    lambda match: f"{'' if match[1] is None else ' '}{match[2] or match[3]}/{match[4] or match[5]}",
    text,
  )
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
