"""What a method of online learning makes of scored answers: groups, a critic's returns, or pairs."""

from __future__ import annotations

import jax
import ml_collections

from posttrain_jax.build import critic, decisions
from posttrain_jax.build.paired import Paired
from posttrain_jax.build.returns import Returns
from posttrain_jax.build.updates import Updates
from posttrain_jax.settings import ConfigError

Config = ml_collections.ConfigDict
GAE = "gae"  # of objective.advantage: the critic's
OF_ANSWERS = (
  "gspo",
  "rloo",
)  # losses of a whole answer, in which advantages of tokens have no place


def make(config: Config, vocab: int, mesh: jax.sharding.Mesh | None = None) -> Updates:
  """The batches of a run's updates."""
  if critic.has(config):
    return Returns(config, vocab, mesh)
  if config.objective.name == "preference":
    return Paired(config, vocab, mesh)
  return Updates(config, vocab, mesh)


def check_advantage(config: Config) -> None:
  """Raises ConfigError where advantages and critic do not fit one another, or a group is too small."""
  o = config.objective
  if critic.has(config) != (o.advantage == GAE):
    raise ConfigError(
      f"objective.advantage={o.advantage}: {GAE} is what a critic gives, and all that it gives; write"
      " --config=rl:method=ppo, or another advantage and method"
    )
  if not critic.has(config):
    if config.reward.parts and config.online.samples < 2:
      raise ConfigError(
        "online.samples=1: an answer is compared with others to its prompt; write 2 or more, or method=ppo, where a"
        " critic takes their place"
      )
    return
  if o.loss in OF_ANSWERS:
    raise ConfigError(
      f"objective.loss={o.loss}: its loss is of whole answers, and a critic tells tokens apart; write method=ppo"
    )
  if decisions.teacher(config):
    raise ConfigError(
      f"objective.teacher={o.teacher}: a teacher is a part of advantages over other answers, and a critic's are of its"
      " own; write another method, or teacher=''"
    )
  _check_no_gold(config, "a critic")
  if "adalora" in config.adapter.method.split("+"):
    raise ConfigError(
      "adapter=adalora: its ranks are shared out over one adapter, and a critic has another; write lora"
    )
  if config.optimizer.offload != "none" or decisions.base_on_host(config):
    field = "model.offload" if config.optimizer.offload == "none" else "optimizer.offload"
    raise ConfigError(f"{field}: a run with a critic keeps all on its devices; write none")


def _check_no_gold(config: Config, what: str) -> None:
  if decisions.gold_rows(config):
    raise ConfigError(
      f"online.gold_rows={config.online.gold_rows}: the data's own rows stand beside groups, not {what}; write 0"
    )


def check_pairs(config: Config) -> None:
  """Raises ConfigError for what pairs of answers have no place for."""
  o, online = config.objective, config.online
  if online.samples < 2:
    raise ConfigError("online.samples=1: a pair has two answers; write 2 or more")
  unpaired = [name for name in o.losses if name in ("gold", "kto", "reward")]
  if unpaired:
    raise ConfigError(
      f"objective.losses has {unpaired[0]!r}, which learns from more than the pairs of answers that are written here;"
      " write dpo, ipo or another loss of pairs"
    )
  _check_no_gold(config, "pairs")
  if online.kl_in_reward:
    raise ConfigError(
      "online.kl_in_reward: scores say here which answer is the better one, and objective.beta holds the policy to its"
      " reference; write 0.0"
    )
