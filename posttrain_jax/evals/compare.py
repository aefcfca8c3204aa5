"""Several runs on one page: curves on each other, the settings in which they differ, answers side by side."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from posttrain_jax import settings
from posttrain_jax.core import files
from posttrain_jax.data import questions
from posttrain_jax.evals import charts, figures, meanings, online, page, panels, report, suites_page
from posttrain_jax.evals.charts import Line
from posttrain_jax.evals.meanings import ANSWERS, EVAL, NEITHER, Named
from posttrain_jax.runs import record
from posttrain_jax.runs.record import Run

QUESTIONS = 6  # shown with every run's answer
LONGEST = 300  # characters of an answer, of which there may be twenty in a row
SETTING = 60  # characters of a field's value
POINTS = 160  # of a line
ASIDE = ("Optimisation", "Speed", "Lengths of answers", "Other")  # groups that are folded
MISSING = "–"

BODY = """
<p class="state">{{ state }}</p>
<h2>Runs</h2>
<p class="note">A box shows or hides a run in every figure; pointing at a run's line in this list dims the others.</p>
<ul class="runs">
{% for run in runs %}
<li class="key{{ loop.index0 }}"><label><input type="checkbox" id="run{{ loop.index0 }}" checked>
<svg class="swatch" viewBox="0 0 30 8" aria-hidden="true"><path class="line c{{ run.colour }}" \
{% if run.dash %}stroke-dasharray="{{ run.dash }}" {% endif %}d="M0 4H30"/></svg>
{{ run.number }}</label> <a href="{{ run.address }}">{{ run.name }}</a> <span class="note">{{ run.state }}</span></li>
{% endfor %}
</ul>
{% if values %}
<h2>What they came to</h2>
{% for sentence in notes %}<p>{{ sentence }}</p>{% endfor %}
<div class="scroll"><table class="settings">
<tr><th>run</th>{% for column in values.columns %}<th class="number">{{ column.label }}<br>\
<span class="note">{{ column.better }}</span></th>{% endfor %}</tr>
{% for row in values.rows %}
<tr class="key{{ loop.index0 }}"><td class="name">{{ row.name }}</td>{% for cell in row.cells %}\
<td class="number{{ ' best' if cell.best }}">{{ cell.text }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
<p class="note">Last values, held-out ones of the step that was exported; \
* marks the best of a column where one way is better and the values compare.</p>
{% endif %}
{{ SUITES }}<h2>Settings that differ</h2>
{% if table.rows %}
<div class="scroll"><table class="settings">
<tr>{% for head in table.heads %}<th>{{ head }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}\
<td{% if loop.first %} class="name"{% endif %}>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</table></div>
{% else %}<p>None: the runs have one config.</p>{% endif %}
{% for section in sections %}
{% if section.is_aside %}<details><summary>{{ section.title }}</summary>
{% else %}<h2>{{ section.title }}</h2>{% endif %}
<div class="panels">{% for p in section.panels %}{{ page.panel(p) }}{% endfor %}</div>
{% if section.is_aside %}</details>{% endif %}
{% endfor %}
{% if examples %}
<h2>Answers side by side</h2>
<p class="note">Questions on which the runs differ come first.</p>
{% for one in examples %}{{ page.pair(one) }}{% endfor %}
{% endif %}
"""


@dataclasses.dataclass(frozen=True)
class Section:
  title: str
  panels: Sequence[panels.Panel]
  is_aside: bool


def read(folders: Sequence[str | Path]) -> list[Run]:
  """The runs in these folders, each once; of a folder that holds runs (a sweep's), those.

  Raises:
    FileNotFoundError: a folder holds no run.
  """
  paths: dict[Path, None] = {}
  for folder in map(Path, folders):
    is_run = (folder / record.CONFIG).exists() or (folder / record.METRICS).exists()
    inside = sorted((path.parent for path in folder.glob(f"*/{record.CONFIG}")), key=_natural)
    for path in [folder] if is_run or not inside else inside:
      paths.setdefault(path.resolve())
  return [record.read(path) for path in paths]


def write(runs: Sequence[Run], out: str | Path) -> Path:
  """The page of several runs, which links to their reports."""
  out = Path(out)
  if out.suffix not in (".html", ".htm"):
    raise ValueError(f"--out={out}: the page is HTML; write --out={out.with_suffix('.html')}")
  names = _names(runs)
  html = page.render(
    BODY.replace("{{ SUITES }}", suites_page.BODY),
    title=f"{len(runs)} runs compared",
    more_style=_style(len(runs)),
    state=f"{sum(run.done is not None for run in runs)} of {len(runs)} are finished.",
    runs=[_entry(i, run, names[i], out) for i, run in enumerate(runs)],
    values=_values(runs, names),
    notes=_notes(runs),
    table=differing(runs, names),
    suites=suites_page.section(runs, names),
    sections=_sections(runs, names),
    examples=_examples(runs, names),
  )
  files.write_text(out, html)
  return out


def _names(runs: Sequence[Run]) -> list[str]:
  """The folders' names without the parts that all share (a sweep's points do); with parents' where two are equal."""
  parts = [run.folder.name.split("__") for run in runs]
  shared = set.intersection(*map(set, parts))
  names = [", ".join(part for part in some if part not in shared) for some in parts]
  if all(names) and len(set(names)) == len(names):
    return names
  names = [run.folder.name for run in runs]
  if len(set(names)) == len(names):
    return names
  return [f"{run.folder.parent.name}/{run.folder.name}" for run in runs]


def _natural(path: Path) -> list[tuple[int, float, str]]:
  """Names in the order of the numbers in them: r=4 before r=16."""
  parts = re.findall(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?|[^\d]+", path.name)
  return [(0, float(p), "") if p[0].isdigit() else (1, 0.0, p) for p in parts]


def _entry(i: int, run: Run, name: str, out: Path) -> dict[str, Any]:
  line = Line(name, [], [], i)
  to = run.folder / report.NAME
  # without a report, what there is of the run
  target = to if to.exists() else run.folder
  finished = f"{run.steps:,} steps" + ("" if run.done is not None else ", not finished")
  return dict(
    number=i + 1,
    name=name,
    colour=i % charts.COLOURS,
    dash=line.dash,
    state=finished,
    address=quote(Path(os.path.relpath(target, out.absolute().parent)).as_posix()),
  )


def _style(count: int) -> str:
  """Boxes that hide a run's lines, and lines that stand out while their run is pointed at: without a script."""
  rules = [
    ".runs { list-style: none; padding: 0; columns: 24rem; } .runs li { break-inside: avoid; }",
    "svg.swatch { width: 2rem; display: inline-block; vertical-align: middle; }",
  ]
  for i in range(count):
    rules.append(f"body:has(#run{i}:not(:checked)) figure .run{i} {{ display: none; }}")
    rules.append(
      f"body:has(.key{i}:hover) figure path:not(.run{i}, .grid, .zero) {{ opacity: .12; }}"
    )
    rules.append(f"body:has(.key{i}:hover) figure .run{i} {{ stroke-width: 3; }}")
  return "\n".join(rules)


# Settings


def differing(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Any]:
  """The fields in which configs differ: a row for each run, or for each field where there are more of those."""
  configs = [settings.flat(dict(run.record.get("config") or {})) for run in runs]
  fields = list(dict.fromkeys(field for config in configs for field in config))
  fields = [f for f in fields if len({repr(c.get(f, MISSING)) for c in configs}) > 1]
  cell = lambda config, field: _cut(str(config.get(field, MISSING)), SETTING)
  if len(fields) > max(6, len(runs)):
    rows = [[field, *(cell(config, field) for config in configs)] for field in fields]
    return dict(heads=["field", *names], rows=rows)
  rows = [[name, *(cell(config, f) for f in fields)] for name, config in zip(names, configs)]
  return dict(heads=["run", *fields], rows=rows if fields else [])


# Values


def kind_of(configs: Sequence[Mapping[str, Any]]) -> str | None:
  """The kind of all configs' runs; None where they differ or name none."""
  kinds = {meanings.kind(config) for config in configs}
  return kinds.pop() if len(kinds) == 1 else None


def finals(run: Run) -> dict[str, float]:
  """What `Run.given` says, of online runs over their last fifth, and the accuracies of the task's evaluations."""
  results = {f"{ANSWERS}before": run.before, f"{ANSWERS}after": run.after}
  known = {
    name: result.accuracy
    for name, result in results.items()
    if result is not None and result.is_share
  }
  return {**known, **run.given(), **online.finals(run)}


def _configs(runs: Sequence[Run]) -> list[Mapping[str, Any]]:
  return [run.record.get("config") or {} for run in runs]


def _values(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Any] | None:
  kind, final = kind_of(_configs(runs)), [finals(run) for run in runs]
  columns = _columns(kind, final)
  if not columns:
    return None
  configs, ranked = _configs(runs), {}
  for name in columns:
    compares = len(runs) > 1 and not meanings.obstacles(name, configs)
    ranked[name] = (
      meanings.best(kind, name, [some.get(name) for some in final]) if compares else None
    )
  cell = lambda i, name: dict(
    text=panels.number(final[i][name]) if name in final[i] else MISSING, best=ranked[name] == i
  )
  return dict(
    columns=[dict(label=_label(kind, name), better=_way(kind, name, configs)) for name in columns],
    rows=[
      dict(name=name, cells=[cell(i, column) for column in columns]) for i, name in enumerate(names)
    ],
  )


def _way(kind: str | None, name: str, configs: Sequence[Mapping[str, Any]]) -> str:
  """Which way is better, of values that compare."""
  way = meanings.better(kind, name)
  if way and len(configs) > 1 and meanings.obstacles(name, configs):
    return "does not compare"
  return f"{way} is better" if way else ""


def _label(kind: str | None, name: str) -> str:
  if name.startswith(ANSWERS):
    return f"answers right {name.partition('/')[2]}"
  ((_, (named,)),) = meanings.sorted_into(kind, [name])
  return named.alone + (", held out" if name.startswith(EVAL) else "")


def _columns(kind: str | None, final: Sequence[Mapping[str, float]]) -> list[str]:
  """Metrics of which one way is better, and the KL; the held-out value where there is one."""
  every = list(dict.fromkeys(name for some in final for name in some))
  shown = [name for name in every if name.startswith(ANSWERS)]
  for group, named in meanings.sorted_into(kind, [n for n in every if n not in shown]):
    if group.title not in ASIDE and group not in (meanings.CHANNELS, meanings.PARTS):
      told = [one for one in named if one.metric.better != NEITHER or one.name == "kl"]
      shown += [EVAL + one.name if EVAL + one.name in every else one.name for one in told]
  return shown


def _notes(runs: Sequence[Run]) -> list[str]:
  """What does not compare, and why."""
  configs, said = _configs(runs), {}
  is_online = kind_of(configs) == meanings.ONLINE
  instead = "pass@1, the reward and entropies" if is_online else "accuracies and the KL"
  for name, what in (("eval_loss", "losses"), ("rewards/margins", "margins and rewards")):
    has = any(n.endswith(name.removeprefix(EVAL)) for run in runs for n in run.names())
    fields = meanings.obstacles(name, configs) if has else []
    if fields:
      said[what] = fields
  return [
    f"The {what} of these runs do not compare: the runs differ in {', '.join(fields[:6])}"
    f"{' and more' if len(fields) > 6 else ''}, so their heights are not of one function. Read their shapes, and"
    f" compare {instead}."
    for what, fields in said.items()
  ]


# Curves


def _sections(runs: Sequence[Run], names: Sequence[str]) -> list[Section]:
  kind = kind_of(_configs(runs))
  every = dict.fromkeys(name for run in runs for name in run.names())
  result = []
  for group, named in meanings.sorted_into(kind, every):
    drawn = [p for one in named if one.metric.panel for p in _panels(runs, names, kind, one)]
    if drawn:
      result.append(Section(group.title, drawn, group.title in ASIDE))
  return sorted(result, key=lambda section: section.is_aside)


def _panels(
  runs: Sequence[Run], names: Sequence[str], kind: str | None, one: Named
) -> list[panels.Panel]:
  """Held-out values where there are some, else those of training, smoothed; of the loss both."""
  result = []
  held_out = any(len(run.series(EVAL + one.name)[0]) > 1 for run in runs)
  for name in (one.name, EVAL + one.name):
    if name == one.name and held_out and one.name != "loss":
      continue
    lines = [line for i, run in enumerate(runs) for line in _lines(i, run, names[i], name)]
    title = _label(kind, name)
    svg = charts.draw(lines, title=title)
    if svg is not None:
      result.append(
        panels.Panel(title[0].upper() + title[1:], svg, (), _way(kind, name, _configs(runs)))
      )
  return result


def _lines(i: int, run: Run, label: str, name: str) -> list[Line]:
  steps, values = run.series(name)
  if not steps:
    return []
  if not name.startswith(EVAL) and len(values) >= 20:
    values = figures.smooth(values).tolist()
  x, y = charts.thin(np.asarray(steps), np.asarray(values, np.float64), POINTS)
  return [Line(label, x.tolist(), y.tolist(), i, "line", f"run{i}")]


# Answers


def _examples(runs: Sequence[Run], names: Sequence[str]) -> list[dict[str, Any]]:
  """Questions that several runs answered, those first on which some are right and others wrong."""
  asked: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
  for name, run in zip(names, runs):
    for answer in run.after.answers if run.after is not None else ():
      asked.setdefault((answer["question"], answer["gold"]), {})[name] = answer
  shared = [by_run for by_run in asked.values() if len(by_run) > 1]
  disputed = lambda by_run: abs(np.mean([a["correct"] or 0 for a in by_run.values()]) - 0.5)
  return [_example(by_run) for by_run in sorted(shared, key=disputed)[:QUESTIONS]]


def _example(by_run: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  some = next(iter(by_run.values()))
  return dict(
    question=some["question"],
    channel="" if some["channel"] == questions.NO_CHANNEL else some["channel"],
    gold=MISSING if some["gold"] is None else some["gold"],
    answers=[
      dict(
        when=name, correct=a["correct"], reason=panels.reason(a), text=_cut(a["answer"], LONGEST)
      )
      for name, a in by_run.items()
    ],
  )


def _cut(text: str, longest: int) -> str:
  return text if len(text) <= longest else text[:longest] + " …"
