"""PEFT and we on a model that also sees: adapters of its text model have the names of its class, both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import adapters
from posttrain_jax.adapters import AdapterConfig, peft_format
from posttrain_jax.core import tree
from posttrain_jax.models import decoder, hf
from tests.models import families
from tests.oracle.pefts import close, quiet, torch_logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.oracle

TOKENS = families.tokens(1, 12)
VISION = dict(
  hidden_size=16,
  intermediate_size=32,
  num_hidden_layers=1,
  num_attention_heads=2,
  image_size=28,
  patch_size=14,
)
THEIRS = {
  "sees_too": dict(r=4, target_modules=["q_proj", "v_proj"]),
  "expression": dict(r=4, target_modules=r"^(?!.*vision).*(q_proj|up_proj)$"),
  "patterns": dict(
    r=4,
    target_modules=["gate_proj", "o_proj"],
    layers_to_transform=[1],
    rank_pattern={r"^model\.language_model\.layers\.1\.self_attn\.o_proj": 2},
    alpha_pattern={"model.language_model.layers.1.mlp.gate_proj": 20},
    modules_to_save=["language_model.norm"],
  ),
}
OURS = {
  "lora": AdapterConfig(r=4),
  "patterns": AdapterConfig(
    r=4,
    target_modules=["q_proj", "gate_proj", "lm_head"],
    rank_pattern={r"model\.layers\.1\.self_attn\.q_proj": 2},
    alpha_pattern={"model.layers.0.mlp.gate_proj": 3.0},
    modules_to_save=["model.norm"],
  ),
  "vera": AdapterConfig(method="vera", r=4, target_modules=["q_proj", "down_proj"]),
  "ia3": AdapterConfig(method="ia3", target_modules=["k_proj", "down_proj"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("seeing") / "model"
  text = {**families.FAMILIES["gemma3"], "model_type": "gemma3_text"}
  config = transformers.Gemma3Config(
    text_config=text, vision_config=VISION, mm_tokens_per_image=4, tie_word_embeddings=True
  )
  torch.manual_seed(0)
  transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
  return folder


def theirs(folder):
  return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(params, adapter, config):
  return decoder.forward(adapters.bind(params, adapter), jnp.asarray(TOKENS), config)


@pytest.mark.parametrize("name", THEIRS)
def test_pefts_adapters_give_pefts_logits(name, folder, tmp_path):
  model = quiet(
    peft.get_peft_model,
    theirs(folder),
    peft.LoraConfig(task_type="CAUSAL_LM", lora_alpha=8, **THEIRS[name]),
  )
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.requires_grad:
        parameter.add_(0.2 * torch.randn(parameter.shape))
  quiet(model.save_pretrained, tmp_path / "a")
  params, config = hf.load(folder)
  adapter, _ = peft_format.load(tmp_path / "a", params, config)
  close(logits(params, adapter, config), torch_logits(model.eval(), TOKENS))


@pytest.mark.parametrize("name", OURS)
def test_ours_give_our_logits_in_peft(name, folder, tmp_path):
  """Written with the names of the text class they did nothing there."""
  params, config = hf.load(folder)
  params, adapter = adapters.init(jax.random.key(0), params, OURS[name])
  trained, fixed = tree.partition(adapter)
  rng = np.random.default_rng(0)
  move = lambda x: x + jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype)
  adapter = tree.combine(jax.tree.map(move, trained), fixed)
  peft_format.save(tmp_path / "a", adapter, OURS[name], config)
  model = quiet(peft.PeftModel.from_pretrained, theirs(folder), tmp_path / "a")
  close(logits(params, adapter, config), torch_logits(model.eval(), TOKENS))
