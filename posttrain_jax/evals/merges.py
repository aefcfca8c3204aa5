"""What went into a merge and what came out: task vectors compared layer by layer, scores of parents and child."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from posttrain_jax.core import files
from posttrain_jax.evals import figures

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
  """`merge_report.{json,md,png}` in a folder; returns what the first holds.

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
  files.write_text(folder / f"{NAME}.md", _page(report))
  figures.save_png(figure(names, by_layer, scores), folder / f"{NAME}.png")
  return report


def _page(report: dict[str, Any]) -> str:
  scores = report["scores"]
  measures = list(dict.fromkeys(m for numbers in scores.values() for m in numbers))
  lines = ["# The merge", ""]
  if measures:
    lines += ["| model | " + " | ".join(measures) + " |", "|---" * (len(measures) + 1) + "|"]
    lines += [
      f"| {name} | " + " | ".join(_shown(numbers.get(m)) for m in measures) + " |"
      for name, numbers in scores.items()
    ]
    lines.append("")
  lines += ["| layer | sign conflicts | mean cosine of task vectors |", "|---|---|---|"]
  for layer, numbers in report["layers"].items():
    lines.append(
      f"| {layer} | {numbers['conflict_rate']:.3f} | {_mean_cosine(numbers['cosine']):+.3f} |"
    )
  return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
  return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _mean_cosine(cosine: Any) -> float:
  """Over the pairs of different models."""
  cosine = np.asarray(cosine)
  pairs = cosine[np.triu_indices(len(cosine), 1)]
  return float(pairs.mean()) if len(pairs) else 1.0


def figure(
  names: Sequence[str],
  by_layer: Mapping[str, Overlap],
  scores: Mapping[str, Mapping[str, Any]],
) -> Figure:
  measures = list(dict.fromkeys(m for numbers in scores.values() for m in numbers))
  with figures.style():
    drawing = Figure(figsize=(4 + 3.2 * max(len(measures), 1), 3), layout="constrained")
    axes = drawing.subplots(1, 1 + len(measures), squeeze=False)[0]
    layers = list(by_layer)
    axes[0].plot([by_layer[n].conflict_rate() for n in layers], label="sign conflicts")
    axes[0].plot(
      [_mean_cosine(by_layer[n].cosine()) for n in layers], label="cosine of task vectors"
    )
    step = max(1, len(layers) // 8)
    axes[0].set_xticks(range(0, len(layers), step), layers[::step], rotation=45, ha="right")
    axes[0].set(title=f"{len(names)} task vectors, layer by layer")
    axes[0].legend()
    for axis, measure in zip(axes[1:], measures):
      bars = {name: numbers[measure] for name, numbers in scores.items() if measure in numbers}
      axis.barh(list(bars), list(bars.values()), color=figures.BLUE, height=0.6)
      axis.invert_yaxis()
      axis.set(title=measure)
  return drawing
