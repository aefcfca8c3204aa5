"""Figures of a run and of a sweep, drawn without a display."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from posttrain_jax.runs.record import Run

STYLE: dict[Any, Any] = {
  "font.family": "sans-serif",
  "font.size": 9,
  "axes.titlesize": 9,
  "axes.titlelocation": "left",
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.edgecolor": "#999999",
  "axes.grid": True,
  "grid.color": "#e6e6e6",
  "grid.linewidth": 0.6,
  "legend.frameon": False,
  "legend.fontsize": 8,
  "svg.hashsalt": "posttrain_jax",  # the same figure gives the same file
}
BLUE, ORANGE = "#1f5a96", "#d1661a"
SPECIAL = "loss/special"
SMALL = {
  "learning_rate": "learning rate",
  "grad_norm": "gradient norm",
  "mean_token_accuracy": "token accuracy",
  "tokens_per_second": "tokens per second",
}


def style() -> contextlib.AbstractContextManager:
  return mpl.rc_context(STYLE)


def data_uri(figure: Figure) -> str:
  """The figure as an SVG inside an address, for an `<img>` that needs no other file."""
  buffer = io.BytesIO()
  with style():
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
  return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def save_png(figure: Figure, path: str | Path) -> None:
  with style():
    figure.savefig(path, format="png", dpi=150, bbox_inches="tight")


def smooth(values: Sequence[float], share: float = 0.05) -> np.ndarray:
  """A centred mean over `share` of the values, narrower at the ends; what is not finite is left out of it.

  >>> smooth([0.0, 3.0, 0.0, 3.0], share=0.5).tolist()
  [1.5, 1.0, 2.0, 1.5]
  """
  array = np.asarray(values, np.float64)
  half = int(len(array) * share / 2 + 0.5)
  kept = np.isfinite(array)
  total = np.concatenate([[0.0], np.cumsum(np.where(kept, array, 0.0))])
  count = np.concatenate([[0], np.cumsum(kept)])
  place = np.arange(len(array))
  start, end = np.maximum(place - half, 0), np.minimum(place + half + 1, len(array))
  among = count[end] - count[start]
  return np.where(among > 0, (total[end] - total[start]) / np.maximum(among, 1), np.nan)


# A run


def loss(run: Run) -> Figure | None:
  """Training and evaluation loss over steps; None where neither was recorded."""
  train, held_out = run.series("loss"), run.series("eval_loss")
  if not train[0] and not held_out[0]:
    return None
  with style():
    figure = Figure(figsize=(7.2, 2.9))
    axes = figure.subplots()
    if train[0]:
      axes.plot(*train, color=BLUE, alpha=0.25, linewidth=0.8)
      axes.plot(train[0], smooth(train[1]), color=BLUE, linewidth=1.6, label="training, smoothed")
    if held_out[0]:
      axes.plot(*held_out, "o-", color=ORANGE, markersize=3.5, linewidth=1.2, label="evaluation")
    axes.set(xlabel="step", ylabel="nats per token", title="Loss")
    _limit(axes, [smooth(train[1]), held_out[1]])
    axes.legend()
  return figure


def channels(run: Run) -> Figure | None:
  """Loss by channel, and of special tokens: training, and evaluation where there are some of both."""
  panels = []
  for prefix, title in (("loss/", "Training loss by channel"), ("eval_loss/", "Evaluation loss")):
    names = [name for name in run.names() if name.startswith(prefix)]
    if names:
      panels.append((prefix, title, names))
  if not panels:
    return None
  colors = dict(
    zip(
      dict.fromkeys(name.partition("/")[2] for _, _, names in panels for name in names),
      itertools.cycle(mpl.color_sequences["tab10"]),
    )
  )
  with style():
    figure = Figure(figsize=(7.2 if len(panels) > 1 else 5.2, 2.9), layout="constrained")
    handles = {}
    for axes, (prefix, title, names) in zip(
      figure.subplots(1, len(panels), squeeze=False)[0], panels
    ):
      drawn = []
      for name in names:
        steps, values = run.series(name)
        values = smooth(values, 0.1) if prefix == "loss/" else np.asarray(values)
        short = name.removeprefix(prefix)
        line = dict(color=colors[short], linewidth=1.2, label=_label(short))
        line |= dict(linestyle="--", color="black") if name.endswith(SPECIAL) else {}
        handles[short] = axes.plot(steps, values, marker="" if len(steps) > 20 else ".", **line)[0]
        drawn.append(values)
      axes.set(xlabel="step", title=title)
      _limit(axes, drawn)
    figure.legend(handles=list(handles.values()), loc="outside right center")
  return figure


def course(run: Run) -> Figure | None:
  """Learning rate, gradient norm, token accuracy and speed, each small."""
  names = [name for name in SMALL if run.series(name)[0]]
  if not names:
    return None
  with style():
    figure = Figure(figsize=(7.2, 1.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
      axes.plot(*run.series(name), color=BLUE, linewidth=0.9)
      axes.set_title(SMALL[name], fontsize=8)
      axes.tick_params(labelsize=7)
      axes.locator_params(nbins=4)
  return figure


def _limit(axes, drawn: Sequence[ArrayLike]) -> None:
  """Room for what matters: a first step that is far above the rest does not flatten them."""
  values = np.concatenate([np.asarray(some, np.float64) for some in drawn])
  values = values[np.isfinite(values)]
  if len(values) > 20 and values.max() > 3 * np.quantile(values, 0.98) > 0:
    axes.set_ylim(0, 1.3 * np.quantile(values, 0.98))
  elif len(values) and values.min() >= 0:
    axes.set_ylim(bottom=0)


def _label(name: str) -> str:
  """Names come from data: matplotlib would read $ as mathematics and hide what starts with _."""
  return (name if len(name) <= 32 else name[:31] + "…").replace("$", r"\$").lstrip("_") or "–"


# A sweep


def sweep(points: Sequence[Mapping[str, Any]], swept: Sequence[str], metric: str) -> Figure:
  """The metric of each point over the swept fields: one on the axis, a line for each value of the others.

  On the axis is the numeric field with the most values (without any, the field with the most); an axis whose values
  span more than a factor of ten is logarithmic.

  Args:
    points: one dict a finished point: its swept fields and its metrics.
    swept: the fields that differ between points.
  """
  across = _axis(points, swept)
  others = [name for name in swept if name != across]
  lines: dict[tuple, list] = {}
  for point in points:
    lines.setdefault(tuple(point.get(name) for name in others), []).append(point)
  x: list[Any] = [point.get(across) for point in points] if across else ["all"]
  numeric = across is not None and all(map(_is_number, x))
  with style():
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for key, some in _sorted(lines):
      some = sorted(some, key=lambda point: point[across]) if numeric else some
      at = [point[across] if numeric else _text(point.get(across, "all")) for point in some]
      label = ", ".join(f"{name} = {_text(value)}" for name, value in zip(others, key))
      axes.plot(at, [point[metric] for point in some], "o-" if numeric else "o", label=label)
    axes.set(xlabel=across or "", ylabel=metric)
    if numeric and _spans_decades(x):
      axes.set_xscale("log")
    if numeric and len(set(x)) <= 10:
      axes.set_xticks(sorted(set(x)), [_text(value) for value in sorted(set(x))])
      axes.minorticks_off()
    if _spans_decades([point[metric] for point in points]):
      axes.set_yscale("log")
    if others:
      axes.legend()
  return figure


def _axis(points, swept) -> str | None:
  values = {name: [point.get(name) for point in points] for name in swept}
  rank = lambda name: (all(map(_is_number, values[name])), len(set(map(str, values[name]))))
  return max(swept, key=rank, default=None)


def _sorted(lines):
  """Lines in the order of their values, numbers as numbers."""
  order = lambda value: (0, value, "") if _is_number(value) else (1, 0, str(value))
  return sorted(lines.items(), key=lambda item: [order(value) for value in item[0]])


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _spans_decades(values: Sequence[float]) -> bool:
  finite = [value for value in values if math.isfinite(value)]
  return bool(finite) and min(finite) > 0 and max(finite) > 10 * min(finite)


def _text(value: Any) -> str:
  return _label(f"{value:g}" if isinstance(value, float) else str(value))
