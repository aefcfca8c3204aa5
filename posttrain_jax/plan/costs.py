"""Arithmetic and time of a train step: FLOPs counted from shapes, and the least that a device's peaks allow.

A matrix of n numbers takes 2 n FLOPs a token forward, 2 n for the gradient of its input and, where it is trained, 2 n
for its own: 6 N a token in full fine-tuning, 4 N with an adapter on a frozen base.  Attention adds 4 h t a token and
layer forward, for heads of h numbers together and t keys, and twice that backward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax

from posttrain_jax.build import decisions, reference
from posttrain_jax.core import tree
from posttrain_jax.core.weight import shape
from posttrain_jax.plan.chips import Chip
from posttrain_jax.plan.collectives import Collective
from posttrain_jax.plan.program import Compiled, Program

AGAIN = ("full", "host")  # remat with which the backward pass runs every layer forward again


def flops(built: Program) -> dict[str, float]:
  """{model, computed} of a step on all devices together.

  model: what learning needs: each product once, and of attention what is visible in a row of one document.
  computed: with what is computed again in the backward pass, and attention over all keys.
  """
  config, model = built.config, built.model
  tokens = config.batch.rows * config.data.length
  full = decisions.is_full(config)
  matrices = _matrices(built)
  adapter = 0.0 if full else float(numbers(built.state.trainable))
  passes = 3 if full else 2
  compared = compares(built)
  again = int(config.model.remat in AGAIN)
  keys = config.data.length
  visible = sum(min(keys / 2, model.window or keys) if model.sliding(i) else keys / 2
                for i in range(model.num_layers))  # fmt: skip
  attention = 4.0 * model.num_heads * model.head_dim
  useful = 2 * matrices * (passes + compared) + 6 * adapter + attention * visible * (3 + compared)
  every = attention * keys * model.num_layers
  computed = (
    2 * matrices * (passes + compared + again) + (6 + 2 * again) * adapter
    + every * (3 + compared + again)
  )  # fmt: skip
  return {"model": useful * tokens, "computed": computed * tokens}


def compares(built: Program) -> int:
  """How many forward passes a step has beside that of what trains: of a reference, in the step."""
  return int(built.context.reference is not None or _asks_base(built))


def numbers(arrays: Any) -> int:
  """How many numbers a tree's arrays hold."""
  return sum(x.size for x in jax.tree.leaves(arrays))


def _asks_base(built: Program) -> bool:
  """Whether a step runs the base without its adapter too."""
  config = built.config
  return (
    decisions.has_reference(config)
    and not decisions.caches_reference(config)
    and not decisions.is_full(config)
    and reference.is_in_step(config)
  )


def _matrices(built: Program) -> float:
  """Numbers of the matrices that a token is multiplied with, a tied head included; of experts those that it chooses."""
  params = built.state.trainable if built.context.base is None else built.context.base
  sizes = {path: math.prod(shape(leaf)) for path, leaf in tree.items(params)}
  model = built.model
  active = model.experts_per_token / model.experts if model.experts else 1.0
  layers = sum(
    size * (active if "/experts/" in path else 1.0)
    for path, size in sizes.items()
    if path.startswith("layers/") and tree.turned(path)
  )
  head = sizes.get("lm_head/weight", sizes["embed_tokens/weight"])
  return layers + head


def roofline(
  built: Program,
  chip: Chip,
  compiled: Compiled,
  sent: Sequence[Collective],
) -> dict[str, Any]:
  """Seconds that each part of a device needs at its peak, which is the longest, and tokens a second at that."""
  devices = 1 if built.mesh is None else built.mesh.size
  passes = 2 + (built.config.model.remat in AGAIN) + int(_asks_base(built))
  seconds = {
    "products": flops(built)["computed"] / devices / chip.flops,
    # weights are read in every pass, what trains is read and written, and so is what lies between
    "memory": (compiled.arguments * passes + 2 * compiled.temporaries) / chip.bandwidth,
    "links": sum(one.sent for one in sent) / chip.links,
    "network": sum(one.network for one in sent) / chip.network,
    "host": compiled.host * passes / chip.host,
  }
  bound = max(seconds, key=lambda name: seconds[name])
  tokens = built.config.batch.rows * built.config.data.length
  return {
    "seconds": {name: round(value, 6) for name, value in seconds.items()},
    "bound": bound,
    "step_seconds": round(seconds[bound], 6),
    "tokens_per_second": round(tokens / seconds[bound], 1),
  }
