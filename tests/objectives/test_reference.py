"""The reference policy: the base as it was, where training starts, or a copy that follows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from posttrain_jax import adapters, objectives
from posttrain_jax.core import tree
from posttrain_jax.core.metrics import read
from posttrain_jax.models import decoder
from posttrain_jax.objectives import (
  Context,
  Labelled,
  Preference,
  reference,
  reference_cache,
)
from posttrain_jax.train import state as state_lib
from posttrain_jax.train import step
from tests import tiny
from tests.marks import slow
from tests.objectives.batches import (
  batch,
  labels,
  pairs,
  setup,
  told,
  whole_decoder,
)


@pytest.mark.parametrize("name", [slow("dpo"), "kto"])
def test_a_reference_that_is_not_the_start_is_refused(name):
  objective, trainable, context, examples = setup(name)
  objective = dataclasses.replace(objective, own_base=True, starts_there=True)
  start = jax.tree.map(jnp.zeros_like, trainable)
  measure = lambda trainable: read(
    objectives.evaluation(objective)(trainable, context, None, batch(examples))
  )
  objective.check_start(measure(start))
  with pytest.raises(ValueError, match=r"differ from the reference's by .* nats a token"):
    objective.check_start(measure(trainable))
  dataclasses.replace(objective, starts_there=False).check_start(measure(trainable))


@pytest.mark.parametrize("use_dora", [slow(False), True])
def test_what_an_adapter_took_out_of_its_base_is_the_references_again(use_dora):
  """PiSSA: the reference is the model that was, not what is left of it."""
  model, _, _ = tiny.setup("full")
  params = decoder.init(jax.random.key(1), model, std=tiny.STD)
  chosen = adapters.AdapterConfig(r=4, lora_alpha=8, init_lora_weights="pissa", use_dora=use_dora)
  rest, adapter = adapters.init(jax.random.key(0), params, chosen)
  trainable, fixed = tree.partition(adapter)
  context = Context(rest, fixed)
  (loss, _), _ = told(Preference(model), trainable, context, batch(pairs()))
  assert float(loss) == pytest.approx(np.log(2), rel=1e-5)
  found = reference.reference(context)
  tokens = np.arange(3, 12)[None]
  logits = [whole_decoder(p, tokens, model) for p in (found, params)]
  np.testing.assert_allclose(*logits, atol=2e-5)


def test_full_fine_tuning_without_a_reference_is_refused(tmp_path):
  model, params, context = tiny.setup("full")
  objective = Preference(model)
  with pytest.raises(ValueError, match="give it a reference"):
    objective.loss(params, context, batch(pairs()), {"count": 7}, None, training=True)
  # ... but for log-probabilities that were computed while it was the base
  cached = reference_cache.scored(pairs(), objective, params, cache=tmp_path, say=lambda _: None)
  (loss, _), _ = told(objective, params, context, batch(cached))
  assert float(loss) == pytest.approx(np.log(2), rel=1e-5)


@pytest.mark.parametrize("kind", ["pairs", slow("labels")])
def test_a_reference_follows_the_policy(kind):
  """TR-DPO: every second update the reference goes 0.6 of the way; the loss compares with it, evaluation too."""
  model, params, _ = tiny.setup("full")
  make = {"pairs": Preference, "labels": Labelled}[kind]
  objective = make(model, sync_every=2)
  examples = batch(pairs() if kind == "pairs" else labels())
  optimizer = optax.sgd(0.5)
  state = state_lib.start(params, optimizer, None, objective.start(params))
  run = jax.jit(step.make(objective, optimizer))
  expected, margins = params, []
  for count in range(4):
    before, compared = state.trainable, expected
    state, metrics = run(state, Context(), examples)
    if count % 2:
      expected = jax.tree.map(lambda new, old: 0.6 * new + 0.4 * old, state.trainable, expected)
    margins.append(metrics["rewards/chosen"])
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    jax.tree.map(near, state.memory["reference"].trainable, expected)
  assert float(margins[0].total) == pytest.approx(0, abs=1e-5)
  plain = make(model)
  (_, metrics), _ = told(plain, before, Context(reference=compared), examples)
  assert float(margins[3].total) == pytest.approx(float(metrics["rewards/chosen"].total), rel=1e-4)


@pytest.mark.slow
def test_a_reference_follows_an_adapter():
  """TR-DPO with LoRA: the trained factors are mixed; the base and the adapter's scale stay what they are."""
  objective, trainable, context, examples = setup("dpo")
  objective = dataclasses.replace(objective, sync_every=1, sync_mix=0.25)
  optimizer, given = optax.sgd(0.5), batch(examples)
  state = state_lib.start(trainable, optimizer, context.fixed, objective.start(trainable))
  run = jax.jit(step.make(objective, optimizer))
  first, metrics = run(state, context, given)
  assert read(metrics)["rewards/margins"] == pytest.approx(0, abs=1e-5)  # the base's would not be
  follower = jax.tree.map(lambda new, old: 0.25 * new + 0.75 * old, first.trainable, trainable)
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
  jax.tree.map(near, first.memory["reference"].trainable, follower)
  _, metrics = run(first, context, given)
  # what the second step compares with: the base bound to the mixed factors
  params = adapters.bind(context.base, tree.combine(follower, context.fixed))
  fixed = dataclasses.replace(objective, sync_every=0)
  (_, expected), _ = told(
    fixed, first.trainable, dataclasses.replace(context, reference=params), given
  )
  found, wanted = read(metrics), read(expected)
  for name in ("loss", "rewards/chosen", "rewards/margins"):
    assert found[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-6)
  assert abs(wanted["rewards/chosen"]) > 1e-3
