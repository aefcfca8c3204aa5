"""Objectives join model, data and loss, and add up exactly: one file a kind of rows."""

from posttrain_jax.core.metrics import read
from posttrain_jax.objectives.balance import Balance
from posttrain_jax.objectives.critic import ActorCritic
from posttrain_jax.objectives.distillation import Distilled
from posttrain_jax.objectives.groups import Grouped
from posttrain_jax.objectives.imitation import Imitation
from posttrain_jax.objectives.labels import Labelled
from posttrain_jax.objectives.objective import (
  CRITIC,
  Batch,
  Context,
  Forward,
  Objective,
  Scorer,
  evaluation,
  measured,
  of_policy,
  policy,
  targets,
)
from posttrain_jax.objectives.preference import Preference
from posttrain_jax.objectives.reward import Reward
from posttrain_jax.objectives.streams import Written
from posttrain_jax.objectives.sum import Sum
from posttrain_jax.objectives.supervised import Sft

__all__ = [
  "CRITIC",
  "ActorCritic",
  "Balance",
  "Batch",
  "Context",
  "Distilled",
  "Forward",
  "Grouped",
  "Imitation",
  "Labelled",
  "Objective",
  "Preference",
  "Reward",
  "Scorer",
  "Sft",
  "Sum",
  "Written",
  "evaluation",
  "measured",
  "of_policy",
  "policy",
  "read",
  "targets",
]
