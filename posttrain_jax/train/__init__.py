"""How parameters change: the step, its state, the loop around it, signals, progress."""

from posttrain_jax.train.state import State
from posttrain_jax.train.step import begin

__all__ = ["State", "begin"]
