"""Mixtures of experts against transformers: logits, gradients, the loss of balance, and files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import adapters
from posttrain_jax.adapters import AdapterConfig, peft_format
from posttrain_jax.core import tree
from posttrain_jax.losses import balance
from posttrain_jax.models import decoder, hf
from tests.adapters import cases
from tests.models import families

torch = pytest.importorskip("torch", reason="PyTorch is not installed: run `make oracle`")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
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


@pytest.mark.parametrize("name", KINDS)
def test_the_loss_of_balance_equals_transformers(tmp_path, tiny_model, name):
  """Value and gradient, right padding left out."""
  model = tiny_model(name)
  model.save_pretrained(tmp_path)
  params, config = hf.load(tmp_path)
  tokens, lengths = families.tokens(2, 20), np.asarray([20, 13])
  mask = (np.arange(20) < lengths[:, None]).astype(np.int32)
  out = model(
    input_ids=torch.tensor(tokens, dtype=torch.long),
    attention_mask=torch.tensor(mask),
    output_router_logits=True,
  )
  model.zero_grad()
  out.aux_loss.backward()

  def loss(params):
    _, load = decoder.hidden_and_load(params, tokens, config, segment_ids=mask)
    return balance.load_balance(load.chosen, load.probability, load.tokens)

  value, gradient = jax.jit(jax.value_and_grad(loss))(params)
  np.testing.assert_allclose(value, out.aux_loss.item(), rtol=1e-5)
  for layer in range(3):
    wanted = model.model.layers[layer].mlp.gate.weight.grad.numpy().T
    found = gradient["layers"]["mlp"]["gate"]["weight"][layer]
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6)


CHOSEN = {
  "all": dict(r=3, lora_alpha=6),
  "attention": dict(r=2, target_modules=("q_proj", "v_proj")),
  "down": dict(r=2, lora_alpha=3, target_modules=("down_proj",)),
  "router": dict(r=2, target_modules=("gate", "k_proj")),
}


def bound_logits(params, adapter, tokens, config):
  run = jax.jit(decoder.forward, static_argnums=2)
  return np.asarray(run(adapters.bind(params, adapter), tokens, config))


@pytest.mark.parametrize("chosen", CHOSEN)
@pytest.mark.parametrize("name", KINDS)
def test_adapters_go_to_peft_and_come_back_fused(tmp_path, folders, torch_logits, name, chosen):
  folder, params, config = folders(name)
  chosen = AdapterConfig(**CHOSEN[chosen])
  _, adapter = adapters.init(jax.random.key(0), params, chosen)
  adapter, tokens = cases.trained(adapter), families.tokens(2, 20)
  peft_format.save(tmp_path / "ours", adapter, chosen, config)
  base = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
  model = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
  wanted = torch_logits(model, tokens)
  found = bound_logits(params, adapter, tokens, config)
  np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-4)
  model.save_pretrained(tmp_path / "theirs")
  again, _ = peft_format.load(tmp_path / "theirs", params, config)
  np.testing.assert_allclose(bound_logits(params, again, tokens, config), wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("parameters", [("gate_up_proj", "down_proj"), ("gate_up_proj",)])
@pytest.mark.parametrize("name", KINDS)
def test_adapters_that_peft_made_of_fused_experts_are_read(
  tmp_path, folders, torch_logits, name, parameters
):
  folder, params, config = folders(name)
  base = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
  targets = [f"mlp.experts.{parameter}" for parameter in parameters]
  chosen = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["o_proj"], target_parameters=targets)
  model = peft.get_peft_model(base, chosen).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for key, parameter in model.named_parameters():
      if "lora_B" in key:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
  model.save_pretrained(tmp_path)
  adapter, _ = peft_format.load(tmp_path, params, config)
  tokens = families.tokens(2, 20)
  found = bound_logits(params, adapter, tokens, config)
  np.testing.assert_allclose(found, torch_logits(model, tokens), rtol=0, atol=2e-4)
