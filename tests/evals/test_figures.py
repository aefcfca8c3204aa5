"""The figure of a sweep has a line where there is one to draw."""

import pytest

from posttrain_jax.evals import figures


def lines(points, swept):
  """[(label, x, y), ...] of the drawn lines, and the axes."""
  (axes,) = figures.sweep(points, swept, "accuracy").axes
  return [(line.get_label(), [*line.get_xdata()], [*line.get_ydata()]) for line in axes.lines], axes


GRID = [
  {"adapter.r": r, "adapter.lora_alpha": 2.0 * r, "beta": beta, "accuracy": r * beta}
  for r in (4, 16, 64)
  for beta in (0.1, 0.3)
]


@pytest.mark.parametrize("order", [1, -1])
def test_a_rank_that_changes_alpha_is_one_axis(order):
  drawn, axes = lines(GRID, ["adapter.r", "adapter.lora_alpha", "beta"][::order])
  assert [line[0] for line in drawn] == ["beta = 0.1", "beta = 0.3"]
  assert {*axes.get_xlabel().split(", ")} == {"adapter.r", "adapter.lora_alpha"}
  across = [4, 16, 64] if order == 1 else [8.0, 32.0, 128.0]
  assert drawn[0][1:] == (across, pytest.approx([0.4, 1.6, 6.4]))
  first = axes.get_xticklabels()[0].get_text()
  assert first.split() == (["4", "8"] if order == 1 else ["8", "4"])


def test_fields_of_a_grid_do_not_follow_each_other():
  grid = [dict(r=r, lr=lr) for r in (4, 16) for lr in (1e-4, 1e-3)]
  assert figures.following(grid, ["r", "lr"]) == {}


def test_a_field_that_no_two_points_share_leads_nothing():
  drawn_at_random = [dict(lr=0.1, r=4), dict(lr=0.2, r=16), dict(lr=0.3, r=4)]
  assert figures.following(drawn_at_random, ["lr", "r"]) == {}


def test_three_that_go_together_have_one_leader():
  points = [dict(r=r, alpha=2 * r, lr=1 / r) for r in (4, 16)]
  assert figures.following(points, ["r", "alpha", "lr"]) == {"alpha": "r", "lr": "r"}


def test_values_that_are_not_numbers_are_dots():
  points = [dict(method=m, accuracy=0.5) for m in ("lora", "dora")]
  drawn, _ = lines(points, ["method"])
  assert drawn[0][1] == ["lora", "dora"]
