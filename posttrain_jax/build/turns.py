"""config.online of a run whose answers have several turns: tools, environments, and what an episode is worth."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ml_collections

from posttrain_jax.build import tools
from posttrain_jax.build.model import Model
from posttrain_jax.build.prompts import Prompt
from posttrain_jax.build.writer import Writer
from posttrain_jax.data import questions, tool_calls
from posttrain_jax.environments import episode as kinds
from posttrain_jax.environments import named
from posttrain_jax.environments.episode import Episode
from posttrain_jax.environments.episodes import Asked, Episodes, Rules
from posttrain_jax.environments.host import Hosts
from posttrain_jax.rewards import environment, score, trl
from posttrain_jax.rewards.environment import COLUMN, LEFT
from posttrain_jax.rewards.reward import Result, Reward, Scored
from posttrain_jax.rollout.requests import Answer, Request
from posttrain_jax.settings import ConfigError

Config = ml_collections.ConfigDict
COLUMNS = (COLUMN, LEFT)  # that rows of an environment have beside their own
CALLS = 4  # processes of tools that keep nothing, at most


class Turns:
  """Episodes of a run."""

  def __init__(self, config: Config, model: Model, writer: Writer) -> None:
    """Raises ConfigError where the model's template cannot say what the environment needs."""
    self.config, self.model, self.writer = config, model, writer
    o, about = config.online, tools.described(config)
    self.acts, self.scores = about.acts, about.scores
    if model.template is None:
      raise ConfigError("turns need a chat template: write --config.model.template=chatml")
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

  def check_reward(self, parts: Sequence[str], say: Callable[[str], None]) -> None:
    """Raises ConfigError where the reward reads one that the environment does not have; says where it reads none."""
    reads = "environment" in parts
    if reads and not self.scores:
      raise ConfigError(
        "reward.parts: environment is what get_reward() of an environment or the rewards of its steps say, and"
        f" {self.config.online.environment or 'a tool'} has neither; name a verifier"
      )
    if self.scores and not reads:
      say(
        "the environment has a reward of its own, which this run does not read (reward=environment does)"
      )

  def run(
    self, asked: Iterable[tuple[Request, Prompt]], before_window: Callable[[], None]
  ) -> Iterator[tuple[int, Episode]]:
    """(place, episode) as they finish."""
    episodes = Episodes(self.writer, self._hosts, self.rules)
    return episodes.run((self._asked(*pair) for pair in asked), before_window)

  def _asked(self, request: Request, prompt: Prompt) -> Asked:
    return Asked(
      request, {"prompt": prompt.asked, **prompt.row}, functools.partial(self._opening, prompt)
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
    return Scored(score.of(unparsed), one.parts)
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
      part.verifier is environment.environment
      or (isinstance(part.verifier, trl.Function) and part.verifier.reads_environments)
    )
  )
  parts = [part for part in reward.parts if of_rows(part)]
  return Reward(parts, retries=reward.retries) if parts else None
