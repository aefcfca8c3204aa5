"""Figures of a sweep, a merge and of experiments as files, drawn without a display; pages draw with `charts`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # a third of a second, and most commands draw nothing, or at their end
  from matplotlib.figure import Figure

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


def style() -> contextlib.AbstractContextManager:
  import matplotlib as mpl

  return mpl.rc_context(STYLE)


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
    swept: the fields that differ between points; one that goes with another (alpha with the rank) stands beside it.
  """
  from matplotlib.figure import Figure

  followers = following(points, swept)
  free = [name for name in swept if name not in followers]
  across = _axis(points, free)
  others = [name for name in free if name != across]
  lines: dict[tuple, list] = {}
  for point in points:
    lines.setdefault(tuple(point.get(name) for name in others), []).append(point)
  x: list[Any] = [point.get(across) for point in points] if across else ["all"]
  numeric = across is not None and all(map(_is_number, x))
  named = lambda name: ", ".join([name, *(f for f, leader in followers.items() if leader == name)])
  with style():
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for key, some in _sorted(lines):
      some = sorted(some, key=lambda point: point[across]) if numeric else some
      at = [point[across] if numeric else _text(point.get(across, "all")) for point in some]
      label = ", ".join(f"{_label(name)} = {_text(value)}" for name, value in zip(others, key))
      axes.plot(at, [point[metric] for point in some], "o-" if numeric else "o", label=label)
    axes.set(xlabel=named(across) if across else "", ylabel=metric)
    if numeric and _spans_decades(x):
      axes.set_xscale("log")
    if numeric and len(set(x)) <= 10:
      axes.set_xticks(
        sorted(set(x)), [_ticked(points, across, followers, v) for v in sorted(set(x))]
      )
      axes.minorticks_off()
    if _spans_decades([point[metric] for point in points]):
      axes.set_yscale("log")
    if others:
      beside = dict(loc="center left", bbox_to_anchor=(1.0, 0.5)) if len(lines) > 6 else {}
      axes.legend(**beside)
  return figure


def following(points: Sequence[Mapping[str, Any]], swept: Sequence[str]) -> dict[str, str]:
  """{field: the one that it goes with}: fields that have one value for each value of another, as alpha = 2 rank has.

  >>> grid = [dict(r=r, alpha=2 * r, lr=lr) for r in (4, 16) for lr in (1e-4, 1e-3)]
  >>> following(grid, ["r", "alpha", "lr"])
  {'alpha': 'r'}
  """
  values = {name: [repr(point.get(name)) for point in points] for name in swept}
  count = lambda *names: len(set(zip(*(values[name] for name in names))))
  result: dict[str, str] = {}
  for i, name in enumerate(swept):
    for j, leader in enumerate(swept):
      follows = leader != name and leader not in result and count(leader, name) == count(leader)
      is_mutual = count(leader) == count(name)
      # of two that go with each other the first leads; a field that no two points share leads nothing
      if follows and (j < i if is_mutual else count(leader) < len(points)):
        result[name] = leader
        break
  return result


def _ticked(points, across, followers, value) -> str:
  """A value of the axis, with what goes with it beneath."""
  (point, *_) = [point for point in points if point.get(across) == value]
  beside = [point.get(name) for name, leader in followers.items() if leader == across]
  return "\n".join(map(_text, [value, *beside]))


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
