"""Losses of reward models: arrays in, (loss, stats) out, one value per pair or per step."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from posttrain_jax.losses.preference import PreferenceStats

Array = jax.Array


def bradley_terry(
  chosen: Array, rejected: Array, *, margin: Array | float = 0.0, centering: float = 0.0
) -> tuple[Array, PreferenceStats]:
  """-log sigma(r_w - r_l - margin) + centering (r_w + r_l)^2, of scalar rewards.

  margin: how much better the chosen answer is held to be, per pair (Touvron et al. 2023, Llama 2, eq. 2).  centering
  keeps the rewards' mean at zero (Eisenstein et al. 2023, arXiv 2312.09244, section 2.1; 0.01 there).
  """
  stats = PreferenceStats(chosen=chosen, rejected=rejected)
  loss = -jax.nn.log_sigmoid(stats.margin - margin) + centering * (chosen + rejected) ** 2
  return loss, stats


def binary_cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
  """-y log sigma(z) - (1 - y) log sigma(-z); stats: whether sigma(z) > 1/2 agrees with y.

  An outcome model has one logit an answer (Cobbe et al. 2021), a process model one a step (Lightman et al. 2023).
  """
  labels = jnp.asarray(labels, logits.dtype)
  loss = -labels * jax.nn.log_sigmoid(logits) - (1 - labels) * jax.nn.log_sigmoid(-logits)
  return loss, (logits > 0) == (labels > 0.5)
