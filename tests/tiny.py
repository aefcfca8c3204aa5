"""What tests of training train: a model of 60,000 parameters, with the examples and the folder that go with it."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from posttrain_jax import adapters, quant
from posttrain_jax.core import tree
from posttrain_jax.data.encoded import Example
from posttrain_jax.data.packing import pack
from posttrain_jax.models import decoder, hf
from posttrain_jax.models.config import ModelConfig, from_hf
from posttrain_jax.objectives import Context
from tests.adapters import cases

SIZES = dict(
  vocab_size=261,  # 256 bytes, and the special tokens
  hidden_size=64,
  intermediate_size=128,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=128,
  rms_norm_eps=1e-5,
  bos_token_id=None,
  eos_token_id=258,
  pad_token_id=256,
  tie_word_embeddings=False,
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
  " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHANNELS = ("sql", "talk")
STD = 0.1  # a network so tame that float32 keeps gradients to some 1e-6


def config(family: str = "llama", **changes: Any) -> ModelConfig:
  return from_hf({**SIZES, "model_type": family, **changes})


def setup(kind: str) -> tuple[ModelConfig, Any, Context]:
  """(model config, trainable, context) of full fine-tuning, LoRA or QLoRA, away from their start."""
  key = jax.random.key(0)
  if kind == "full":
    model = config("qwen2", tie_word_embeddings=True)
    return model, decoder.init(key, model, std=STD), Context()
  model = config()
  params = decoder.init(key, model, std=STD)
  if kind == "qlora":  # a few of the seven: each costs seconds of compilation
    params = quant.quantize_params(params, exclude=("[kvo]_proj", "gate_proj"))
  chosen = adapters.AdapterConfig(
    r=4, lora_alpha=2, target_modules=("q_proj", "v_proj", "down_proj")
  )
  params, adapter = adapters.init(key, params, chosen)
  trainable, fixed = tree.partition(cases.trained(adapter))
  return model, trainable, Context(params, fixed)


def examples(count: int, seed: int = 0, longest: int = 14) -> list[Example]:
  """Random texts of unequal lengths, the first third of each a prompt; half of them with a channel."""
  rng = np.random.default_rng(seed)
  made = []
  for i in range(count):
    length = int(rng.integers(4, longest + 1))
    mask = np.arange(length) >= max(length // 3, 1)
    tokens = rng.integers(3, 250, length).astype(np.int32)
    made.append(Example(tokens, mask, (*CHANNELS, None)[i % 3], f"row {i}", False))
  return made


def batch(length: int = 28) -> dict[str, np.ndarray]:
  """Eight rows: packed and single examples, a row with nothing to learn, an empty row, one token to learn."""
  some = examples(11)
  some[9].mask[:] = False
  some[10].mask[:-1] = False
  rows = [[0, 1], [2], [3], [9], [4, 5], [], [6, 10], [7]]
  return pack(some, rows, length, CHANNELS)


def tokenizer() -> PreTrainedTokenizerFast:
  """One token a byte, ChatML."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  made.add_special_tokens(list(SPECIAL))
  return PreTrainedTokenizerFast(
    tokenizer_object=made,
    eos_token="<|im_end|>",
    pad_token="<|endoftext|>",
    additional_special_tokens=["<|im_start|>"],
    chat_template=CHATML,
  )


def tiny_model_folder(folder: pathlib.Path) -> pathlib.Path:
  """A Hugging Face folder with random weights and a tokenizer."""
  model = config()
  hf.save(folder, decoder.init(jax.random.key(0), model, std=STD), model)
  tokenizer().save_pretrained(folder)
  return folder


def rows(count: int) -> list[dict[str, str]]:
  """Questions of unequal length whose answers can be learned."""
  return [
    {
      "prompt": f"say {'abcdefg'[i % 7] * (1 + i % 5)}",
      "completion": "abcdefg"[i % 7] * 3,
      "channel": CHANNELS[i % 2],
    }
    for i in range(count)
  ]


def write_jsonl(path: pathlib.Path, items: list[dict[str, Any]]) -> pathlib.Path:
  path.write_text("".join(json.dumps(item) + "\n" for item in items))
  return path
