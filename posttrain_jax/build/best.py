"""config.eval.best: which evaluated step is the best, when a run without a better one ends, and what it gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import ml_collections

from posttrain_jax.build import decisions, reference, teacher
from posttrain_jax.core import distributed, metrics
from posttrain_jax.evals import meanings
from posttrain_jax.objectives import evaluation
from posttrain_jax.settings import ConfigError
from posttrain_jax.train.loop import Best, Progress

if TYPE_CHECKING:
  from posttrain_jax.build.run import Pieces


def of(config: ml_collections.ConfigDict) -> Best:
  """What the loop makes of a config; where it names no metric, the lowest loss is kept beside the last step."""
  name = decisions.best_metric(config)
  if not name:
    return Best()
  way = meanings.better(config.objective.name, name)
  return Best(
    metric=f"{meanings.EVAL}{name}",
    is_higher=way == meanings.HIGHER,
    is_given=True,
    stop_after=config.eval.stop_after,
  )


def describe(config: ml_collections.ConfigDict) -> str:
  """Which step the run gives, and when it ends early."""
  best, what = of(config), "model" if decisions.is_full(config) else "adapter"
  way = "highest" if best.is_higher else "lowest"
  if not best.is_given:
    return f"exported: the {what} of the last step; that of the {way} {best.metric} beside it, as {what}-best"
  ends = (
    f"; the run ends after {best.stop_after} evaluations without a better one"
    if best.stop_after
    else ""
  )
  return f"exported: the {what} of the step with the {way} {best.metric}{ends}"


def check(pieces: Pieces) -> None:
  """Raises unless the metric is one that evaluations have; nothing is computed.

  Raises:
    ConfigError: there are no held-out rows, or they have no such metric; the message lists those that they have.
  """
  config = pieces.config
  name = decisions.best_metric(config)
  if not name:
    return
  asked = f"eval.best={name}" if config.eval.best else f"eval.stop_after={config.eval.stop_after}"
  if not pieces.data.eval:
    raise ConfigError(
      f"{asked}: the best step is told by held-out rows, and there are none; write --config.data.eval_rows=N or"
      " --config.data.eval=SOURCE"
    )
  known = [each for each in _names(pieces) if meanings.better(config.objective.name, each)]
  if name not in known:
    raise ConfigError(
      f"{asked}: evaluations of this run have no such metric; of theirs there are {', '.join(known)}"
    )


def _names(pieces: Pieces) -> list[str]:
  """The names of what an evaluation gives."""
  batch = reference.blank(pieces.config, next(pieces.eval_batches()), pieces.objective)
  batch = teacher.blank(pieces.config, batch)
  placed = batch if pieces.mesh is None else distributed.global_batch(pieces.mesh, batch)
  state = pieces.abstract_state()
  context = state.context(pieces.trees.context)
  measure = jax.jit(evaluation(pieces.objective))
  given = jax.eval_shape(measure, state.trainable, context, state.memory, placed)
  return [name for name, value in given.items() if not isinstance(value, metrics.Histogram)]


def reached(best: Best, progress: Progress, steps: int) -> dict[str, Any]:
  """What done.json says of it: the best step, whether that is what was exported, and whether the run ended early."""
  said: dict[str, Any] = {}
  if progress.best_step:
    said["best"] = {
      "step": progress.best_step,
      "metric": best.metric,
      "value": progress.best_value,
      "is_exported": best.is_given,
    }
  if best.gives_up(progress) and progress.step < steps:
    said["ended_early"] = {"after": best.stop_after, "of": steps}
  return said
