"""Figures hold every value inside their axes, and say in text what they draw."""

import re
import xml.etree.ElementTree

import numpy as np
import pytest

from posttrain_jax.evals import charts
from posttrain_jax.evals.charts import Line

NAN, INF = float("nan"), float("inf")


def drawn(*lines, **options):
  svg = charts.draw(lines, title="Loss", **options)
  return xml.etree.ElementTree.fromstring(svg)


def path(svg, css):
  """[(x, y), ...] of the line with this class."""
  (one,) = [p for p in svg.iter("path") if p.get("class").split()[0] == css]
  return [tuple(map(float, pair.split())) for pair in one.get("d").removeprefix("M").split("L")]


@pytest.mark.parametrize(
  ("values", "low", "high", "is_log"),
  [
    ([0.4, 1.9], 0, 2, False),
    ([0.85, 0.9], 0.84, 0.9, False),
    ([-3.0, 5.0], -4, 6, False),
    ([11.0, *[1.0] * 40], 1, 20, True),
    ([0.5e-9, 2e-9], 0, 2e-9, False),
    ([0.7, 0.7], 0.6, 0.8, False),
    ([0.0], -0.1, 0.1, False),
    ([NAN, 2.0, INF], 1.8, 2.2, False),
    ([NAN], 0, 1, False),
  ],
)
def test_an_axis_holds_every_finite_value_and_ends_at_ticks(values, low, high, is_log):
  axis = charts.axis(values)
  assert (axis.low, axis.high) == pytest.approx((low, high))
  assert axis.is_log is is_log
  assert (min(axis.ticks), max(axis.ticks)) == pytest.approx((low, high))


def test_a_spike_is_inside_the_figure_and_does_not_flatten_the_rest():
  values = np.ones(400)
  values[200:], values[123] = 0.5, 90.0
  line = path(drawn(Line("training", range(400), values)), "line")
  heights = [y for _, y in line]
  assert min(heights) >= charts.TOP - 0.1
  assert max(heights) <= charts.HEIGHT - charts.BOTTOM + 0.1
  # 1 and 0.5 are a factor of two on an axis from 0.5 to 100
  plain = charts.HEIGHT - charts.BOTTOM - charts.TOP
  assert heights[-1] - heights[0] == pytest.approx(plain * np.log10(2) / np.log10(200), abs=0.2)


def test_places_are_those_of_the_values():
  line = path(drawn(Line("a", [0, 5, 10], [0.0, 1.0, 2.0])), "line")
  xs, ys = zip(*line)
  assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11)
  assert xs[2] == charts.WIDTH - charts.RIGHT
  assert ys == (charts.HEIGHT - charts.BOTTOM, pytest.approx(93, abs=0.1), charts.TOP)


def test_what_is_not_finite_is_left_out_and_nothing_gives_no_figure():
  svg = drawn(Line("a", [1, 2, 3, 4], [1.0, NAN, INF, 2.0]))
  assert len(path(svg, "line")) == 2
  assert "nan" not in xml.etree.ElementTree.tostring(svg, "unicode").lower()
  assert charts.draw([Line("a", [1], [NAN])], title="Loss") is None
  assert charts.draw([], title="Loss") is None


def test_a_single_value_is_a_dot():
  svg = drawn(Line("a", [1], [0.3]))
  assert len(list(svg.iter("circle"))) == 1


def test_many_points_are_thinned_and_the_extremes_stay():
  draw = np.random.default_rng(0)
  values = draw.normal(size=5000)
  values[3210], values[17] = 40, -40
  steps, kept = charts.thin(np.arange(5000), values)
  assert len(kept) <= charts.POINTS
  assert {40.0, -40.0} <= {*kept}
  assert (np.diff(steps) > 0).all()
  assert (steps[0], steps[-1]) == (0, 4999)


def test_figures_are_told_to_those_who_do_not_see_them():
  svg = drawn(Line("training", [1, 200], [2.25, 0.5]), Line("", [1, 2], [9, 9], kind="faint"))
  assert svg.get("aria-label") == "Loss over steps: training from 2.25 to 0.5"
  assert svg.get("role") == "img"


def test_names_are_text():
  evil = "\"><script>alert('x')</script>"
  svg = charts.draw([Line(evil, [1, 2], [1.0, 2.0])], title=evil, across=evil)
  assert "<script" not in svg
  assert evil in xml.etree.ElementTree.fromstring(svg).get("aria-label")


def test_lines_of_one_colour_have_other_dashes():
  looks = {(Line("", [], [], i).look, Line("", [], [], i).dash) for i in range(40)}
  assert len(looks) == 40


def test_bars_are_as_high_as_their_counts():
  svg = xml.etree.ElementTree.fromstring(
    charts.bars([0.0, 1.0, 2.0], [10, 5], title="Margins", across="margin")
  )
  heights = [float(bar.get("height")) for bar in svg.iter("rect")]
  assert heights[0] == pytest.approx(2 * heights[1], abs=0.11)


def test_ticks_are_written_without_an_error_of_floats():
  svg = drawn(Line("a", [1, 2], [0.1, 0.3]))
  numbers = [t.text for t in svg.iter("text") if re.fullmatch(r"[\d.]+", t.text)]
  assert max(map(len, numbers)) <= 4
