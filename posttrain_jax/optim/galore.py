"""GaLore: Adam in a low-rank subspace of each matrix's gradient (Zhao et al. 2024, arXiv 2403.03507)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from posttrain_jax.core import patterns, struct
from posttrain_jax.optim import adam8bit, paths

Array = jax.Array
PROJECTIONS = ("std", "reverse_std", "right", "left", "full")
LAYERS = r"layers/.*"


# of float32 gradients, as they are: an accelerator rounds its own
_product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@struct.dataclass
class Subspace:
  """low = left^T G right^T, with left: [..., in, rank] and right: [..., rank, out]; None: that side stays whole."""

  left: Array | None
  right: Array | None

  def project(self, g: Array) -> Array:
    if self.left is not None:
      g = _product("...ir,...io->...ro", self.left, g)
    return g if self.right is None else _product("...io,...ro->...ir", g, self.right)

  def back(self, low: Array) -> Array:
    if self.left is not None:
      low = _product("...ir,...ro->...io", self.left, low)
    return low if self.right is None else _product("...ir,...ro->...io", low, self.right)

  def of(self, g: Array, rank: int) -> Subspace:
    """The leading singular vectors of g, float32, one layer after the other.

    The sign of a singular vector is nobody's: the largest entry is made positive, so that moments which outlive a
    subspace mean the same on every backend and mesh.
    """
    stack = g.reshape(-1, *g.shape[-2:])
    left, right = jax.lax.map(lambda g: _singular(g, rank), stack)
    keep = lambda old, new: None if old is None else new.reshape(old.shape)
    return Subspace(keep(self.left, left), keep(self.right, right))


def _singular(g, rank):
  u, _, vh = jnp.linalg.svd(g.astype(jnp.float32), full_matrices=False)
  return _signed(u[:, :rank], 0), _signed(vh[:rank], 1)


def _signed(vectors, axis):
  at = jnp.argmax(jnp.abs(vectors), axis=axis, keepdims=True)
  return vectors * jnp.sign(jnp.take_along_axis(vectors, at, axis=axis))


@struct.dataclass
class Projected:
  """What GaLore keeps of one matrix: the subspace, and moments within it that no change of subspace touches."""

  subspace: Subspace
  mu: Any
  nu: Any


@struct.dataclass
class Whole:
  """What plain Adam keeps."""

  mu: Any
  nu: Any


class State(NamedTuple):
  count: Array
  leaves: Any  # a `Projected` or `Whole` for each parameter


def adamw(
  rate: Callable[[Any], Any],
  *,
  rank: int = 128,
  update_gap: int = 200,
  scale: float = 0.25,
  projection: str = "std",
  target: str = LAYERS,
  eight_bit: bool = False,
  min_size: int = adam8bit.MIN_SIZE,
  in_float32: Callable[[str], bool] = lambda path: False,
  is_embedding: Callable[[str], bool] = lambda path: False,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  weight_decay: float = 0.0,
  mask: Callable[[Any], Any],
) -> optax.GradientTransformation:
  """p - lr scale back(m / (sqrt(v) + eps) sqrt(1 - b2^t) / (1 - b1^t)), m and v of the projected gradient; then decay.

  As the authors' AdamW computes it: eps is not divided by the bias correction, the decay (1 - lr decay) comes after
  the update, and moments are neither rotated nor reset with the subspace.  With eight_bit the moments and the order
  of operations are bitsandbytes', within the subspace.  Other parameters get the same without a projection.

  Args:
    rank: of the subspace; at most the smaller side of each target.
    update_gap: updates between two decompositions of the gradient, the first at update 0.
    scale: of the projected update alone.
    projection: which side of a matrix as PyTorch stores it, [out, in], is projected.  right: its columns, our `in`;
      left: its rows, our `out`; full: both; std: the shorter side (`in` where equal), so that moments are
      [rank, longer]; reverse_std: the other.  Rows and columns of an embedding are the same for both.
    target: pattern of the paths whose matrices are projected; all in the layers by default.
    eight_bit: moments in 8 bits where one layer's have min_size elements or more.
    in_float32: as in `adam8bit.adamw`.
    is_embedding: path -> whether PyTorch stores the matrix as we do.
  """
  if projection not in PROJECTIONS:
    raise ValueError(f"projection={projection!r}: known are {', '.join(PROJECTIONS)}")
  if rank < 1 or update_gap < 1:
    raise ValueError(f"rank={rank}, update_gap={update_gap}: both must be 1 or more")

  def start(path, p):
    lead = paths.stacked(path)
    whole = not is_target(path, p, target)
    least = min_size if eight_bit and not in_float32(paths.module(path)) else float("inf")
    moments = lambda shape: [
      adam8bit.zeros(shape, signed=signed, stacked=lead, min_size=least) for signed in (True, False)
    ]
    if whole:
      return Whole(*moments(p.shape))
    left, right = sides(projection, *p.shape[-2:], is_embedding(paths.module(path)))
    *layers, rows, columns = p.shape
    subspace = Subspace(
      jnp.zeros((*layers, rows, rank), jnp.float32) if left else None,
      jnp.zeros((*layers, rank, columns), jnp.float32) if right else None,
    )
    low = (*layers, rank if left else rows, rank if right else columns)
    return Projected(subspace, *moments(low))

  def init(params):
    leaves = jax.tree_util.tree_map_with_path(start, params)
    return State(jnp.zeros((), jnp.int32), leaves)

  def update(updates, state, params=None):
    count, lr = state.count + 1, rate(state.count)
    fresh = state.count % update_gap == 0

    def direction(g, kept):
      if eight_bit:
        step, mu, nu, _ = adam8bit.adam(g, kept.mu, kept.nu, count, b1=b1, b2=b2, eps=eps)
      else:
        step, mu, nu = adam(g, kept.mu, kept.nu, count, b1=b1, b2=b2, eps=eps)
      return step, kept.replace(mu=mu, nu=nu)

    def one(g, p, decays, kept):
      g = g.astype(jnp.float32)
      if isinstance(kept, Projected):
        subspace = jax.lax.cond(
          fresh, lambda g: kept.subspace.of(g, rank), lambda _: kept.subspace, g
        )
        low, kept = direction(subspace.project(g), kept.replace(subspace=subspace))
        step = scale * subspace.back(low)
      else:
        step, kept = direction(g, kept)
      lost = lr * weight_decay * decays
      return -lr * step * (1 - lost) - lost * p.astype(jnp.float32), kept

    changes, leaves = paths.unzip(one, 2, updates, params, mask(params), state.leaves)
    return changes, State(count, leaves)

  return optax.GradientTransformation(init, update)


def adam(
  g: Array, m: Array, v: Array, count: Array, *, b1: float, b2: float, eps: float
) -> tuple[Array, Array, Array]:
  """(m / (sqrt(v) + eps) * sqrt(1 - b2^t) / (1 - b1^t), m, v): eps beside the uncorrected v."""
  m = b1 * m + (1 - b1) * g
  v = b2 * v + (1 - b2) * g * g
  correction = jnp.sqrt(adam8bit.left(b2, count)) / adam8bit.left(b1, count)
  return correction * m / (jnp.sqrt(v) + eps), m, v


def is_target(path: tuple[Any, ...], p: Any, target: str) -> bool:
  """Whether the parameter is a matrix whose path `target` matches."""
  matrix = p.ndim - paths.stacked(path) == 2
  return matrix and patterns.fullmatch(target, paths.module(path))


def check(params: Any, *, rank: int, target: str) -> None:
  """Every target has the rank, and there is one.

  Raises:
    ValueError: names the parameter.
  """
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  targets = [(paths.module(path), p.shape) for path, p in leaves if is_target(path, p, target)]
  if not targets:
    known = ", ".join(dict.fromkeys(paths.module(path) for path, _ in leaves))
    raise ValueError(f"target={target!r} matches no matrix of {known}")
  for name, shape in targets:
    if rank > min(shape[-2:]):
      raise ValueError(
        f"rank={rank} is above the {min(shape[-2:])} of {name}, {list(shape[-2:])}; lower it, or leave "
        f"the matrix out with optimizer.target"
      )


def sides(projection: str, rows: int, columns: int, as_torch: bool = False) -> tuple[bool, bool]:
  """(whether left, whether right) of our [rows, columns] is projected; as_torch: PyTorch stores it the same way."""
  if projection == "full":
    return True, True
  if as_torch:
    right, left = sides(projection, columns, rows)
    return left, right
  inputs = {"std": columns >= rows, "reverse_std": columns < rows, "right": True, "left": False}
  return inputs[projection], not inputs[projection]
