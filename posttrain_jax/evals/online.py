"""What an online run is (its method, what scores, how much it writes), and what it came to from first to last."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from posttrain_jax import settings
from posttrain_jax.evals import meanings
from posttrain_jax.rewards import named
from posttrain_jax.runs.record import Run

PART = 5  # the ends that are compared are fifths of the run
RIGHT_AWAY = "pass@1"


@dataclasses.dataclass(frozen=True)
class Ends:
  """Means of the first and the last fifth of a run's batches, and what chance makes of their difference."""

  first: float
  last: float
  noise: float  # standard error of last - first, by what single batches differ from a straight line
  batches: int
  each: int  # batches of a fifth

  @property
  def is_change(self) -> bool:
    return abs(self.last - self.first) > 2 * self.noise

  def __str__(self) -> str:
    return f"{self.first:.2f} -> {self.last:.2f}"


def ends(run: Run, name: str) -> Ends | None:
  """The ends of a metric, each batch once however many updates it was used for; None where the run has no such one."""
  updates = (run.field("online.minibatches") or 1) * (run.field("online.passes") or 1)
  steps, values = run.series(name)
  by_batch = {(step - 1) // updates: value for step, value in zip(steps, values)}
  known = [value for value in by_batch.values() if math.isfinite(value)]
  if not known:
    return None
  each = max(1, round(len(known) / PART))
  noise = math.inf
  if len(known) > 3:
    at = np.arange(len(known))
    rest = np.asarray(known) - np.polyval(np.polyfit(at, known, 1), at)
    noise = math.sqrt(float(np.sum(rest**2)) / (len(known) - 2) * 2 / each)
  mean = statistics.fmean
  return Ends(mean(known[:each]), mean(known[-each:]), noise, len(known), each)


def is_of_answers(name: str) -> bool:
  """Whether a metric says how good the answers of one batch are, so that a single value is mostly chance."""
  return name in ("reward", "holdout/reward") or name.startswith("pass@")


def finals(run: Run) -> dict[str, float]:
  """Of an online run {metric: its mean over the last fifth}, of those that say how good answers are; {} of others."""
  names = [name for name in run.names() if is_of_answers(name)] if is_one(run) else []
  return {name: one.last for name in names if (one := ends(run, name)) is not None}


def came_to(run: Run) -> str | None:
  """What became of the reward, of right answers and of the second score, in a sentence; None before the first batch."""
  reward = ends(run, "reward")
  if reward is None:
    return None
  n = run.field("online.samples")
  names = {RIGHT_AWAY: RIGHT_AWAY, f"pass@{n}": f"pass@{n}", "held-out score": "holdout/reward"}
  others = [f"{label} {one}" for label, name in names.items() if (one := ends(run, name))]
  if reward.batches == 1:
    alone = [f"reward {reward.last:.2f}", *(text.partition(" -> ")[0] for text in others)]
    return f"{', '.join(alone)} in one batch"
  of = (
    "the first and the last batch"
    if reward.each == 1
    else (f"means of the first and the last {reward.each}")
  )
  told = ", ".join([f"reward {reward} over {reward.batches:,} batches", *others])
  return f"{told} ({of}{_chance(reward)})"


def _chance(reward: Ends) -> str:
  return "" if reward.is_change else "; the change of the reward is within what batches differ by"


def method(run: Run) -> str:
  """What the loss is called: the config's method with its loss, or the loss by itself."""
  objective = run.field("objective") or {}
  name, loss = settings.method(objective), str(objective.get("loss"))
  return f"{name} (loss {loss})" if name and name != loss else loss


def compares(run: Run) -> bool:
  """Whether a policy gradient reads its reference: in the loss, in the reward, or as who wrote the answers."""
  o = run.field("objective") or {}
  in_reward = run.field("online.kl_in_reward")
  return bool(o.get("kl_weight") or in_reward or o.get("old") == "reference")


def scored_by(run: Run, section: str = "reward") -> str | None:
  """Verifiers with their weights, and the gates that multiply; None where nothing scores."""
  spec: Mapping[str, Any] = run.field(section) or {}
  called = named.titles([*(spec.get("parts") or ()), *(spec.get("gates") or ())])
  parts = [called[name] for name in spec.get("parts") or ()]
  weights = list(spec.get("weights") or ()) or [1.0] * len(parts)
  terms = [name if w == 1 else f"{w:g} x {name}" for name, w in zip(parts, weights)]
  gates = [called[name] for name in spec.get("gates") or ()]
  multiplied = (
    f", times the gate{'s' if len(gates) > 1 else ''} {' and '.join(gates)}" if gates else ""
  )
  return (" + ".join(terms) + multiplied) or None


def samples(run: Run) -> str | None:
  """How much is written, and how."""
  o = run.field("online")
  if not o:
    return None
  rows, updates = run.field("batch.rows"), o["minibatches"] * o["passes"]
  said = [f"{o['samples']} answers to each of {rows * o['minibatches']} prompts a batch"]
  said += [f"at most {o['max_new_tokens']} tokens", f"temperature {o['temperature']:g}"]
  said += [
    f"{name} {o[name]:g}"
    for name, off in (("top_k", 0), ("top_p", 1), ("min_p", 0))
    if o[name] != off
  ]
  said += [f"{updates} updates a batch"] if updates > 1 else []
  said += ["groups that agree replaced"] if o["dynamic"] else []
  by = [o.get("environment"), *(o.get("tools") or ())]  # which runs of an earlier version lack
  said += [f"at most {o['max_turns']} turns with {', '.join(filter(None, by))}"] if any(by) else []
  return ", ".join(said)


def rows(run: Run) -> list[tuple[str, str, str]]:
  """(metric, its first fifth, its last) of what a reader asks first, as far as there is any."""
  kinds = (
    "reward",
    "pass@",
    "holdout/reward",
    "rewards/",
    "completions/mean_length",
    "completions/clipped_ratio",
    "turns/mean",
    "tools/",
  )
  names = [name for kind in kinds for name in run.names() if name.startswith(kind)]
  bare = lambda name: name.removeprefix("holdout/")
  names = [
    n
    for n in dict.fromkeys(names)
    if bare(n) == "reward" or n.endswith("/mean") or not bare(n).startswith("reward")
  ]
  names += [
    name for name in ("rewards/missing", "holdout/rewards/missing") if any(run.series(name)[1])
  ]
  shown = []
  for name in [*names, "entropy"]:
    if (one := ends(run, name)) is not None:
      shown.append((name, f"{one.first:.4g}", f"{one.last:.4g}"))
  return shown


def is_one(run: Run) -> bool:
  return meanings.kind(run.record.get("config") or {}) == meanings.ONLINE
