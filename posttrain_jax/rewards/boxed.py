r"""What stands in the last \boxed{} of an answer, as math data sets mark their answers."""

from __future__ import annotations

import fractions
import re

from posttrain_jax.rewards import numbers
from posttrain_jax.rewards.matching import RIGHT, spaced

# (answer, expected): those that are equal, and those that are not
EXAMPLES = (
  ((r"\boxed{1} or \boxed{\dfrac{a}{2}}.", r"\frac{a}{2}"), (r"\boxed{0.50}", "1/2")),
  ((r"\boxed{\frac{a}{3}}", r"\frac{a}{2}"), ("1/2", "1/2")),
)
# a box that opens; a brace or another sign behind a backslash, which is a letter; a brace
_MARK = re.compile(r"(\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)


def last(text: str) -> str | None:
  r"""The content of the last `\boxed{...}` (or `\fbox{...}`) whose braces close; None where there is none.

  >>> last(r"\boxed{1} or \boxed{\frac{a}{2}}."), last(r"\boxed{1")
  ('\\frac{a}{2}', None)
  """
  open_braces: list[int | None] = []  # where the content of a box begins; None of another brace
  start, end = -1, -1
  for match in _MARK.finditer(text):
    if match[1] or match[0] == "{":
      open_braces.append(match.end() if match[1] else None)
    elif match[0] == "}" and open_braces:
      opened = open_braces.pop()
      if opened is not None and opened > start:
        start, end = opened, match.start()
  return text[start:end].strip() if start >= 0 else None


def boxed(answer: str, gold: str) -> tuple[bool, str]:
  r"""What is in the last box is the expected answer: as LaTeX that looks the same, or as a number, by value.

  The expected answer is what is in its own last box, else what follows `####`, else all of it.  LaTeX is compared as
  `plain` writes it.  A variable before the value (`x = 10`) and a unit behind a number (`10\text{ cm}`) may be left out
  by one of the two; where both have one, it is the same.

  >>> boxed(r"So it is \boxed{\dfrac12 x}", r"\frac{1}{2}x"), boxed(r"\boxed{0.50}", "1/2")[0]
  ((True, 'ok'), True)
  """
  wanted = last(gold)
  if wanted is None:
    wanted = gold.rpartition("####")[2].strip()
  inside = last(answer)
  if inside is None:
    return False, "nothing boxed"
  is_same = _same(inside, wanted) or _same_apart(_apart(inside), _apart(wanted))
  return is_same, RIGHT if is_same else "another answer in the box"


def _same(one: str, other: str) -> bool:
  return plain(one) == plain(other) or _same_number(one, other)


def _same_apart(one: tuple[str, str, str], other: tuple[str, str, str]) -> bool:
  """Of (variable, value, unit): the values are the same, and nothing that both have beside them differs."""
  variables, values, units = zip(one, other)
  beside = all(not a or not b or plain(a) == plain(b) for a, b in (variables, units))
  return beside and _same(*values)


# one variable; a number, roots, fractions and pi included; a unit, with its power
_VARIABLE = re.compile(r"\s*([A-Za-z])\s*=(?!=)(.*)", re.DOTALL)
_UNIT = re.compile(
  r"([-+\u2212\d.,/^(){}\s$]*(?:\\(?:[dt]?frac|sqrt|pi|cdot|times|[,!;:$ ])[-+\u2212\d.,/^(){}\s$]*)*)"
  r"(\\(?:text|textrm|mathrm|mbox)\s*\{[^{}]*\}\s*(?:\^\s*(?:\d|\{\s*-?\d\s*\}))?)[\s.$]*"
)


def _apart(latex: str) -> tuple[str, str, str]:
  """(the variable, the value, the unit), "" for what there is not."""
  named = _VARIABLE.fullmatch(latex.strip(" $"))
  variable, value = named.groups() if named else ("", latex)
  measured = _UNIT.fullmatch(value)
  if measured and re.search(r"\d|\\pi", measured[1]):
    return variable, measured[1], measured[2]
  return variable, value, ""


_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[^\s~]", re.DOTALL)
_NOTHING = {"$", r"\$", "%", r"\%", r"\left", r"\right", r"\displaystyle", r"\textstyle", r"\limits", r"\,", r"\!",
            r"\;", r"\:", r"\ ", r"\>", r"\quad", r"\qquad", r"\thinspace", r"\degree"}  # fmt: skip
_SAME = {
  **dict.fromkeys((r"\dfrac", r"\tfrac", r"\cfrac"), r"\frac"),
  **dict.fromkeys((r"\dbinom", r"\tbinom"), r"\binom"),
  r"\le": r"\leq", r"\ge": r"\geq", r"\ne": r"\neq", r"\lbrace": r"\{", r"\rbrace": r"\}",
  "\N{MINUS SIGN}": "-",
}  # fmt: skip
_TEXT = {r"\text", r"\textrm", r"\textbf", r"\textit", r"\mathrm", r"\mbox"}
_ARGUMENTS = {r"\frac": 2, r"\binom": 2, r"\sqrt": 1, r"\vec": 1, r"\bar": 1, r"\overline": 1, "^": 1, "_": 1,
              **dict.fromkeys(_TEXT, 1)}  # fmt: skip


def plain(latex: str) -> str:
  r"""LaTeX without what changes only its looks, and with braces around every argument.

  Left out are spaces, `\left` and `\right`, dollar and percent signs, degrees, `\text` around words and a final point;
  `\dfrac` is `\frac`, and `\le` is `\leq`.

  >>> plain(r"\dfrac 1{\sqrt3}."), plain(r"x^2"), plain(r"90^\circ")
  ('\\frac { 1 } { \\sqrt { 3 } }', 'x ^ { 2 }', '9 0')
  """
  tokens = [_SAME.get(t, t) for t in _TOKEN.findall(spaced(latex).replace("{,}", ","))]
  tokens = [token for token in tokens if token not in _NOTHING]
  while tokens and tokens[-1] == ".":
    tokens.pop()
  return " ".join(_braced(tokens)).replace(r"^ { \circ }", "").strip()


def _braced(tokens: list[str]) -> list[str]:
  """Braces around each argument that is a single sign, as TeX reads it; none around what is text.

  From right to left, so that what follows a command has been read when the command is.
  """
  written = [[token] for token in tokens]
  units: list[
    tuple[int, int]
  ] = []  # (first, last) of groups, commands with arguments and signs; the next one is last
  closed: list[tuple[int, int]] = []  # braces: (place, how many units there are behind it)
  for i in reversed(range(len(tokens))):
    token, end = tokens[i], i
    if token == "}":
      closed.append((i, len(units)))
      continue
    if token == "{" and closed:
      end, behind = closed.pop()
      del units[behind:]
    least = closed[-1][1] if closed else 0
    if token == r"\sqrt" and len(units) > least and tokens[units[-1][0]] == "[":
      end = _closing(tokens, units, least)
    for _ in range(_ARGUMENTS.get(token, 0)):
      if len(units) > least:
        first, end = units.pop()
        _wrap(written, first, end, token in _TEXT)
    if token in _TEXT:
      written[i] = []
    units.append((i, end))
  return [sign for signs in written for sign in signs]


def _closing(tokens: list[str], units: list[tuple[int, int]], least: int) -> int:
  """Takes the units of a `[...]` away; the place of its end."""
  end = units[-1][1]
  while len(units) > least and tokens[end] != "]":
    end = units.pop()[1]
  if len(units) > least and units[-1][1] == end:
    units.pop()
  return end


def _wrap(written: list[list[str]], first: int, last: int, is_text: bool) -> None:
  is_group = written[first][:1] == ["{"]
  if is_text and is_group:
    written[first], written[last] = [], []
  elif not is_text and not is_group:
    written[first].insert(0, "{")
    written[last].append("}")


def _same_number(one: str, other: str) -> bool:
  """Whether both are a number and nothing else."""
  try:
    return _number(one) == _number(other)
  except ValueError:
    return False


def _number(latex: str) -> fractions.Fraction:
  try:
    return numbers.only_number(latex)
  except ValueError:
    return numbers.only_number(plain(latex).replace(" ", ""))
