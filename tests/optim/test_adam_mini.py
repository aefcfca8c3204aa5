"""Adam-mini against its formula in float64, block by block; blocks come from axis names."""

import jax
import numpy as np
import pytest

from posttrain_jax.adapters.lora import LoRA
from posttrain_jax.core import tree
from posttrain_jax.optim import adam_mini
from tests.optim import cases

RATE, B1, B2, EPS, DECAY = 0.02, 0.8, 0.95, 1e-3, 0.1


def block_numbers(path, shape):
  """Which block each entry of one layer's tensor belongs to, written down by name for every kind of parameter."""
  index = np.indices(shape)
  if path.endswith("/bias"):
    return np.arange(np.prod(shape)).reshape(shape)
  if "norm" in path:
    return np.zeros(shape, int)
  if "q_proj" in path or "k_proj" in path:
    return index[1] // cases.HEADS
  return index[0 if path == "embed_tokens/weight" else 1]


def reference(path, w, gradients):
  """Zhang et al. 2024, algorithm 1, for one tensor; decay before the update, on matrices."""
  numbers = block_numbers(path, w.shape)
  count = numbers.max() + 1
  size = np.bincount(numbers.ravel(), minlength=count)
  m, v = np.zeros(w.shape), np.zeros(count)
  for t, g in enumerate(gradients, 1):
    m = B1 * m + (1 - B1) * g
    squares = np.bincount(numbers.ravel(), weights=(g * g).ravel(), minlength=count)
    v = B2 * v + (1 - B2) * squares / size
    h = np.sqrt(v / (1 - B2**t)) + EPS
    w = w * (1 - RATE * DECAY * (w.ndim == 2))
    w = w - RATE * m / (1 - B1**t) / h[numbers]
  return w, count


def test_it_is_the_published_update_in_the_declared_blocks():
  params = cases.params()
  gradients = [cases.like(params, seed, scale=seed) for seed in (1, 2, 3)]
  optimizer = cases.made("adam_mini", lr=RATE, b1=B1, b2=B2, eps=EPS, weight_decay=DECAY, clip=None)
  found, state = cases.after(optimizer, params, gradients)
  kept = tree.flatten(state[0].nu)
  for path, w in tree.items(params):
    layers = path.startswith("layers/")
    for layer in range(2 if layers else 1):
      at = path, layer if layers else ...
      wanted, count = reference(path, one(params, *at), [one(g, *at) for g in gradients])
      np.testing.assert_allclose(one(found, *at), wanted, rtol=1e-5, atol=1e-6, err_msg=path)
      assert kept[path].size == count * (w.shape[0] if layers else 1), path


def one(params, path, layer):
  return np.asarray(tree.get(params, path), np.float64)[layer]


def test_queries_and_keys_have_a_number_a_head():
  state = cases.made("adam_mini", clip=None).init(cases.params())[0]
  layer = state.nu["layers"]["self_attn"]
  assert layer["q_proj"]["weight"].shape == (2, 1, 6)
  assert layer["k_proj"]["weight"].shape == (2, 1, 2)
  assert layer["v_proj"]["weight"].shape == (2, 1, 32)
  assert layer["o_proj"]["weight"].shape == (2, 1, 64)
  assert state.nu["embed_tokens"]["weight"].shape == (261, 1)
  assert state.nu["lm_head"]["weight"].shape == (1, 261)
  assert state.nu["layers"]["input_layernorm"]["weight"].shape == (2, 1)
  assert layer["q_proj"]["bias"].shape == (2, 96)


def test_second_moments_take_a_fiftieth_of_the_bytes():
  params = cases.params()
  state = cases.made("adam_mini", clip=None).init(params)[0]
  assert cases.nbytes(state.mu) == cases.nbytes(params)
  assert cases.nbytes(state.nu) < cases.nbytes(params) / 50


def test_the_factors_of_an_adapter_have_a_number_an_output():
  node = LoRA(np.ones((2, 8, 3)), np.ones((2, 3, 6)), None)
  params = {"layers": {"self_attn": {"q_proj": {"weight": node}}}}
  state = cases.made("adam_mini", clip=None).init(params)[0]
  found = state.nu["layers"]["self_attn"]["q_proj"]["weight"]
  assert (found.a.shape, found.b.shape) == ((2, 1, 3), (2, 1, 6))


def test_mistakes_are_explained():
  params = {"layers": {"odd": {"weight": np.ones((2, 4, 4))}}}
  with pytest.raises(ValueError, match="axes of layers/odd/weight are not declared"):
    cases.made("adam_mini").init(params)
  with pytest.raises(ValueError, match="24 outputs are no whole number of heads of 16"):
    adam_mini.blocks("layers embed heads", (2, 8, 24), stacked=True, head_dim=16)


def test_every_parameter_of_a_model_has_blocks():
  shapes = jax.eval_shape(cases.params)
  state = jax.eval_shape(cases.made("adam_mini", clip=None).init, shapes)[0]
  assert jax.tree.structure(state.nu) == jax.tree.structure(shapes)
