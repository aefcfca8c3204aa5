"""Where the delta lives: adapter nodes, and the verbs that make, bind and merge a tree of them."""

from posttrain_jax.adapters.bind import Hooks, bind, count, hooks, init, merge, summary
from posttrain_jax.adapters.config import AdapterConfig

__all__ = ["AdapterConfig", "Hooks", "bind", "count", "hooks", "init", "merge", "summary"]
