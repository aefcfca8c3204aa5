"""What the policy of an online run wrote as it learned: the same prompt over the batches, where one came again."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain_jax.data import questions
from posttrain_jax.runs import completions

READ = 200  # tables, evenly over the run: each is a file
PROMPTS, TIMES = 3, 4  # that are shown, and how often each
Row = Mapping[str, Any]


def over_steps(folder: Path) -> tuple[str, list[dict[str, Any]]]:
  """(what is shown, {"prompt", "answers": [{"when", "text"}, ...]} of some prompts); ("", []) of no online run.

  A table that cannot be read is left out, and what is shown says so.
  """
  numbers = completions.numbers(folder)
  if not numbers:
    return "", []
  asked: dict[str, list[list[Row]]] = {}
  unread: list[int] = []
  for number in _spread(numbers, READ):
    try:
      groups = _groups(completions.rows(folder, number))
    except (ValueError, KeyError):  # damaged, or of other columns
      unread.append(number)
      continue
    for prompt, group in groups.items():
      asked.setdefault(prompt, []).append(group)
  note, shown = _shown(asked) if asked else ("", [])
  left_out = ", ".join(completions.table(folder, number).name for number in unread)
  return (f"{note} Left out, as it cannot be read: {left_out}." if unread else note).strip(), shown


def _shown(asked: Mapping[str, list[list[Row]]]) -> tuple[str, list[dict[str, Any]]]:
  """`over_steps` of {prompt: its groups}."""
  again = [prompt for prompt in asked if len(asked[prompt]) > 1]
  if again:
    again.sort(key=lambda prompt: -len(asked[prompt]))
    shown = [(prompt, _spread(asked[prompt], TIMES)) for prompt in again[:PROMPTS]]
    return "The best answer to a prompt each time that it was asked.", [
      _one(prompt, [(group, _best(group)) for group in groups]) for prompt, groups in shown
    ]
  # no prompt came again: one of the first batch, one of the last, and some between
  some = _spread(list(asked.items()), TIMES)
  return "No prompt was asked twice: the best and the worst answer to some.", [
    _one(prompt, [(groups[0], row) for row in _extremes(groups[0])]) for prompt, groups in some
  ]


def _groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
  """{prompt: its answers}; of a prompt that a batch has twice, those of the first time."""
  groups: dict[str, list[Row]] = {}
  for row in rows:
    group = groups.setdefault(row["prompt"], [])
    if not group or group[0]["number"] == row["number"]:
      group.append(row)
  return groups


def _spread(items: Sequence[Any], most: int) -> list[Any]:
  """At most so many, evenly, the first and the last among them.

  >>> _spread([1, 2, 3, 4, 5, 6, 7], 4)
  [1, 3, 5, 7]
  """
  if len(items) <= most:
    return list(items)
  return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _known(row: Row) -> float:
  return float("-inf") if row["reward"] is None else row["reward"]


def _best(group: Sequence[Row]) -> Row:
  return max(group, key=_known)


def _extremes(group: Sequence[Row]) -> list[Row]:
  return [_best(group), min(group, key=_known)]


def _one(prompt: str, answers: Sequence[tuple[Sequence[Row], Row]]) -> dict[str, Any]:
  return {
    "prompt": questions.shown(json.loads(prompt)),
    "answers": [{"when": _when(group, row), "text": row["completion"]} for group, row in answers],
  }


def _when(group: Sequence[Row], row: Row) -> str:
  """Which batch, what the answer got, and what its group did."""
  known = [one["reward"] for one in group if one["reward"] is not None]
  own = "no reward" if row["reward"] is None else f"reward {row['reward']:.3g}"
  mean = f", {statistics.fmean(known):.3g} on average of {len(known)}" if len(known) > 1 else ""
  return f"batch {row['batch']}: {own}{mean}"
