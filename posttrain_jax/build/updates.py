"""From groups of scored answers to the batches of the updates that learn from them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from posttrain_jax.build import writer
from posttrain_jax.build.adapter import Trees
from posttrain_jax.build.groups import Group
from posttrain_jax.core import bits
from posttrain_jax.data import answers
from posttrain_jax.data.encoded import Example
from posttrain_jax.data.packing import pack_answers
from posttrain_jax.environments.episode import Episode
from posttrain_jax.losses import advantage, kl
from posttrain_jax.objectives import Context, Scorer
from posttrain_jax.objectives.reference import reference_logps
from posttrain_jax.objectives.rows import spans
from posttrain_jax.rollout.requests import Answer
from posttrain_jax.train.state import State

Config = ml_collections.ConfigDict
Batch = Mapping[str, Any]
EDGES = 8  # lengths of rows, each of them a program


class Updates:
  """The batches of a run's updates, a row a group."""

  def __init__(self, config: Config, vocab: int) -> None:
    self.config = config
    whole = writer.sampling(config).is_whole
    self.words = 0 if whole else bits.words(vocab)  # that say what a token was drawn among
    self._old_logps, self._kl = jax.jit(self._logps), jax.jit(self._kl_of_answers)

  def bind(self, trees: Trees, objective: Scorer) -> None:
    """What computes log-probabilities."""
    self.context, self.objective = trees.context, objective

  def of(
    self, groups: Sequence[Group], state: State, number: int
  ) -> tuple[list[Batch], dict[str, float]]:
    """(batches in the order in which they are taken, what is told of them).

    number: of the written batch in the run.
    """
    o, told = self.config.online, {}
    rewards = np.stack([group.scores for group in groups])
    if o.kl_in_reward:
      divergences = self._divergences(groups, state)
      if not np.isnan(rewards).all():
        told["reward_kl_penalty"] = float(divergences[~np.isnan(rewards)].mean())
      rewards = rewards - o.kl_in_reward * divergences
    advantages = advantage.named(self.config.objective.advantage, rewards)
    for group, of_group in zip(groups, advantages):
      group.advantages = of_group
    examples = [self._example(group, np.asarray(group.advantages)) for group in groups]
    orders = [np.arange(len(examples))]
    for turn in range(1, o.passes):
      random = np.random.default_rng((self.config.seed, number, turn))
      orders.append(random.permutation(orders[0]))
    packed = [batch for order in orders for batch in self._packed(examples, order)]
    if len(packed) == 1:
      return packed, told
    context = state.context(self.context)
    old = lambda batch: np.asarray(self._old_logps(state.trainable, context, batch))
    return [{**batch, "old_logps": old(batch)} for batch in packed], told

  def blank(self) -> Batch:
    """A batch of the largest shape, for a program that is compiled and not run."""
    o, length = self.config.online, self.config.data.length
    rows = [[0]] * self.config.batch.rows
    shares = self.config.data.share_prompt
    batch = pack_answers([self._one_token], rows, length, o.samples, shares=shares)
    if o.minibatches * o.passes > 1:
      batch["old_logps"] = np.zeros((len(rows), length), np.float32)
    return batch

  @functools.cached_property
  def _one_token(self) -> answers.Answers:
    """An answer of one token."""
    return dataclasses.replace(
      answers.blank("scored", with_ref_logps=False, with_companion=False),
      sampling_logps=np.zeros(2, np.float32),
      kept=np.zeros((2, self.words), np.uint32) if self.words else None,
    )

  def _packed(self, examples: Sequence[answers.Answers | None], order: np.ndarray) -> list[Batch]:
    """The examples in that order, in batches of one update; an empty row where there is none."""
    rows, shares = self.config.batch.rows, self.config.data.share_prompt
    known = [self._one_token if example is None else example for example in examples]
    edge = next(e for e in self._edges if max(map(len, known)) <= e)
    filled = [[] if examples[i] is None else [int(i)] for i in order]
    parts = [filled[start : start + rows] for start in range(0, len(filled), rows)]
    return [
      pack_answers(known, part, edge, self.config.online.samples, shares=shares) for part in parts
    ]

  def _divergences(self, groups: Sequence[Group], state: State) -> np.ndarray:
    """[groups, samples]: the KL of each answer to the reference, summed over its tokens; 0 without a score."""
    examples = [self._example(group, np.zeros(len(group.written))) for group in groups]
    context = state.context(self.context)
    sums = [
      np.asarray(self._kl(state.trainable, context, batch))
      for batch in self._packed(examples, np.arange(len(examples)))
    ]
    divergences = np.zeros((len(groups), self.config.online.samples), np.float32)
    for row, group, known in zip(divergences, groups, np.concatenate(sums)):
      places = scored_places(group)
      row[places] = known[: len(places)]
    return divergences

  @functools.cached_property
  def _edges(self) -> tuple[int, ...]:
    length = self.config.data.length
    return tuple(
      dict.fromkeys(min(length, -(-length * i // EDGES // 64) * 64) for i in range(1, EDGES + 1))
    )

  def _example(self, group: Group, advantages: np.ndarray) -> answers.Answers | None:
    """The group as a row; what could not be scored is left out, and None is left of a group without any score."""
    scores, o = group.scores, self.config.online
    places = scored_places(group)
    if not places:
      return None
    parts = []
    for i in places:
      answer = group.written[i]
      # an environment may have said something behind the prompt of each
      prompt = np.asarray(answer.request.prompt, np.int32)
      tokens = np.asarray(answer.tokens, np.int32)
      mask = np.concatenate([np.zeros(len(prompt), bool), _written(answer)])
      parts.append(Example(np.concatenate([prompt, tokens]), mask, origin=group.prompt.origin))
    known = scores[~np.isnan(scores)]
    deviation = float(known.std(ddof=1)) if len(known) > 1 else 0.0
    values = {
      "score": [float(scores[i]) for i in places],
      "advantage": [float(advantages[i]) for i in places],
      "deviation": [deviation] * len(places),
    }
    joined = answers.join(parts, share=self.config.data.share_prompt, values=values)
    time = len(joined.tokens)
    sampling, mask = np.zeros(time, np.float32), joined.mask.copy()
    kept = np.zeros((time, self.words), np.uint32)
    for place, i in enumerate(places):
      answer = group.written[i]
      here, wrote = joined.mask & (joined.answer == place), _written(answer)
      sampling[here] = answer.logps[wrote]
      if self.words and answer.kept is not None:
        kept[here] = answer.kept[wrote]
      if o.mask_cut and not group.written[i].finished:
        mask[here] = False
    recorded = dict(sampling_logps=sampling, kept=kept if self.words else None)
    return dataclasses.replace(joined, mask=mask, **recorded)

  def _logps(self, trainable: Any, context: Context, batch: Batch) -> jax.Array:
    """[rows, time]: log-probabilities of the answers' tokens before any update of the batch."""
    forward = self.objective.forward(trainable, context, batch, None, training=False)
    mask = spans(batch).mask
    temperature = self.config.online.temperature
    return self.objective.scores(forward, batch, mask, temperature=temperature).logp

  def _kl_of_answers(self, trainable: Any, context: Context, batch: Batch) -> jax.Array:
    """[rows, slots]: of what was drawn from, at its temperature and among what was kept, on both sides."""
    o, at = self.config.online, spans(batch)
    logps = self._logps(trainable, context, batch)
    reference = reference_logps(self.objective, context, batch, at.mask, temperature=o.temperature)
    return at.per_answer(kl.ESTIMATES[o.kl_in_reward_estimator](logps, reference, at.mask))


def _written(answer: Answer) -> np.ndarray:
  """Which tokens of an answer the model wrote: what tools said between them is read, and never learned from."""
  return answer.written if isinstance(answer, Episode) else np.ones(len(answer.tokens), bool)


def scored_places(group: Group) -> list[int]:
  """Of the answers that are a row's."""
  return [i for i, score in enumerate(group.scores) if not np.isnan(score)]
