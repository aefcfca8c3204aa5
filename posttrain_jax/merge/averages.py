"""Points between models: averages along straight lines and along spheres.

Functions of the arrays of one tensor, computed in float32; `merge.linear` and so on are the same over trees.  Results
have the first array's dtype (base's where there is one) unless dtype names another.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from posttrain_jax.merge import checks

Array = jax.Array
Tensor = Any  # an array; in `merge.*` a tree of them

_jit = functools.partial(jax.jit, static_argnames=("dtype",))


def linear(
  models: Sequence[Tensor], *, weights: Any = None, normalize: bool = True, dtype: Any = None
) -> Array:
  """sum_i w_i x_i, over sum_i w_i where normalize.

  Wortsman et al. 2022 (model soups, arXiv 2203.05482).

  Args:
    weights: one a model, of any sign; None is 1 each.

  Raises:
    ValueError: weights sum to zero where normalize, or are not one a model.

  >>> linear([jnp.array([1.0]), jnp.array([4.0])], weights=[2, 1]).tolist()
  [2.0]
  """
  models = checks.models(models)
  weights = checks.weights(weights, len(models), normalize=normalize)
  if normalize:
    checks.divisible(weights)
  return _linear(models, weights, normalize, dtype=_dtype(dtype, models))


@functools.partial(jax.jit, static_argnums=2, static_argnames=("dtype",))
def _linear(models, weights, normalize, *, dtype):
  total = sum(w * _wide(x) for w, x in zip(weights, models))
  return (total / sum(weights) if normalize else total).astype(dtype)


def soup(models: Sequence[Tensor], *, dtype: Any = None) -> Array:
  """sum_i x_i / n: the uniform soup.  Wortsman et al. 2022 (arXiv 2203.05482)."""
  return linear(models, dtype=dtype)


def interpolate(base: Tensor, tuned: Tensor, *, t: Any, dtype: Any = None) -> Array:
  """(1 - t) base + t tuned: 0 is the base, 1 the tuned model.

  Wortsman et al. 2022 (WiSE-FT, arXiv 2109.01903), section 3, whose alpha is t.

  Raises:
    ValueError: t outside [0, 1].
  """
  checks.fraction("t", t, "; past the models goes task_arithmetic, with lambda_=t")
  return linear([base, tuned], weights=[1 - t, t], normalize=False, dtype=dtype)


def slerp(
  first: Tensor, second: Tensor, *, t: Any, threshold: float = 0.9995, dtype: Any = None
) -> Array:
  """sin((1 - t) angle) / sin(angle) first + sin(t angle) / sin(angle) second; t = 0 is first.

  angle is that between the two arrays as vectors, which keep their lengths.  Where |cos(angle)| > threshold, that is
  for parallel and for opposite vectors, the straight line (1 - t) first + t second.  Shoemake 1985; as in mergekit,
  where an array of zeros is at right angles to all.

  Raises:
    ValueError: t outside [0, 1].
  """
  checks.fraction("t", t)
  checks.fraction("threshold", threshold)
  first, second = checks.models((first, second))
  return _slerp(first, second, t, threshold, dtype=_dtype(dtype, (first,)))


@_jit
def _slerp(first, second, t, threshold, *, dtype):
  a, b = _wide(first), _wide(second)
  unit = lambda x: x / jnp.where(_norm(x) > 1e-8, _norm(x), 1.0)
  cosine = jnp.clip(jnp.sum(unit(a) * unit(b)), -1.0, 1.0)
  return _arc(a, b, t, cosine, jnp.abs(cosine) > threshold).astype(dtype)


def nuslerp(
  first: Tensor,
  second: Tensor,
  *,
  weights: Any = None,
  base: Tensor | None = None,
  along: str = "all",
  dtype: Any = None,
) -> Array:
  """slerp with t = w_2 / (w_1 + w_2), of what each model adds to the base where there is one.

  The straight line is taken only where the vectors are parallel or opposite to the last bit.  From mergekit, with no
  paper: its nuslerp_flatten is along="all"; without it, nuslerp_row_wise is along="out".

  Args:
    weights: two; None is the middle.
    along: the vectors between which angles are: "all" (the whole array), "in" (those of the last axis: what one output
      reads, in a matrix [out, in]), "out" (those of the first).

  Raises:
    ValueError: weights sum to zero; along is none of these.
  """
  checks.choice("along", along, ("all", "in", "out"))
  first, second = checks.models((first, second), base=base)
  weights = checks.weights(weights, 2, normalize=True)
  checks.divisible(weights)
  t = weights[1] / (weights[0] + weights[1])
  return _nuslerp(first, second, base, t, along, dtype=_dtype(dtype, (first,), base))


@functools.partial(jax.jit, static_argnums=4, static_argnames=("dtype",))
def _nuslerp(first, second, base, t, along, *, dtype):
  a, b = _from(base, first), _from(base, second)
  axis = None if along == "all" or a.ndim == 0 else -1 if along == "in" else 0
  unit = lambda x: x / jnp.maximum(_norm(x, axis), 1e-7)
  cosine = jnp.clip(jnp.sum(unit(a) * unit(b), axis=axis, keepdims=True), -1.0, 1.0)
  return _onto(base, _arc(a, b, t, cosine, 1 - cosine**2 <= 1e-16)).astype(dtype)


def _arc(a, b, t, cosine, straight):
  angle = jnp.arccos(jnp.where(straight, 0.0, cosine))
  from_a = jnp.where(straight, 1 - t, jnp.sin((1 - t) * angle) / jnp.sin(angle))
  from_b = jnp.where(straight, t, jnp.sin(t * angle) / jnp.sin(angle))
  return from_a * a + from_b * b


def multislerp(
  models: Sequence[Tensor],
  *,
  weights: Any = None,
  base: Tensor | None = None,
  normalize: bool = True,
  dtype: Any = None,
) -> Array:
  """m sum_i w_i |x_i|, m the direction of sum_i w_i u_i, u_i = x_i / |x_i|.

  Of what each model adds to the base where there is one.  mergekit, whose method this is, then takes one step in the
  tangent plane of m, sum_i w_i (u_i - <u_i, m> m); it is zero, since sum_i w_i u_i lies along m.
  Where the directions cancel (|sum_i w_i u_i| below 1e-6 sum_i |w_i|, some of float32's roundings) the straight line
  sum_i w_i x_i; mergekit looks for 1e-8, and there stops with an error if models are three.

  Args:
    normalize: divide the weights by their sum first.

  Raises:
    ValueError: weights sum to zero where normalize, or are not one a model.
  """
  models = checks.models(models, base=base)
  weights = checks.weights(weights, len(models), normalize=normalize)
  if normalize:
    checks.divisible(weights)
    weights = tuple(w / sum(weights) for w in weights)
  return _multislerp(models, base, weights, dtype=_dtype(dtype, models, base))


@_jit
def _multislerp(models, base, weights, *, dtype):
  if len(models) == 1:
    return models[0].astype(dtype)
  least = 1e-6 * sum(jnp.abs(w) for w in weights)
  points = [_from(base, x) for x in models]
  norms = [_norm(x) for x in points]
  blend = lambda xs: sum(w * x for w, x in zip(weights, xs))
  mean = blend([x / (norm + 1e-8) for x, norm in zip(points, norms)])
  length = _norm(mean)
  curved = mean / jnp.where(length < least, 1.0, length) * blend(norms)
  return _onto(base, jnp.where(length < least, blend(points), curved)).astype(dtype)


def karcher(
  models: Sequence[Tensor],
  *,
  weights: Any = None,
  max_iter: int = 10,
  tol: float = 1e-5,
  dtype: Any = None,
) -> Array:
  """The point of the unit sphere with the least sum_i w_i angle(u_i)^2, u_i = x_i / |x_i|, times sum_i w_i |x_i|.

  Karcher 1977, by steps along the mean tangent, from the mean direction (or, where the directions cancel, the first
  model's).  Arrays with a norm of at most tol have no direction and take no part in it; if all are such, zero.  As in
  mergekit, where models weigh alike.

  Args:
    weights: one a model, divided by their sum; None is 1 each.
    max_iter, tol: steps at most, and the length of a step, in radians, that is the last.

  Raises:
    ValueError: weights are negative, sum to zero, or are not one a model.
  """
  models = checks.models(models)
  weights = checks.weights(weights, len(models), normalize=True)
  checks.divisible(weights)
  for w in weights:
    if not isinstance(w, Tracer) and w < 0:
      raise ValueError(f"weights={list(weights)}: a mean on the sphere needs weights of at least 0")
  weights = tuple(w / sum(weights) for w in weights)
  return _karcher(models, weights, max_iter, tol, dtype=_dtype(dtype, models))


@_jit
def _karcher(models, weights, max_iter, tol, *, dtype):
  if len(models) == 1:
    return models[0].astype(dtype)
  points = jnp.stack([_wide(x) for x in models])
  axes = tuple(range(1, points.ndim))
  beside = lambda of_models: jnp.expand_dims(of_models, axes)
  norms = jnp.sqrt(jnp.sum(points**2, axis=axes))
  units = points / beside(jnp.where(norms == 0, 1.0, norms))
  shares = jnp.where(norms > tol, jnp.stack([jnp.float32(w) for w in weights]), 0.0)
  total = jnp.sum(shares)
  shares = shares / jnp.where(total == 0, 1.0, total)
  mean = jnp.sum(beside(shares) * units, axis=0)
  length = _norm(mean)
  first = units[jnp.argmax(norms > tol)]
  mean = jnp.where(length < tol, first, mean / jnp.where(length < tol, 1.0, length))

  def step(carry):
    done, mean, _ = carry
    cosine = jnp.clip(jnp.sum(units * mean, axis=axes), -1.0, 1.0)
    angle = jnp.arccos(cosine)
    there = angle < tol
    pull = jnp.where(there, 0.0, shares * angle / jnp.sin(jnp.where(there, 1.0, angle)))
    tangent = jnp.sum(beside(pull) * (units - beside(cosine) * mean), axis=0)
    far = _norm(tangent)
    moved = jnp.cos(far) * mean + jnp.sin(far) * tangent / jnp.where(far < tol, 1.0, far)
    moved = moved / _norm(moved)
    return done + 1, jnp.where(far < tol, mean, moved), far

  _, mean, _ = jax.lax.while_loop(
    lambda carry: (carry[0] < max_iter) & (carry[2] >= tol), step, (0, mean, jnp.float32(jnp.inf))
  )
  scale = jnp.sum(jnp.stack([jnp.float32(w) for w in weights]) * norms)
  return jnp.where(total == 0, 0.0, scale * mean).astype(dtype)


def passthrough(model: Tensor, *, scale: Any = None, dtype: Any = None) -> Array:
  """scale x: one model's tensor as it is (None), or times a number.  `merge.passthrough` stacks layers of several."""
  (model,) = checks.models((model,))
  if scale is None:
    return model.astype(dtype or model.dtype)
  return linear([model], weights=[scale], normalize=False, dtype=dtype)


def _dtype(dtype, models, base=None):
  return jnp.dtype(dtype or (models[0] if base is None else base).dtype)


def _wide(x):
  return x.astype(jnp.float32)


def _from(base, x):
  return _wide(x) if base is None else _wide(x) - _wide(base)


def _onto(base, x):
  return x if base is None else _wide(base) + x


def _norm(x, axis=None):
  return jnp.sqrt(jnp.sum(x * x, axis=axis, keepdims=axis is not None))
