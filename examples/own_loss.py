"""A loss of one's own in an objective, in full fine-tuning: python examples/own_loss.py [MODEL]"""

import dataclasses
import sys

import jax.numpy as jnp
import optax

from posttrain_jax import objectives, train
from posttrain_jax.core import metrics as metrics_lib
from posttrain_jax.data import chat, loader
from posttrain_jax.models import fetch, hf


@dataclasses.dataclass(frozen=True)
class Focal(objectives.Scorer):
  """Token mean of -(1 - p)^gamma log p: tokens that the model is sure of count less.  Lin et al. 2017, eq. 4."""

  gamma: float = 2.0

  def totals(self, trainable, context, batch, key, *, memory, training):
    return {"count": jnp.sum(objectives.targets(batch)[1])}  # of the whole optimizer batch

  def contribution(self, forward, context, batch, totals, *, training):
    _, mask = objectives.targets(batch)
    logp = self.scores(forward, batch, mask).logp
    each = -((1 - jnp.exp(logp)) ** self.gamma) * logp
    loss = jnp.sum(jnp.where(mask, each, 0.0)) / totals["count"]
    return loss, {"loss": metrics_lib.mean(each, mask), "tokens": jnp.sum(mask)}


model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
params, config = hf.load(model, dtype="float32")
rows = [{"prompt": "Who wrote Emma?", "completion": "Jane Austen."}]
batches = loader.read(rows, chat.load_tokenizer(fetch.resolve(model)), batch_size=1, length=128)
state, step = train.begin(Focal(config), optax.adafactor(1e-3), params)
for _ in range(6):
  state, metrics = step(state, objectives.Context(), next(batches))
  print("loss {loss:.4f}".format(**objectives.read(metrics)))
