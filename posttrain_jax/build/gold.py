"""config.online.gold_rows: answers of the data that stand in a batch beside those that the policy writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import ml_collections
import numpy as np

from posttrain_jax.build import data as data_lib
from posttrain_jax.build import decisions
from posttrain_jax.build.model import Model
from posttrain_jax.data.answers import Answers
from posttrain_jax.data.encoded import Example
from posttrain_jax.settings import ConfigError

Config = ml_collections.ConfigDict
ORDER = 1  # of two orders of the same rows, the prompts' is the other


@dataclasses.dataclass(frozen=True)
class Gold:
  """The data's own answers, drawn by the number of the batch alone, so that a run goes on anywhere."""

  rows: Sequence[Answers]
  count: int  # in a written batch
  seed: int

  def of(self, batch: int) -> list[Answers]:
    """Those of a batch, from 1; every epoch of them has its own order."""
    numbers = range((batch - 1) * self.count, batch * self.count)
    return [self._row(number) for number in numbers]

  def _row(self, number: int) -> Answers:
    epoch, at = divmod(number, len(self.rows))
    order = np.random.default_rng((self.seed, epoch, ORDER)).permutation(len(self.rows))
    return self.rows[order[at]]


def rows(config: Config, model: Model, as_row: Callable[[Example], Answers]) -> Gold:
  """The answers of config.data.train, where the config asks for some, each made a row.

  Raises:
    ConfigError: no row has an answer that fits.
  """
  each = decisions.gold_rows(config)
  if not each:
    return Gold((), 0, config.seed)
  text = config.copy_and_resolve_references().unlock()
  d = text.data
  d.kind, d.train_on, d.truncate, d.packing = "text", "last", "drop", False
  del text.online
  with data_lib.told_of("data.train, of which online.gold_rows takes answers"):
    examples = data_lib.read(text, model).train
  if not examples:
    raise ConfigError(
      f"online.gold_rows={each}: no row of {d.train} has an answer of at most data.length={d.length} tokens; write 0,"
      " or rows with a completion"
    )
  every = tuple(as_row(example) for example in examples)
  return Gold(every, each * config.online.minibatches, config.seed)
