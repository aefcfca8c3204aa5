"""An adapter type of one's own, trained and merged: python examples/own_adapter.py [MODEL]"""

import sys

import jax
import optax

from posttrain_jax import adapters, objectives, train
from posttrain_jax.adapters.node import Change
from posttrain_jax.core import struct, tree, weight
from posttrain_jax.data import chat, loader
from posttrain_jax.models import fetch, hf


@struct.dataclass
class Rescaled(Change):
  """(x * gain) @ W with gain: [in]; a matrix costs as many parameters as it has inputs."""

  gain: jax.Array
  TRAINED = ("gain",)

  def apply(self, x, base, key=None):
    return weight.linear((x * self.gain).astype(x.dtype), base)

  def dense(self, base, dtype=None):
    return (self.gain[..., None] * weight.dense(base)).astype(dtype or self.gain.dtype)


model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
base, config = hf.load(model, dtype="float32")
rows = [{"prompt": "Who wrote Emma?", "completion": "Jane Austen."}]
batches = loader.read(rows, chat.load_tokenizer(fetch.resolve(model)), batch_size=1, length=128)
weights = {path: w for path, w in tree.flatten(base).items() if path.endswith("_proj/weight")}
adapter = tree.unflatten((p, Rescaled(jax.numpy.ones(w.shape[:-1]))) for p, w in weights.items())
state, step = train.begin(objectives.Sft(config), optax.adamw(5e-3), adapter)
for _ in range(6):
  state, metrics = step(state, objectives.Context(base), next(batches))
  print("loss {loss:.4f}".format(**objectives.read(metrics)))
hf.save("runs/own-adapter-merged", adapters.merge(base, state.adapter), config)
