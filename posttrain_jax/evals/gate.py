"""What a comparison of two models says: lines and a table for the terminal, sections for pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.box
import rich.table
import rich.text

from posttrain_jax.core import files, words
from posttrain_jax.evals import page, suite, verdicts
from posttrain_jax.evals.verdicts import DROP, PASS, UNKNOWN, Comparison, Verdict

NONE = "–"
NAME = "regress.html"
SHOWN = 20  # items of a part on the page
COLOURS = {DROP: "red", PASS: "green", UNKNOWN: "yellow"}
HEADS = ("part", "verdict", "before", "after", "change", "right to wrong", "could see")

BODY = """
<p class="state">{{ state }}</p>
{% for sentence in sentences %}<p class="verdict">{{ sentence }}</p>{% endfor %}
{{ gate.table(table) }}
{{ gate.stages(stages) }}
{{ gate.items(groups) }}
"""

MACROS = """\
{% macro table(t) %}
<div class="scroll"><table>
<tr>{% for head in t.heads %}<th{% if loop.index > 2 %} class="number"{% endif %}>{{ head }}</th>{% endfor %}</tr>
{% for row in t.rows %}
<tr>{% for cell in row.cells %}<td class="{{ 'number' if loop.index > 2 }}{{ row.colour if loop.index == 2 }}">\
{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
<p class="note">{{ t.note }}</p>
{% endmacro %}
{% macro stages(s) %}
{% if s %}
<h2>Over the stages</h2>
<div class="scroll"><table>
<tr>{% for head in s.heads %}<th{% if not loop.first %} class="number"{% endif %}>{{ head }}</th>{% endfor %}</tr>
{% for row in s.rows %}<tr>{% for cell in row %}<td{% if not loop.first %} class="number"{% endif %}>{{ cell }}</td>\
{% endfor %}</tr>{% endfor %}
</table></div>
<p class="note">{{ s.note }}</p>
{% endif %}
{% endmacro %}
{% macro items(groups) %}
{% for group in groups %}
<h3>{{ group.title }}</h3>
{% for one in group.pairs %}{{ page.pair(one) }}{% endfor %}
{% if group.more %}<p class="note">{{ group.more }}</p>{% endif %}
{% endfor %}
{% endmacro %}
"""


def sentences(found: Comparison) -> list[str]:
  """What it came to, the most important first."""
  said = [_dropped(one) for one in found.verdicts if one.verdict == DROP]
  if not said:
    said = ["Nothing dropped that could be told."]
  if unknown := found.unknown:
    count = words.count(len(unknown), "part")
    said.append(f"{count} cannot be told: {', '.join(unknown)}. More items would tell.")
  gains = [one for one in found.verdicts if one.trained and one.difference is not None]
  if gains:
    told = "; ".join(f"{one.part} {change(one)}" for one in gains)
    said.append(f"What was trained for: {told}.{_paid(found)}")
  for one in found.verdicts:
    if one.pass_at:
      told = ", ".join(f"{k} {was:.3f} to {now:.3f}" for k, (was, now) in one.pass_at.items())
      said.append(f"{one.part}: {told}.")
  if found.before["weights"] == found.after["weights"]:
    said.append("Both sides have the same weights.")
  return said


def _dropped(one: Verdict) -> str:
  if one.broken:
    return (
      f"{one.part} dropped: of {words.count(one.broken, 'item')} that had a score the model's log-probabilities are no"
      " numbers any more: its weights or its adapter overflow."
    )
  if one.every:
    lost = ", ".join(item.id for item in one.lost[:4])
    return f"{one.part} dropped: {words.count(len(one.lost), 'item')} right before and wrong after ({lost})."
  beyond = f", beyond the {amount(one, one.tolerance)} agreed" if one.tolerance else ""
  lost = (
    f"; {len(one.lost)} became wrong, {len(one.gained)} right" if one.kind != suite.TEXT else ""
  )
  return f"{one.part} dropped: {rate(one, one.before)} to {rate(one, one.after)}{beyond}{lost}."


def _paid(found: Comparison) -> str:
  if found.tax is None:
    return ""
  if found.tax > 0:
    return f" Beside it, the parts with scores lost {100 * found.tax:.1f} points in the mean."
  return f" Beside it, the parts with scores gained {-100 * found.tax:.1f} points in the mean."


def amount(one: Verdict, value: float) -> str:
  """A difference in a part's own unit."""
  return f"{value:.3f} bits per byte" if one.kind == suite.TEXT else f"{100 * value:.1f} points"


def rate(one: Verdict, side: Mapping[str, Any]) -> str:
  """A side's result, with its interval where it has one."""
  if side["mean"] is None:
    return NONE
  if one.kind == suite.TEXT:
    return f"{side['mean']:.3f}"
  within = "" if side["low"] is None else f" [{100 * side['low']:.0f}, {100 * side['high']:.0f}]"
  return f"{100 * side['mean']:.1f} %{within}"


def change(one: Verdict) -> str:
  """The difference with its interval; above 0 is better, of text too."""
  d = one.difference
  if d is None:
    return NONE
  scale, digits, unit = (1, 3, "bits") if one.kind == suite.TEXT else (100, 1, "points")
  shown = lambda value: f"{scale * value:+.{digits}f}"
  within = "" if d.low is None or d.high is None else f" [{shown(d.low)}, {shown(d.high)}]"
  return f"{shown(d.mean)}{within} {unit}"


def rows(found: Comparison) -> list[tuple[str, ...]]:
  """A row for each part, in the order of HEADS."""
  return [
    (
      one.part,
      told(one),
      rate(one, one.before),
      rate(one, one.after),
      change(one),
      NONE if one.kind == suite.TEXT else f"{len(one.lost)} of {one.before['count']}",
      NONE if one.visible is None or one.every or one.trained else amount(one, one.visible),
    )
    for one in found.verdicts
  ]


def told(one: Verdict) -> str:
  if one.trained:
    return "gain" if one.verdict == PASS else "no gain told"
  better = ", better" if one.is_better and one.verdict == PASS else ""
  return one.verdict + better + (f", {one.missing} missing" if one.missing else "")


NOTE = (
  "Change is of the same items, above 0 is better, with 95 % intervals; of bits per byte it is before minus after. A"
  " part drops where it fell by more than was agreed, at 5 % over all parts (Holm). It passes where its whole interval"
  ' is within what was agreed. "Could see" is the drop that would have been told in 80 of 100 cases.'
)


def table(found: Comparison) -> rich.table.Table:
  made = rich.table.Table(box=rich.box.SIMPLE_HEAD)
  for i, head in enumerate(HEADS):
    made.add_column(head, justify="left" if i < 2 else "right", overflow="fold")
  for one, cells in zip(found.verdicts, rows(found)):
    colour = "" if one.trained else COLOURS[one.verdict]
    shown = [rich.text.Text(cell, style=colour if i == 1 else "") for i, cell in enumerate(cells)]
    made.add_row(*shown)
  return made


def section(found: Comparison) -> dict[str, Any]:
  """What a page shows of a comparison: `table` and `groups` of the macros, and `sentences`."""
  colour = lambda one: (
    {DROP: "wrong", PASS: "right"}.get(one.verdict, "") if not one.trained else ""
  )
  return dict(
    sentences=sentences(found),
    table=dict(
      heads=HEADS,
      note=NOTE,
      rows=[dict(cells=c, colour=colour(v)) for v, c in zip(found.verdicts, rows(found))],
    ),
    groups=[
      group
      for one in found.verdicts
      for group in (
        _group(one, "right before, wrong after", one.lost),
        _group(one, "wrong before, right after", one.gained),
      )
      if group["pairs"]
    ],
  )


def _group(one: Verdict, title: str, items: Sequence[Any]) -> dict[str, Any]:
  left = len(items) - SHOWN
  is_lost = items is one.lost
  return dict(
    title=f"{one.part}: {title} ({len(items)})",
    more=f"{left} more are in regress.json." if left > 0 else "",
    pairs=[
      dict(
        question=item.prompt,
        channel=item.id,
        gold=item.gold or NONE,
        answers=[
          dict(
            when="before", correct=is_lost, reason="" if is_lost else item.reason, text=item.before
          ),
          dict(
            when="after",
            correct=not is_lost,
            reason=item.reason if is_lost else "",
            text=item.after,
          ),
        ],
      )
      for item in items[:SHOWN]
    ],
  )


def of_run(folder: Path) -> dict[str, Any] | None:
  """`section` of what a run's folder holds of a suite, with a link to its page; None where it holds nothing."""
  found = results(folder)
  if found is None:
    return None
  at, comparison = found
  return {**section(comparison), "suite": comparison.suite, "address": f"{at.parent.name}/{NAME}"}


def results(folder: Path) -> tuple[Path, Comparison] | None:
  """(regress.json, what it says) of a run's folder: the newest of its own measurement and of `posttrain regress`."""
  paths = [path for path in folder.glob(f"*/{verdicts.RESULTS}") if path.is_file()]
  if not paths:
    return None
  newest = max(paths, key=lambda path: path.stat().st_mtime)
  return newest, Comparison.from_json(files.read_json(newest))


def write(folder: Path, found: Comparison, over: Mapping[str, Any] | None = None) -> Path:
  """The page of a comparison.  over: stages, as `over_stages` has them."""
  html = page.render(
    BODY,
    macros={"gate": MACROS},
    title=f"{found.suite}: {found.before['model']} and {found.after['model']}",
    state="What was kept, gained and forgotten, item by item.",
    stages=over,
    **section(found),
  )
  path = folder / NAME
  files.write_text(path, html)
  return path
