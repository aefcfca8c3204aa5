"""`quantize_params`: which weights, in which type, and what it says of the rest."""

import jax
import jax.numpy as jnp
import pytest

from posttrain_jax import quant
from posttrain_jax.core import tree
from posttrain_jax.quant import fp4, int8, nf4


def normal(*shape, seed=0, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def params():
  return {
    "embed_tokens": {"weight": normal(50, 64)},
    "layers": {
      "self_attn": {"q_proj": {"weight": normal(2, 64, 64), "bias": normal(2, 64)}},
      "mlp": {"down_proj": {"weight": normal(2, 128, 64)}},
      "input_layernorm": {"weight": normal(2, 64)},
    },
    "norm": {"weight": normal(64)},
    "lm_head": {"weight": normal(64, 50)},
  }


def quantised(tree_, kind=nf4.NF4):
  return {path for path, leaf in tree.items(tree_) if isinstance(leaf, kind)}


Q, DOWN = "layers/self_attn/q_proj/weight", "layers/mlp/down_proj/weight"


@pytest.mark.parametrize(
  ("options", "kind"),
  [
    ({}, nf4.NF4),
    (dict(storage="nf4", double_quant=False, block_size=32), nf4.NF4),
    (dict(storage="fp4"), fp4.FP4),
    (dict(storage="int8"), int8.Int8),
  ],
)
def test_linear_weights_of_the_layers_are_stored(options, kind):
  before = params()
  after = quant.quantize_params(before, **options)
  assert quantised(after, kind) == {Q, DOWN}
  if "block_size" in options:
    assert tree.get(after, Q).block_size == 32
    assert tree.get(after, Q).nested_absmax is None
  assert list(tree.flatten(after)) == list(tree.flatten(before))
  assert tree.size(after) == tree.size(before)
  assert tree.get(after, "lm_head/weight") is tree.get(before, "lm_head/weight")


@pytest.mark.parametrize(
  "pattern", [DOWN, r"layers/mlp/.*", "down_proj", r"layers\.\d+\.mlp\.down_proj", r".*\.mlp\..*"]
)
def test_excluded_weights_stay_dense(pattern):
  assert quantised(quant.quantize_params(params(), exclude=[pattern])) == {Q}


def test_mistakes_in_quantize_params_are_named():
  with pytest.raises(ValueError, match=r"no parameter matches 'dwn_proj'; .*down_proj"):
    quant.quantize_params(params(), exclude=["dwn_proj"])
  with pytest.raises(ValueError, match=r"^'\(' is no regular expression: missing \)"):
    quant.quantize_params(params(), exclude=["("])
  with pytest.raises(ValueError, match=r"matches 1 of the 2 layers of .*write 'down_proj'"):
    quant.quantize_params(params(), exclude=[r"layers\.1\.mlp\.down_proj"])
  with pytest.raises(ValueError, match=r"down_proj/weight: it is a NF4 already"):
    quant.quantize_params(quant.quantize_params(params(), exclude=["q_proj"]))
  with pytest.raises(ValueError, match=r"q_proj/weight: cannot quantise .*exclude="):
    quant.quantize_params(tree.put(params(), Q, normal(2, 40, 64)))
  with pytest.raises(ValueError, match=r"unknown storage 'int3': known are nf4, fp4, int8"):
    quant.quantize_params(params(), storage="int3")
  with pytest.raises(TypeError, match="block_size"):  # of nf4 and fp4 alone
    quant.quantize_params(params(), storage="int8", block_size=64)
  with pytest.raises(ValueError, match="nothing to quantise"):
    quant.quantize_params({"norm": {"weight": normal(64)}})
