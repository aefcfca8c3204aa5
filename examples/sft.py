"""Supervised fine-tuning of a LoRA adapter over a 4-bit base: python examples/sft.py [MODEL [ROWS.jsonl]]"""

import sys

import jax
import optax

from posttrain_jax import adapters, objectives, train
from posttrain_jax.data import chat, loader
from posttrain_jax.models import fetch, hf

ROWS = [
  {"prompt": "Who wrote Emma?", "completion": "Jane Austen."},
  {"prompt": "Who wrote Dracula?", "completion": "Bram Stoker."},
  {"prompt": "Who wrote Faust?", "completion": "Johann Wolfgang von Goethe."},
]

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
rows = sys.argv[2] if len(sys.argv) > 2 else ROWS
params, config = hf.load(model, dtype="float32", storage="nf4")
tokenizer = chat.load_tokenizer(fetch.resolve(model))
# several examples share a row of 256 tokens and do not see each other
batches = loader.read(rows, tokenizer, batch_size=1, length=256, packing=True)

lora = adapters.AdapterConfig(r=8, lora_alpha=16)
base, adapter = adapters.init(jax.random.key(0), params, lora)
print(adapters.summary(base, adapter))
sft = objectives.Sft(config)
state, step = train.begin(sft, optax.adamw(2e-3), adapter)
for _ in range(6):
  state, metrics = step(state, objectives.Context(base), next(batches))
  print("loss {loss:.4f}, accuracy {mean_token_accuracy:.2f}".format(**objectives.read(metrics)))

adapters.peft_format.save("runs/sft-example", state.adapter, lora, config)
hf.save("runs/sft-example-merged", adapters.merge(base, state.adapter), config)
