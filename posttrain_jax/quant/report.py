"""What a storage type costs: the error of each matrix, and of the logits.

params, config = hf.load("smollm2")
print(report.report(params, "nf4", logits=lambda params: decoder.forward(params, tokens, config)))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax import quant
from posttrain_jax.core import tree

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class MatrixError:
  """How far a stored matrix q is from w; for a stack the mean over its layers, or its worst layer.

  For standard normal values in NF4 blocks of 64, `mean_abs` is 0.0728 and `relative` 0.203.
  """

  mean_abs: float  # mean |w - q|
  relative: float  # mean |w - q| / (|w| + 1e-8), as bitsandbytes' tests count it
  norm: float  # ||w - q|| / ||w||, Frobenius
  max_abs: float


@dataclasses.dataclass(frozen=True)
class StackError:
  """The layers of one path: their mean, and the layer whose `norm` is largest."""

  mean: MatrixError
  worst: MatrixError
  worst_layer: int


@dataclasses.dataclass(frozen=True)
class LogitError:
  """How far logits [..., vocab] are from others; kl is KL(reference || logits) in nats, a mean over tokens."""

  max_abs: float
  mean_abs: float
  kl: float
  same_top: float  # share of tokens whose likeliest next token is the same

  def __str__(self) -> str:
    return (
      f"max {self.max_abs:.3g}, mean {self.mean_abs:.3g}, KL {self.kl:.3g} nats, "
      f"same top token {100 * self.same_top:.1f} %"
    )


@dataclasses.dataclass(frozen=True)
class Report:
  storage: str
  matrices: dict[str, StackError]  # by path
  logits: LogitError | None

  def __str__(self) -> str:
    wide = max(map(len, self.matrices))
    head = f"{'':<{wide}}  {'mean abs':>9} {'relative':>9} {'norm':>9}   worst layer: norm"
    lines = [f"error of {self.storage}", head]
    for path, e in self.matrices.items():
      m = e.mean
      lines.append(
        f"{path:<{wide}}  {m.mean_abs:>9.3g} {m.relative:>9.3g} {m.norm:>9.3g}   {e.worst_layer}: {e.worst.norm:.3g}"
      )
    return "\n".join([*lines, *([f"logits: {self.logits}"] if self.logits else [])])


def report(
  params: Any,
  storage: str = "nf4",
  *,
  exclude: Sequence[str] = (),
  logits: Callable[[Any], Array] | None = None,
  **options: Any,
) -> Report:
  """The error of every matrix that `quant.quantize_params` would store, by path, and of the logits.

  Args:
    params: dense.
    logits: params -> [..., vocab]; called with the dense and with the quantised ones.
    exclude, storage, options: as `quant.quantize_params` takes them.
  """
  stored = quant.quantize_params(params, exclude=exclude, storage=storage, **options)
  matrices = {
    path: _over_layers(leaf, tree.get(stored, path))
    for path, leaf in tree.items(params)
    if path in quant.quantisable(tree.flatten(params), exclude)
  }
  of_logits = None if logits is None else logit_error(logits(params), logits(stored))
  return Report(storage, matrices, of_logits)


def error(w: Any, q: Any) -> MatrixError:
  """How far q, any stored weight, is from the matrix w: [in, out]."""
  return MatrixError(*map(float, _errors(jnp.asarray(w), q)))


@jax.jit
def _errors(w: Array, q: Any) -> tuple[Array, ...]:
  w = w.astype(jnp.float32)
  distance = jnp.abs(w - q.dense(jnp.float32))
  norm = jnp.linalg.norm(distance) / jnp.maximum(jnp.linalg.norm(w), 1e-30)
  return distance.mean(), (distance / (jnp.abs(w) + 1e-8)).mean(), norm, distance.max()


def _over_layers(w: Any, q: Any) -> StackError:
  layers = [error(w[i], jax.tree.map(lambda x, i=i: x[i], q)) for i in range(len(w))]
  worst = max(range(len(layers)), key=lambda i: layers[i].norm)
  mean = np.mean([dataclasses.astuple(layer) for layer in layers], axis=0)
  return StackError(MatrixError(*map(float, mean)), layers[worst], worst)


def logit_error(reference: Any, logits: Any) -> LogitError:
  """The error of logits [..., vocab] against reference, in float32."""
  reference, logits = (jnp.asarray(x, jnp.float32) for x in (reference, logits))
  distance = jnp.abs(reference - logits)
  logp, logq = jax.nn.log_softmax(reference), jax.nn.log_softmax(logits)
  kl = jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1).mean()
  same = reference.argmax(-1) == logits.argmax(-1)
  return LogitError(*(float(x) for x in (distance.max(), distance.mean(), kl, same.mean())))
