"""Batches of answers, objectives that read them, and how gradients and log-probabilities of them are computed."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from posttrain_jax.adapters import layout
from posttrain_jax.core import metrics as metrics_lib
from posttrain_jax.core import tree
from posttrain_jax.data import answers, companions
from posttrain_jax.data.encoded import Example
from posttrain_jax.data.packing import pack_answers, slots
from posttrain_jax.models import decoder
from posttrain_jax.objectives import (
  Context,
  Grouped,
  Labelled,
  Preference,
)
from posttrain_jax.train import step
from tests import tiny

LENGTH = 48
PAIRS: dict[str, dict[str, Any]] = {
  "dpo": dict(losses=(("dpo", 1.0),)),
  "several": dict(losses=(("ipo", 0.5), ("bco", 0.3), ("sft", 1.0)), label_smoothing=0.1),
  "aot": dict(losses=(("aot", 1.0),)),
  "aot_unpaired": dict(losses=(("aot_unpaired", 1.0),)),
  "orpo": dict(losses=(("orpo", 1.0), ("sft_with_prompt", 1.0))),
  "simpo": dict(losses=(("simpo", 1.0),), gamma_beta_ratio=0.5),
  "ld": dict(ld_alpha=0.3),
  "weighting": dict(weighting=True),
  "shift": dict(losses=(("bco", 1.0),), running_shift=True),
}


def example(rng, prompt, length):
  tokens = np.concatenate([prompt, rng.integers(3, 250, length)]).astype(np.int32)
  return Example(tokens, np.arange(len(tokens)) >= len(prompt), None, "row", False)


def groups(count, sizes, *, share=True, seed=0, **values):
  """Answers of unequal lengths to random prompts; `values` are functions of (rng, how many)."""
  rng = np.random.default_rng(seed)
  made = []
  for i in range(count):
    prompt = rng.integers(3, 250, int(rng.integers(2, 7)))
    size = sizes[i % len(sizes)]
    several = [example(rng, prompt, int(rng.integers(1, 8))) for _ in range(size)]
    numbers = {name: make(rng, size) for name, make in values.items()}
    made.append(answers.join(several, share=share, values=numbers))
  return made


def pairs(count=7, **options):
  return groups(count, (2,), **options)


def labels(count=8):
  made = groups(count, (1,), label=lambda rng, n: [float(rng.integers(2))])
  made[0] = dataclasses.replace(made[0], values={"label": (1.0,)})
  made[1] = dataclasses.replace(made[1], values={"label": (0.0,)})
  return companions.beside(made, LENGTH)


def scored(count=6):
  return groups(
    count,
    (3, 2, 4),
    score=lambda rng, n: rng.normal(size=n),
    advantage=lambda rng, n: rng.normal(size=n),
    deviation=lambda rng, n: rng.uniform(size=n),
  )


def drawn(count=6):
  """The same with what a sampler that is somewhat off says of each token."""
  rng = np.random.default_rng(3)
  off = lambda e: rng.normal(-5.8, 0.3, len(e.tokens)).astype(np.float32)
  return [
    dataclasses.replace(e, sampling_logps=np.where(e.mask, off(e), np.float32(0)))
    for e in scored(count)
  ]


def rows_of(examples, rows, length=LENGTH):
  room = max(slots(examples, length, True), max(e.count for e in examples))
  return pack_answers(examples, rows, length, room)


def batch(examples):
  """Eight rows: some hold several examples, one is empty."""
  rows = [[0, 1], [2], [3], [4], [5], [6] if len(examples) > 6 else []]
  rows += [[7]] if len(examples) > 7 else [[]]
  return rows_of(examples, [*rows, []], 2 * LENGTH)


CASES: dict[str, tuple[Any, dict[str, Any], Any]] = {
  **{name: (Preference, options, pairs) for name, options in PAIRS.items()},
  "kto": (Labelled, dict(undesirable_weight=1.3), labels),
  "grpo": (Grouped, dict(aggregation="sequence_mean", old="reference", kl_weight=0.1), scored),
  "gspo": (
    Grouped,
    dict(loss_name="gspo", aggregation="sequence_mean", old="reference", epsilon=0.5),
    scored,
  ),
  "rloo": (Grouped, dict(loss_name="rloo", old="reference", epsilon=0.5), scored),
  "dppo": (
    Grouped,
    dict(loss_name="dppo_tv", aggregation="prompt_mean", old="reference", epsilon=1e-3),
    scored,
  ),
  "dppo_kl": (Grouped, dict(loss_name="dppo_kl", old="reference", epsilon=1e-3), scored),
  "cispo": (Grouped, dict(loss_name="cispo", old="reference", ceiling=1.05), scored),
  "reinforce": (Grouped, dict(loss_name="reinforce"), scored),
  "constant_length": (Grouped, dict(aggregation="constant_length", max_length=9), scored),
  "sequence_sum": (Grouped, dict(aggregation="sequence_sum", kl_weight=0.1), scored),
  **{
    f"{level}, {outside}": (
      Grouped,
      dict(
        importance=level,
        importance_low=low,
        importance_high=1 / low,
        importance_outside=outside,
        aggregation=aggregation,
      ),
      drawn,
    )
    for level, low, aggregation in (
      ("token", 0.7, "token_mean"),
      ("sequence", 0.5, "sequence_mean"),
      ("geometric", 0.8, "prompt_mean"),
    )
    for outside in ("truncate", "mask")
  },
}
FAST = ("grpo",)


def setup(name):
  """(objective, trainable, context, examples)."""
  kind, options, make = CASES[name]
  model, trainable, context = tiny.setup("lora")
  objective = kind(model, **options)
  return objective, trainable, context, make()


def gradient(objective, trainable, context, batch, accumulate=1):
  key, memory = jax.random.key(0), objective.start(trainable)
  run = jax.jit(functools.partial(step.gradient, objective, accumulate=accumulate))
  grads, metrics = run(trainable, context, batch, key, memory=memory)
  return grads, metrics_lib.read(metrics)


@functools.cache
def whole(name):
  """(gradient, metrics) of the case's batch at once."""
  objective, trainable, context, examples = setup(name)
  return gradient(objective, trainable, context, batch(examples))


@functools.partial(jax.jit, static_argnames="objective")
def told(objective, trainable, context, given):
  """What the loss tells of a batch, and the batch's totals."""
  memory = objective.start(trainable)
  context = objective.context(context, memory)
  totals = objective.totals(trainable, context, given, None, memory=memory, training=False)
  return objective.loss(trainable, context, given, totals, None, training=False), totals


@functools.partial(jax.jit, static_argnames="model")
def whole_decoder(params, tokens, model):
  return decoder.forward(params, tokens, model)


def alone(params, tokens, model):
  """[time, vocab] of one sequence by itself; filled up behind, for one program to read them all."""
  padded = np.pad(tokens, (0, LENGTH - len(tokens)))[None]
  return whole_decoder(params, padded, model)[0, : len(tokens)]


def placed(trainable, context, mesh):
  """As a run lays them out."""
  if context.fixed is None:
    return layout.laid_out(trainable, mesh), context
  adapter = layout.laid_out(tree.combine(trainable, context.fixed), mesh)
  trainable, fixed = tree.partition(adapter)
  return trainable, Context(layout.laid_out(context.base, mesh), fixed)


def assert_same(found, wanted, tolerance=1e-5):
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted)):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    error, size = np.linalg.norm(a - b), np.linalg.norm(b)
    assert error <= tolerance * size, f"{jax.tree_util.keystr(path)}: {error:.2e} of {size:.2e}"
    assert size > 0
