"""Where the delta lives: adapter nodes, and the verbs that make, bind and merge a tree of them."""

from posttrain_jax.adapters.bind import bind, count, init, merge, summary
from posttrain_jax.adapters.config import AdapterConfig

__all__ = ["AdapterConfig", "bind", "count", "init", "merge", "summary"]
