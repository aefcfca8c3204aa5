"""Checks across the sections of a config, made before anything is read: by training, evaluation and planning alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import ml_collections

from posttrain_jax.build import adapter, decisions, objective
from posttrain_jax.models import decoder
from posttrain_jax.objectives.groups import AGGREGATIONS, POLICY_LOSSES
from posttrain_jax.objectives.preference import DIVERGENCES
from posttrain_jax.optim import offload
from posttrain_jax.settings import ConfigError

Config = ml_collections.ConfigDict
ADVANTAGES = ("group", "batch", "none", "leave_one_out")


def check(config: Config) -> None:
  """Raises ConfigError for the first sections that do not fit one another."""
  for check_one in CHECKS:
    check_one(config)


def _one_of(config: Config, field: str, known: Sequence[str]) -> None:
  """The field, where the config has it, is one of the names."""
  *parents, last = field.split(".")
  node = config
  for parent in parents:
    node = node[parent]
  if last in node and node[last] not in known:
    raise ConfigError(f"{field}={node[last]!r}: known are {', '.join(known)}")


def _names(config: Config) -> None:
  _one_of(config, "objective.name", objective.NAMES)
  _one_of(config, "objective.advantage", ADVANTAGES)
  _one_of(config, "objective.divergence", tuple(DIVERGENCES))
  _one_of(config, "objective.loss", POLICY_LOSSES)
  _one_of(config, "objective.aggregation", AGGREGATIONS)
  _one_of(config, "objective.old", ("policy", "reference"))
  _one_of(config, "model.remat", ("auto", *decoder.REMAT))
  _one_of(config, "optimizer.offload", offload.MODES)


def _frozen_base(config: Config) -> None:
  if decisions.is_full(config) and config.model.base != "dense":
    raise ConfigError(
      f"base={config.model.base} is frozen: train an adapter on it (adapter=lora), or write base=dense"
    )


def _offload(config: Config) -> None:
  if config.optimizer.offload != "params":
    return
  if not decisions.is_full(config):
    raise ConfigError(
      "optimizer.offload=params is for full fine-tuning, where parameters are what is updated; write state"
    )
  if decisions.remat(config) == "none":
    raise ConfigError(
      "optimizer.offload=params with model.remat=none would keep every layer on the device for the backward pass; "
      "write another remat"
    )


def _mixture(config: Config) -> None:
  d = config.data
  if not decisions.is_mixture(d.train):
    return
  if not d.eval and d.eval_rows:
    raise ConfigError(
      "data.train is a mixture: name held-out rows with data.eval, or set data.eval_rows to 0"
    )
  if d.limit:
    raise ConfigError("data.limit cuts one source; a mixture is cut by its fractions")


def _shifted_attention(config: Config) -> None:
  adapter_config = adapter.described(config)
  if adapter_config is None or not adapter_config.attention_group:
    return
  if config.data.kind != "text" and config.data.share_prompt:
    raise ConfigError(
      "data.share_prompt: shifted attention (attention_group) has no room for a shared prompt; write false"
    )
  if not adapter_config.in_weights:
    raise ConfigError(
      f"adapter={adapter_config.method}: a soft prompt or prefix is seen by every token, which groups of shifted"
      " attention are there to prevent; write one of them alone, or --config.adapter.longlora.attention_group=0"
    )


def _following_reference(config: Config) -> None:
  if not decisions.follows(config):
    return
  if config.objective.cache_reference or not decisions.compares_with_base(config):
    raise ConfigError(
      "objective.sync_every: a reference that follows the policy cannot be computed beforehand or be another model;"
      " write --config.objective.cache_reference=false --config.objective.reference=base"
    )


def _task(config: Config) -> None:
  if config.eval.task and jax.process_count() > 1:
    raise ConfigError(
      "eval.task generates text in one process; run `posttrain eval` afterwards instead"
    )


def _accumulation(config: Config) -> None:
  if config.batch.rows % config.batch.accumulate:
    raise ConfigError(
      f"batch.rows={config.batch.rows} does not split into batch.accumulate={config.batch.accumulate} micro-batches;"
      f" write a multiple of {config.batch.accumulate}"
    )


CHECKS: tuple[Callable[[Config], None], ...] = (
  _names,
  _frozen_base,
  _offload,
  _mixture,
  _shifted_attention,
  _following_reference,
  _task,
  _accumulation,
)
