"""Where the delta lives: adapter nodes, and the verbs that make, bind and merge a tree of them."""

from posttrain_jax.adapters import peft_format
from posttrain_jax.adapters.bind import (
  Hooks,
  bind,
  count,
  hooks,
  init,
  merge,
  original,
  summary,
)
from posttrain_jax.adapters.combination import AnyConfig, Combination, parts_of, together
from posttrain_jax.adapters.config import AdapterConfig, depth_ranks
from posttrain_jax.adapters.config_section import from_section
from posttrain_jax.adapters.settled import settled
from posttrain_jax.adapters.stacked import stack

__all__ = [
  "AdapterConfig",
  "AnyConfig",
  "Combination",
  "Hooks",
  "bind",
  "count",
  "depth_ranks",
  "from_section",
  "hooks",
  "init",
  "merge",
  "original",
  "parts_of",
  "peft_format",
  "settled",
  "stack",
  "summary",
  "together",
]
