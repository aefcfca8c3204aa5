"""How long a run is: config.steps, or what config.epochs come to; and what another length makes of a run under way."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import ml_collections

from posttrain_jax.build import decisions, optimizer
from posttrain_jax.runs import folder as run_folder
from posttrain_jax.runs import record
from posttrain_jax.settings import ConfigError


class Length(Protocol):
  """What a source of batches says of its length."""

  def steps(self, epochs: float) -> int: ...

  def epochs(self, steps: int) -> float: ...


PLANNED = 1000  # steps of a program that is compiled and not run, where epochs say how many


def resolved(config: ml_collections.ConfigDict, steps: int) -> ml_collections.ConfigDict:
  """A copy of the config with a number of steps, where its epochs leave them open."""
  if config.steps is not None:
    return config
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.steps = steps
  return config.lock()


def of_data(config: ml_collections.ConfigDict, batches: Length) -> ml_collections.ConfigDict:
  """The config with the steps that its epochs are of these batches; as it is where it names steps."""
  epochs = decisions.epochs(config)
  return config if epochs is None else resolved(config, batches.steps(epochs))


MANY = 20  # epochs that nobody asks for by mistake; recipes for fine-tuning have one to five


def describe(config: ml_collections.ConfigDict, batches: Length) -> str:
  """Both measures of a run's length, in a line."""
  epochs = batches.epochs(config.steps)
  passes = f"{epochs:,.1f}" if epochs >= 1 else f"{epochs:.2g}"
  told = f"length: {config.steps:,} step{'s' * (config.steps != 1)}, which are {passes} epochs"
  return (
    told
    if epochs <= MANY
    else f"{told}: every row is seen that often; --config.epochs=3 says fewer"
  )


def check_change(folder: Path, config: ml_collections.ConfigDict) -> None:
  """Raises unless a run in the folder may go on to the config's steps: there are such that it has not done.

  Raises:
    ConfigError: the data has changed, steps beyond them were done, or the method has a schedule of its own that the
      former number has decided.
  """
  former = run_folder.former_length(folder, config)
  if former is None or former["steps"] == config.steps:
    return
  epochs = decisions.epochs(config)
  if epochs is not None and epochs == former["epochs"]:
    raise ConfigError(
      f"epochs={epochs:g} were {former['steps']} steps when {folder} was started and are {config.steps} now: the rows"
      f" of {config.data.train} have changed since; restore them, or start over in another folder"
    )
  if config.steps < former["reached"]:
    asked = f"steps={config.steps}" + (f" (epochs={epochs:g})" if epochs is not None else "")
    raise ConfigError(
      f"{folder} has done {former['reached']} steps, and {asked} would take some of them back: write"
      f" steps={former['reached']} or more, or name another --workdir"
    )
  if _spends_ranks_by_length(config):
    raise ConfigError(
      f"{folder} was started with steps={former['steps']}, by which AdaLoRA has spent its ranks: a run of"
      f" {config.steps} steps would have spent them otherwise; name another --workdir, or restore steps"
    )


def _spends_ranks_by_length(config: ml_collections.ConfigDict) -> bool:
  """Whether AdaLoRA's schedule ends with the run, wherever that is."""
  methods = config.adapter.method.split("+")
  if "adalora" not in methods:
    return False
  section = config.adapter if len(methods) == 1 else config.adapter.adalora
  return "total_step" not in section or section.total_step is None


def told(folder: Path, config: ml_collections.ConfigDict) -> str:
  """What becomes of a run whose number of steps was changed after it had begun; "" where it was not."""
  former = run_folder.former_length(folder, config)
  if former is None or former["steps"] == config.steps:
    return ""
  way = "raised" if config.steps > former["steps"] else "lowered"
  at = former["step"]
  now, was = (optimizer.rate(config, n, at) for n in (config.steps, former["steps"]))
  learning = (
    f"the learning rate follows the new number from step {at + 1} on: it is {now:.3g} there"
  )
  would = f", and was to be {was:.3g}" if at < former["steps"] else f", and had ended at {was:.3g}"
  if now == was:
    learning, would = f"the learning rate goes on at {now:.3g}", ""
  return (
    f"steps are {way} from {former['steps']} to {config.steps}, and the run goes on from step {at}; {learning}{would}."
    f" {record.CONFIG} keeps the former number in its history"
  )
