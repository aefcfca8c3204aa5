"""What is asked of cuDNN, answered by jax's own formula, is plain attention; the kernel itself needs a GPU."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.models import attention, cudnn
from posttrain_jax.models.attention import Places
from tests.models.test_attention import drawn, pairs_that_share


@pytest.mark.parametrize("window", [None, 4, 19])
def test_it_is_plain_attention(window, monkeypatch):
  """A row of 19 tokens, and one of 12 with padding behind; the window traced, as over layers of two kinds."""
  monkeypatch.setattr(cudnn, "KERNEL", "xla")
  inputs = drawn(19)
  lengths = np.array([19, 12])
  is_token = np.arange(19) < lengths[:, None]
  places = Places(jnp.arange(19) * is_token, jnp.asarray(is_token, jnp.int32))
  reach = None if window is None else jnp.int32(window)

  def run(attend, **options):
    def loss(q, k, v, reach):
      out = attend(q, k, v, places, places, reach, scale=0.7, **options)
      return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*inputs, reach)

  found, wanted = run(cudnn.attend, windows=(4,)), run(attention.attend)
  for one, expected in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-5)


def test_what_its_call_cannot_say_is_refused():
  q, k, v = drawn(22)
  shared = pairs_that_share(22)
  alone = Places(shared.positions, shared.segments)
  for places, options in ((shared, {}), (alone, dict(softcap=30.0))):
    with pytest.raises(ValueError, match="no soft-cap and no tokens that several documents see"):
      cudnn.attend(q, k, v, places, places, scale=1.0, **options)


def test_what_a_gpu_is_given_says_the_mask_the_scale_and_the_window(monkeypatch):
  """Lowered for CUDA without a card: forward and backward, near and whole."""
  asks = "jax._src.cudnn.fused_attention_stablehlo."
  monkeypatch.setattr(asks + "check_cudnn_version", lambda: 91100)
  monkeypatch.setattr(asks + "check_compute_capability", lambda least: True)
  monkeypatch.setattr(asks + "is_cuda_compute_capability_equal", lambda which: False)

  def loss(q, k, v, segments, reach):
    places = Places(jnp.broadcast_to(jnp.arange(256), (2, 256)), segments)
    out = cudnn.attend(q, k, v, places, places, reach, windows=(64,), scale=0.3)
    return jnp.sum(out, dtype=jnp.float32)

  matrix = lambda heads: jax.ShapeDtypeStruct((2, 256, heads, 64), jnp.bfloat16)
  given = (matrix(8), matrix(2), matrix(2), np.ones((2, 256), np.int32), jnp.int32(64))
  traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(*given)
  program = traced.lower(lowering_platforms=("cuda",)).as_text()
  calls = re.findall(r"@__cudnn\$(fmhaSoftmax\w*)\(.*?backend_config = \"(.*?)\"", program)
  told = [
    json.loads(config.replace("\\22", '"'))["cudnn_fmha_backend_config"] for _, config in calls
  ]
  assert sorted((name, one["sliding_window_length"]) for (name, _), one in zip(calls, told)) == [
    ("fmhaSoftmax", 0),
    ("fmhaSoftmax", 64),
    ("fmhaSoftmaxBackward", 0),
    ("fmhaSoftmaxBackward", 64),
  ]
  assert {one["mask_type"] for one in told} == {"PADDING_CAUSAL"}
  assert {one["fmha_scale"] for one in told} == {0.3}
