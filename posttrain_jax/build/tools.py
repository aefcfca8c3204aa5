"""config.online.environment and tools: what they offer, and prompts that tell the model of them."""

from __future__ import annotations

import functools
from typing import Any

import ml_collections

from posttrain_jax.data import tool_calls
from posttrain_jax.data.templates import Template
from posttrain_jax.environments import host as host_lib
from posttrain_jax.environments import named
from posttrain_jax.environments.host import Described, EnvironmentFailed, Source
from posttrain_jax.settings import ConfigError

Config = ml_collections.ConfigDict
SPARE = 8  # tokens that words may take more of in a prompt than alone


def is_on(config: Config) -> bool:
  """Whether answers have several turns; those of runs of an earlier version have one."""
  o = config.online
  return "environment" in o and bool(o.environment or o.tools)


def source(config: Config) -> Source:
  """What processes of this run hold.

  Raises:
    ConfigError: there is no such environment or tool.
  """
  o = config.online
  names = tuple(o.tools)
  named.check(o.environment, names)
  return Source(o.environment, names, (("unsafe_code", config.reward.unsafe_code),))


def described(config: Config) -> Described:
  """What the run's environment and tools offer.

  Raises:
    ConfigError: they cannot be had.
  """
  o = source(config)
  try:
    return _described(o, named.digest(o.environment, o.tools))
  except EnvironmentFailed as error:
    field = "environment" if o.environment else "tools"
    raise ConfigError(f"online.{field}: {error}") from error


@functools.cache
def _described(source: Source, digest: str) -> Described:
  """digest: of the user's files, which another run may find changed."""
  del digest
  return host_lib.describe(source)


def check(config: Config, template: Template | None) -> None:
  """Raises ConfigError where the template cannot say what the environment needs, or the reward reads what it lacks."""
  if not is_on(config):
    return
  about = described(config)
  if template is None:
    raise ConfigError("turns need a chat template: write --config.model.template=chatml")
  if not about.acts:
    try:
      tool_calls.form(template)
      if not tool_calls.tells(template):
        raise ValueError(
          f"the chat template {template.name!r} does not tell the model which tools there are; name one that does, as"
          " --config.model.template=chatml"
        )
    except ValueError as error:
      raise ConfigError(str(error)) from error
  if "environment" in config.reward.parts and not about.scores:
    raise ConfigError(
      "reward.parts: environment is what get_reward() of an environment or the rewards of its steps say, and"
      f" {config.online.environment or 'a tool'} has neither; name a verifier"
    )


def given(config: Config, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """The questions of a run, with its tools for their chat template; as they are where it has none.

  Raises:
    ConfigError: a prompt is no conversation, or has tools of its own.
  """
  if not is_on(config):
    return asked
  schemas = [dict(one) for one in described(config).schemas]
  for question in asked:
    if isinstance(question["prompt"], str):
      raise ConfigError(
        f"{question['origin']}: its prompt is text to be continued, and turns need messages; write data.chat=true and"
        " a model with a chat template (--config.model.template=chatml), or rows with messages"
      )
    if question.get("variables", {}).get("tools"):
      raise ConfigError(
        f"{question['origin']}: the row has tools of its own, which nothing here calls: leave that column out, the"
        " run's are online.tools"
      )
  if not schemas:
    return asked
  return [{**q, "variables": {**q.get("variables", {}), "tools": schemas}} for q in asked]


def room(config: Config) -> int:
  """Tokens that a prompt may have beside its own: what an environment says before the first turn."""
  return config.online.tool_tokens + SPARE if config.online.environment else 0
