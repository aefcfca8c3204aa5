r"""What stands in the last \boxed{} of an answer, as math data sets mark their answers."""

from __future__ import annotations

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
  r"""What is in the last box is the expected answer: as text, or where both are a number, by value.

  The expected answer is what is in its own last box, else what follows `####`, else all of it.  Compared are texts
  without spaces, `$`, a final point, and LaTeX that changes only how they look (`\left`, `\dfrac`, `\text{}`, `\,`).

  >>> boxed(r"So it is \boxed{\dfrac12 x}", r"\frac12x"), boxed(r"\boxed{0.50}", "1/2")[0]
  ((True, 'ok'), True)
  """
  wanted = last(gold)
  if wanted is None:
    wanted = gold.rpartition("####")[2].strip()
  inside = last(answer)
  if inside is None:
    return False, "nothing boxed"
  is_same = plain(inside) == plain(wanted) or _same_number(inside, wanted)
  return is_same, RIGHT if is_same else "another answer in the box"


def plain(latex: str) -> str:
  """LaTeX without what changes only its looks."""
  text = spaced(latex).replace("$", "").replace(r"\%", "").replace("%", "")
  text = re.sub(r"\\(left|right|displaystyle|limits)(?![A-Za-z])|\\[,!;: ]", "", text)
  text = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", text)
  text = re.sub(r"\\(text|mathrm|textbf|mbox)\s*\{([^{}]*)\}", r"\2", text)
  return re.sub(r"\s+", "", text).rstrip(".")


def _same_number(one: str, other: str) -> bool:
  """Whether both are a number and nothing else."""
  try:
    return numbers.only_number(one) == numbers.only_number(other)
  except ValueError:
    return False
