"""The page of a chain: its stages in their order, what each came to, and what it changed of the one before."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from posttrain_jax.core import files
from posttrain_jax.evals import compare, page, suites_page
from posttrain_jax.runs import record

STATE, PAGE = "chain.json", "report.html"
# scores of a stage, in the order in which they are shown: of answers first
SHOWN = ("accuracy/before", "accuracy/after", "score/", "pass@1", "reward", "eval_loss", "loss")
RIGHT = "accuracy/after"

BODY = """
<p class="state">{{ state }}</p>
{% if verdict %}<p class="verdict">{{ verdict }}</p>{% endif %}
<div class="scroll"><table class="settings">
<tr><th>stage</th><th>what it did</th><th class="number">minutes</th>\
{% for name in columns %}<th class="number">{{ name }}</th>{% endfor %}\
<th class="number">change of right answers</th></tr>
{% for row in rows %}
<tr><td class="name">{% if row.address %}<a href="{{ row.address }}">{{ row.name }}</a>\
{% else %}{{ row.name }}{% endif %}<br><span class="note">{{ row.status }}</span></td>\
<td><code>{{ row.line }}</code></td><td class="number">{{ row.minutes }}</td>\
{% for cell in row.cells %}<td class="number">{{ cell }}</td>{% endfor %}\
<td class="number">{{ row.change }}</td></tr>
{% endfor %}
</table></div>
<p class="note">A stage that trained has a report of its own behind its name. accuracy is of the questions of eval.task,
before and after the stage; the change is from the last stage that answered them of those that it was made of: below 0
it forgot more than it learned.</p>
{% for row in rows if row.said %}
<h3>{{ row.name }}</h3>
<pre>{{ row.said }}</pre>
{% endfor %}
"""


def read(folder: Path) -> list[dict[str, Any]]:
  """The stages that a chain's folder knows, in their order; [] where there are none yet."""
  path = folder / STATE
  return files.read_json(path)["stages"] if path.exists() else []


def scores(folder: Path, stage: Mapping[str, Any]) -> dict[str, float]:
  """What a stage came to, by the names of metrics; {} of one that trained nothing, or has not yet."""
  home = folder / stage["name"]
  if stage["verb"] != "train" or not (home / record.CONFIG).exists():
    return {}
  known = compare.finals(record.read(home))
  shown = {name: known[name] for prefix in SHOWN for name in known if _is(name, prefix)}
  return shown


def _is(name: str, prefix: str) -> bool:
  return name.startswith(prefix) if prefix.endswith("/") else name == prefix


def write(folder: Path) -> Path:
  """The page of the chain in a folder, as far as it has come."""
  stages = read(folder)
  known = [scores(folder, stage) for stage in stages]
  columns = list(dict.fromkeys(name for one in known for name in one))
  changes = _changes(folder, stages, known)
  rows = [
    {
      "name": stage["name"],
      "status": _status(folder, stage),
      "line": _line(stage),
      "address": _address(folder, stage),
      "minutes": f"{stage['seconds'] / 60:.1f}" if "seconds" in stage else "",
      "cells": [f"{one[name]:.4g}" if name in one else "" for name in columns],
      "change": change,
      "said": "" if stage["verb"] == "train" else "\n".join(stage.get("said", ())),
    }
    for stage, one, change in zip(stages, known, changes)
  ]
  finished = sum(row["status"] == "finished" for row in rows)
  html = page.render(
    BODY + suites_page.BODY,
    title=f"Chain of {len(stages)} stages",
    state=f"{finished} of {len(stages)} stages are finished.",
    verdict=_verdict(stages, known),
    columns=columns,
    rows=rows,
    suites=_suites(folder, stages),
  )
  out = folder / PAGE
  files.write_text(out, html)
  return out


def _suites(folder: Path, stages: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
  """What stages with eval.suite kept and forgot, each of what it began with."""
  names = [stage["name"] for stage in stages if (folder / stage["name"] / record.CONFIG).exists()]
  return suites_page.section([record.read(folder / name) for name in names], names)


def _changes(
  folder: Path, stages: Sequence[Mapping[str, Any]], known: Sequence[Mapping[str, float]]
) -> list[str]:
  """Of each stage that answered questions, how many more are right than before it.

  Before it are its own answers, else those after the last stage that answered of all that it was made of: two stages
  made of the same one are both compared with that.
  """
  changes, made_of = [], {}
  for place, (stage, one) in enumerate(zip(stages, known, strict=True)):
    named = [other["name"] for other in stages[:place] if _names(folder, stage, other)]
    made_of[stage["name"]] = {*named}.union(*(made_of[name] for name in named))
    before = one.get("accuracy/before")
    for other, its in zip(stages[:place], known) if before is None else ():
      before = its.get(RIGHT, before) if other["name"] in made_of[stage["name"]] else before
    right = one.get(RIGHT)
    changes.append("" if right is None or before is None else f"{right - before:+.3f}")
  return changes


def _names(folder: Path, stage: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
  """Whether a stage's command reads what another made."""
  path = re.compile(rf"{re.escape(str(folder / other['name']))}(?![\w-])")
  return any(map(path.search, stage["line"]))


def _verdict(stages: Sequence[Mapping[str, Any]], known: Sequence[Mapping[str, float]]) -> str:
  """From the first answers to the last, where stages were asked."""
  asked = [
    (stage["name"], one[RIGHT]) for stage, one in zip(stages, known, strict=True) if RIGHT in one
  ]
  before = next((one["accuracy/before"] for one in known if "accuracy/before" in one), None)
  if not asked:
    return ""
  told = ", ".join(f"{value:.3f} after {name}" for name, value in asked)
  return (
    f"Right answers: {told}."
    if before is None
    else f"Right answers: {before:.3f} at first, {told}."
  )


def _status(folder: Path, stage: Mapping[str, Any]) -> str:
  done = (folder / stage["name"] / record.DONE).exists()
  if done or (stage["verb"] != "train" and stage.get("finished")):
    return "finished"
  return "begun" if stage.get("began") else "not begun"


def _line(stage: Mapping[str, Any]) -> str:
  """The command as it was meant: without folders that the chain gave it."""
  return " ".join(part for part in stage["line"] if not part.startswith(("--workdir=", "--out=")))


def _address(folder: Path, stage: Mapping[str, Any]) -> str:
  path = folder / stage["name"] / "report.html"
  return quote(os.path.relpath(path, folder)) if path.exists() else ""
