"""PPO's batches: rewards of tokens, the critic's values, advantages and returns of the answers that were written."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from posttrain_jax.build.groups import Group
from posttrain_jax.build.updates import Batch, Updates, scored_places
from posttrain_jax.losses import advantage, kl
from posttrain_jax.objectives import Context
from posttrain_jax.objectives.reference import reference_logps
from posttrain_jax.objectives.rows import spans
from posttrain_jax.train.state import State

BY_TOKEN = ("advantages", "returns", "old_values")  # what a batch has beside that of a group


class Returns(Updates):
  """The batches of PPO's updates, a row a group; what is said of a token stands at the position before it."""

  def __init__(
    self, config: ml_collections.ConfigDict, vocab: int, mesh: jax.sharding.Mesh | None = None
  ) -> None:
    super().__init__(config, vocab, mesh)
    self._known = self._read(self._of_tokens)

  def of(
    self, groups: Sequence[Group], state: State, number: int
  ) -> tuple[list[Batch], dict[str, float]]:
    o, rows = self.config.online, self.config.batch.rows
    examples = [self._example(group, np.zeros(len(group.written))) for group in groups]
    packed = self._packed(examples, np.arange(len(examples)))
    context = state.context(self.context)
    known = [self._known(state.trainable, context, batch) for batch in packed]
    whole, of_tokens = _joined(packed), _joined(known)
    collected, told = self._collected(whole, of_tokens, self._rewards_of_rows(groups))
    whole |= collected
    if o.minibatches * o.passes > 1:
      whole["old_logps"] = of_tokens["logps"]
    for group, of_group in zip(groups, whole["advantage"]):
      places = scored_places(group)
      every = group.advantages = np.full(len(group.written), np.nan)
      every[places] = of_group[: len(places)]
    orders = self.orders(len(examples), number)
    parts = [order[at : at + rows] for order in orders for at in range(0, len(order), rows)]
    return [{name: value[part] for name, value in whole.items()} for part in parts], told

  def blank(self) -> Batch:
    batch = super().blank()
    filled = np.zeros(batch["tokens"].shape, np.float32)
    return {**batch, **dict.fromkeys(BY_TOKEN, filled)}

  def _rewards_of_rows(self, groups: Sequence[Group]) -> np.ndarray:
    """[rows, slots] of the answers that are a row's, in their places there."""
    scores = np.zeros((len(groups), self.config.online.samples))
    for row, group, rewards in zip(scores, groups, self.rewards(groups)):
      known = rewards[scored_places(group)]
      row[: len(known)] = known
    return scores

  def _collected(
    self, batch: Batch, known: Mapping[str, np.ndarray], scores: np.ndarray
  ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """(advantages, returns and old values [rows, time], advantage [rows, slots]; what is told of them)."""
    c, told = self.config.critic, {}
    answers = _Answers(batch)
    coefficient = self.kl_coefficient
    divergence = answers.apart(known["kl"]).astype(np.float64)
    if self.config.online.kl_in_reward:
      told = self.took_off(divergence.sum(axis=1))
    rewards = -coefficient * divergence
    rewards[np.arange(len(rewards)), answers.lengths - 1] += scores[answers.row, answers.slot]
    values = answers.apart(known["values"]).astype(np.float64)
    with jax.enable_x64(True):
      collect = functools.partial(advantage.gae, rewards, values, answers.mask, gamma=c.gamma)
      advantages, returns = map(np.asarray, collect(lam=c.lam))
      if c.returns_lam is not None and c.returns_lam != c.lam:
        returns = np.asarray(collect(lam=c.returns_lam)[1])
      explained = advantage.explained_variance(values, returns, answers.mask)
      if c.whiten and answers.mask.any():
        advantages = np.asarray(advantage.whiten(advantages, answers.mask))
    if explained is not None:
      told["critic/vf_explained_var"] = explained
    slots = np.zeros(scores.shape, np.float32)
    slots[answers.row, answers.slot] = advantages.sum(axis=1) / answers.lengths
    by_token = dict(zip(BY_TOKEN, (advantages, returns, values)))
    return {n: answers.back(x) for n, x in by_token.items()} | {"advantage": slots}, told

  def _of_tokens(self, trainable: Any, context: Context, batch: Batch) -> dict[str, jax.Array]:
    """[rows, time] each: log-probabilities, values and KL as the answers are written; 0 where no token is scored."""
    o, at = self.config.online, spans(batch)
    forward = self.objective.forward(trainable, context, batch, None, training=False)
    logps = self.objective.scores(forward, batch, at.mask, temperature=o.temperature).logp
    divergence = jnp.zeros_like(logps)
    if o.kl_in_reward:
      how = dict(temperature=o.temperature)
      reference = reference_logps(self.objective, context, batch, at.mask, **how)
      divergence = kl.ESTIMATES[o.kl_in_reward_estimator](logps, reference, at.mask)
    return {"logps": logps, "values": jnp.where(at.mask, forward.values, 0.0), "kl": divergence}


class _Answers:
  """The answers of a batch, one a row, that have a token to learn from; an empty one has no end to be paid at."""

  def __init__(self, batch: Batch) -> None:
    read = {name: jnp.asarray(batch[name]) for name in ("tokens", "loss_mask", "answer", "present")}
    at = jax.tree.map(np.asarray, spans(read))
    self._shape = at.mask.shape
    found = [
      (row, slot, places)
      for row, present in enumerate(at.present)
      for slot in np.flatnonzero(present)
      if len(places := np.flatnonzero(at.mask[row] & (at.answer[row] == slot)))
    ]
    self.row = np.asarray([row for row, _, _ in found], int)
    self.slot = np.asarray([slot for _, slot, _ in found], int)
    self._places = [places for _, _, places in found]
    self.lengths = np.asarray([len(places) for places in self._places], int)
    self.mask = np.arange(max(self.lengths, default=1)) < self.lengths[:, None]

  def apart(self, values: np.ndarray) -> np.ndarray:
    """[rows, time] -> [answers, longest]."""
    out = np.zeros(self.mask.shape, values.dtype)
    for one, row, places in zip(out, self.row, self._places):
      one[: len(places)] = values[row, places]
    return out

  def back(self, values: np.ndarray) -> np.ndarray:
    """[answers, longest] -> [rows, time], float32."""
    out = np.zeros(self._shape, np.float32)
    for one, row, places in zip(values, self.row, self._places):
      out[row, places] = one[: len(places)]
    return out


def _joined(batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """The rows of all of them, one after the other."""
  return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
