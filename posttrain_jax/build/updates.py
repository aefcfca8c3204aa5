"""From groups of scored answers to the batches of the updates that learn from them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from posttrain_jax.build import decisions, writer
from posttrain_jax.build.adapter import Trees
from posttrain_jax.build.gold import Gold
from posttrain_jax.build.groups import Group
from posttrain_jax.build.teacher import Teacher
from posttrain_jax.core import bits, distributed
from posttrain_jax.data import answers
from posttrain_jax.data.encoded import Example
from posttrain_jax.data.packing import pack_answers
from posttrain_jax.environments.episode import Episode
from posttrain_jax.losses import advantage, kl
from posttrain_jax.objectives import Context, Scorer
from posttrain_jax.objectives.distillation import teacher_logps
from posttrain_jax.objectives.reference import reference_logps
from posttrain_jax.objectives.rows import spans
from posttrain_jax.rollout.requests import Answer
from posttrain_jax.train.state import State

Config = ml_collections.ConfigDict
Batch = Mapping[str, Any]
EDGES = 8  # lengths of rows, each of them a program


class Updates:
  """The batches of a run's updates, a row a group."""

  def __init__(self, config: Config, vocab: int, mesh: jax.sharding.Mesh | None = None) -> None:
    self.config, self.mesh = config, mesh
    whole = writer.sampling(config).is_whole
    self.words = 0 if whole else bits.words(vocab)  # that say what a token was drawn among
    self.slots = int(config.online.samples)  # answers of a row
    self._old_logps, self._kl = self._read(self._logps), self._read(self._kl_of_answers)
    self._of_teacher = self._read(self._teacher_logps)
    self.teacher: Teacher | None = None
    self.gold = Gold((), 0, config.seed)
    self.kl_coefficient = float(config.online.kl_in_reward)  # which an adaptive one changes

  def _read(self, compute: Callable[..., Any]) -> Callable[..., Any]:
    """compute, jitted, with what it gives on this host."""
    jitted = jax.jit(compute)
    on_host = lambda made: jax.tree.map(np.asarray, distributed.whole(made, self.mesh))
    return lambda *args: on_host(jitted(*args))

  def bind(self, trees: Trees, objective: Scorer, teacher: Teacher | None = None) -> None:
    """What computes log-probabilities; teacher: whose are taken off the advantages, where there is one."""
    self.context, self.objective = trees.context, objective
    self.teacher = teacher if self.config.objective.name == "grouped" else None

  def of(
    self,
    groups: Sequence[Group],
    state: State,
    number: int,
  ) -> tuple[list[Batch], dict[str, float]]:
    """(batches in the order in which they are taken, what is told of them).

    number: of the written batch in the run.
    """
    o, told = self.config.online, {}
    rewards = self.rewards(groups)
    if o.kl_in_reward:
      divergences = self._divergences(groups, state)
      coefficient = self.kl_coefficient
      told = self.took_off(divergences[~np.isnan(rewards)])
      rewards = rewards - coefficient * divergences
    # without a reward there is nothing to compare: a teacher alone says what is learned
    compares = "advantage" in self.config.objective and bool(self.config.reward.parts)
    advantages = (
      advantage.named(self.config.objective.advantage, rewards)
      if compares
      else np.zeros_like(rewards)
    )
    for group, of_group in zip(groups, advantages):
      group.advantages = of_group
    examples = [self._example(group, np.asarray(group.advantages)) for group in groups]
    packed: list[Batch] = [
      batch
      for order in self.orders(len(examples), number)
      for batch in self._packed(examples, order, self.gold.of(number))
    ]
    if (teacher := self.teacher) is not None:
      theirs = functools.partial(self._of_teacher, teacher.params)
      packed = [{**batch, "teacher_logps": theirs(batch)} for batch in packed]
    if len(packed) == 1 or self.config.objective.name != "grouped":
      return packed, told
    context = state.context(self.context)
    old = functools.partial(self._old_logps, state.trainable, context)
    return [{**batch, "old_logps": old(batch)} for batch in packed], told

  def rewards(self, groups: Sequence[Group]) -> np.ndarray:
    """[groups, samples]: scores, NaN where one is missing, less what an answer that was cut is charged."""
    scores = np.stack([group.scores for group in groups])
    cut = [[not answer.finished for answer in group.answers] for group in groups]
    return scores - self.config.online.cut_penalty * np.asarray(cut)

  def took_off(self, divergences: np.ndarray) -> dict[str, float]:
    """What is told of the answers' KL, in nats each; an adaptive coefficient is moved for the next batch."""
    o = self.config.online
    if not len(divergences):
      return {}
    told = {"reward_kl_penalty": float(divergences.mean())}
    if o.kl_target is not None:
      told["reward_kl_coefficient"] = self.kl_coefficient
      self.kl_coefficient = kl.adapted(
        self.kl_coefficient,
        told["reward_kl_penalty"],
        target=o.kl_target,
        horizon=o.kl_horizon,
        answers=len(divergences),
      )
    return told

  def orders(self, count: int, number: int) -> list[np.ndarray]:
    """The order of the rows in each pass over them."""
    first = np.arange(count)
    turns = range(1, self.config.online.passes)
    random = (np.random.default_rng((self.config.seed, number, turn)) for turn in turns)
    return [first, *(one.permutation(first) for one in random)]

  def blank(self) -> Batch:
    """A batch of the largest shape, for a program that is compiled and not run."""
    o, length = self.config.online, self.config.data.length
    rows = [[0]] * self.config.batch.rows
    shares = self.config.data.share_prompt
    batch = pack_answers([self._one_token], rows, length, self.slots, shares=shares)
    if decisions.teacher(self.config) and self.config.objective.name == "grouped":
      batch["teacher_logps"] = np.zeros((len(rows), length), np.float32)
    if o.minibatches * o.passes > 1 and self.config.objective.name == "grouped":
      batch["old_logps"] = np.zeros((len(rows), length), np.float32)
    return batch

  @functools.cached_property
  def _one_token(self) -> answers.Answers:
    """An answer of one token."""
    blank = answers.blank("scored", with_ref_logps=False, with_companion=False)
    return dataclasses.replace(
      blank,
      values={**blank.values, **self._marked(0.0)},
      sampling_logps=np.zeros(2, np.float32),
      kept=np.zeros((2, self.words), np.uint32) if self.words else None,
    )

  def _packed(
    self,
    examples: Sequence[answers.Answers | None],
    order: np.ndarray,
    gold: Sequence[answers.Answers] = (),
  ) -> list[Batch]:
    """The examples in that order, in batches of one update, gold ones behind; an empty row where there is none."""
    rows, shares = decisions.asked_rows(self.config), self.config.data.share_prompt
    known = [self._one_token if example is None else example for example in examples]
    known += gold
    edge = next(e for e in self._edges if max(map(len, known)) <= e)
    filled = [[] if examples[i] is None else [int(i)] for i in order]
    parts = [filled[start : start + rows] for start in range(0, len(filled), rows)]
    each = decisions.gold_rows(self.config)
    behind = [[len(examples) + i] for i in range(len(gold))]
    taken = lambda at: (
      [behind[i % len(behind)] for i in range(at * each, at * each + each)] if gold else []
    )
    parts = [part + taken(at) for at, part in enumerate(parts)]
    return [pack_answers(known, part, edge, self.slots, shares=shares) for part in parts]

  def _divergences(self, groups: Sequence[Group], state: State) -> np.ndarray:
    """[groups, samples]: the KL of each answer to the reference, summed over its tokens; 0 without a score."""
    examples = [self._example(group, np.zeros(len(group.written))) for group in groups]
    context = state.context(self.context)
    sums = [
      self._kl(state.trainable, context, batch)
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
    parts = [as_example(group, i) for i in places]
    known = scores[~np.isnan(scores)]
    deviation = float(known.std(ddof=1)) if len(known) > 1 else 0.0
    values = {
      "score": [float(scores[i]) for i in places],
      "advantage": [float(advantages[i]) for i in places],
      "deviation": [deviation] * len(places),
      **self._marked(0.0, len(places)),
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

  def _marked(self, gold: float, count: int = 1) -> dict[str, tuple[float, ...]]:
    """Of answers whether they are the data's own, where a batch has both."""
    return {"gold": (gold,) * count} if decisions.gold_rows(self.config) else {}

  def of_data(self, example: Example) -> answers.Answers:
    """An answer of the data as a row."""
    values = dict.fromkeys(("score", "advantage", "deviation"), (0.0,)) | self._marked(1.0)
    joined = answers.join([example], share=False, values=values)
    time = len(joined.tokens)
    return dataclasses.replace(
      joined,
      sampling_logps=np.zeros(time, np.float32),
      kept=np.zeros((time, self.words), np.uint32) if self.words else None,
    )

  def _logps(self, trainable: Any, context: Context, batch: Batch) -> jax.Array:
    """[rows, time]: log-probabilities of the answers' tokens before any update of the batch."""
    forward = self.objective.forward(trainable, context, batch, None, training=False)
    mask = spans(batch).mask
    temperature = self.config.online.temperature
    return self.objective.scores(forward, batch, mask, temperature=temperature).logp

  def _teacher_logps(self, params: Any, batch: Batch) -> jax.Array:
    """[rows, time]: of the answers' tokens, at the temperature and among the tokens that they were drawn with."""
    assert self.teacher is not None
    how = dict(temperature=self.config.online.temperature)
    return teacher_logps(self.teacher.reader, params, batch, spans(batch).mask, **how)

  def _kl_of_answers(self, trainable: Any, context: Context, batch: Batch) -> jax.Array:
    """[rows, slots]: of what was drawn from, at its temperature and among what was kept, on both sides."""
    o, at = self.config.online, spans(batch)
    logps = self._logps(trainable, context, batch)
    reference = reference_logps(self.objective, context, batch, at.mask, temperature=o.temperature)
    return at.per_answer(kl.ESTIMATES[o.kl_in_reward_estimator](logps, reference, at.mask))


def as_example(group: Group, sample: int) -> Example:
  """One of a group's answers behind its prompt, with a mask of what the model wrote."""
  answer = group.written[sample]
  # an environment may have said something behind the prompt of each
  prompt = np.asarray(answer.request.prompt, np.int32)
  tokens = np.asarray(answer.tokens, np.int32)
  mask = np.concatenate([np.zeros(len(prompt), bool), _written(answer)])
  return Example(np.concatenate([prompt, tokens]), mask, origin=group.prompt.origin)


def _written(answer: Answer) -> np.ndarray:
  """Which tokens of an answer the model wrote: what tools said between them is read, and never learned from."""
  return answer.written if isinstance(answer, Episode) else np.ones(len(answer.tokens), bool)


def scored_places(group: Group) -> list[int]:
  """Of the answers that are a row's."""
  return [i for i, score in enumerate(group.scores) if not np.isnan(score)]
