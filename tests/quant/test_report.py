"""The error of matrices and logits against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import quant
from posttrain_jax.core import tree
from posttrain_jax.models import decoder
from posttrain_jax.quant import report
from tests.models import families

DOWN = "layers/mlp/down_proj/weight"


@pytest.fixture(scope="module")
def model():
  config = families.config("llama", hidden_size=64, intermediate_size=128)
  params = families.params(config)
  # the second layer is hard to store: a value in each block that dwarfs the others
  spiked = params["layers"]["mlp"]["down_proj"]["weight"].at[1, ::64].mul(5)
  return tree.put(params, DOWN, spiked), config


@pytest.mark.parametrize("storage", quant.STORAGES)
def test_matrices_by_path_with_mean_and_worst_layer(model, storage):
  params, _ = model
  found = report.report(params, storage, exclude=["o_proj"])
  stored = quant.quantize_params(params, storage=storage, exclude=["o_proj"])
  assert set(found.matrices) == {p for p, leaf in tree.items(stored) if hasattr(leaf, "apply")}
  assert found.logits is None
  for path, row in found.matrices.items():
    w = np.asarray(tree.get(params, path), np.float64)
    off = np.abs(w - np.asarray(tree.get(stored, path).dense(), np.float64))
    layers = (-2, -1)
    norm = np.sqrt((off**2).sum(layers) / (w**2).sum(layers))
    expected = [off.mean(layers), (off / (np.abs(w) + 1e-8)).mean(layers), norm, off.max(layers)]
    worst = norm.argmax()
    assert row.worst_layer == worst
    for name, values in zip(("mean_abs", "relative", "norm", "max_abs"), expected):
      assert getattr(row.mean, name) == pytest.approx(values.mean(), rel=1e-4), (path, name)
      assert getattr(row.worst, name) == pytest.approx(values[worst], rel=1e-4), (path, name)
  assert found.matrices[DOWN].worst_layer == 1
  assert "down_proj/weight" in str(found)


def test_logits_of_the_stored_model_against_the_dense(model):
  params, config = model
  tokens = families.tokens(2, 9)
  logits = lambda params: decoder.forward(params, tokens, config)
  found = report.report(params, "fp4", logits=logits).logits
  ours, exact = logits(quant.quantize_params(params, storage="fp4")), logits(params)
  assert found == report.logit_error(exact, ours)
  assert found.max_abs > report.report(params, "int8", logits=logits).logits.max_abs > 0


def test_logit_error_is_in_nats():
  draw = np.random.default_rng(0)
  p, q = 3 * draw.standard_normal((2, 2, 5, 7)).astype(np.float64)
  q[0] = p[0] + 4  # a shift of all logits moves no probability
  found = report.logit_error(jnp.asarray(p), jnp.asarray(q))
  log = lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))
  kl = (np.exp(log(p)) * (log(p) - log(q))).sum(-1)
  assert kl[0].max() < 1e-12
  assert found.kl == pytest.approx(kl.mean(), rel=1e-5)
  assert found.max_abs == pytest.approx(np.abs(p - q).max(), rel=1e-6)
  assert found.mean_abs == pytest.approx(np.abs(p - q).mean(), rel=1e-6)
  same = p.argmax(-1) == q.argmax(-1)
  assert 0.5 <= same.mean() < 1
  assert found.same_top == pytest.approx(same.mean())
  assert f"KL {found.kl:.3g} nats" in str(found)


def test_nothing_is_off_of_itself():
  x = jax.random.normal(jax.random.key(0), (3, 8))
  assert report.logit_error(x, x) == report.LogitError(0, 0, 0, 1)
