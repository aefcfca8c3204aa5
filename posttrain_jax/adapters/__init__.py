"""Where the delta lives: adapter nodes, and the verbs that make, bind and merge a tree of them."""

from posttrain_jax.adapters import peft_format
from posttrain_jax.adapters.bind import (
  RULES,
  Hooks,
  bind,
  count,
  hooks,
  init,
  merge,
  original,
  summary,
)
from posttrain_jax.adapters.config import AdapterConfig, depth_ranks
from posttrain_jax.adapters.stacked import stack

__all__ = [
  "RULES",
  "AdapterConfig",
  "Hooks",
  "bind",
  "count",
  "depth_ranks",
  "hooks",
  "init",
  "merge",
  "original",
  "peft_format",
  "stack",
  "summary",
]
