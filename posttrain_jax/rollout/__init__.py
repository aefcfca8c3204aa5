"""Where a model writes: the engine, how a token is drawn, and conversations on top."""

from posttrain_jax.rollout.dialogue import Dialogue, stream
from posttrain_jax.rollout.engine import Engine, Generation, Ready, generate, prepare, stop_tokens
from posttrain_jax.rollout.requests import Answer, Request
from posttrain_jax.rollout.sampling import GREEDY, Sampling

__all__ = [
  "GREEDY",
  "Answer",
  "Dialogue",
  "Engine",
  "Generation",
  "Ready",
  "Request",
  "Sampling",
  "generate",
  "prepare",
  "stop_tokens",
  "stream",
]
