"""The table of adapter sizes against PEFT's own count, on the shapes of Llama-3-8B and 70B without a weight."""

import copy
import warnings

import peft
import pytest
import torch
import transformers

from experiments import adapter_sizes
from posttrain_jax.models.shapes import SHAPES

pytestmark = pytest.mark.oracle

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CAUSAL = dict(task_type="CAUSAL_LM")
THEIRS = {
  "LoRA, rank 16": peft.LoraConfig(r=16, target_modules=SEVEN),
  "DoRA, rank 16": peft.LoraConfig(r=16, target_modules=SEVEN, use_dora=True),
  "AdaLoRA, at the start (rank 12)": peft.AdaLoraConfig(
    init_r=12, target_modules=SEVEN, total_step=10
  ),
  "VeRA, rank 256": peft.VeraConfig(r=256, target_modules=SEVEN),
  "(IA)³, keys, values, down": peft.IA3Config(),
  "prompt tuning, 20 tokens": peft.PromptTuningConfig(num_virtual_tokens=20, **CAUSAL),
  "prefix tuning, 20 tokens": peft.PrefixTuningConfig(num_virtual_tokens=20, **CAUSAL),
}


def shell(name):
  """A transformers model of these shapes on the device that holds none."""
  shape = SHAPES[name]
  config = transformers.LlamaConfig(
    vocab_size=shape.vocab_size,
    hidden_size=shape.hidden_size,
    intermediate_size=shape.intermediate_size,
    num_hidden_layers=shape.num_layers,
    num_attention_heads=shape.num_heads,
    num_key_value_heads=shape.num_kv_heads,
    head_dim=shape.head_dim,
  )
  return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("model", adapter_sizes.MODELS)
@pytest.mark.parametrize("title", adapter_sizes.ADAPTERS)
def test_the_counts_are_pefts(model, title):
  with warnings.catch_warnings(), torch.device("meta"):
    warnings.simplefilter("ignore")
    theirs = peft.get_peft_model(shell(model), copy.deepcopy(THEIRS[title]))  # it writes into it
  trained, _ = theirs.get_nb_trainable_parameters()
  assert adapter_sizes.trained(SHAPES[model], adapter_sizes.ADAPTERS[title]) == trained


def test_the_table_on_file_is_what_is_computed():
  assert adapter_sizes.OUT.read_text() == adapter_sizes.table()
