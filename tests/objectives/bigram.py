"""A model so small that its log-probabilities are one line: a token's hidden state is a row of a table.

Its parameters are a decoder's without layers.  `hidden_and_load` stands in for that of `Scorer`, so that an objective
runs from its batch to its loss as it does in training, and compiles in a fraction of a second.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.core import zigzag
from posttrain_jax.data.answers import SHARED

VOCAB, EMBED = 250, 6


def params(seed: int, spread: float = 1.0) -> dict[str, Any]:
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(0, spread, shape).astype(np.float32)
  return {
    "embed_tokens": {"weight": normal(VOCAB, EMBED)},
    "lm_head": {"weight": normal(EMBED, VOCAB)},
    "score": {"weight": normal(EMBED, 1)},
  }


def hidden_and_load(self, params, batch, *, training=False):
  del self, training
  return jnp.asarray(params["embed_tokens"]["weight"])[zigzag.cut(batch["tokens"])], None


@dataclasses.dataclass(frozen=True)
class Alone:
  """Sequences each in a row of its own, padded behind; [sequences, time], `mask` where a token is scored."""

  tokens: np.ndarray
  mask: np.ndarray
  inside: np.ndarray  # whether there is a token

  @property
  def lengths(self) -> np.ndarray:
    return self.mask.sum(1)

  def log_softmax(self, params: Any) -> jax.Array:
    """[sequences, time - 1, vocab]: of the token after each."""
    x = params["embed_tokens"]["weight"][self.tokens[:, :-1]]
    return jax.nn.log_softmax(x @ params["lm_head"]["weight"])

  def logps(self, params: Any, where: np.ndarray | None = None) -> jax.Array:
    """[sequences, time]: of each token where it stands, 0 where it is not scored (or where `where` is False)."""
    each = jnp.take_along_axis(self.log_softmax(params), self.tokens[:, 1:, None], -1)[..., 0]
    each = jnp.pad(each, ((0, 0), (1, 0)))
    return jnp.where(self.mask if where is None else where, each, 0.0)

  def rewards(self, params: Any) -> jax.Array:
    """[sequences, time]: a reward model's number at each token."""
    return (params["embed_tokens"]["weight"][self.tokens] @ params["score"]["weight"])[..., 0]


def of_examples(examples) -> Alone:
  """One sequence an example of `data.chat`."""
  return _padded([(e.tokens, e.mask) for e in examples])


def of_answers(examples) -> Alone:
  """One sequence an answer of `data.answers`, in their order, each with the prompt before it."""
  parts = []
  for example in examples:
    for i in range(example.count):
      seen = (example.answer == SHARED) | (example.answer == i)
      parts.append((example.tokens[seen], example.mask[seen]))
  return _padded(parts)


def _padded(parts) -> Alone:
  longest = max(len(tokens) for tokens, _ in parts)
  pad = lambda x: np.pad(x, (0, longest - len(x)))
  inside = np.stack([pad(np.ones(len(tokens), bool)) for tokens, _ in parts])
  return Alone(np.stack([pad(t) for t, _ in parts]), np.stack([pad(m) for _, m in parts]), inside)
