"""Verifiers that compare an answer with the one that the row expects."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from posttrain_jax.core import words
from posttrain_jax.rewards import score
from posttrain_jax.rewards.matching import without_thoughts
from posttrain_jax.rewards.score import Score
from posttrain_jax.rewards.verifier import Known, Prompt, Tried


@dataclasses.dataclass(frozen=True)
class Compared(Tried):
  """compare: (answer, expected) -> (value, what is to be said of it); ValueError where the expected text is unreadable.

  Thoughts, up to the last `</think>`, are not compared.

  Args:
    column: where the row has what is expected.
    within: of an answer only what the last `<within>...</within>` holds is compared; "": all of it.
    right, wrong: (answer, expected) of which is known that they are equal, and that they are not.
    options: further keywords of `compare`.
    is_json: what is expected may be any value, which is compared as JSON.
  """

  compare: Callable[..., tuple[float, str]]
  column: str
  within: str = ""
  right: tuple[tuple[str, str], ...] = ()
  wrong: tuple[tuple[str, str], ...] = ()
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  is_json: bool = False

  def __call__(self, prompt: Prompt, completion: str, example: Mapping[str, Any]) -> Score:
    gold = expected(example, self.column, is_json=self.is_json)
    if isinstance(gold, Score):
      return gold
    answer = without_thoughts(completion)
    if self.within:
      inside = tagged(answer, self.within)
      if inside is None:
        return Score(0.0, f"no <{self.within}>")
      answer = inside
    try:
      value, reason = self.compare(answer, gold, **self.options)
    except ValueError as error:
      return score.missing(
        f"the row's {self.column} {words.shown(gold, 60)} cannot be compared with: {error}"
      )
    return Score(float(value), reason)

  def known(self) -> list[Known]:
    opening, closing = (f"<{self.within}>", f"</{self.within}>") if self.within else ("", "")
    pairs = [(pair, True) for pair in self.right] + [(pair, False) for pair in self.wrong]
    return [
      Known(f"{opening}{answer}{closing}", {self.column: gold}, is_right)
      for (answer, gold), is_right in pairs
    ]


def expected(example: Mapping[str, Any], column: str, *, is_json: bool = False) -> str | Score:
  """What the row expects as text, without thoughts; missing where there is nothing, or something else."""
  if column not in example:
    return score.missing(f"the row has no column {column!r}")
  value = example[column]
  if not is_json and not isinstance(value, str | int | float | None):
    return score.missing(
      f"the row's {column} is a {type(value).__name__}, {words.shown(value, 60)}; it should be a text or a number"
    )
  gold = without_thoughts(value if isinstance(value, str) else json.dumps(value))
  return (
    gold if gold.strip() and value is not None else score.missing(f"the row's {column} is empty")
  )


def tagged(text: str, tag: str) -> str | None:
  """What stands in the last `<tag>...</tag>`; None where there is none.

  >>> tagged("<a>1</a> <a> 2 </a>", "a")
  ' 2 '
  """
  name = re.escape(tag)
  found = re.findall(rf"<{name}>((?:(?!<{name}>).)*?)</{name}>", text, re.DOTALL)
  return found[-1] if found else None
