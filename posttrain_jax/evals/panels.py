"""A run's metrics as a page shows them: in groups, each with its curves and a table that says what the values mean."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import markupsafe

from posttrain_jax.evals import charts, curve_advice, figures, meanings, online
from posttrain_jax.evals.charts import Line
from posttrain_jax.evals.meanings import EVAL, Named
from posttrain_jax.runs.record import Run

TOGETHER = 3  # metrics in a panel with training and held-out values both; more get a panel each

# What a loss alone is worth where the policy is still its reference.
AT_START = {"dpo": math.log(2), "dpo_norm": math.log(2), "aot": math.log(2), "hinge": 1.0}


@dataclasses.dataclass(frozen=True)
class Key:
  name: str
  colour: int


@dataclasses.dataclass(frozen=True)
class Panel:
  """A figure of a page."""

  title: str
  svg: markupsafe.Markup
  keys: Sequence[Key] = ()
  note: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
  """A metric's last values."""

  label: str
  name: str
  train: str
  held_out: str
  better: str
  meaning: str


@dataclasses.dataclass(frozen=True)
class Section:
  title: str
  reading: str
  panels: Sequence[Panel]
  rows: Sequence[Row]


def sections(run: Run) -> list[Section]:
  """The groups of metrics that the run has, but for scores of answers, which the report has beside the answers."""
  kind, final = meanings.kind(run.record.get("config") or {}), run.final()
  return [
    Section(group.title, _reading(run, group), _panels(run, named), _rows(run, named, final))
    for group, named in meanings.sorted_into(kind, [*run.names(), *final])
    if group is not meanings.SCORES
  ]


def _reading(run: Run, group: meanings.Group) -> str:
  if group is meanings.LOSS and run.field("objective.name") == "grouped":
    return curve_advice.of_policy_loss(run)
  return group.reading


def number(value: Any) -> str:
  if not isinstance(value, float):
    return str(value)
  return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.4g}"


def _rows(run: Run, named: Sequence[Named], final: Mapping[str, float]) -> list[Row]:
  """A meaning that several rows share stands at the last of them."""
  meant = [_loss_meaning(run) if one.name == "loss" else one.metric.meaning for one in named]
  cell = lambda name: number(final[name]) if name in final else ""
  return [
    Row(
      label=one.label,
      name=one.name,
      train=cell(one.name),
      held_out=cell(EVAL + one.name),
      better=_better(run, one),
      meaning="" if meaning == after else meaning,
    )
    for one, meaning, after in zip(named, meant, [*meant[1:], ""])
  ]


def _better(run: Run, one: Named) -> str:
  if one.name == "loss" and run.field("objective.name") == "grouped":
    return "neither"
  return one.metric.better or "neither"


def _loss_meaning(run: Run) -> str:
  match run.field("objective.name"):
    case "sft":
      return (
        "Nats per trained token: minus log of the right token's probability. 0.69 is a probability of one half, 0 is"
        " certainty."
      )
    case "distil":
      return (
        "Nats per trained token by which the student's probabilities of the next token are off the teacher's; 0 is a"
        " student that says what its teacher says."
      )
    case "preference" | "kto" | "reward" | "grouped" as kind:
      if curve_advice.is_zero_by_construction(run):
        return "Minus the mean advantage, about 0 by construction: its value says nothing, its gradient trains."
      of = {
        "preference": "pairs",
        "kto": "labelled answers",
        "reward": "rows",
        "grouped": "answers",
      }[kind]
      return f"Mean over the batch's {of} of {objective(run)}.{_at_start(run)}"
  return meanings.meaning(None, "loss").meaning


def _at_start(run: Run) -> str:
  losses, beta = run.field("objective.losses") or {}, run.field("objective.beta")
  if run.field("objective.name") != "preference" or len(losses) != 1:
    return ""
  ((name, weight),) = losses.items()
  start = (1 / (2 * beta)) ** 2 if name == "ipo" and beta else AT_START.get(name)
  return (
    ""
    if start is None
    else f" It starts at {weight * start:.3g}, where the policy is its reference."
  )


def objective(run: Run) -> str | None:
  """The loss by name, and the numbers that make it what it is."""
  section = run.field("objective") or {}
  name = section.get("name")
  match name:
    case "preference":
      losses = section.get("losses", {})
      terms = [loss if weight == 1 else f"{weight:g} {loss}" for loss, weight in losses.items()]
      parts = [" + ".join(terms) or "preference"]
    case "grouped":
      rows = "answers that the run writes" if online.is_one(run) else "scored groups"
      parts = [f"{online.method(run)} on {rows}", f"advantage {section.get('advantage')}"]
    case "distil":
      parts = [f"{section.get('loss')} to {Path(str(section.get('teacher'))).name}"]
    case _:
      parts = [str(name)] if name else []
  silent = () if name != "grouped" or online.compares(run) else ("reference",)
  return (
    ", ".join([*parts, *_numbers({k: v for k, v in section.items() if k not in silent})]) or None
  )


# What stands in a fact although it has the value that changes nothing is noise: {field: that value}.
SHOWN = {
  "beta": None,
  "label_smoothing": 0.0,
  "gamma_beta_ratio": 0.0,
  "divergence": "reverse_kl",
  "ld_alpha": 1.0,
  "weighting": False,
  "running_shift": False,
  "desirable_weight": 1.0,
  "undesirable_weight": 1.0,
  "kl_weight": 0.0,
  "sft_weight": 0.0,
  "sync_every": 0,
  "aggregation": None,
  "epsilon": None,
  "old": None,
  "reference": None,
}


def _numbers(section: Mapping[str, Any]) -> list[str]:
  return [
    f"{field} {section[field]}"
    for field, silent in SHOWN.items()
    if field in section and section[field] not in (None, silent)
  ]


def _panels(run: Run, named: Sequence[Named]) -> list[Panel]:
  by_title: dict[str, list[Named]] = {}
  for one in named:
    if one.metric.panel:
      by_title.setdefault(one.metric.panel, []).append(one)
  return [panel for title, some in by_title.items() for panel in _panel(run, title, some)]


def _panel(run: Run, title: str, some: Sequence[Named]) -> list[Panel]:
  drawn = [one for one in some if run.series(one.name)[0] or run.series(EVAL + one.name)[0]]
  if not drawn or (title != "Loss" and all(_is_constant(run, one) for one in drawn)):
    return []
  if len(drawn) == 1:
    one = drawn[0]
    return _alone(run, title if one.metric.label else f"{title}: {one.label}", one)
  sides = {"training": "", "held out": EVAL}
  held_out = any(run.series(EVAL + one.name)[0] for one in drawn)
  if held_out and len(drawn) > TOGETHER:
    return [
      panel
      for side, prefix in sides.items()
      for panel in _many(
        f"{title}, {side}", [(one, _side(run, one, prefix, i)) for i, one in enumerate(drawn)]
      )
    ]
  lines = [
    (one, [line for prefix in sides.values() for line in _side(run, one, prefix, i)])
    for i, one in enumerate(drawn)
  ]
  return _many(title, lines, note="Dots: held out." if held_out else "")


def _alone(run: Run, title: str, one: Named) -> list[Panel]:
  train, held_out = run.series(one.name), run.series(EVAL + one.name)
  lines, keys = [], []
  if train[0]:
    lines += charts.smoothed("training", *train)
    keys.append(Key("training" + (", smoothed" if len(train[0]) >= 20 else ""), 0))
  if held_out[0]:
    lines.append(Line("held out", *held_out, 1, "points"))
    keys.append(Key("held out", 1))
  svg = charts.draw(lines, title=title)
  return [] if svg is None else [Panel(title, svg, keys if held_out[0] else (), "")]


def _many(title: str, lines: Sequence[tuple[Named, list[Line]]], note: str = "") -> list[Panel]:
  svg = charts.draw([line for _, some in lines for line in some], title=title)
  keys = [Key(one.label, some[0].colour) for one, some in lines if some]
  return [] if svg is None else [Panel(title, svg, keys, note)]


def _side(run: Run, one: Named, prefix: str, colour: int) -> list[Line]:
  """The mean of training values, or the held-out ones as points."""
  steps, values = run.series(prefix + one.name)
  if not steps:
    return []
  if prefix:
    return [Line(one.label, steps, values, colour, "points")]
  means = figures.smooth(values, 0.1).tolist() if len(values) >= 20 else values
  return [Line(one.label, steps, means, colour)]


def _is_constant(run: Run, one: Named) -> bool:
  values = [run.series(prefix + one.name)[1] for prefix in ("", EVAL)]
  return all(len(set(some)) <= 1 for some in values) and sum(map(len, values)) > 1


def reason(answer: Mapping[str, Any]) -> str:
  """What graders said: the first its reason, or its number; others their numbers."""
  given = list((answer.get("scores") or {}).items())
  said = [answer["reason"] or (number(given[0][1]) if given else "")]
  said += [f"{name} {number(value)}" for name, value in given[1:]]
  cut = [] if answer.get("finished", True) else ["cut"]
  return ", ".join([*filter(None, said), *cut])


def counted(score: Mapping[str, Any]) -> str:
  """A metric's mean over answers, as `intervals.mean` gives it, with how many are right where it says so."""
  if score["right"] is not None:
    return f"{score['right']}/{score['count']} correct ({100 * score['mean']:.1f} %)"
  return f"{number(score['mean'])}, the mean of {score['count']}"
