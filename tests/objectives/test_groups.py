"""Groups of scored answers."""

import dataclasses

import jax
import jax.numpy as jnp

from tests.objectives.batches import (
  batch,
  gradient,
  setup,
)


def test_a_group_that_agrees_has_no_gradient():
  objective, trainable, context, examples = setup("grpo")
  objective = dataclasses.replace(objective, kl_weight=0.0)
  flat = [
    dataclasses.replace(
      e, values=dict(score=(1.0,) * e.count, advantage=(0.0,) * e.count, deviation=(0.0,) * e.count)
    )
    for e in examples
  ]
  grads, _ = gradient(objective, trainable, context, batch(flat))
  assert all(float(jnp.abs(g).max()) == 0 for g in jax.tree.leaves(grads))
