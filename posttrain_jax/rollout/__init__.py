"""Text generation: how a token is drawn, the decode loop, and a conversation on top."""

from posttrain_jax.rollout.engine import Generation, Ready, generate, prepare, stop_tokens, stream
from posttrain_jax.rollout.sampling import GREEDY, Sampling

__all__ = [
  "GREEDY",
  "Generation",
  "Ready",
  "Sampling",
  "generate",
  "prepare",
  "stop_tokens",
  "stream",
]
