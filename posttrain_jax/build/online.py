"""config.online: batches that the policy writes itself.  Prompts, answers, scores, advantages, rows.

Online learning is the ordinary loop with this source of batches.  A batch depends on the weights that wrote it, on the
seed and on how many were written before, so that a run that is killed anywhere writes the same ones again.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from posttrain_jax.build import groups as groups_lib
from posttrain_jax.build import scoring
from posttrain_jax.build.adapter import Trees
from posttrain_jax.build.data import Data
from posttrain_jax.build.groups import Group
from posttrain_jax.build.model import Model
from posttrain_jax.build.prompts import Prompt
from posttrain_jax.build.updates import Updates
from posttrain_jax.build.writer import Writer
from posttrain_jax.objectives import Scorer
from posttrain_jax.rewards import section, selftest
from posttrain_jax.rewards.reward import Reward
from posttrain_jax.rewards.verifier import Answer
from posttrain_jax.rollout.requests import Answer as Written
from posttrain_jax.runs import completions
from posttrain_jax.train.loop import Diverged
from posttrain_jax.train.state import State

Config = ml_collections.ConfigDict


def is_online(config: Config) -> bool:
  """Whether the run writes its own batches."""
  return "online" in config


class Online:
  """The source of a run's batches: it writes them with the weights of the state that is to learn from them."""

  def __init__(
    self,
    config: Config,
    model: Model,
    data: Data,
    say: Callable[[str], None],
  ) -> None:
    self.config, self.model, self.prompts, self.say = config, model, data.examples, say
    columns = dict.fromkeys(name for prompt in self.prompts for name in prompt.row)
    self.reward: Reward = scoring.make(config, list(columns))
    self.writer = Writer(config, model, self.prompts)
    self.updates = Updates(config, model.config.vocab_size)
    self.folder: Path | None = None
    self._batches = 0  # written
    self._asked = 0  # prompts, of all rounds
    self._left: list[Any] = []  # of the batch that was written last
    self._told: dict[str, float] = {}

  def bind(self, trees: Trees, objective: Scorer) -> None:
    """What is trained, and what computes its log-probabilities."""
    self.writer.bind(trees)
    self.updates.bind(trees, objective)

  @property
  def epoch(self) -> float:
    return self._asked / len(self.prompts)

  def batch(self, state: State | None) -> Mapping[str, Any]:
    """The next one, written by this state's weights unless some of the last are left.

    state: None for a batch of the largest shape, for a program that is compiled and not run.
    """
    if state is None:
      return self.updates.blank()
    if not self._left:
      self._left = self._write(state)
    return self._left.pop(0)

  def told(self, step: int) -> Mapping[str, float]:
    del step
    return dict(self._told)

  def get_state(self) -> dict:
    return {"batches": self._batches, "asked": self._asked, "left": len(self._left)}

  def set_state(self, state: dict) -> None:
    self._batches, self._asked = state["batches"], state["asked"]
    self._left = []
    if state["left"]:  # of a batch that is used several times
      assert self.folder is not None
      every = completions.arrays(self.folder, self._batches)
      self._left = every[len(every) - state["left"] :]

  def steps(self, epochs: float) -> int:
    o = self.config.online
    per_batch = self.config.batch.rows * o.minibatches
    return max(1, round(epochs * len(self.prompts) / per_batch)) * o.minibatches * o.passes

  def epochs(self, steps: int) -> float:
    o = self.config.online
    return steps / o.passes * self.config.batch.rows / len(self.prompts)

  def stats(self) -> str:
    o, rows = self.config.online, self.config.batch.rows
    written = rows * o.minibatches
    used = f", used for {o.minibatches * o.passes} updates" if o.minibatches * o.passes > 1 else ""
    return (
      f"{len(self.prompts):,} prompts; a batch is {written} prompts x {o.samples} = {written * o.samples} answers of at"
      f" most {o.max_new_tokens} tokens{used}"
    )

  def check(self, state: State) -> None:
    """Verifiers tell right from wrong, and a changed adapter reaches what writes.

    Raises:
      ConfigError: they do not.
      ValueError: other weights write the same.
    """
    some = [Answer(p.asked, section.expected(p.row), p.row) for p in self.prompts[: selftest.PAIRS]]
    selftest.check(self.reward, some)
    self.writer.check(state)

  def _write(self, state: State) -> list[Mapping[str, Any]]:
    o, config = self.config.online, self.config
    wanted = config.batch.rows * o.minibatches
    self._batches += 1
    began = time.monotonic()
    self.writer.load(state.trainable, state.carried)
    journal = completions.Journal(self.folder, self._batches, _digest(state.trainable))
    kept: list[Group] = []
    dead: list[Group] = []
    spent: dict[str, float] = {"writing": 0.0, "scoring": 0.0}
    rounds = 0
    while len(kept) < wanted and rounds < (o.most_rounds if o.dynamic else 1):
      rounds += 1
      groups = self._ask(wanted - len(kept), journal, spent)
      for group in groups:
        (dead if o.dynamic and group.is_dead(o.outcome) else kept).append(group)
    if len(kept) < wanted:  # a batch has as many rows whatever happens
      if o.dynamic:
        self._say_dead(kept, dead, rounds)
      kept += dead[: wanted - len(kept)]
    every = [*kept, *(group for group in dead if group not in kept)]
    batches, beside = self.updates.of(kept, state, self._batches)
    spent["all"] = time.monotonic() - began
    self._tell(every, kept, spent, rounds, beside)
    completions.write(self.folder, self._batches, groups_lib.table(self._batches, every, kept))
    if len(batches) > 1:
      # steps that checkpoints go back
      saved = config.checkpoint.every * (config.checkpoint.keep + 1)
      completions.keep(self.folder, self._batches, batches, last=saved // len(batches) + 1)
    journal.close()
    return batches

  def _ask(self, count: int, journal: completions.Journal, spent: dict[str, float]) -> list[Group]:
    """That many groups, written and scored; what the journal has is not paid for again."""
    o, began = self.config.online, time.monotonic()
    numbers = range(self._asked, self._asked + count)
    self._asked += count
    prompts = [self._prompt(number) for number in numbers]
    places = [(i, sample) for i in range(count) for sample in range(o.samples)]
    ask = lambda i, sample: self.writer.request(prompts[i], numbers[i], sample)
    found: dict[tuple[int, int], Written] = {}
    for i, sample in places:
      if (old := journal.written(numbers[i], sample)) is not None:
        found[i, sample] = Written(ask(i, sample), **old)
    open_places = [place for place in places if place not in found]
    for at, written in self.writer.run(ask(*place) for place in open_places):
      i, sample = open_places[at]
      found[i, sample] = written
      journal.put(
        numbers[i],
        sample,
        tokens=written.tokens,
        logps=written.logps,
        ended=written.ended,
        kept=written.kept,
      )
    spent["writing"] += time.monotonic() - began
    began = time.monotonic()
    decode = functools.partial(self.model.tokenizer.decode, skip_special_tokens=True)
    texts = {place: decode(found[place].tokens) for place in places}
    answers = [
      Answer(prompts[i].asked, texts[i, s], prompts[i].row, found[i, s].tokens, numbers[i])
      for i, s in places
    ]
    result = self.reward.score(answers)
    self._reward_metrics = dict(result.metrics)
    for (part, why), times in result.missing.items():
      self.say(f"batch {self._batches}: {part} was missing {times} times: {why}")
    scored = dict(zip(places, result.answers))
    spent["scoring"] += time.monotonic() - began
    of = lambda table, i: [table[i, sample] for sample in range(o.samples)]
    return [
      Group(numbers[i], prompts[i], of(found, i), of(texts, i), of(scored, i)) for i in range(count)
    ]

  def _prompt(self, number: int) -> Prompt:
    """The prompt that is asked in that place: every epoch has its own order."""
    epoch, at = divmod(number, len(self.prompts))
    order = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.prompts))
    return self.prompts[order[at]]

  def _say_dead(self, kept: Sequence[Group], dead: Sequence[Group], rounds: int) -> None:
    rate = groups_lib.pass_rate([*kept, *dead], self.config.online.outcome)
    self.say(
      f"batch {self._batches}: only {len(kept)} of {len(kept) + len(dead)} groups of {rounds} rounds have answers that"
      f" differ (mean outcome {rate:.2f}); it is filled up with groups that teach nothing. Too hard, too easy, or a"
      " verifier that says the same of all"
    )

  def _tell(
    self,
    every: Sequence[Group],
    kept: Sequence[Group],
    spent: Mapping[str, float],
    rounds: int,
    beside: Mapping[str, float],
  ) -> None:
    seconds = max(spent["all"], 1e-9)
    self._told = {
      **self._reward_metrics,
      **beside,
      **groups_lib.metrics(every, self.config.online.outcome),
      **groups_lib.passed(every, self.reward.most),
      "dynamic_sampling/rounds": float(rounds),
      "dynamic_sampling/kept": len(kept) / len(every),
      "timing_s/writing": spent["writing"],
      "timing_s/scoring": spent["scoring"],
      "timing_share/writing": spent["writing"] / seconds,
      "timing_share/scoring": spent["scoring"] / seconds,
    }


def check_step(config: Config, values: Mapping[str, float]) -> None:
  """Raises Diverged where the sampler and the trainer do not compute the same distribution."""
  if not is_online(config):
    return
  drift, most = values.get("sampling/logp_difference", 0.0), config.online.most_drift
  if not drift <= most:  # NaN is no agreement
    raise Diverged(
      f"the log-probabilities that answers were drawn with differ from the trainer's by {drift:.3g} nats a token on"
      f" average, above online.most_drift={most:g}: the policy learns from answers of another one. Are its weights the"
      " sampler's, and both of one precision?"
    )


def _digest(arrays: Any) -> str:
  """What tells weights from others."""
  digest = hashlib.blake2b(digest_size=16)
  for leaf in jax.tree.leaves(arrays):
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()
