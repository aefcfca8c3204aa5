"""config.online: batches that the policy writes itself.  Prompts, answers, scores, advantages, rows.

Online learning is the ordinary loop with this source of batches.  A batch depends on the weights that wrote it, on the
seed and on how many were written before, so that a run that is killed anywhere writes the same ones again.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from posttrain_jax import adapters
from posttrain_jax.build import data as data_lib
from posttrain_jax.build import scoring
from posttrain_jax.build.adapter import Trees
from posttrain_jax.build.data import Data
from posttrain_jax.build.model import Model
from posttrain_jax.core import tree
from posttrain_jax.data import answers, questions, templates
from posttrain_jax.data.encoded import Example
from posttrain_jax.data.errors import RowError
from posttrain_jax.data.packing import pack_answers
from posttrain_jax.evals import tasks
from posttrain_jax.losses import advantage
from posttrain_jax.models import decoder
from posttrain_jax.objectives import Context, Scorer
from posttrain_jax.objectives.rows import spans
from posttrain_jax.rewards import section, selftest
from posttrain_jax.rewards.reward import Reward, Scored
from posttrain_jax.rewards.verifier import Answer
from posttrain_jax.rollout import engine as engine_lib
from posttrain_jax.rollout.requests import Answer as Written
from posttrain_jax.rollout.requests import Request
from posttrain_jax.rollout.sampling import Sampling
from posttrain_jax.runs import completions
from posttrain_jax.settings import ConfigError
from posttrain_jax.train.loop import Diverged
from posttrain_jax.train.state import State

Config = ml_collections.ConfigDict
EDGES = 4  # lengths of rows, each of them a program


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
  """What is asked: its tokens, and the row that verifiers are given."""

  tokens: np.ndarray
  asked: Any  # a string, or messages
  row: Mapping[str, Any]
  origin: str
  channel: str | None = None
  is_chat: bool = False

  @property
  def mask(self) -> np.ndarray:
    return np.zeros(len(self.tokens), bool)  # what is trained is yet to be written

  def __len__(self) -> int:
    return len(self.tokens)


def is_online(config: Config) -> bool:
  """Whether the run writes its own batches."""
  return "online" in config


def read(config: Config, model: Model) -> Data:
  """The prompts of config.data.

  Raises:
    RowError: a prompt that leaves no room for an answer.
    ConfigError: a row of a group that the model writes would not fit data.length.
  """
  d, most = config.data, config.online.max_new_tokens
  if d.train in tasks.TASKS:
    task = tasks.TASKS[d.train]
    asked: list[dict[str, Any]] = [
      dict(row, row=row, origin=f"{task.name}/train:{i}")
      for i, row in enumerate(task.examples("train"), 1)
    ]
  else:
    with data_lib.told_of("data.train"):
      rows = data_lib.read_rows(config, model, d.train, "train", d.columns)
      asked = [questions.of(row, model.tokenizer) for row in rows]
  if d.limit:
    order = np.random.default_rng(config.seed).permutation(len(asked))[: d.limit]
    asked = [asked[i] for i in sorted(order)]
  ids = questions.tokens(asked, model.tokenizer, model.template)
  prompts = tuple(
    Prompt(
      tokens=np.asarray(tokens, np.int32),
      asked=question["prompt"],
      row=_row(question),
      origin=question["origin"],
      channel=question["channel"],
      is_chat=not isinstance(question["prompt"], str),
    )
    for question, tokens in zip(asked, ids)
  )
  room = data_lib.bounds_of(config, model).room
  longest = max(prompts, key=len)
  if len(longest) + most > room:
    raise RowError(
      "too long",
      longest.origin,
      f"its prompt has {len(longest)} tokens of the {room} that the model reads, which leaves too few for"
      f" online.max_new_tokens={most}",
      "lower online.max_new_tokens, or leave the row out",
    )
  share = 1 if d.share_prompt else config.online.samples
  needed = len(longest) * share + config.online.samples * (most + 1)
  if needed > d.length:
    raise ConfigError(
      f"data.length={d.length}: a row holds the answers to one prompt, {config.online.samples} of {most} tokens behind"
      f" {len(longest)} of the longest prompt ({longest.origin}): write data.length={needed} or more, or lower"
      " online.samples or online.max_new_tokens"
    )
  return Data(prompts, (), (), "")


def _row(question: Mapping[str, Any]) -> dict[str, Any]:
  """What verifiers are given: the row's own columns, and its answer as `gold` where it has one."""
  gold = {} if question["gold"] is None else {"gold": question["gold"]}
  return {**question["row"], **gold}


@dataclasses.dataclass
class _Group:
  """The answers to a prompt, with their scores: NaN where one is missing."""

  number: int  # of the prompt among all that were asked
  prompt: Prompt
  written: list[Written]
  texts: list[str]
  scored: list[Scored]

  @property
  def scores(self) -> np.ndarray:
    totals = (one.total.value for one in self.scored)
    return np.asarray([np.nan if value is None else value for value in totals], np.float32)

  def outcomes(self, part: str) -> np.ndarray:
    """Of each answer the score of a part, before anything shapes it; "" for the total."""
    if not part:
      return self.scores
    values = (one.parts[part].value for one in self.scored)
    return np.asarray([np.nan if value is None else value for value in values], np.float32)

  def is_dead(self, part: str) -> bool:
    """Whether its answers agree, so that there is nothing to learn from them."""
    known = self.outcomes(part)
    known = known[~np.isnan(known)]
    return len(known) < 2 or float(known.max() - known.min()) <= 1e-6 * max(1.0, abs(known).max())


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
    self.folder: Path | None = None
    o = config.online
    self.sampling = Sampling(o.temperature)
    self._batches = 0  # written
    self._asked = 0  # prompts, of all rounds
    self._left: list[Any] = []  # of the batch that was written last
    self._told: dict[str, float] = {}
    self._engine: engine_lib.Engine | None = None
    self._old_logps = jax.jit(self._scored)

  def bind(self, trees: Trees, objective: Scorer) -> None:
    """What is trained, and what computes its log-probabilities."""
    self.context, self.objective = trees.context, objective
    self._is_full = trees.adapter_config is None

  @property
  def epoch(self) -> float:
    return self._asked / len(self.prompts)

  def batch(self, state: State | None) -> Mapping[str, Any]:
    """The next one, written by this state's weights unless some of the last are left.

    state: None for a batch of the largest shape, for a program that is compiled and not run.
    """
    if state is None:
      return self._blank()
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
    if self._is_full:
      return
    moved = jax.tree.map(lambda x: x + jnp.asarray(0.02, x.dtype), state.trainable)
    probe = self.prompts[0].tokens.tolist()
    read = []
    for trainable in (state.trainable, moved):
      self._load(trainable, state.carried)
      ((_, answer),) = self._writer.run([Request(probe, 1, stop_tokens=())])
      read.append(float(answer.logps[0]))
    if read[0] == read[1]:
      raise ValueError(
        "a changed adapter leaves the sampler's log-probabilities as they were: what writes does not have the weights"
        " that are trained"
      )

  def _write(self, state: State) -> list[Mapping[str, Any]]:
    o, config = self.config.online, self.config
    wanted = config.batch.rows * o.minibatches
    self._batches += 1
    began = time.monotonic()
    self._load(state.trainable, state.carried)
    journal = completions.Journal(self.folder, self._batches, _digest(state.trainable))
    kept: list[_Group] = []
    dead: list[_Group] = []
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
    batches = self._rows(kept, state)
    spent["all"] = time.monotonic() - began
    self._tell(every, kept, spent, rounds)
    completions.write(self.folder, self._batches, self._table(every, kept))
    if len(batches) > 1:
      saved = config.checkpoint.every * (
        config.checkpoint.keep + 1
      )  # steps that checkpoints go back
      completions.keep(self.folder, self._batches, batches, last=saved // len(batches) + 1)
    journal.close()
    return batches

  def _ask(self, count: int, journal: completions.Journal, spent: dict[str, float]) -> list[_Group]:
    """That many groups, written and scored; what the journal has is not paid for again."""
    o, began = self.config.online, time.monotonic()
    numbers = range(self._asked, self._asked + count)
    self._asked += count
    prompts = [self._prompt(number) for number in numbers]
    places = [(i, sample) for i in range(count) for sample in range(o.samples)]
    stops = self._stops
    ask = lambda i, sample: Request(
      prompts[i].tokens.tolist(),
      o.max_new_tokens,
      sampling=self.sampling,
      stop_tokens=stops,
      seed=self.config.seed,
      number=numbers[i],
      sample=sample,
    )
    found: dict[tuple[int, int], Written] = {}
    for i, sample in places:
      if (old := journal.written(numbers[i], sample)) is not None:
        tokens, logps, ended = old
        found[i, sample] = Written(ask(i, sample), tokens, logps, ended)
    open_places = [place for place in places if place not in found]
    for at, written in self._writer.run(ask(*place) for place in open_places):
      i, sample = open_places[at]
      found[i, sample] = written
      journal.put(numbers[i], sample, written.tokens, written.logps, written.ended)
    spent["writing"] += time.monotonic() - began
    began = time.monotonic()
    decode = functools.partial(self.model.tokenizer.decode, skip_special_tokens=True)
    texts = {place: decode(found[place].tokens) for place in places}
    answers_ = [
      Answer(prompts[i].asked, texts[i, s], prompts[i].row, found[i, s].tokens, numbers[i])
      for i, s in places
    ]
    result = self.reward.score(answers_)
    self._reward_metrics = dict(result.metrics)
    for (part, why), times in result.missing.items():
      self.say(f"batch {self._batches}: {part} was missing {times} times: {why}")
    scored = dict(zip(places, result.answers))
    spent["scoring"] += time.monotonic() - began
    of = lambda table, i: [table[i, sample] for sample in range(o.samples)]
    return [
      _Group(numbers[i], prompts[i], of(found, i), of(texts, i), of(scored, i))
      for i in range(count)
    ]

  def _prompt(self, number: int) -> Prompt:
    """The prompt that is asked in that place: every epoch has its own order."""
    epoch, at = divmod(number, len(self.prompts))
    order = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.prompts))
    return self.prompts[order[at]]

  @functools.cached_property
  def _stops(self) -> tuple[int, ...]:
    model = self.model
    ends = (
      None if model.template is None else templates.end_of_turn(model.tokenizer, model.template)
    )
    stops = {*engine_lib.stop_tokens(model.config, model.tokenizer, model.folder)}
    return tuple(sorted(stops | (set() if ends is None else {ends})))

  @property
  def _writer(self) -> engine_lib.Engine:
    assert self._engine is not None
    return self._engine

  @functools.cached_property
  def _ready(self) -> Any:
    """(base, trainable, carried) -> what the engine reads, one program."""

    def ready(base: Any, trainable: Any, carried: Any) -> engine_lib.Ready:
      params = (
        trainable if self._is_full else adapters.merge(base, tree.combine(trainable, carried))
      )
      apart = jax.default_backend() == "cpu"
      config = self.model.config
      return engine_lib.Ready(params, decoder.unstack(params, config) if apart else params)

    return jax.jit(ready)

  def _load(self, trainable: Any, carried: Any) -> None:
    ready = self._ready(self.context.base, trainable, carried)
    if self._engine is not None:
      self._engine.load(ready)
      return
    o = self.config.online
    answers_ = self.config.batch.rows * o.minibatches * o.samples
    self._engine = engine_lib.Engine(
      ready,
      self.model.config,
      rows=min(o.rows, answers_),
      length=max(map(len, self.prompts)) + o.max_new_tokens,
      dtype=self.model.dtype,
    )

  def _rows(self, groups: Sequence[_Group], state: State) -> list[Mapping[str, Any]]:
    """The updates' batches, in the order in which they are taken."""
    o, rows = self.config.online, self.config.batch.rows
    advantages = _advantages(self.config, np.stack([group.scores for group in groups]))
    examples = [self._example(group, a) for group, a in zip(groups, advantages)]
    edge = next(e for e in self._edges if max(map(len, examples)) <= e)
    packed = []
    for number in range(o.passes):
      order = np.arange(len(examples))
      if number:
        order = np.random.default_rng((self.config.seed, self._batches, number)).permutation(order)
      for start in range(0, len(order), rows):
        some = [[int(i)] for i in order[start : start + rows]]
        shares = self.config.data.share_prompt
        packed.append(pack_answers(examples, some, edge, o.samples, shares=shares))
    if len(packed) == 1:
      return packed
    context = state.context(self.context)
    return [
      {**batch, "old_logps": np.asarray(self._old_logps(state.trainable, context, batch))}
      for batch in packed
    ]

  @functools.cached_property
  def _edges(self) -> tuple[int, ...]:
    length = self.config.data.length
    return tuple(
      dict.fromkeys(min(length, -(-length * i // EDGES // 64) * 64) for i in range(1, EDGES + 1))
    )

  def _example(self, group: _Group, advantages: np.ndarray) -> answers.Answers:
    """The group as a row; what could not be scored is left out."""
    scores, o = group.scores, self.config.online
    kept = [i for i in range(len(scores)) if not np.isnan(scores[i])]
    if not kept:  # the row teaches nothing, and its place is kept
      kept = [0]
    prompt = group.prompt.tokens
    parts = []
    for i in kept:
      tokens = np.asarray(group.written[i].tokens, np.int32)
      mask = np.arange(len(prompt) + len(tokens)) >= len(prompt)
      parts.append(Example(np.concatenate([prompt, tokens]), mask, origin=group.prompt.origin))
    known = scores[~np.isnan(scores)]
    deviation = float(known.std(ddof=1)) if len(known) > 1 else 0.0
    values = {
      "score": [float(scores[i]) for i in kept],
      "advantage": [0.0 if np.isnan(scores[i]) else float(advantages[i]) for i in kept],
      "deviation": [deviation] * len(kept),
    }
    joined = answers.join(parts, share=self.config.data.share_prompt, values=values)
    sampling, mask = np.zeros(len(joined.tokens), np.float32), joined.mask.copy()
    for place, i in enumerate(kept):
      here = joined.mask & (joined.answer == place)
      sampling[here] = group.written[i].logps
      if o.mask_cut and not group.written[i].finished:
        mask[here] = False
    return dataclasses.replace(joined, sampling_logps=sampling, mask=mask)

  def _scored(self, trainable: Any, context: Context, batch: Mapping[str, Any]) -> jax.Array:
    """[rows, time]: log-probabilities of the answers' tokens before any update of the batch."""
    forward = self.objective.forward(trainable, context, batch, None, training=False)
    mask = spans(batch).mask
    temperature = self.config.online.temperature
    return self.objective.scores(forward, batch, mask, temperature=temperature).logp

  def _blank(self) -> Mapping[str, Any]:
    """A batch of the largest shape, for a program that is compiled and not run."""
    o, length = self.config.online, self.config.data.length
    example = dataclasses.replace(
      answers.blank("scored", with_ref_logps=False, with_companion=False),
      sampling_logps=np.zeros(2, np.float32),
    )
    rows = [[0]] * self.config.batch.rows
    batch = pack_answers([example], rows, length, o.samples, shares=self.config.data.share_prompt)
    if o.minibatches * o.passes > 1:
      batch["old_logps"] = np.zeros((len(rows), length), np.float32)
    return batch

  def _say_dead(self, kept: Sequence[_Group], dead: Sequence[_Group], rounds: int) -> None:
    rate = _pass_rate([*kept, *dead], self.config.online.outcome)
    self.say(
      f"batch {self._batches}: only {len(kept)} of {len(kept) + len(dead)} groups of {rounds} rounds have answers that"
      f" differ (mean outcome {rate:.2f}); it is filled up with groups that teach nothing. Too hard, too easy, or a"
      " verifier that says the same of all"
    )

  def _tell(
    self,
    every: Sequence[_Group],
    kept: Sequence[_Group],
    spent: Mapping[str, float],
    rounds: int,
  ) -> None:
    part = self.config.online.outcome
    written = [answer for group in every for answer in group.written]
    dead = collections.Counter(
      round(float(np.nanmean(group.outcomes(part))), 3) for group in every if group.is_dead(part)
    )
    seconds = max(spent["all"], 1e-9)
    self._told = {
      **self._reward_metrics,
      "completions/clipped_ratio": statistics.fmean(not a.finished for a in written),
      "completions/max_length": float(max(len(a.tokens) for a in written)),
      "completions/min_length": float(min(len(a.tokens) for a in written)),
      **self._passed(every),
      "frac_groups_dead": sum(dead.values()) / len(every),
      "frac_groups_all_zero": dead.get(0.0, 0) / len(every),
      "frac_groups_all_one": dead.get(1.0, 0) / len(every),
      "dynamic_sampling/rounds": float(rounds),
      "dynamic_sampling/kept": len(kept) / len(every),
      "timing_s/writing": spent["writing"],
      "timing_s/scoring": spent["scoring"],
      "timing_share/writing": spent["writing"] / seconds,
      "timing_share/scoring": spent["scoring"] / seconds,
    }

  def _passed(self, groups: Sequence[_Group]) -> dict[str, float]:
    """pass@1 and pass@N of what has a score; right is the highest reward there is, {} where it has no bound."""
    most = self.reward.most
    known = [group.scores[~np.isnan(group.scores)] for group in groups]
    known = [scores for scores in known if len(scores)]
    if most is None or not known:
      return {}
    right = [float(np.mean(scores >= most - 1e-6)) for scores in known]
    return {
      "pass@1": statistics.fmean(right),
      f"pass@{self.config.online.samples}": statistics.fmean(share > 0 for share in right),
    }

  def _table(self, every: Sequence[_Group], kept: Sequence[_Group]) -> list[dict[str, Any]]:
    """A row an answer, as TRL's table of completions has them."""
    rows = []
    for group in every:
      for i, (answer, text, scored) in enumerate(zip(group.written, group.texts, group.scored)):
        rows.append(
          {
            "batch": self._batches,
            "prompt": json.dumps(group.prompt.asked, ensure_ascii=False),
            "completion": text,
            "number": group.number,
            "sample": i,
            "reward": scored.total.value,
            "missing": scored.total.reason,
            **{f"rewards/{name}": part.value for name, part in scored.parts.items()},
            "tokens": answer.tokens,
            "ended": answer.ended,
            "used": group in kept,
          }
        )
    return rows


def check_step(config: Config, values: Mapping[str, float]) -> None:
  """Raises Diverged where the sampler and the trainer do not compute the same distribution."""
  if not is_online(config):
    return
  drift, most = values.get("sampling/logp_difference", 0.0), config.online.most_drift
  if drift > most:
    raise Diverged(
      f"the log-probabilities that answers were drawn with differ from the trainer's by {drift:.3g} nats a token on"
      f" average, above online.most_drift={most:g}: the policy learns from answers of another one. Are its weights the"
      " sampler's, and both of one precision?"
    )


def _advantages(config: Config, scores: np.ndarray) -> np.ndarray:
  how, rewards = config.objective.advantage, jnp.asarray(scores)
  if how == "leave_one_out":
    return np.asarray(advantage.leave_one_out(rewards))
  if how == "max_rl":
    return np.asarray(advantage.over_mean(rewards))
  if how == "whitened":
    centred = advantage.group_relative(rewards, scale="none")
    return np.asarray(advantage.whiten(centred, ~jnp.isnan(rewards)))
  return np.asarray(advantage.group_relative(rewards, scale=how))


def _digest(arrays: Any) -> str:
  """What tells weights from others."""
  digest = hashlib.blake2b(digest_size=16)
  for leaf in jax.tree.leaves(arrays):
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()


def _pass_rate(groups: Sequence[_Group], part: str) -> float:
  outcomes = np.concatenate([group.outcomes(part) for group in groups])
  return float(np.nanmean(outcomes)) if len(outcomes) else 0.0
