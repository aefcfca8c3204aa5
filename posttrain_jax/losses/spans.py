"""Where the answers of a batch stand: several may share a row, and each token belongs to one of them or to none."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from posttrain_jax.core import struct

Array = jax.Array


@struct.dataclass
class Spans:
  """Sums over the tokens of each answer, and back: [rows, time] <-> [rows, slots], a slot holding one answer.

  What a value is where the mask is False, NaN included, reaches neither a sum nor its gradient.
  """

  mask: Array  # [rows, time] whether a token is scored
  # [rows, time] the slot of a token's answer, or the number of slots where it is none's
  answer: Array
  present: Array  # [rows, slots] whether there is an answer

  def per_answer(self, values: Array) -> Array:
    """[rows, time] -> [rows, slots]: sums over the scored tokens of each answer."""
    slots = self.present.shape[1]
    values = jnp.where(self.mask, values, 0.0)
    add = lambda row, answer: jnp.zeros(slots + 1, values.dtype).at[answer].add(row)
    return jax.vmap(add)(values, self.answer)[:, :slots]

  def per_token(self, values: Array) -> Array:
    """[rows, slots] -> [rows, time]: each token has that of its answer, and 0 where it is none's."""
    padded = jnp.pad(values, ((0, 0), (0, 1)))
    return jnp.take_along_axis(padded, self.answer, axis=1)

  @property
  def lengths(self) -> Array:
    """[rows, slots] floats: how many tokens of each answer are scored, at least 1, so that it can be divided by."""
    return jnp.maximum(self.per_answer(self.mask), 1)


def whole(mask: Array) -> Spans:
  """One answer a row, which is present where any of its tokens is scored; mask: [rows, time].

  >>> whole(jnp.array([[True, True, False], [False, False, False]])).lengths.tolist()
  [[2.0], [1.0]]
  """
  mask = jnp.asarray(mask, bool)
  return Spans(mask, jnp.zeros(mask.shape, jnp.int32), jnp.any(mask, axis=1, keepdims=True))
