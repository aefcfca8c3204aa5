"""Mixtures of experts against transformers: logits, gradients, the loss of balance, and files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.core import tree
from posttrain_jax.models import decoder, hf
from tests.models import families

torch = pytest.importorskip("torch", reason="PyTorch is not installed: run `make oracle`")
pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

KINDS = ["mixtral", "qwen3_moe"]


def gradients(model, tokens):
  """{name in the hub's files: gradient} of the mean log-probability of each next token; fused stacks taken apart."""
  ids = torch.tensor(tokens, dtype=torch.long)
  logits = model(input_ids=ids).logits.float()
  logps = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])
  model.zero_grad()
  (-logps.mean()).backward()
  return {name: p.grad.numpy() for name, p in model.named_parameters()}


def loss(params, tokens, config):
  logps = jax.nn.log_softmax(decoder.forward(params, tokens, config)[:, :-1])
  return -jnp.take_along_axis(logps, tokens[:, 1:, None], -1).mean()


@pytest.mark.parametrize("chosen", [1, 2, 4])
@pytest.mark.parametrize("name", KINDS)
def test_logits_and_gradients_equal_transformers(tmp_path, tiny_model, torch_logits, name, chosen):
  model = tiny_model(name, num_experts_per_tok=chosen, norm_topk_prob=chosen == 2)
  with torch.no_grad():
    for layer in model.model.layers:  # of three pairs a logit each is above 0, which expert 3's is
      router = layer.mlp.gate.weight
      router[[0, 2, 5]] = -router[[1, 4, 6]]
      router[3] = 0
  model.save_pretrained(tmp_path)
  params, config = hf.load(tmp_path)
  tokens = families.tokens(2, 40)
  found = jax.jit(lambda p: decoder.forward(p, tokens, config))(params)
  _, load = decoder.hidden_and_load(params, tokens, config)
  assert load.chosen.sum(1).tolist() == [80 * chosen] * 3
  assert chosen == 4 or load.chosen[:, 3].tolist() == [0] * 3
  np.testing.assert_allclose(found, torch_logits(model, tokens), rtol=0, atol=1e-4)
  wanted = gradients(model, tokens)
  ours = dict(tree.items(jax.jit(jax.grad(loss), static_argnums=2)(params, tokens, config)))
  for path, gradient in ours.items():
    for at in hf.places(path, config):
      name, one = tree.numbered(path, at), np.asarray(gradient[at] if at else gradient)
      if ".experts." in name:
        layer, expert = at
        both = wanted[f"model.layers.{layer}.mlp.experts.gate_up_proj"][expert]
        half = len(both) // 2
        theirs = {
          "gate_proj": both[:half],
          "up_proj": both[half:],
          "down_proj": wanted[f"model.layers.{layer}.mlp.experts.down_proj"][expert],
        }[name.split(".")[-2]]
      else:
        theirs = wanted[name if name.startswith("lm_head") else f"model.{name}"]
      one = one.T if tree.turned(path) else one
      np.testing.assert_allclose(one, theirs, rtol=1e-3, atol=1e-5, err_msg=name)
