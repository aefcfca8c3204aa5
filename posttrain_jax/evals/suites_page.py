"""What several runs kept and forgot, beside each other, for the page that compares runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain_jax.evals import gate, measure
from posttrain_jax.evals.measure import Measured
from posttrain_jax.evals.verdicts import DROP, Comparison, Item, Verdict, is_right
from posttrain_jax.runs.record import Run

ITEMS = 12  # shown with every run's answer
LONGEST = 300  # characters of an answer

BODY = """
{% if suites %}
<h2>What they kept and forgot</h2>
{% for sentence in suites.sentences %}<p>{{ sentence }}</p>{% endfor %}
<div class="scroll"><table class="settings">
<tr>{% for head in suites.heads %}<th{% if not loop.first %} class="number"{% endif %}>{{ head }}</th>{% endfor %}</tr>
{% for row in suites.rows %}
<tr><td class="name">{{ row.name }}</td>{% for cell in row.cells %}\
<td class="number{{ ' wrong' if cell.dropped }}">{{ cell.level }}<br><span class="note">{{ cell.change }}</span></td>\
{% endfor %}</tr>
{% endfor %}
</table></div>
<p class="note">Each after training, below it the change since before on the same items with its 95 % interval; \
above 0 is better, and what dropped beyond what was agreed is coloured.</p>
{% if suites.lost %}
<h3>Right before, wrong after</h3>
<p class="note">Items that some run lost, those first that most of them lost.</p>
{% for one in suites.lost %}{{ page.pair(one) }}{% endfor %}
{% endif %}
{% endif %}
"""


def section(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Any] | None:
  """What BODY shows of the runs that measured a suite; None where fewer than one did.

  Runs whose suites, prompts or decoding differ do not compare, which a sentence says.
  """
  there = [(name, found) for run, name in zip(runs, names) if (found := gate.results(run.folder))]
  if not there:
    return None
  (_, (_, first)), *_ = there
  alike = [(n, f) for n, f in there if not measure.obstacles(first.after, f[1].after)]
  apart = [n for n, _ in there if n not in {n for n, _ in alike}]
  return dict(
    sentences=[_said(name, found) for name, (_, found) in alike]
    + [f"{name} was measured otherwise and does not compare." for name in apart],
    heads=["run", *(one.part for one in first.verdicts)],
    rows=[dict(name=name, cells=_cells(first, found)) for name, (_, found) in alike],
    lost=_items(alike),
  )


def _said(name: str, found: Comparison) -> str:
  forgot = ", ".join(found.dropped) or "nothing that could be told"
  paid = (
    ""
    if found.tax is None
    else f"; its scores changed by {-100 * found.tax:+.1f} points in the mean"
  )
  return f"{name} forgot {forgot}{paid}."


def _cells(first: Comparison, found: Comparison) -> list[dict[str, Any]]:
  by_part = {one.part: one for one in found.verdicts}
  return [_cell(by_part.get(one.part)) for one in first.verdicts]


def _cell(one: Verdict | None) -> dict[str, Any]:
  if one is None:
    return dict(level=gate.NONE, change="", dropped=False)
  return dict(level=gate.rate(one, one.after), change=gate.change(one), dropped=one.verdict == DROP)


def _items(alike: Sequence[tuple[str, tuple[Path, Comparison]]]) -> list[dict[str, Any]]:
  """What some run lost, with the answer of each."""
  lost: dict[tuple[str, str], dict[str, Item]] = {}
  for name, (_, found) in alike:
    for one in found.verdicts:
      for item in one.lost:
        lost.setdefault((one.part, item.id), {})[name] = item
  shown = sorted(lost, key=lambda at: -len(lost[at]))[:ITEMS]
  measured = {name: _after(path) for name, (path, _) in alike} if shown else {}
  return [_item(at, lost[at], measured) for at in shown]


def _after(path: Path) -> Measured | None:
  """The answers after training that a comparison is of, where they are kept."""
  file = path.with_name("after.jsonl")
  return measure.read(file) if file.exists() else None


def _item(
  at: tuple[str, str], by_run: Mapping[str, Item], measured: Mapping[str, Measured | None]
) -> dict[str, Any]:
  part, name = at
  some = next(iter(by_run.values()))
  answers = [dict(when="before", correct=True, reason="", text=some.before[:LONGEST])]
  for run, side in measured.items():
    if run in by_run:
      item = by_run[run]
      answers.append(dict(when=run, correct=False, reason=item.reason, text=item.after[:LONGEST]))
    elif side is not None:
      result = next(r for r in side.results[part] if r.id == name)
      text = "\n---\n".join(result.answers)[:LONGEST]
      answers.append(dict(when=run, correct=is_right(result), reason=result.reason, text=text))
  return dict(
    question=some.prompt, channel=f"{part}: {name}", gold=some.gold or gate.NONE, answers=answers
  )
