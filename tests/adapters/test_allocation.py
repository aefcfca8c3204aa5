"""AdaLoRA's budget against a numpy loop, its corner cases, and its phases in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import adapters
from posttrain_jax.adapters import AdapterConfig, allocation
from posttrain_jax.core import metrics as metrics_lib
from posttrain_jax.core import tree
from posttrain_jax.models import decoder
from posttrain_jax.objectives import Context, Sft
from posttrain_jax.optim import chain
from posttrain_jax.train import state as state_lib
from posttrain_jax.train import step
from tests import tiny
from tests.adapters.kinds import moved
from tests.models import families

OPTIONS = dict(method="adalora", init_r=4, target_r=2, lora_alpha=8)
SOME = dict(target_modules=("q_proj", "down_proj"), exclude_modules=("layers.1.mlp.down_proj",))


def start(**options):
  """(config, adapter away from its start) of a tiny Llama: three modules of q_proj, two of down_proj."""
  config = AdapterConfig(**{**OPTIONS, **SOME, **options})
  _, adapter = adapters.init(jax.random.key(0), families.make("llama")[1], config)
  return config, moved(adapter)


def gradient_like(adapter, seed):
  draw = np.random.default_rng(seed)
  part = tree.partition(adapter)[0]
  noise = lambda x: jnp.asarray(
    draw.standard_normal(x.shape) * 10 ** draw.uniform(-2, 0, x.shape), jnp.float32
  )
  return jax.tree.map(noise, part)


def total(adapter):
  return int(sum(node.ranks().sum() for _, node in tree.items(adapter)))


def by_numpy(history, config, number, schedule):
  """{path: masks} after update `number` in float64, from every (adapter, gradient) so far."""
  scores = {}
  for path, last in tree.items(history[-1][0]):
    means = dict.fromkeys("abe", (0.0, 0.0))
    for adapter, gradient in history[: schedule.end - 1]:
      for name in "abe":
        p = np.asarray(getattr(tree.get(adapter, path), name), np.float64)
        g = np.asarray(getattr(tree.get(gradient, path), name), np.float64)
        average, spread = means[name]
        now = np.abs(p * g)
        average = config.beta1 * average + (1 - config.beta1) * now
        spread = config.beta2 * spread + (1 - config.beta2) * np.abs(now - average)
        means[name] = (average, spread)
    of = {name: average * spread for name, (average, spread) in means.items()}
    scores[path] = of["e"] + of["a"].mean(-2) + of["b"].mean(-1)
    scores[path][~np.asarray(last.adapted)] = -1
  every = np.sort(np.concatenate([s[s[..., 0] >= 0].ravel() for s in scores.values()]))
  keep = schedule.budget(number)
  return {path: s >= every[len(every) - keep] for path, s in scores.items()}


def test_the_ranks_kept_are_those_of_a_numpy_loop():
  config, adapter = start(tinit=1, tfinal=2, deltaT=2)
  steps = 9
  hooks = adapters.hooks(config, steps)
  schedule = allocation.schedule(config, steps, 5)
  after = jax.jit(hooks.after_update)
  history, seen = [], 0
  for number in range(1, steps + 1):
    adapter = moved(adapter, seed=number, size=0.1)  # what an optimizer would do
    gradient = gradient_like(adapter, number)
    before = adapter
    history.append((before, gradient))
    adapter = after(adapter, gradient, number - 1)
    if schedule.prunes(number):
      wanted = by_numpy(history, config, number, schedule)
      seen += 1
    for path, node in tree.items(adapter):
      if seen:
        np.testing.assert_array_equal(np.asarray(node.mask) > 0, wanted[path])
      done = schedule.prunes(number) or number >= schedule.end
      assert ((np.asarray(node.e) == 0) == (np.asarray(node.mask) == 0)).all() == done or not seen
      np.testing.assert_array_equal(node.a, tree.get(before, path).a)
  assert seen == 4  # updates 2, 4, 6 and the end, 7
  assert total(adapter) == 2 * 5


def test_the_budget_falls_by_the_cube():
  schedule = allocation.Schedule(first=40, target=10, start=2, end=12, every=5)
  budgets = [schedule.budget(n) for n in range(15)]
  assert budgets[:3] == [40, 40, 40]
  assert budgets[3] == int(30 * 0.9**3 + 10)
  assert budgets[7] == int(30 * 0.5**3 + 10)
  assert budgets[12:] == [10, 10, 10]
  assert [n for n in range(15) if schedule.prunes(n)] == [5, 10, 12]


def test_ties_at_the_threshold_are_cut_with_it():
  config, adapter = start()
  hooks = adapters.hooks(config, 1)
  zero = jax.tree.map(jnp.zeros_like, tree.partition(adapter)[0])
  assert (
    total(jax.jit(hooks.after_update)(adapter, zero, 0)) == 0
  )  # every score is 0: as in PEFT all go


def test_equal_ranks_at_both_ends_prune_nothing():
  config, adapter = start(target_r=4)
  after = jax.jit(adapters.hooks(config, 3).after_update)
  for number in range(3):
    adapter = after(adapter, gradient_like(adapter, number), number)
  assert total(adapter) == 4 * 5


def test_an_end_that_was_left_out_is_made_up_for():
  """The update at the end had a gradient that was not finite, and the whole hook with it."""
  config, adapter = start(init_r=12, tfinal=3, deltaT=3)
  after = jax.jit(adapters.hooks(config, 8).after_update)
  for number in [0, 1, 2, 3, 5]:  # not 4, which is the end
    adapter = after(adapter, gradient_like(adapter, number), number)
    assert (total(adapter) > 10) == (number < 5)
  assert total(adapter) == 10


def test_the_penalty_is_the_mean_distance_from_orthogonality():
  config, adapter = start(orth_reg_weight=0.7)
  value = jax.jit(adapters.hooks(config, 5).penalty)(adapter)
  wanted = []
  for _, node in tree.items(adapter):
    for layer, there in enumerate(node.adapted):
      for factor in (node.a[layer], node.b[layer].T):
        square = np.asarray(factor, np.float64).T @ np.asarray(factor, np.float64)
        wanted += [np.linalg.norm(square - np.eye(4))] * there
  assert len(wanted) == 10
  assert float(value) == pytest.approx(0.7 * np.mean(wanted), rel=1e-5)


def test_the_penalty_of_orthogonal_factors_has_a_finite_gradient():
  config, adapter = start()
  exact = lambda node: node.replace(
    a=jnp.broadcast_to(jnp.eye(node.a.shape[-2], 4), node.a.shape),
    b=jnp.broadcast_to(jnp.eye(4, node.b.shape[-1]), node.b.shape),
  )
  adapter = tree.unflatten((path, exact(node)) for path, node in tree.items(adapter))
  part, fixed = tree.partition(adapter)
  penalty = adapters.hooks(config, 5).penalty
  loss = lambda part: penalty(tree.combine(part, fixed))
  value, slope = jax.jit(jax.value_and_grad(loss))(part)
  assert value == 0
  assert not any(leaf.any() for leaf in jax.tree.leaves(slope))


@pytest.mark.parametrize(
  ("options", "steps", "message"),
  [
    (dict(tinit=5, tfinal=5), 10, "tinit=5 and tfinal=5 leave none of 10 steps to prune in"),
    (dict(total_step=20), 10, "total_step=20: the run has 10 steps"),
    (dict(total_step=0), 10, "total_step=0"),
    (dict(total_step=4, tinit=4), 10, "leave none of 4 steps"),
    (dict(beta1=0.0), 10, "beta1=0.0"),
  ],
)
def test_a_schedule_that_cannot_be_run_is_refused(options, steps, message):
  with pytest.raises(ValueError, match=message):
    adapters.hooks(AdapterConfig(method="adalora", **options), steps)


# --- in training ------------------------------------------------------------------------------------------------------


def run(accumulate=1, steps=8, spoil=None, **options):
  """(the states' adapters, metrics) of a tiny training; `spoil` is a step whose loss is not finite."""
  config = AdapterConfig(**{**OPTIONS, **options}, target_modules=("q_proj", "v_proj", "down_proj"))
  model = tiny.config()
  params = decoder.init(jax.random.key(0), model, std=tiny.STD)
  _, adapter = adapters.init(jax.random.key(1), params, config)
  part, fixed = tree.partition(adapter)
  optimizer, _ = chain.chain("adamw", lr=0.02, steps=steps)
  made = step.make(
    Sft(model), optimizer, accumulate=accumulate, hooks=adapters.hooks(config, steps)
  )
  made = jax.jit(made, donate_argnums=0)
  state, found, metrics = state_lib.start(part, optimizer, fixed), [], []
  for number in range(steps):
    base = params
    if number == spoil:
      base = tree.put(params, "norm/weight", params["norm"]["weight"] * jnp.nan)
    state, values = made(state, Context(base), tiny.batch())
    found.append(jax.tree.map(np.array, tree.combine(state.trainable, state.carried)))
    metrics.append(metrics_lib.read(values))
  return found, metrics


def test_training_prunes_to_the_target_and_what_is_pruned_stays_zero():
  found, metrics = run(tinit=1, tfinal=3)
  totals = [total(adapter) for adapter in found]
  assert totals[0] == 4 * 6
  assert totals == sorted(totals, reverse=True)
  assert totals[4:] == [2 * 6] * 4
  assert [m["adalora/mean_rank"] for m in metrics] == pytest.approx([t / 6 for t in totals])
  assert metrics[-1]["loss"] < metrics[0]["loss"]
  for (path, end), (_, last) in zip(tree.items(found[4]), tree.items(found[-1])):
    np.testing.assert_array_equal(end.mask, last.mask, err_msg=path)
    np.testing.assert_array_equal((last.e == 0), (last.mask == 0), err_msg=path)
    assert (end.a != last.a).any()
    np.testing.assert_array_equal(end.importance.a, last.importance.a)  # at rest after the end


@pytest.mark.slow
def test_the_penalty_counts_once_an_optimizer_batch():
  (whole, one), (parts, eight) = run(steps=2), run(steps=2, accumulate=8)
  assert one[0]["penalty"] == pytest.approx(eight[0]["penalty"], rel=1e-6)
  assert one[0]["grad_norm"] == pytest.approx(eight[0]["grad_norm"], rel=1e-5)
  for a, b in zip(jax.tree.leaves(whole[0]), jax.tree.leaves(parts[0])):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_an_update_that_is_skipped_moves_no_importance_and_no_mask():
  # the fifth update is the end
  found, metrics = run(init_r=12, tinit=1, tfinal=3, deltaT=3, spoil=4)
  jax.tree.map(np.testing.assert_array_equal, found[4], found[3])
  assert metrics[4]["skipped"] == 1
  assert metrics[4]["adalora/mean_rank"] == metrics[3]["adalora/mean_rank"]
  assert total(found[3]) > 2 * 6 == total(found[5])
