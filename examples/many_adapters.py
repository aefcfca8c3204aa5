"""Two adapters learn different answers and give them in one batch: python examples/many_adapters.py [MODEL]"""

import sys

import jax
import numpy as np
import optax

from posttrain_jax import adapters, objectives, train
from posttrain_jax.data import chat, loader
from posttrain_jax.models import fetch, hf
from posttrain_jax.rollout import engine

QUESTION, ANSWERS = "What is your favourite colour?", ("Blue.", "Red.")
model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
params, config = hf.load(model, dtype="float32")
tokenizer = chat.load_tokenizer(fetch.resolve(model))
lora = adapters.AdapterConfig(r=8, lora_alpha=16)
learned = []
for answer in ANSWERS:
  base, adapter = adapters.init(jax.random.key(0), params, lora)
  rows = [{"prompt": QUESTION, "completion": answer}]
  batches = loader.read(rows, tokenizer, batch_size=1, length=128)
  state, step = train.begin(objectives.Sft(config), optax.adamw(3e-3), adapter)
  for _ in range(8):
    state, metrics = step(state, objectives.Context(base), next(batches))
  print("loss {loss:.4f}".format(**objectives.read(metrics)))
  learned.append(state.adapter)

# row i of the batch has the adapter index[i]; -1 is the model as it was
index = [0, 1, -1]
bound = adapters.bind(params, adapters.stack(learned), rows=np.asarray(index))
turn = [{"role": "user", "content": QUESTION}]
prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
ends = engine.stop_tokens(config, tokenizer)
written = engine.generate(bound, config, [prompt] * 3, max_new_tokens=8, stop_tokens=ends)
for i, tokens in zip(index, written.tokens):
  print(f"adapter {i}: {tokenizer.decode(tokens, skip_special_tokens=True)}")
