"""config.online: batches that the policy writes itself.  Prompts, answers, scores, advantages, rows.

Online learning is the ordinary loop with this source of batches.  A batch depends on the weights that wrote it, on the
seed and on how many were written before, so that a run that is killed anywhere writes the same ones again.

Each of several processes writes and scores the answers to its own prompts, alone; then all are told of all answers and
scores, make the same batch of them and take their own rows.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import ml_collections
import numpy as np

from posttrain_jax import settings
from posttrain_jax.build import curriculum, decisions, gold, methods, scoring, tools
from posttrain_jax.build import groups as groups_lib
from posttrain_jax.build import turns as turns_lib
from posttrain_jax.build.adapter import Trees
from posttrain_jax.build.data import Data
from posttrain_jax.build.elsewhere import Elsewhere
from posttrain_jax.build.groups import Group
from posttrain_jax.build.model import Model
from posttrain_jax.build.teacher import Teacher
from posttrain_jax.build.turns import Turns
from posttrain_jax.build.writer import Writer
from posttrain_jax.core import distributed, progress, tree, words
from posttrain_jax.environments.episode import FAILED, Episode, restored
from posttrain_jax.objectives import Scorer
from posttrain_jax.rewards import alarm, section, selftest
from posttrain_jax.rewards import columns as columns_lib
from posttrain_jax.rewards import reward as reward_lib
from posttrain_jax.rewards.ledger import Ledger
from posttrain_jax.rewards.overlapped import Overlapped
from posttrain_jax.rewards.reward import Result, Reward
from posttrain_jax.rewards.verifier import Answer, TrainerState
from posttrain_jax.rewards.workers import Interrupted
from posttrain_jax.rollout.requests import Answer as Written
from posttrain_jax.rollout.requests import Request
from posttrain_jax.runs import completions
from posttrain_jax.train.loop import Diverged
from posttrain_jax.train.signals import Stopped
from posttrain_jax.train.state import State

Config = ml_collections.ConfigDict
T = TypeVar("T")
UNSCORED = 3  # batches in a row without any score after which the run ends
NOT_WRITTEN_BY = (
  *scoring.SECTIONS,
  *settings.LENGTH,
)  # sections that say nothing of how answers are drawn


def is_online(config: Config) -> bool:
  """Whether the run writes its own batches."""
  return "online" in config


class Unscored(RuntimeError):
  """No answer of several batches in a row has a score."""


class Online:
  """The source of a run's batches: it writes them with the weights of the state that is to learn from them."""

  def __init__(
    self,
    config: Config,
    model: Model,
    data: Data,
    say: Callable[[str], None],
    mesh: jax.sharding.Mesh | None = None,
  ) -> None:
    self.config, self.model, self.prompts, self.say = config, model, data.examples, say
    self.mesh = mesh
    columns, partly = columns_lib.of([(prompt.row, prompt.origin) for prompt in self.prompts])
    columns += turns_lib.COLUMNS if tools.is_on(config) else ()
    self._stopping: Callable[[], bool] = lambda: False
    with distributed.alone(mesh):  # each has the reward models that it scores with
      self.reward, self.holdout = scoring.make(config, columns, partly, lambda: self._stopping())
    if config.objective.get("advantage") == "max_rl":
      scoring.check_not_negative(self.reward)
    outcome = config.online.outcome
    self.outcome = self.reward.outcome(
      scoring.titles(settings.plain(config.reward)).get(outcome, outcome)
    )
    self._identities = [scoring.identity(settings.plain(config[name])) for name in scoring.SECTIONS]
    o = config.online
    self.order = curriculum.make(
      o.curriculum, self.prompts, seed=config.seed, answers=o.samples, outcome=self.outcome
    )
    # of the batch under way: place of a prompt among all that were asked -> which one it is
    self._chosen: dict[int, int] = {}
    self.writer = (
      Elsewhere(config, model, self.prompts, lambda: self.folder, lambda: self._stopping(), mesh)
      if o.engine
      else Writer(config, model, self.prompts, mesh)
    )
    self.turns = Turns(config, model) if tools.is_on(config) else None
    if self.turns is not None:
      self.turns.check_columns(columns, partly)
      self.turns.check_reward(self.reward.names, say)
    self.updates = methods.make(config, model.config.vocab_size, mesh)
    self.updates.gold = gold.rows(config, model, self.updates.of_data)
    self.folder: Path | None = None
    self._batches = 0  # written
    self._asked = 0  # prompts, of all rounds
    self._left: list[Any] = []  # of the batch that was written last
    self._told: dict[str, float] = {}
    self._unscored = 0  # batches in a row without any score
    self._ended: float | None = None  # when this process had written its last batch
    self._watch = alarm.Watch()

  def bind(self, trees: Trees, objective: Scorer, teacher: Teacher | None = None) -> None:
    """What is trained, and what computes its log-probabilities."""
    self.writer.bind(trees)
    self.updates.bind(trees, objective, teacher)

  @property
  def epoch(self) -> float:
    return self._asked / len(self.prompts)

  def batch(
    self, state: State | None, stopping: Callable[[], bool] = lambda: False
  ) -> Mapping[str, Any]:
    """The next one, written by this state's weights unless some of the last are left; this process's rows of it.

    state: None for a batch of the largest shape, for a program that is compiled and not run.

    Raises:
      Stopped: `stopping` said so while it was written; answers and scores that are there stay in their files.
      Unscored: no answer of the last batches has a score.
    """
    if state is None:
      return distributed.own_rows(self.mesh, self.updates.blank())
    if not self._left:
      before = self._batches, self._asked
      self._stopping = stopping
      try:
        self._left = self._write(state)
      except Stopped:
        self._batches, self._asked = before
        raise
    return distributed.own_rows(self.mesh, self._left.pop(0))

  def _go_on(self) -> None:
    """Raises Stopped where the run is to stop."""
    if self._stopping():
      raise Stopped("saved, with the answers of the next batch that are written")

  def _together(self, work: Callable[[], T]) -> list[T]:
    """What each process's work gives.  Raises Stopped in all of them where it does in one."""
    done: T | Stopped
    try:
      with distributed.alone(self.mesh):
        done = work()
    except Stopped as error:
      done = error
    every = distributed.exchanged(done)
    for one in every:
      if isinstance(one, Stopped):
        raise one
    return [one for one in every if not isinstance(one, Stopped)]

  def told(self, step: int) -> Mapping[str, float]:
    del step
    return dict(self._told)

  def get_state(self) -> dict:
    return {
      "batches": self._batches,
      "asked": self._asked,
      "left": len(self._left),
      "told": self._told,
      "unscored": self._unscored,
      "history": [[*pair] for pair in self._watch.history],
      "kl_coefficient": self.updates.kl_coefficient,
      "curriculum": self.order.get_state(),
    }

  def set_state(self, state: dict) -> None:
    self._batches, self._asked = state["batches"], state["asked"]
    self._told = state["told"]
    # which checkpoints of earlier versions lack
    self._unscored = state.get("unscored", 0)
    self.updates.kl_coefficient = state.get("kl_coefficient", self.updates.kl_coefficient)
    self.order.set_state(state.get("curriculum", {}))
    self._watch = alarm.Watch([(reward, other) for reward, other in state["history"]])
    self._left = []
    if state["left"]:  # of a batch that is used several times
      assert self.folder is not None
      every = completions.arrays(self.folder, self._batches)
      self._left = every[len(every) - state["left"] :]

  def steps(self, epochs: float) -> int:
    o = self.config.online
    per_batch = decisions.asked_rows(self.config) * o.minibatches
    return max(1, round(epochs * len(self.prompts) / per_batch)) * o.minibatches * o.passes

  def epochs(self, steps: int) -> float:
    o = self.config.online
    return steps / o.passes * decisions.asked_rows(self.config) / len(self.prompts)

  def stats(self) -> str:
    o, rows = self.config.online, decisions.asked_rows(self.config)
    written = rows * o.minibatches
    used = f", used for {o.minibatches * o.passes} updates" if o.minibatches * o.passes > 1 else ""
    return (
      f"{len(self.prompts):,} prompts; a batch is {written} prompts x {o.samples} = {written * o.samples} answers of at"
      f" most {o.max_new_tokens} tokens{self._gold_said()}{used}{self._outcome_said()}"
      f"{self.turns.stats() if self.turns is not None else ''}"
    )

  def _gold_said(self) -> str:
    count = decisions.gold_rows(self.config)
    beside = f" and {words.count(count, 'answer')} of the data beside them in each update"
    return beside if count else ""

  def _outcome_said(self) -> str:
    """What says whether an answer is right, where that is not the reward; "" where it is."""
    names = self.outcome.names
    if self.outcome is self.reward or names == self.reward.names:
      return ""
    left_out = [part.name for part in self.reward.parts if part.name not in names]
    apart = f", without {', '.join(left_out)}," if left_out else ""
    says = "says" if len(names) == 1 else "together say"
    return (
      f"\noutcome: {', '.join(names)}{apart} {says} which answers are right and which groups agree"
      " (online.outcome)"
    )

  def check(self, state: State) -> None:
    """Verifiers tell right from wrong, and a changed adapter reaches what writes.

    Raises:
      ConfigError: they do not.
      ValueError: other weights write the same.
    """
    tokenizer = self.model.tokenizer
    some = [
      section.reference(prompt.asked, prompt.row, tokenizer)
      for prompt in self.prompts[: selftest.PAIRS]
    ]
    for section_name, reward in zip(scoring.SECTIONS, (self.reward, self.holdout), strict=True):
      if reward is not None:
        tried = turns_lib.testable(reward)
        with distributed.alone(self.mesh):
          told = selftest.check(tried, some, section=section_name) if tried else ()
        for sentence in told:
          self.say(sentence)
    self.writer.check(state)

  @property
  def _rewards(self) -> dict[str, Reward]:
    """By the name of what their scores depend on, that of the section first."""
    both = zip(scoring.SECTIONS, self._identities, (self.reward, self.holdout), strict=True)
    return {f"{name} {by}": reward for name, by, reward in both if reward is not None}

  def _write(self, state: State) -> list[Mapping[str, Any]]:
    o, config = self.config.online, self.config
    wanted = decisions.asked_rows(config) * o.minibatches
    self._batches += 1
    self._chosen = {}
    with progress.announced("updating", self.say):
      jax.block_until_ready(state.trainable)  # of the last update
    self._together(self._go_on)
    began = time.monotonic()
    self.writer.load(state.trainable, state.carried)
    asked = self.order.get_state()
    writer = f"{tree.digest(state.trainable)} {self._asks}{f' {_named(asked)}' if asked else ''}"
    journal = completions.Journal(
      self.folder, self._batches, writer, last=self._goes_back, process=jax.process_index()
    )
    spent: dict[str, float] = {"writing": 0.0, "scoring": 0.0}
    with contextlib.closing(journal):
      with self._ledger() as ledger:
        kept, dead, results = self._rounds(wanted, journal, ledger, spent)
      self._begin_ahead(wanted)
      return self._learned(state, kept, dead, results, spent, began)

  def _begin_ahead(self, count: int) -> None:
    """The answers of the next batch, where an engine elsewhere writes while this program updates."""
    o = self.config.online
    per_batch, steps = o.minibatches * o.passes, self.config.steps
    is_last = steps is not None and self._batches * per_batch >= steps
    if not o.ahead or is_last or not isinstance(self.writer, Elsewhere):
      return
    numbers = range(self._asked, self._asked + count)
    chosen = self.order.choose(numbers, ())  # prompts in turn: a curriculum does not go with this
    self.writer.ahead(
      self.writer.request(self.prompts[i], number, sample)
      for number, i in distributed.part([*zip(numbers, chosen)])
      for sample in range(o.samples)
    )

  def _learned(
    self,
    state: State,
    kept: list[Group],
    dead: list[Group],
    results: list[list[Result]],
    spent: dict[str, float],
    began: float,
  ) -> list[Mapping[str, Any]]:
    """The batches of the updates that learn from what was written, which is told and kept."""
    o, wanted = (
      self.config.online,
      decisions.asked_rows(self.config) * self.config.online.minibatches,
    )
    if len(kept) < wanted:  # a batch has as many rows whatever happens
      if o.dynamic:
        self._say_dead(kept, dead, len(results))
      kept += dead[: wanted - len(kept)]
    every = [*kept, *(group for group in dead if group not in kept)]
    batches, beside = self.updates.of(kept, state, self._batches)
    now, self._ended = time.monotonic(), self._ended or began
    spent["all"], self._ended = now - self._ended, now
    beside["dynamic_sampling/rounds"] = float(len(results))
    beside["dynamic_sampling/kept"] = len(kept) / len(every)
    beside |= self.order.saw([(self._chosen[g.number], g) for g in every], self.outcome)
    beside |= self._scores_told([reward_lib.together(rounds) for rounds in zip(*results)])
    self._check_scored(every)
    self._tell(every, spent, beside)
    if distributed.is_main():
      table = groups_lib.table(self._batches, every, kept, self.outcome)
      completions.write(self.folder, self._batches, table)
      if len(batches) > 1:
        completions.keep(self.folder, self._batches, batches, last=self._goes_back)
    return batches

  def _rounds(
    self,
    wanted: int,
    journal: completions.Journal,
    ledger: Ledger | None,
    spent: dict[str, float],
  ) -> tuple[list[Group], list[Group], list[list[Result]]]:
    """(groups to learn from, at most as many as are wanted; dead ones; results of each round, by each reward)."""
    o = self.config.online
    kept: list[Group] = []
    dead: list[Group] = []
    results: list[list[Result]] = []
    while len(kept) < wanted and len(results) < (o.most_rounds if o.dynamic else 1):
      groups, of_round = self._ask(wanted - len(kept), journal, ledger, spent)
      results.append(of_round)
      for group in groups:
        (dead if o.dynamic and group.is_dead(self.outcome) else kept).append(group)
    return kept, dead, results

  def _ledger(self) -> contextlib.AbstractContextManager[Ledger | None]:
    """Of the batch's scores.  It outlives the batch, which is written again where no checkpoint came behind it."""
    if self.folder is None:
      return contextlib.nullcontext()
    last, process = self._goes_back, jax.process_index()
    path = completions.scores(self.folder, self._batches, last=last, process=process)
    return Ledger(path, completions.of_all(path))

  @property
  def _goes_back(self) -> int | None:
    """How many batches lie behind the oldest checkpoint at most; None: all, as only the last one is saved."""
    c, o = self.config.checkpoint, self.config.online
    return c.every * (c.keep + 1) // (o.minibatches * o.passes) + 1 if c.every else None

  @functools.cached_property
  def _asks(self) -> str:
    """Names what an answer depends on beside the weights: prompts and fields, of which rewards are none."""
    kept = {k: v for k, v in settings.plain(self.config).items() if k not in NOT_WRITTEN_BY}
    fields = np.frombuffer(json.dumps(kept).encode(), np.uint8)
    lengths = np.asarray([len(prompt) for prompt in self.prompts])
    code = [] if self.turns is None else [np.frombuffer(self.turns.digest.encode(), np.uint8)]
    return _digest([fields, lengths, [prompt.tokens for prompt in self.prompts], *code])

  def _ask(
    self,
    count: int,
    journal: completions.Journal,
    ledger: Ledger | None,
    spent: dict[str, float],
  ) -> tuple[list[Group], list[Result]]:
    """(that many groups, what each reward says of them); what was written or scored before is not again.

    A group is scored as soon as it is whole, while others are written, where each answer is judged alone.
    """
    o = self.config.online
    numbers = range(self._asked, self._asked + count)
    self._asked += count
    chosen = self.order.choose(numbers, {*self._chosen.values()})
    self._chosen |= zip(numbers, chosen)
    groups = [Group(number, self.prompts[i]) for number, i in zip(numbers, chosen)]
    own = distributed.part(groups)
    shares = self._together(lambda: self._answered(own, journal, ledger, spent))
    written = {number: one for share, _ in shares for number, one in share.items()}
    for group in groups:
      group.written, group.texts = written[group.number]
    results = [
      reward_lib.together([scored[name] for _, scored in shares])
      if name in shares[0][1]
      else self._compared(name, groups, ledger, spent)
      for name in self._rewards
    ]
    if self.turns is not None:
      every = [answer for group in groups for answer in group.answers]
      results = [turns_lib.settled(one, every, o.unparsed) for one in results]
    for i, group in enumerate(groups):
      here = slice(i * o.samples, (i + 1) * o.samples)
      group.scored, *others = [result.answers[here] for result in results]
      group.held_out = others[0] if others else ()
      for prefix, result in zip(("", "holdout/"), results):
        group.columns |= {f"{prefix}{name}": x[here] for name, x in result.columns.items()}
    return groups, results

  def _answered(
    self,
    groups: Sequence[Group],
    journal: completions.Journal,
    ledger: Ledger | None,
    spent: dict[str, float],
  ) -> tuple[dict[int, tuple[dict[int, Written], list[str]]], dict[str, Result]]:
    """({number: (answers, texts)} of this process's groups, their scores by each reward).

    A reward that compares answers has no scores yet where other processes have some of them.
    """
    began, is_one = time.monotonic(), jax.process_count() == 1
    with contextlib.ExitStack() as open_ones:
      scores = {
        name: open_ones.enter_context(Overlapped(reward, ledger, name, self._trainer_state))
        for name, reward in self._rewards.items()
        if is_one or reward.is_per_answer
      }
      total = len(groups) * self.config.online.samples
      written_so_far = progress.lines("writing", self.say)
      for done, (group, sample, written) in enumerate(self._written(groups, journal), 1):
        written_so_far(done, total)
        group.written[sample] = written
        if len(group.written) == self.config.online.samples:
          answers = self._answers(group)
          for one in scores.values():
            one.put(group.number, answers)
      spent["writing"] += time.monotonic() - began
      results = self._results(scores, spent)
    return {group.number: (group.written, group.texts) for group in groups}, results

  def _compared(
    self, name: str, groups: Sequence[Group], ledger: Ledger | None, spent: dict[str, float]
  ) -> Result:
    """What a reward that compares answers says of those of all processes: the main one asks it."""

    def asked() -> Result:
      if not distributed.is_main():
        return reward_lib.together([])
      with Overlapped(self._rewards[name], ledger, name, self._trainer_state) as scores:
        for group in groups:
          scores.put(group.number, self._answers(group))
        return self._results({name: scores}, spent)[name]

    return self._together(asked)[0]

  def _results(
    self, scores: Mapping[str, Overlapped], spent: dict[str, float]
  ) -> dict[str, Result]:
    """What rewards say of all answers that they were given."""
    began = time.monotonic()
    with progress.announced("scoring", self.say):
      try:
        results = {name: one.result() for name, one in scores.items()}
      except Interrupted:  # scores that were there before stay in their file
        self._go_on()
        raise
    self._go_on()
    spent["scoring"] += time.monotonic() - began
    return results

  @property
  def _trainer_state(self) -> TrainerState:
    """What functions are told of the run when the batch under way is scored."""
    o, config = self.config.online, self.config
    steps = config.steps or self.steps(config.epochs)
    return TrainerState((self._batches - 1) * o.minibatches * o.passes, steps, self.epoch)

  def _written(
    self, groups: Sequence[Group], journal: completions.Journal
  ) -> Iterator[tuple[Group, int, Written]]:
    """(group, sample, answer) as they finish; first those that the journal has."""
    left = []
    for group in groups:
      for sample in range(self.config.online.samples):
        request = self.writer.request(group.prompt, group.number, sample)
        if (old := journal.written(group.number, sample)) is not None:
          yield group, sample, restored(request, old)
        else:
          left.append((group, request))
    for at, answer in self._run(left):
      group, request = left[at]
      if answer.ended != FAILED:  # which says nothing of what it would be another time
        journal.put(
          group.number,
          request.sample,
          tokens=answer.tokens,
          logps=answer.logps,
          ended=answer.ended,
          kept=answer.kept,
          beside=answer.beside if isinstance(answer, Episode) else None,
        )
      yield group, request.sample, answer

  def _run(self, asked: Sequence[tuple[Group, Request]]) -> Iterator[tuple[int, Written]]:
    """(place, answer) as they finish, of one turn or of several."""
    if self.turns is None:
      return self.writer.run((request for _, request in asked), self._go_on)
    pairs = ((request, group.prompt) for group, request in asked)
    return self.turns.run(self.writer.sampler, pairs, self._go_on)

  def _answers(self, group: Group) -> list[Answer]:
    """What verifiers are given of a group whose answers are all there."""
    prompt = group.prompt
    decode = functools.partial(self.model.tokenizer.decode, skip_special_tokens=True)
    group.texts = [
      answer.final if isinstance(answer, Episode) else decode(answer.tokens)
      for answer in group.answers
    ]
    return [
      Answer(
        prompt.asked,
        text,
        {**prompt.row, **turns_lib.columns(answer)},
        answer.tokens,
        group.number,
        answer.messages if isinstance(answer, Episode) else None,
      )
      for text, answer in zip(group.texts, group.answers)
    ]

  def _say_dead(self, kept: Sequence[Group], dead: Sequence[Group], rounds: int) -> None:
    rate = groups_lib.pass_rate([*kept, *dead], self.outcome)
    asked = f"{len(kept) + len(dead)} groups of {words.count(rounds, 'round')}"
    self.say(
      f"batch {self._batches}: only {len(kept)} of {asked} have answers that differ (mean outcome {rate:.2f}); it is"
      " filled up with groups that agree. Too hard, too easy, or a verifier that says the same of all"
    )

  def _scores_told(self, results: Sequence[Result]) -> dict[str, float]:
    """What each reward says of all rounds' answers; says what was missing, and whether the reward is gamed."""
    if scoring.is_silent(self.reward):
      return {}
    result, *others = results
    for one in results:
      for (part, why), times in one.missing.items():
        reason = reward_lib.counted(why, one.why[part, why])
        self.say(
          f"batch {self._batches}: {part} was missing {words.count(times, 'time')}: {reason}"
        )
    told = result.metrics
    for other in others:
      told |= {f"holdout/{name}": value for name, value in other.metrics.items()}
    known = "reward" in told and "holdout/reward" in told
    if known and (sentence := self._watch.add(told["reward"], told["holdout/reward"])):
      self.say(f"batch {self._batches}: {sentence}")
    return told

  def _check_scored(self, every: Sequence[Group]) -> None:
    """Raises Unscored after UNSCORED batches in a row without any score, whose scores are then asked for anew."""
    scored = [one.total for group in every for one in group.scored]
    reasons = Counter(total.reason for total in scored if total.is_missing)
    if sum(reasons.values()) < len(scored):
      self._unscored = 0
      return
    self._unscored += 1
    ((why, _),) = reasons.most_common(1)
    self.say(f"no answer of batch {self._batches} has a score ({why}): nothing is learned from it")
    if self._unscored < UNSCORED:
      return
    first = self._batches - UNSCORED + 1
    completions.forget_scores(self.folder, range(first, self._batches + 1))
    ails = "verifier", "reward.seconds"
    if any(isinstance(one, Episode) and one.ended == FAILED for g in every for one in g.answers):
      ails = "environment", "online.tool_seconds"
    raise Unscored(
      f"no answer of the batches {first} to {self._batches} has a score, the last time as {why}; nothing was learned"
      f" from them. With the {ails[0]} mended, or a higher {ails[1]} where it is slow, run the same command again:"
      " it goes on from the last checkpoint, and what is written is kept"
    )

  def _of_answers(self, every: Sequence[Group]) -> dict[str, float]:
    told = groups_lib.metrics(every, self.outcome) | groups_lib.passed(every, self.outcome)
    if not scoring.is_silent(self.reward):
      return told
    return {name: value for name, value in told.items() if name.startswith("completions/")}

  def _tell(
    self, every: Sequence[Group], spent: Mapping[str, float], beside: Mapping[str, float]
  ) -> None:
    seconds = max(spent["all"], 1e-9)
    parts = {name: spent[name] for name in ("writing", "scoring")}
    parts["updating"] = max(seconds - sum(parts.values()), 0.0)
    self._told = {
      **beside,
      **self._of_answers(every),
      **(self.writer.told() if isinstance(self.writer, Elsewhere) else {}),
      **turns_lib.metrics([answer for group in every for answer in group.answers]),
      **{f"timing_s/{name}": part for name, part in parts.items()},
      **{f"timing_share/{name}": part / seconds for name, part in parts.items()},
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


def _named(state: Mapping[str, Any]) -> str:
  """What tells the state of an order from others."""
  return _digest([np.frombuffer(json.dumps(state).encode(), np.uint8)])


def _digest(arrays: Any) -> str:
  """What tells weights, or other arrays, from others."""
  digest = hashlib.blake2b(digest_size=16)
  for leaf in jax.tree.leaves(arrays):
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()
