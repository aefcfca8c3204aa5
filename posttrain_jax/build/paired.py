"""Online DPO's batches: of the answers to a prompt the best and the worst, as a pair; groups that tie are no pair."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np

from posttrain_jax.build.groups import Group
from posttrain_jax.build.updates import Batch, Updates, as_example
from posttrain_jax.data import answers
from posttrain_jax.data.packing import pack_answers
from posttrain_jax.losses.advantage import ROUNDING
from posttrain_jax.train.state import State

OF_PAIR = 2


class Paired(Updates):
  """The batches of a preference loss, a row a pair; it is empty where a group has none."""

  def __init__(
    self, config: ml_collections.ConfigDict, vocab: int, mesh: jax.sharding.Mesh | None = None
  ) -> None:
    super().__init__(config, vocab, mesh)
    self.slots = OF_PAIR

  def of(
    self, groups: Sequence[Group], state: State, number: int
  ) -> tuple[list[Batch], dict[str, float]]:
    del state
    rewards = self.rewards(groups)
    examples = [self._pair(group, of_group) for group, of_group in zip(groups, rewards)]
    scored = (~np.isnan(rewards)).any(axis=1)
    tied = [example is None for example in examples]
    told = {"pairs/tied": float(np.mean(tied, where=scored))} if scored.any() else {}
    packed = [
      batch
      for order in self.orders(len(examples), number)
      for batch in self._packed(examples, order)
    ]
    return packed, told

  def blank(self) -> Batch:
    c = self.config
    rows, shares = [[0]] * c.batch.rows, c.data.share_prompt
    return pack_answers([self._one_token], rows, c.data.length, self.slots, shares=shares)

  @functools.cached_property
  def _one_token(self) -> answers.Answers:
    return dataclasses.replace(
      answers.blank("pairs", with_ref_logps=False, with_companion=False), values={}
    )

  def _pair(self, group: Group, rewards: np.ndarray) -> answers.Answers | None:
    """The best and the worst answer, the first of each; None where those that may be learned from have one reward."""
    is_cut = np.asarray([not answer.finished for answer in group.answers])
    known = np.where(is_cut & self.config.online.mask_cut, np.nan, rewards)
    chosen = group.advantages = np.zeros(len(rewards))
    if np.isnan(known).all():
      return None
    best, worst = int(np.nanargmax(known)), int(np.nanargmin(known))
    spread = known[best] - known[worst]
    is_same = group.answers[best].tokens == group.answers[worst].tokens
    if is_same or spread <= ROUNDING * max(abs(known[best]), abs(known[worst])):
      return None
    chosen[[best, worst]] = 1.0, -1.0
    samples = sorted(group.written)
    parts = [as_example(group, samples[i]) for i in (best, worst)]
    return answers.join(parts, share=self.config.data.share_prompt)
