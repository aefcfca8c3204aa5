"""What went into a merge and what came out: task vectors compared layer by layer, scores of parents and child."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.core import files
from posttrain_jax.evals import charts, page, panels

NAME = "merge_report"


@dataclasses.dataclass
class Overlap:
  """Sums over the entries of a layer's tensors, of the task vectors delta_i = x_i - base."""

  gram: np.ndarray  # [models, models]: sum of delta_i delta_j
  conflicts: float = 0.0  # entries that one model raises and another lowers
  shared: float = 0.0  # entries that at least two models change

  def cosine(self) -> np.ndarray:
    """[models, models]; 0 where a task vector is zero."""
    norm = np.sqrt(np.diag(self.gram))
    scale = np.outer(norm, norm)
    return np.divide(self.gram, scale, out=np.zeros_like(self.gram), where=scale > 0)

  def conflict_rate(self) -> float:
    """The share of entries changed by at least two models in which their signs differ."""
    return self.conflicts / self.shared if self.shared else 0.0


def overlaps(
  tensors: Iterable[tuple[str, np.ndarray, Sequence[np.ndarray]]], models: int
) -> dict[str, Overlap]:
  """{layer: Overlap}, of (layer, base's tensor, models' tensors); layers in the order of their first tensor."""
  by_layer: dict[str, Overlap] = {}
  for layer, base, others in tensors:
    gram, conflicts, shared = jax.device_get(_sums(base, list(others)))
    overlap = by_layer.setdefault(layer, Overlap(np.zeros((models, models))))
    overlap.gram += gram
    overlap.conflicts += float(conflicts)
    overlap.shared += float(shared)
  return by_layer


@jax.jit
def _sums(base, others):
  deltas = [(x.astype(jnp.float32) - base.astype(jnp.float32)).reshape(-1) for x in others]
  gram = jnp.stack([jnp.stack([jnp.vdot(a, b) for b in deltas]) for a in deltas])
  up, down = sum(d > 0 for d in deltas), sum(d < 0 for d in deltas)
  return gram, jnp.sum((up > 0) & (down > 0)), jnp.sum(up + down > 1)


def write(
  folder: Path,
  names: Sequence[str],
  by_layer: Mapping[str, Overlap],
  scores: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
  """`merge_report.{json,md,html}` in a folder; returns what the first holds.

  Args:
    names: of the models whose task vectors were compared.
    scores: {model or merge: {measure: value}}.
  """
  report = {
    "models": list(names),
    "layers": {
      layer: {"conflict_rate": overlap.conflict_rate(), "cosine": overlap.cosine().tolist()}
      for layer, overlap in by_layer.items()
    },
    "scores": {name: dict(numbers) for name, numbers in scores.items()},
  }
  files.write_json(folder / f"{NAME}.json", report)
  files.write_text(folder / f"{NAME}.md", _markdown(report))
  files.write_text(folder / f"{NAME}.html", _page(folder, report))
  return report


def _markdown(report: dict[str, Any]) -> str:
  measures, rows = _scores(report)
  lines = ["# The merge", ""]
  if measures:
    lines += ["| model | " + " | ".join(measures) + " |", "|---" * (len(measures) + 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines.append("")
  lines += ["| layer | sign conflicts | mean cosine of task vectors |", "|---|---|---|"]
  lines += ["| " + " | ".join(row) + " |" for row in _layers(report)]
  return "\n".join(lines) + "\n"


def _scores(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
  """(measures, a row a model)."""
  scores = report["scores"]
  measures = list(dict.fromkeys(m for numbers in scores.values() for m in numbers))
  rows = [[name, *(_shown(numbers.get(m)) for m in measures)] for name, numbers in scores.items()]
  return measures, rows


def _layers(report: dict[str, Any]) -> list[list[str]]:
  return [
    [layer, f"{numbers['conflict_rate']:.3f}", f"{_mean_cosine(numbers['cosine']):+.3f}"]
    for layer, numbers in report["layers"].items()
  ]


BODY = """
<p class="state">{{ models }}</p>
{% if measures %}
<h2>Scores</h2>
<div class="scroll"><table class="settings">
<tr><th>model</th>{% for name in measures %}<th class="number">{{ name }}</th>{% endfor %}</tr>
{% for row in scores %}<tr>{% for cell in row %}\
<td class="{{ 'name' if loop.first else 'number' }}">{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</table></div>
<p class="note">Of losses the lower value is better, of shares of right answers the higher one.</p>
{% endif %}
<h2>Task vectors, layer by layer</h2>
<div class="panels">{% for p in panels %}{{ page.panel(p) }}{% endfor %}</div>
<p><b>How to read them.</b> A task vector is what a model's training added to the base. A cosine near 0 means that the
models changed different things, which add up well; near 1 they learned the same, of which averaging is enough. Many
sign conflicts mean that they pull entries in opposite directions: take ties or dare in place of a plain sum, or lower
the weights of the layers where conflicts are highest.</p>
<div class="scroll"><table>
<tr><th>layer</th><th class="number">sign conflicts</th><th class="number">mean cosine</th></tr>
{% for layer, conflicts, cosine in layers %}
<tr><td>{{ layer }}</td><td class="number">{{ conflicts }}</td><td class="number">{{ cosine }}</td></tr>
{% endfor %}
</table></div>
"""


def _page(folder: Path, report: dict[str, Any]) -> str:
  measures, scores = _scores(report)
  return page.render(
    BODY,
    title=f"{folder.absolute().name}: the merge",
    models=f"{len(report['models'])} task vectors: {', '.join(report['models'])}",
    measures=measures,
    scores=scores,
    panels=_panels(report),
    layers=_layers(report),
  )


def _panels(report: dict[str, Any]) -> list[panels.Panel]:
  numbers = list(report["layers"].values())
  values = {
    "Sign conflicts": (
      [some["conflict_rate"] for some in numbers],
      "Share of the entries changed by two models or more in which their signs differ.",
    ),
    "Cosine of task vectors": (
      [_mean_cosine(some["cosine"]) for some in numbers],
      "Mean over the pairs of models; 1 is the same direction.",
    ),
  }
  return [
    panels.Panel(title, svg, note=note)
    for title, (some, note) in values.items()
    if (
      svg := charts.draw([charts.Line(title, range(len(some)), some)], title=title, across="layer")
    )
  ]


def _shown(value: Any) -> str:
  return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _mean_cosine(cosine: Any) -> float:
  """Over the pairs of different models."""
  cosine = np.asarray(cosine)
  pairs = cosine[np.triu_indices(len(cosine), 1)]
  return float(pairs.mean()) if len(pairs) else 1.0
