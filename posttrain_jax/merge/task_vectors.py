"""What models add to a common base, joined: delta_i = x_i - base.

Functions of the arrays of one tensor, computed in float32; `merge.ties` and so on are the same over trees.  Results
have the base's dtype unless dtype names another.

Most are base + lambda sum_i w_i s_i, where s_i is what a mask leaves of delta_i, with two choices in common:

  election   None joins all entries.  "sum" elects for each entry a sign, that of a sum over models (a sum of zero
             elects +), or "count" that of which more models have, and joins only the entries of that sign.
  semantics  how election and weights meet.  "mergekit": w_i s_i vote, and normalize divides by the sum of the
             weights that took part.  "peft": s_i vote, before weights, and normalize divides by the number of
             entries that took part.  With weights of 1 the two are one; the papers', without weights, is "peft".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from posttrain_jax.merge import checks, sparsify

Array = jax.Array
Tensor = Any  # an array; in `merge.*` a tree of them

ELECTIONS = (None, "sum", "count")
SINGULAR = 1e-6  # mergekit's floor of norms, sums and determinants


@dataclasses.dataclass(frozen=True)
class Rule:
  """How sparse task vectors are joined: static, so that one program serves every weight and density."""

  election: str | None = None
  weighted: bool = True  # votes and divisor are of weights
  normalize: bool = False
  rescale: str | None = None  # "l1" | "expected"


def task_arithmetic(
  models: Sequence[Tensor],
  *,
  base: Tensor,
  weights: Any = None,
  lambda_: Any = 1.0,
  normalize: bool = False,
  dtype: Any = None,
) -> Array:
  """base + lambda sum_i w_i delta_i: adds what models learned, or with w_i < 0 takes it away.

  normalize divides by sum_i w_i (but where that is zero).  Ilharco et al. 2023 (arXiv 2212.04089), whose scaling
  term is lambda.

  Args:
    weights: one a model; None is 1 each.

  Raises:
    ValueError: weights are not one a model, or all zero where normalize.

  >>> task_arithmetic([jnp.array([3.0])], base=jnp.array([1.0]), lambda_=-1).tolist()
  [-1.0]
  """
  rule = Rule(normalize=normalize)
  return _merge(models, base, weights, lambda_, None, None, rule, dtype)


def ties(
  models: Sequence[Tensor],
  *,
  base: Tensor,
  density: Any = 1.0,
  weights: Any = None,
  lambda_: Any = 1.0,
  normalize: bool = True,
  election: str | None = "sum",
  rescale: bool = False,
  semantics: str = "mergekit",
  dtype: Any = None,
) -> Array:
  """base + lambda mean_i w_i s_i over the models of the elected sign, s_i the density largest entries of |delta_i|.

  Trim, elect, merge: Yadav et al. 2023 (arXiv 2306.01708), section 4, is semantics="peft" with weights of 1; its code
  gives an entry whose votes cancel the sign of most entries, here and in both libraries it is +.  election=None is
  peft's magnitude_prune.

  Args:
    density: of the entries kept, one a model or one number: floor(density n) of a tensor of n, in mergekit's at least
      one.  Of equal entries the first stay.
    normalize: False adds instead of averaging (with semantics="peft" that is not peft).
    rescale: give what is kept the L1 norm of delta_i, as mergekit does where asked.
    election, semantics: see the head of this file.

  Raises:
    ValueError: density outside [0, 1]; weights not one a model, or all zero where normalize; an unknown name.
  """
  weighted = checks.choice("semantics", semantics, ("mergekit", "peft")) == "mergekit"
  normalize = normalize and (weighted or election is not None)
  rule = Rule(_election(election), weighted, normalize, "l1" if rescale else None)
  densities = checks.fractions("density", density, len(models))
  counts = lambda _, base: [
    (sparsify.kept_of(d, base.size, least=int(weighted)),) for d in densities
  ]
  return _merge(models, base, weights, lambda_, _largest, counts, rule, dtype)


def dare(
  models: Sequence[Tensor],
  *,
  base: Tensor,
  key: Array,
  density: Any = 1.0,
  weights: Any = None,
  lambda_: Any = 1.0,
  normalize: bool | None = None,
  election: str | None = None,
  rescale: bool = True,
  semantics: str = "mergekit",
  dtype: Any = None,
) -> Array:
  """base + lambda sum_i w_i s_i, s_i = delta_i with each entry kept with probability density, and rescaled.

  Drop and rescale: Yu et al. 2024 (arXiv 2311.03099), section 3.2, divides what is kept by density, as
  semantics="peft" does; "mergekit" gives it the L1 norm of delta_i, which is the same in expectation only.
  election=None is dare_linear, election="sum" dare_ties.

  Args:
    key: a PRNG key; model i draws with fold_in(key, i), and a tree's tensor with crc32 of its name folded in first.
    density: one a model or one number; at 0 nothing of a model is left.
    normalize: None is False, but True for an election by semantics="peft", as the libraries have it.
    election, semantics: see the head of this file.

  Raises:
    ValueError: density outside [0, 1]; weights not one a model, or all zero where normalize; an unknown name.
  """
  weighted = checks.choice("semantics", semantics, ("mergekit", "peft")) == "mergekit"
  if normalize is None:
    normalize = not weighted and election is not None
  how = ("l1" if weighted else "expected") if rescale else None
  rule = Rule(_election(election), weighted, normalize, how)
  densities = checks.fractions("density", density, len(models))
  settings = lambda *_: [(_fold(key, i), d) for i, d in enumerate(densities)]
  return _merge(models, base, weights, lambda_, _drawn, settings, rule, dtype)


def della(
  models: Sequence[Tensor],
  *,
  base: Tensor,
  key: Array,
  density: Any = 1.0,
  epsilon: Any = 0.15,
  weights: Any = None,
  lambda_: Any = 1.0,
  normalize: bool | None = None,
  election: str | None = "sum",
  rescale: bool = True,
  semantics: str = "mergekit",
  dtype: Any = None,
) -> Array:
  """base + lambda mean_i w_i s_i over the elected, s_i = delta_i with entry e kept with probability p_e, rescaled.

  p_e rises evenly from density - epsilon to density + epsilon with the rank of |delta_e| in its row.  Deep et al. 2024
  (DELLA, arXiv 2406.11617), section 3: semantics="paper" divides each survivor by its p_e and joins as "peft" does;
  "mergekit" gives s_i the L1 norm of delta_i.  election=None is mergekit's della_linear.

  Args:
    key: a PRNG key, used as `dare` does.
    density, epsilon: one a model or one number; at density 0 and 1 epsilon is not used.
    normalize: None is True for an election and False without, as mergekit has it.
    election, semantics: see the head of this file.

  Raises:
    ValueError: density outside [0, 1], or density +- epsilon outside (0, 1); weights not one a model, or all zero
      where normalize; an unknown name.
  """
  weighted = checks.choice("semantics", semantics, ("mergekit", "paper")) == "mergekit"
  normalize = election is not None if normalize is None else normalize
  how = ("l1" if weighted else "expected") if rescale else None
  rule = Rule(_election(election), weighted, normalize, how)
  densities = checks.fractions("density", density, len(models))
  epsilons = [
    _window(*pair) for pair in zip(densities, checks.per_model("epsilon", epsilon, len(models)))
  ]
  # one after the other: ranks take as much memory as a model
  settings = lambda models, base: (
    (sparsify.ranks(x, base), _fold(key, i), d, e)
    for i, (x, d, e) in enumerate(zip(models, densities, epsilons))
  )
  return _merge(models, base, weights, lambda_, _by_rank, settings, rule, dtype)


def breadcrumbs(
  models: Sequence[Tensor],
  *,
  base: Tensor,
  density: Any = 1.0,
  gamma: Any = 0.01,
  weights: Any = None,
  lambda_: Any = 1.0,
  normalize: bool = False,
  election: str | None = None,
  rescale: bool = False,
  dtype: Any = None,
) -> Array:
  """base + lambda sum_i w_i s_i, s_i = delta_i without its gamma largest entries and without the smallest of the rest.

  density is what is left; where density + gamma > 1 fewer of the largest go.  Davari and Belilovsky 2024 (arXiv
  2312.06795), section 3, which drops 1 - density - gamma from below; election="sum" is mergekit's breadcrumbs_ties.

  Args:
    density, gamma: one a model or one number; floor(density n) and floor(gamma n) of a tensor of n entries.
    rescale: give what is kept the L1 norm of delta_i, as mergekit does where asked.
    election: see the head of this file; votes are weighted.

  Raises:
    ValueError: density or gamma outside [0, 1]; weights not one a model, or all zero where normalize.
  """
  rule = Rule(_election(election), True, normalize, "l1" if rescale else None)
  densities = checks.fractions("density", density, len(models))
  gammas = checks.fractions("gamma", gamma, len(models))

  def counts(_, base):
    kept = [sparsify.kept_of(d, base.size) for d in densities]
    return [(k, min(int(g * base.size), base.size - k)) for k, g in zip(kept, gammas)]

  return _merge(models, base, weights, lambda_, _middle, counts, rule, dtype)


def model_stock(
  models: Sequence[Tensor],
  *,
  base: Tensor,
  filter_wise: bool = False,
  semantics: str = "mergekit",
  dtype: Any = None,
) -> Array:
  """t mean_i x_i + (1 - t) base, t = n cos / (1 + (n - 1) cos), cos the mean cosine of pairs of deltas.

  Jang et al. 2024 (arXiv 2403.19522), equation 2 and its extension to n models.  Where the denominator is zero, the
  base.

  Args:
    models: at least two.
    filter_wise: a cosine a row (the last axis) instead of one a tensor.
    semantics: "paper", or "mergekit", where a product of two norms counts as at least 1e-6: its cosines of deltas
      below that, as of a norm's scales after a short fine-tune, are too small, and keep them at the base.

  Raises:
    ValueError: fewer than two models; semantics is neither.
  """
  models = checks.models(models, least=2, base=base)
  floor = checks.choice("semantics", semantics, ("mergekit", "paper")) == "mergekit"
  return _model_stock(models, base, filter_wise, floor, dtype=jnp.dtype(dtype or base.dtype))


@functools.partial(jax.jit, static_argnums=(2, 3), static_argnames=("dtype",))
def _model_stock(models, base, filter_wise, floor, *, dtype):
  wide = base.astype(jnp.float32)
  count = len(models)
  axis = -1 if filter_wise and base.ndim else None
  total = lambda x: jnp.sum(x, axis=axis, keepdims=True)
  deltas = [x.astype(jnp.float32) - wide for x in models]
  norms = [jnp.sqrt(total(d * d)) for d in deltas]
  cosines = []
  for i in range(count):
    for j in range(i + 1, count):
      size = norms[i] * norms[j]
      size = jnp.maximum(size, SINGULAR) if floor else jnp.where(size == 0, 1.0, size)
      cosines.append(jnp.clip(total(deltas[i] * deltas[j]) / size, -1.0, 1.0))
  cosine = sum(cosines) / len(cosines)
  below = 1 + (count - 1) * cosine
  none = jnp.abs(below) < SINGULAR
  t = jnp.where(none, 0.0, count * cosine / jnp.where(none, 1.0, below))
  average = sum(x.astype(jnp.float32) for x in models) / count
  return (t * average + (1 - t) * wide).astype(dtype)


def sce(
  models: Sequence[Tensor],
  *,
  base: Tensor,
  density: Any = 1.0,
  semantics: str = "mergekit",
  dtype: Any = None,
) -> Array:
  """base + sum_i e_i s_i / sum_i e_i over the models of the elected sign, e_i = mean of s_i^2 over the tensor.

  Select, calculate, erase: s_i is delta_i at the density part of entries (of those that have any) whose variance
  among the models is the largest; signs are elected by sum_i s_i.  Wan et al. 2024 (FuseChat, arXiv 2408.07990),
  section 3.3.  One model has no variance, so that a density below 1 leaves nothing of it.

  Args:
    density: mergekit's select_topk.
    semantics: "paper", or "mergekit", which gives models equal e_i where the sum of all e_i is below 1e-6 (it is after
      most fine-tunes, whose deltas are below 1e-3), and divides by at least 1e-6 of that sum.

  Raises:
    ValueError: density outside [0, 1]; semantics is neither.
  """
  models = checks.models(models, base=base)
  checks.fraction("density", density)
  floor = checks.choice("semantics", semantics, ("mergekit", "paper")) == "mergekit"
  models, base = jax.tree.map(jnp.asarray, (models, base))
  select = None
  if density < 1:
    variance = _variance(models, base)
    select = variance, _most(variance, density)
  return _sce(models, base, select, floor, dtype=jnp.dtype(dtype or base.dtype))


@jax.jit
def _variance(models, base):
  """The variance of each entry among models."""
  # about the first delta, so that equal ones have no variance at all
  wide = _wide(base)
  deltas = [_wide(x) - wide for x in models]
  about = [d - deltas[0] for d in deltas]
  mean = sum(about) / len(about)
  return sum((d - mean) ** 2 for d in about) / len(about)


@jax.jit
def _most(variance, density):
  some = jnp.sum(variance != 0).astype(jnp.float32)
  return sparsify.largest(variance, (some * density).astype(jnp.int32))


@functools.partial(jax.jit, static_argnums=3, static_argnames=("dtype",))
def _sce(models, base, select, floor, *, dtype):
  wide = _wide(base)
  deltas = [_wide(x) - wide for x in models]
  if select is not None:
    kept = sparsify.mask(*select)
    deltas = [jnp.where(kept, d, 0.0) for d in deltas]
  energy = jnp.stack([jnp.mean(d * d) for d in deltas])
  total = jnp.sum(energy)
  alike = total < SINGULAR if floor else total == 0
  energy = jnp.where(alike, 1 / len(models), energy / jnp.where(alike, 1.0, total))
  agree = _agree(deltas, "sum")
  part = sum(jnp.where(a, e * d, 0.0) for a, e, d in zip(agree, energy, deltas))
  divisor = sum(jnp.where(a, e, 0.0) for a, e in zip(agree, energy))
  divisor = jnp.maximum(divisor, SINGULAR) if floor else jnp.where(divisor == 0, 1.0, divisor)
  return (wide + part / divisor).astype(dtype)


def _merge(models, base, weights, lambda_, find, settings, rule, dtype):
  models = checks.models(models, base=base)
  weights = checks.weights(weights, len(models), normalize=rule.normalize)
  models, base = jax.tree.map(jnp.asarray, (models, base))
  # several programs, each of which reads its inputs once and has no difference in memory
  kept = None
  if find is not None:
    kept = [
      _kept(x, base, setting, find=find, expected=rule.rescale == "expected")
      for x, setting in zip(models, settings(models, base))
    ]
    if rule.rescale == "l1":
      kept = [(mask, _l1_scale(x, base, mask)) for x, (mask, _) in zip(models, kept)]
  dtype = jnp.dtype(dtype or base.dtype)
  return _merged(models, base, weights, lambda_, kept, rule=rule, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("find", "expected"))
def _kept(model, base, settings, *, find: Callable[..., Any], expected: bool):
  """What is kept of a task vector, and what that is multiplied by to have the whole as its mean."""
  kept, probability = find(model, base, *settings)
  if not expected:
    return kept, None
  return kept, 1 / jnp.where(probability == 0, 1.0, probability)


@jax.jit
def _l1_scale(model, base, kept):
  return sparsify.l1_scale(_wide(model) - _wide(base), kept)


@functools.partial(jax.jit, static_argnames=("rule", "dtype"))
def _merged(models, base, weights, lambda_, kept, *, rule: Rule, dtype):
  wide = _wide(base)
  deltas = [_wide(x) - wide for x in models]
  if kept is not None:
    deltas = [_sparse(delta, *mask_and_scale) for delta, mask_and_scale in zip(deltas, kept)]
  return (wide + lambda_ * _joined(deltas, weights, rule)).astype(dtype)


def _sparse(delta, kept, scale):
  left = jnp.where(sparsify.mask(delta, kept), delta, 0.0)
  return left if scale is None else left * scale


def _wide(x):
  return x.astype(jnp.float32)


def _joined(deltas, weights, rule):
  weighted = [w * d for w, d in zip(weights, deltas)]
  if rule.election is None:
    total, divisor = sum(weighted), sum(jnp.float32(w) for w in weights)
    divisor = jnp.where(jnp.abs(divisor) < 1e-8, 1.0, divisor)
  else:
    agree = _agree(weighted if rule.weighted else deltas, rule.election)
    total = sum(jnp.where(a, x, 0.0) for a, x in zip(agree, weighted))
    shares = weights if rule.weighted else [1.0] * len(weights)
    divisor = sum(jnp.where(a, w, 0.0) for a, w in zip(agree, shares))
    divisor = jnp.where(divisor == 0, 1.0, divisor)
  return total / divisor if rule.normalize else total


def _agree(votes, election):
  """Where the vote of each model has the elected sign; a zero never has."""
  positive = sum(votes if election == "sum" else map(jnp.sign, votes)) >= 0
  return [jnp.where(positive, x > 0, x < 0) for x in votes]


def _largest(model, base, count):
  return sparsify.largest(model, count, base), None


def _middle(model, base, count, above):
  return sparsify.middle(model, count, above, base), None


def _drawn(model, base, key, density):
  return sparsify.drawn(key, base.shape, density), density


def _by_rank(model, base, ranks, key, density, epsilon):
  probability = sparsify.evenly(ranks, density, epsilon)
  return sparsify.drawn(key, base.shape, probability), probability


def _fold(key, i):
  return jax.random.fold_in(key, i)


def _election(name):
  return checks.choice("election", name, ELECTIONS)


def _window(density, epsilon):
  if density in (0.0, 1.0):
    return 0.0
  if not (epsilon >= 0 and density - epsilon > 0 and density + epsilon < 1):
    raise ValueError(
      f"density={density} and epsilon={epsilon}: density - epsilon and density + epsilon are probabilities, which must "
      f"lie inside (0, 1); write an epsilon from 0 to below {min(density, 1 - density):g}"
    )
  return float(epsilon)
