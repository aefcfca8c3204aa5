"""Comparison of a loss with its formula in numpy: values in float64, gradients by central differences."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

STEP = 1e-5


def slopes(formula: Callable[..., np.ndarray], *arrays: np.ndarray) -> list[np.ndarray]:
  """d sum(formula) / d each element of each array."""

  def slope(which, index):
    moved = [np.array(x) for x in arrays]
    moved[which][index] += STEP
    above = np.nansum(formula(*moved))
    moved[which][index] -= 2 * STEP
    return (above - np.nansum(formula(*moved))) / (2 * STEP)

  return [
    np.array([slope(which, at) for at in np.ndindex(x.shape)]).reshape(x.shape)
    for which, x in enumerate(arrays)
  ]


def assert_is(loss: Callable[..., jax.Array], formula: Callable[..., np.ndarray], *arrays) -> None:
  """loss(*arrays) has the formula's values, and its sum the gradients to every array; under float64."""
  arrays = [np.asarray(x, np.float64) for x in arrays]
  values = loss(*map(jnp.asarray, arrays))
  assert values.dtype == jnp.float64
  np.testing.assert_allclose(values, formula(*arrays), rtol=1e-10, atol=1e-12)
  where = tuple(range(len(arrays)))
  gradients = jax.grad(lambda *x: jnp.sum(loss(*x)), where)(*map(jnp.asarray, arrays))
  for gradient, expected in zip(gradients, slopes(formula, *arrays)):
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-8)
