"""Two fine-tuned models and their base become one model: python examples/merge.py BASE FIRST SECOND OUT"""

import sys

from posttrain_jax import merge
from posttrain_jax.models import fetch, hf

name, first, second, out = sys.argv[1:]
base, config = hf.load(name, dtype="float32")
models = [hf.load(model, dtype="float32")[0] for model in (first, second)]

# of each model's change the largest fifth, added up where most of it agrees on the sign
ties = merge.ties(models, base=base, density=0.2)
print("norm of the change of the embedding:")
for said, params in (("first", models[0]), ("second", models[1]), ("both", ties)):
  change = params["embed_tokens"]["weight"] - base["embed_tokens"]["weight"]
  print(f"  {said}: {(change**2).sum() ** 0.5:.4f}")

hf.save(out, ties, config, tokenizer_from=fetch.resolve(name))
