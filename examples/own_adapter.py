"""An adapter type of one's own, trained and merged: python examples/own_adapter.py [MODEL]"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

from posttrain_jax import adapters, objectives, train
from posttrain_jax.adapters.node import Change
from posttrain_jax.core import struct, tree, weight
from posttrain_jax.data import chat, loader
from posttrain_jax.models import fetch, hf


@struct.dataclass
class Rescaled(Change):
  """((x * rows) @ W) * columns with rows: [in], columns: [out]; a matrix costs in + out parameters."""

  rows_gain: jax.Array
  columns_gain: jax.Array
  TRAINED = ("rows_gain", "columns_gain")

  def apply(self, x: jax.Array, base: Any, key: jax.Array | None = None) -> jax.Array:
    return (weight.linear(x * self.rows_gain, base) * self.columns_gain).astype(x.dtype)

  def dense(self, base: Any, dtype: Any = None) -> jax.Array:
    w = self.rows_gain[..., :, None] * weight.dense(base) * self.columns_gain[..., None, :]
    return w.astype(dtype or w.dtype)


model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
base, config = hf.load(model, dtype="float32")
rows = [{"prompt": "Who wrote Emma?", "completion": "Jane Austen."}]
batches = loader.read(rows, chat.load_tokenizer(fetch.resolve(model)), batch_size=1, length=128)
paths = [path for path in tree.flatten(base) if path.endswith("_proj/weight")]
shapes = {path: weight.shape(tree.get(base, path)) for path in paths}  # [layers, in, out]
ones = lambda shape: Rescaled(jnp.ones(shape[:-1]), jnp.ones((shape[0], shape[2])))
adapter = tree.unflatten((path, ones(shape)) for path, shape in shapes.items())
state, step = train.begin(objectives.Sft(config), optax.adamw(5e-3), adapter)
for _ in range(6):
  state, metrics = step(state, objectives.Context(base), next(batches))
  print("loss {loss:.4f}".format(**objectives.read(metrics)))
hf.save("runs/own-adapter-merged", adapters.merge(base, state.adapter), config)
