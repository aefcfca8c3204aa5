"""The loss that spreads tokens over a mixture's experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def load_balance(chosen: Array, probability: Array, tokens: Array) -> Array:
  """E sum_e (chosen_e / tokens) (probability_e / tokens): E experts, k of which a token chooses; k where all are alike.

  Fedus et al. 2021 (Switch), eq. 4 to 6, over all layers together, as transformers' `load_balancing_loss_func` has it.
  The gradient goes through the probabilities.

  Args:
    chosen: [layers, experts]: tokens that chose the expert.
    probability: [layers, experts]: the router's, summed over tokens.
    tokens: [layers].

  >>> even = jnp.full((2, 4), 6.0)
  >>> float(load_balance(even, jnp.full((2, 4), 3.0), jnp.full(2, 12.0)))
  2.0
  """
  count = jnp.maximum(jnp.sum(tokens), 1)
  shares = jnp.sum(chosen, axis=0) / count * (jnp.sum(probability, axis=0) / count)
  return chosen.shape[-1] * jnp.sum(shares)
