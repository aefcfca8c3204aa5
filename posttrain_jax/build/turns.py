"""config.online of a run whose answers have several turns: tools, environments, and what an episode is worth."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from posttrain_jax.build import tools
from posttrain_jax.build.model import Model
from posttrain_jax.build.prompts import Prompt
from posttrain_jax.data import questions, tool_calls
from posttrain_jax.environments import episode as kinds
from posttrain_jax.environments import named
from posttrain_jax.environments.episode import Episode
from posttrain_jax.environments.episodes import Asked, Episodes, InEngine, Rules, Sampler
from posttrain_jax.environments.host import Hosts
from posttrain_jax.evals import tasks
from posttrain_jax.models import before
from posttrain_jax.rewards import environment, score, trl
from posttrain_jax.rewards.environment import COLUMN, LEFT
from posttrain_jax.rewards.reward import Result, Reward, Scored
from posttrain_jax.rollout import engine
from posttrain_jax.rollout.requests import Answer, Request
from posttrain_jax.settings import ConfigError

Config = ml_collections.ConfigDict
COLUMNS = (COLUMN, LEFT)  # that rows of an environment have beside their own
PROMPT = "prompt"  # what a row is told by beside its own columns
CALLS = 4  # processes of tools that keep nothing, at most


class Turns:
  """Episodes of a run, whose template and reward `tools.check` has looked at."""

  def __init__(self, config: Config, model: Model) -> None:
    """Raises ConfigError where a turn of the template ends with no token of its own."""
    self.config, self.model = config, model
    o, about = config.online, tools.described(config)
    self.acts, self.scores, self.needs = about.acts, about.scores, about.needs
    try:
      self.rules = Rules(
        about,
        None if about.acts else tool_calls.form(model.template),
        tool_calls.Continuation(model.template, model.tokenizer, about.schemas),
        model.tokenizer,
        o.max_turns,
        o.tool_tokens,
        o.tool_seconds,
        bool(o.environment),
      )
    except ValueError as error:
      raise ConfigError(str(error)) from error
    self._hosts = Hosts(tools.source(config), 2 * o.rows if o.environment else CALLS)

  @property
  def digest(self) -> str:
    """Of the user's code that answers."""
    o = self.config.online
    return named.digest(o.environment, tuple(o.tools))

  def stats(self) -> str:
    """What is said of them before the run begins."""
    o = self.config.online
    what = f"environment {o.environment}" if o.environment else f"tools {', '.join(o.tools)}"
    own = " Its own reward is the verifier environment." if self.scores else ""
    bound = f"at most {o.max_turns} turns an answer, which online.max_new_tokens bounds as a whole"
    return f"\nturns: {what}; {bound}.{own}"

  def check_columns(self, columns: Collection[str], partly: Mapping[str, str]) -> None:
    """Raises ConfigError where the environment is reset with what the rows do not have; see `rewards.columns.of`."""
    if absent := [name for name in self.needs if name not in (PROMPT, *columns)]:
      raise ConfigError(
        f"online.environment: reset() of {self.config.online.environment} takes {absent[0]!r},"
        f" {trl.absent(absent[0], columns, partly)}"
      )

  def check_reward(self, parts: Sequence[str], say: Callable[[str], None]) -> None:
    """Says where the environment has a reward that this run does not read."""
    if self.scores and "environment" not in parts:
      say(
        "the environment has a reward of its own, which this run does not read (reward=environment does)"
      )

  def run(
    self,
    sampler: Sampler,
    asked: Iterable[tuple[Request, Prompt]],
    before_window: Callable[[], None] | None = None,
  ) -> Iterator[tuple[int, Episode]]:
    """(place, episode) as they finish."""
    episodes = Episodes(sampler, self._hosts, self.rules)
    return episodes.run((self._asked(*pair) for pair in asked), before_window)

  def answer(
    self,
    params: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    batch_size: int,
    dtype: Any,
    progress: Callable[[int, int], None] | None,
  ) -> list[tasks.Answered]:
    """Greedy answers to questions, as `evals.tasks.Turns` says."""
    prompts = _prompts(self.config, self.model, rows)
    most, room = self.config.online.max_new_tokens, tools.room(self.config)
    ready = engine.prepare(params, self.model.config)
    longest = before.slots(ready.stacked) + max(map(len, prompts)) + room + most
    rows_at_once = min(batch_size, len(prompts), self.config.online.rows)
    made = engine.Engine(ready, self.model.config, rows=rows_at_once, length=longest, dtype=dtype)
    ends = self.model.ends
    asked = (
      (Request(prompt.tokens.tolist(), most, stop_tokens=ends, number=i), prompt)
      for i, prompt in enumerate(prompts)
    )
    answers: dict[int, tasks.Answered] = {}
    for place, one in self.run(InEngine(made), asked):
      problem = f"{one.ended}: {one.problem}" if one.problem else ""
      answers[place] = tasks.Answered(one.final, one.finished, one.drawn, problem)
      if progress is not None:
        progress(len(answers), len(prompts))
    return [answers[i] for i in range(len(prompts))]

  def _asked(self, request: Request, prompt: Prompt) -> Asked:
    return Asked(
      request, {PROMPT: prompt.asked, **prompt.row}, functools.partial(self._opening, prompt)
    )

  def _opening(self, prompt: Prompt, said: str) -> list[int]:
    """The prompt with what the environment says behind its last message, as TRL has it."""
    *before, last = prompt.asked
    question = {
      "prompt": [*before, {**last, "content": last["content"] + said}],
      "variables": prompt.variables,
    }
    (ids,) = questions.tokens([question], self.model.tokenizer, self.model.template)
    return ids


def _prompts(config: Config, model: Model, rows: Sequence[Mapping[str, Any]]) -> list[Prompt]:
  """Questions of a task as prompts that have the run's tools."""
  asked = tools.given(config, [dict(row, origin=row.get("origin", "question")) for row in rows])
  ids = questions.tokens(asked, model.tokenizer, model.template)
  return [
    Prompt(
      np.asarray(tokens, np.int32),
      one["prompt"],
      {**one.get("row", one), "gold": one["gold"]},
      one["origin"],
      variables=one.get("variables", {}),
    )
    for one, tokens in zip(asked, ids, strict=True)
  ]


def asked(config: Config, model: Model, task: tasks.Task | None) -> tasks.Task | None:
  """The task as the run answers: in turns where its answers have several."""
  if task is None or "online" not in config or not tools.is_on(config):
    return task
  most = config.online.max_new_tokens
  return dataclasses.replace(task, turns=Turns(config, model), max_new_tokens=most)


def columns(answer: Answer) -> dict[str, Any]:
  """What verifiers are given of an episode beside its row."""
  if not isinstance(answer, Episode):
    return {}
  return {COLUMN: answer.reward, LEFT: dict(answer.left)}


def settled(result: Result, answers: Sequence[Answer], unparsed: float) -> Result:
  """The scores of episodes: of a turn that cannot be parsed its own, none where the environment failed."""
  if not any(isinstance(answer, Episode) for answer in answers):
    return result
  scored = [
    _settled(one, answer, unparsed) for one, answer in zip(result.answers, answers, strict=True)
  ]
  return dataclasses.replace(result, answers=tuple(scored))


def _settled(one: Scored, answer: Answer, unparsed: float) -> Scored:
  if answer.ended == kinds.UNPARSED and isinstance(answer, Episode):
    return Scored(score.of(unparsed), one.parts, is_fixed=True)
  if answer.ended == kinds.FAILED and isinstance(answer, Episode):
    return Scored(score.missing(f"environment: {answer.problem}"), one.parts)
  return one


def metrics(answers: Sequence[Answer]) -> dict[str, float]:
  """Turns, calls, failures, and the share of tokens that the model did not write; {} of single turns."""
  some = [answer for answer in answers if isinstance(answer, Episode)]
  if not some:
    return {}
  calls, tokens = sum(e.calls for e in some), sum(len(e.tokens) for e in some)
  share = lambda ended: statistics.fmean(e.ended == ended for e in some)
  told = {
    "turns/mean": statistics.fmean(e.turns for e in some),
    "turns/unparsed": share(kinds.UNPARSED),
    "turns/failed": share(kinds.FAILED),
    "turns/cut": share(kinds.MAX_TURNS),
    "turns/masked_share": 1 - sum(e.drawn for e in some) / max(tokens, 1),
    "tools/call_frequency": calls / len(some),
  }
  if calls:
    told["tools/failure_frequency"] = sum(e.failures for e in some) / calls
  return told


def testable(reward: Reward) -> Reward | None:
  """What can be tried on rows before anything is written: parts that read no environment; None where all do."""
  of_rows = lambda part: (
    not (
      isinstance(part.verifier, environment.Environment)
      or (isinstance(part.verifier, trl.Function) and part.verifier.reads_environments)
    )
  )
  parts = [part for part in reward.parts if of_rows(part)]
  return Reward(parts, retries=reward.retries) if parts else None
