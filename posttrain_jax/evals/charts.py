"""Curves as SVG that stands in a page: its text is text, its colours are the page's, light or dark."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import markupsafe
import numpy as np

from posttrain_jax.evals import figures

WIDTH, HEIGHT = 380, 210  # in the units of the drawing, which a page scales
TOP, RIGHT, BOTTOM = 10, 14, 34
LETTER = 6.2  # width of a digit of an axis
COLOURS = 10  # `c0` to `c9` of the page's style
DASHES = ("", "6 3", "2 3", "8 3 2 3")
POINTS = 240  # of a line that is drawn
DWARFED = 5.0  # an axis is logarmithmic where the highest value is so many times as high as nearly all others


@dataclasses.dataclass(frozen=True)
class Line:
  """One curve: `kind` is "line", "faint" (single values behind their mean) or "points" (evaluations, joined)."""

  name: str
  steps: Sequence[float]
  values: Sequence[float]
  colour: int = 0
  kind: str = "line"
  css: str = ""  # one more class, by which a page hides or shows it

  def finite(self) -> tuple[np.ndarray, np.ndarray]:
    steps, values = np.asarray(self.steps, np.float64), np.asarray(self.values, np.float64)
    kept = np.isfinite(values)
    return steps[kept], values[kept]

  @property
  def look(self) -> str:
    return f"{self.kind} c{self.colour % COLOURS} {self.css}".strip()

  @property
  def dash(self) -> str:
    """Lines of one colour differ by their dashes."""
    return DASHES[self.colour // COLOURS % len(DASHES)]


def thin(
  steps: np.ndarray, values: np.ndarray, most: int = POINTS
) -> tuple[np.ndarray, np.ndarray]:
  """At most `most` points, with the lowest and highest of each stretch among them: a spike stays.

  >>> steps, values = thin(np.arange(1000), np.arange(1000) == 501, most=20)
  >>> len(steps) <= 20, bool(values.max()), int(steps[0]), int(steps[-1])
  (True, True, 0, 999)
  """
  if len(values) <= most:
    return steps, values
  kept = {0, len(values) - 1}
  for part in np.array_split(np.arange(len(values)), most // 2 - 1):
    kept |= {int(part[values[part].argmin()]), int(part[values[part].argmax()])}
  order = sorted(kept)
  return steps[order], values[order]


@dataclasses.dataclass(frozen=True)
class Axis:
  """From `low` to `high`, which hold every value; `ticks` are within."""

  low: float
  high: float
  is_log: bool
  ticks: Sequence[float]

  def place(self, values: np.ndarray) -> np.ndarray:
    """0 at `low`, 1 at `high`."""
    scale = np.log10 if self.is_log else np.asarray
    low, high = scale(self.low), scale(self.high)
    return (scale(np.asarray(values, np.float64)) - low) / (high - low)


def axis(values: Sequence[float] | np.ndarray, *, integer: bool = False) -> Axis:
  """An axis that shows all finite values: from 0 where they come near it, logarithmic where one dwarfs the others.

  >>> axis([0.2, 1.9]).ticks
  [0.0, 0.5, 1.0, 1.5, 2.0]
  >>> axis([100.0] + [1.0] * 40).is_log
  True
  """
  known = np.asarray(values, np.float64)
  known = known[np.isfinite(known)]
  if not len(known):
    return Axis(0.0, 1.0, False, [0.0, 1.0])
  low, high = float(known.min()), float(known.max())
  if low > 0 and high > DWARFED * float(np.quantile(known, 0.95)):
    return _log_axis(low, high)
  if 0 <= low < 0.5 * high:
    low = 0.0
  if low == high:
    low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
  ticks = _ticks(low, high, integer)
  return Axis(min(low, _below(ticks, low)), max(high, _above(ticks, high)), False, ticks.tolist())


def _below(ticks: np.ndarray, low: float) -> float:
  return float(max((t for t in ticks if t <= low), default=low))


def _above(ticks: np.ndarray, high: float) -> float:
  return float(min((t for t in ticks if t >= high), default=high))


def _log_axis(low: float, high: float) -> Axis:
  first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
  among = (1.0, 2.0, 5.0) if last - first <= 3 else (1.0,)
  ticks = [digit * 10.0**i for i in range(first, last + 1) for digit in among]
  start = max(t for t in ticks if t <= low * (1 + 1e-9))
  end = min((t for t in ticks if t >= high * (1 - 1e-9)), default=10.0**last)
  return Axis(start, end, True, [t for t in ticks if start <= t <= end])


def number(value: float) -> str:
  """
  >>> [number(x) for x in (0.0, 2e-4, 0.25, 1500.0, 2.5e6)]
  ['0', '0.0002', '0.25', '1,500', '2.5e+06']
  """
  if value and not 1e-4 <= abs(value) < 1e6:
    return f"{value:.3g}"
  return f"{value:,.0f}" if abs(value) >= 1000 else f"{round(value, 10):g}"


def draw(lines: Sequence[Line], *, title: str, across: str = "step") -> markupsafe.Markup | None:
  """The lines over their steps; None where no value is finite."""
  known = [(line, *line.finite()) for line in lines]
  known = [(line, steps, values) for line, steps, values in known if len(values)]
  if not known:
    return None
  y = axis(np.concatenate([values for _, _, values in known]))
  x = _steps_axis(np.concatenate([steps for _, steps, _ in known]))
  left = 8 + LETTER * max(len(number(t)) for t in y.ticks)
  canvas = _Canvas(x, y, left)
  parts = [canvas.frame(across)]
  parts += [canvas.line(line, steps, values) for line, steps, values in known]
  what = f"{title} over {across}s: " + "; ".join(
    f"{line.name or title} from {number(values[0])} to {number(values[-1])}"
    for line, _, values in known[:8]
    if line.kind != "faint"
  )
  return _svg(parts, what)


def _ticks(low: float, high: float, integer: bool) -> np.ndarray:
  from matplotlib import ticker  # a third of a second, which no start of a run should wait for

  locator = ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=integer)
  return np.asarray(locator.tick_values(low, high))


def _steps_axis(steps: np.ndarray) -> Axis:
  """Over the steps from first to last, with no room beside them."""
  low, high = float(steps.min()), float(steps.max())
  if low == high:
    return Axis(low - 1, high + 1, False, [low])
  ticks = _ticks(low, high, True)
  return Axis(low, high, False, [t for t in ticks if low <= t <= high])


@dataclasses.dataclass(frozen=True)
class _Canvas:
  x: Axis
  y: Axis
  left: float

  def at(self, steps, values) -> tuple[np.ndarray, np.ndarray]:
    across = self.left + self.x.place(steps) * (WIDTH - RIGHT - self.left)
    return across, HEIGHT - BOTTOM - self.y.place(values) * (HEIGHT - BOTTOM - TOP)

  def frame(self, across: str) -> str:
    parts = []
    for tick in self.y.ticks:
      if self.y.low <= tick <= self.y.high:
        (_,), (place,) = self.at([self.x.low], [tick])
        css = "zero" if tick == 0 and self.y.low < 0 else "grid"
        parts.append(
          f'<path class="{css}" d="M{self.left:.1f} {place:.1f}H{WIDTH - RIGHT}"/>'
          f'<text x="{self.left - 5:.1f}" y="{place + 3.5:.1f}" text-anchor="end">{number(tick)}</text>'
        )
    for tick in self.x.ticks:
      (place,), _ = self.at([tick], [self.y.low])
      anchor = "end" if place > WIDTH - 2 * RIGHT else "middle"
      parts.append(
        f'<text x="{min(place, WIDTH - 2):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="{anchor}">'
        f"{number(tick)}</text>"
      )
    middle = (self.left + WIDTH - RIGHT) / 2
    name = markupsafe.escape(across)
    return (
      "".join(parts) + f'<text x="{middle:.1f}" y="{HEIGHT - 4}" text-anchor="middle">{name}</text>'
    )

  def line(self, line: Line, steps: np.ndarray, values: np.ndarray) -> str:
    xs, ys = self.at(*thin(steps, values))
    path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(xs, ys))
    dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
    drawn = f'<path class="{markupsafe.escape(line.look)}"{dash} d="{path}"/>'
    if line.kind == "points" or len(values) == 1:
      drawn += "".join(
        f'<circle class="{markupsafe.escape(line.look)}" cx="{a:.1f}" cy="{b:.1f}" r="2.6"/>'
        for a, b in zip(xs, ys)
      )
    return drawn


def bars(edges: Sequence[float], counts: Sequence[int], *, title: str, across: str):
  """A histogram: a bar between each two edges."""
  x, y = axis(edges), axis([0, *counts], integer=True)
  canvas = _Canvas(x, y, 8 + LETTER * max(len(number(t)) for t in y.ticks))
  parts = [canvas.frame(across)]
  for low, high, count in zip(edges[:-1], edges[1:], counts):
    (a, b), (top, _) = canvas.at([low, high], [count, 0])
    _, (bottom,) = canvas.at([low], [0])
    parts.append(
      f'<rect class="bar c0" x="{a:.1f}" y="{top:.1f}" width="{max(b - a - 1, 1):.1f}" '
      f'height="{bottom - top:.1f}"/>'
    )
  return _svg(
    parts, f"{title}: {int(sum(counts))} values from {number(edges[0])} to {number(edges[-1])}"
  )


def dots(xs: Sequence[float], ys: Sequence[float], *, title: str, across: str):
  """One dot for each pair of values."""
  x, y = axis(xs), axis(ys)
  canvas = _Canvas(x, y, 8 + LETTER * max(len(number(t)) for t in y.ticks))
  places = zip(*canvas.at(xs, ys))
  parts = [f'<circle class="dot c0" cx="{a:.1f}" cy="{b:.1f}" r="2.6"/>' for a, b in places]
  return _svg([canvas.frame(across), *parts], f"{title}: {len(xs)} pairs of values")


def _svg(parts: Sequence[str], what: str) -> markupsafe.Markup:
  return markupsafe.Markup(
    f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{markupsafe.escape(what)}">'
    f"{''.join(parts)}</svg>"
  )


def smoothed(
  name: str, steps: Sequence[int], values: Sequence[float], colour: int = 0
) -> list[Line]:
  """Single values, faint, and their mean over a twentieth of them; a short series as it is."""
  if len(values) < 20:
    return [Line(name, steps, values, colour)]
  return [
    Line("", steps, values, colour, "faint"),
    Line(name, steps, figures.smooth(values).tolist(), colour),
  ]
