"""DPO of a LoRA adapter on a handful of pairs, as a notebook has it: python examples/dpo.py [MODEL]"""

import sys

import jax
import optax

from posttrain_jax import adapters, objectives, train
from posttrain_jax.data import chat, loader
from posttrain_jax.models import fetch, hf

good = {"Name a colour.": "Blue.", "Name an animal.": "A fox.", "Name a city.": "Lyon."}
pairs = [{"prompt": q, "chosen": a, "rejected": "I would rather not."} for q, a in good.items()]

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
params, config = hf.load(model, dtype="float32")
tokenizer = chat.load_tokenizer(fetch.resolve(model))
batches = loader.read(pairs, tokenizer, kind="pairs", batch_size=3, length=128)

lora = adapters.AdapterConfig(r=8, lora_alpha=16)
base, adapter = adapters.init(jax.random.key(0), params, lora)
dpo = objectives.Preference(config, losses=(("dpo", 1.0),), beta=0.1)
state, step = train.begin(dpo, optax.adamw(1e-3), adapter)
for _ in range(6):
  state, metrics = step(state, objectives.Context(base), next(batches))
  print("loss {loss:.4f}, margin {rewards/margins:.4f}".format(**objectives.read(metrics)))

adapters.peft_format.save("runs/dpo-example", state.adapter, lora, config)
