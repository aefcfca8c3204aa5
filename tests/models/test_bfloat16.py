"""SmolLM2-135M with products in bfloat16, as a CPU computes them: near float32 on real text, forward and backward."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import adapters
from posttrain_jax.adapters import layout
from posttrain_jax.core import tree
from posttrain_jax.data import chat
from posttrain_jax.losses import logprob
from posttrain_jax.models import decoder, fetch, hf

TEXT = pathlib.Path(__file__).parents[2] / "README.md"
ROWS, LENGTH = 2, 64


@pytest.fixture(scope="module")
def tokens():
  ids = chat.load_tokenizer(fetch.resolve("smollm2"))(TEXT.read_text())["input_ids"]
  return jnp.asarray(ids[: ROWS * LENGTH]).reshape(ROWS, LENGTH)


def gradient(tokens, products, storage):
  """(loss, flat gradient) of LoRA away from its start, or of the whole model."""
  is_full = storage == "full"
  params, config = hf.load(
    "smollm2",
    dtype=jnp.float32 if is_full else products,
    storage="dense" if is_full else storage,
    place=layout.place,
  )
  trained, fixed = params, None
  if not is_full:
    params, adapter = adapters.init(
      jax.random.key(0), params, adapters.AdapterConfig(r=8, lora_alpha=16)
    )
    trained, fixed = tree.partition(adapter)
    noise = lambda x: x + 0.01 * jax.random.normal(jax.random.key(1), x.shape)
    trained = jax.tree.map(noise, trained)

  def loss(trained, params, tokens):
    if is_full:
      bound = decoder.multiplied_in(trained, products)
    else:
      bound = adapters.bind(params, tree.combine(trained, fixed))
    hidden = decoder.hidden(bound, tokens, config, dtype=jnp.float32, remat="names")
    labels, mask = jnp.roll(tokens, -1, 1), jnp.ones(tokens.shape, int)
    return -jnp.mean(logprob.token_logps(hidden, decoder.head(bound), labels, mask=mask))

  value, of = jax.jit(jax.value_and_grad(loss))(trained, None if is_full else params, tokens)
  return float(value), np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(of)])


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["dense", "full", "nf4", "int8"])
def test_losses_and_gradients_are_near_those_in_float32(tokens, storage):
  loss, exact = gradient(tokens, jnp.float32, storage)
  found, near = gradient(tokens, jnp.bfloat16, storage)
  assert near.dtype == np.float32
  assert 0 < abs(found - loss) < 0.02 * loss
  cosine = np.vdot(near, exact) / np.linalg.norm(near) / np.linalg.norm(exact)
  assert 0.99 < cosine < 1 - 1e-6
