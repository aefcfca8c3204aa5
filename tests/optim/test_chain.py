"""Optimizers by name: schedules in closed form, what decays, what is clipped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from posttrain_jax.adapters.lora import LoRA
from posttrain_jax.optim import chain, schedules
from tests.marks import few
from tests.optim import cases

NAMES = ("adamw", "adafactor", "lion", "sgd", *cases.NEW)
SQUARE = "layers in out"
# the axes of the small trees below, and a rank that their matrices have
AXES = {"layers/w": SQUARE, "norm": "norm", "layers/mlp/up_proj/bias": "layers mlp"}
OPTIONS = dict(rank=2, axes=cases.AXES | AXES, head_dim=1)


def rates(steps=10, lr=2.0, warmup=0.3, schedule="cosine"):
  rate = schedules.learning_rate(lr, steps=steps, warmup=warmup, schedule=schedule)
  return np.asarray([rate(step) for step in range(steps + 1)])


def test_the_rate_rises_to_its_peak_and_falls_to_zero():
  after = np.arange(8) / 7  # from the fourth update to the end of the run
  rising = [2 / 3, 4 / 3, 2.0]  # the first update is not at a rate of 0
  np.testing.assert_allclose(rates(), [*rising, *(1 + np.cos(np.pi * after))], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(rates(schedule="linear"), [*rising, *(2 - 2 * after)], atol=1e-6)
  np.testing.assert_allclose(rates(schedule="constant"), [*rising, *[2.0] * 8], rtol=1e-6)


@pytest.mark.parametrize("warmup", [0.0, 0.04, 0.1])
def test_short_warmups_start_at_the_peak(warmup):
  """No update, or the only one of the warm-up."""
  found = rates(warmup=warmup)
  assert found[0] == 2.0
  assert found[-1] == pytest.approx(0, abs=1e-6)


def test_a_run_that_only_warms_up_ends_at_its_peak():
  np.testing.assert_allclose(rates(steps=4, warmup=1.0)[:4], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_each_optimizer_finds_a_minimum(name):
  optimizer, _ = chain.chain(name, lr=0.05, steps=60, warmup=0.1, scale=1.0, **OPTIONS)
  params = {"layers": {"w": jnp.full((2, 3, 4), 1.5)}, "norm": jnp.full((4,), -1.0)}
  loss = lambda p: sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(p))

  @jax.jit
  def update(params, state):
    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  state, before = optimizer.init(params), loss(params)
  for _ in range(60):
    params, state = update(params, state)
  assert loss(params) < 0.2 * before


def test_adamw_is_the_published_update():
  """Loshchilov & Hutter 2019, algorithm 2, with the gradient clipped before."""
  lr, b1, b2, eps, decay, clip = 0.1, 0.8, 0.95, 1e-8, 0.3, 0.5
  optimizer, _ = chain.chain(
    "adamw", lr=lr, steps=3, schedule="constant", weight_decay=decay, clip=clip, b1=b1, b2=b2
  )
  w = np.asarray([[1.0, -2.0]])
  params = {"w": jnp.asarray(w, jnp.float32)}
  state, m, v = optimizer.init(params), 0.0, 0.0
  for t, g in enumerate(np.asarray([[[3.0, 4.0]], [[0.1, -0.2]], [[-1.0, 0.0]]]), 1):
    updates, state = optimizer.update({"w": jnp.asarray(g, jnp.float32)}, state, params)
    params = optax.apply_updates(params, updates)
    g = g * min(1.0, clip / np.linalg.norm(g))
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    w = w - lr * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * w)
    np.testing.assert_allclose(params["w"], w, rtol=1e-5)


@pytest.mark.parametrize(
  ("clip", "gradient", "update"),
  [
    (1.0, [3.0, 4.0], [-0.6, -0.8]),
    (1.0, [0.3, 0.4], [-0.3, -0.4]),
    (None, [3.0, 4.0], [-3.0, -4.0]),
  ],
)
def test_only_a_large_gradient_is_clipped(clip, gradient, update):
  optimizer, _ = chain.chain("sgd", lr=1.0, steps=1, clip=clip, b1=0.0)
  params = {"w": jnp.zeros(2)}
  found, _ = optimizer.update({"w": jnp.asarray(gradient)}, optimizer.init(params), params)
  np.testing.assert_allclose(found["w"], update, rtol=1e-6)


def test_a_large_gradient_is_clipped_to_one_unless_told_otherwise():
  optimizer, _ = chain.chain("sgd", lr=1.0, steps=1, b1=0.0)
  params = {"w": jnp.zeros(2)}
  found, _ = optimizer.update({"w": jnp.asarray([3.0, 4.0])}, optimizer.init(params), params)
  np.testing.assert_allclose(found["w"], [-0.6, -0.8], rtol=1e-6)


@pytest.mark.parametrize("name", few(NAMES, "adamw", "adafactor", "adam_mini"))
def test_matrices_decay_and_nothing_else(name):
  """Without a gradient all that moves a parameter is its decay: norms and biases, stacked or not, stay."""
  node = lambda *lead: LoRA(jnp.ones((*lead, 4, 2)), jnp.ones((*lead, 2, 4)), jnp.ones(lead))
  params = {
    "embed_tokens": {"weight": jnp.ones((6, 4))},
    "layers": {
      "mlp": {"up_proj": {"weight": jnp.ones((2, 4, 4)), "bias": jnp.ones((2, 4))}},
      "input_layernorm": {"weight": jnp.ones((2, 4))},
      "self_attn": {"q_proj": {"weight": node(2).replace(scale=None)}},
    },
    "norm": {"weight": jnp.ones(4)},
    "lm_head": {"weight": node().replace(scale=None)},
  }
  optimizer, _ = chain.chain(
    name, lr=0.1, steps=5, schedule="constant", weight_decay=0.5, **OPTIONS
  )
  zero = jax.tree.map(jnp.zeros_like, params)
  updates, _ = jax.jit(optimizer.update)(zero, optimizer.init(params), params)
  moved = jax.tree.map(lambda u: bool(jnp.any(u != 0)), updates)
  assert moved["embed_tokens"]["weight"]
  assert moved["layers"]["mlp"]["up_proj"] == {"weight": True, "bias": False}
  assert moved["layers"]["self_attn"]["q_proj"]["weight"] == LoRA(True, True, None)
  assert moved["lm_head"]["weight"] == LoRA(True, True, None)
  assert not moved["layers"]["input_layernorm"]["weight"]
  assert not moved["norm"]["weight"]
  # lr * weight_decay of what is there; optax's adafactor takes the decay itself, whatever the rate
  share = 0.5 if name == "adafactor" else 0.05
  np.testing.assert_allclose(updates["embed_tokens"]["weight"], -share, rtol=1e-6)


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    (dict(name="adamv"), "adamv.*adamw"),
    (dict(schedule="cosin"), "cosin.*cosine"),
    (dict(lr=float("nan")), "lr=nan"),
    (dict(lr=float("inf")), "lr=inf"),
    (dict(lr=-1.0), "lr=-1"),
    (dict(warmup=100), "warmup=100.*share"),
    (dict(name="adafactor", offloaded=True), "state of adafactor is not kept by layer.*adamw8bit"),
  ],
)
def test_mistakes_are_explained(wrong, message):
  with pytest.raises(ValueError, match=message):
    chain.chain(**(dict(name="adamw", lr=1e-3, steps=10) | wrong))


def adapter():
  """LoRA on an embedding and in the layers, a DoRA-like vector beside it."""
  node = lambda *lead: LoRA(jnp.ones((*lead, 6, 2)), jnp.ones((*lead, 2, 4)), None)
  return {
    "embed_tokens": {"weight": node()},
    "layers": {"self_attn": {"q_proj": {"weight": node(3), "magnitude": jnp.ones((3, 4))}}},
    "lm_head": {"weight": node()},
  }


@pytest.mark.parametrize(
  "name", few(["sgd", "adamw", "adamw8bit", "adam_mini"], "adamw", "adam_mini")
)
@pytest.mark.parametrize("offloaded", few([False, True], False))
def test_lora_plus_multiplies_the_rate_of_b(name, offloaded):
  """Hayou et al. 2024: the first step of each group is its rate times that of one rate for all."""
  options = OPTIONS | dict(lr=0.01, steps=4, schedule="constant", clip=None, offloaded=offloaded)
  if name == "adam_mini":
    options["axes"] = {"embed_tokens/weight": "vocab embed"}
  params = {**adapter()}
  if name == "adam_mini":  # a plain array needs axes
    options["axes"]["layers/self_attn/q_proj/magnitude"] = "layers norm"
  gradient = cases.like(params, 3)

  def first(**more):
    optimizer, _ = chain.chain(name, **options, **more)
    return jax.jit(optimizer.update)(gradient, optimizer.init(params), params)[0]

  one, plus = first(), first(loraplus_lr_ratio=16.0, loraplus_lr_embedding=0.001)
  ratio = jax.tree.map(lambda a, b: np.unique(np.round(np.float64(b / a), 3)).tolist(), one, plus)
  assert ratio["layers"]["self_attn"]["q_proj"]["weight"] == LoRA([1.0], [16.0], None)
  assert ratio["layers"]["self_attn"]["q_proj"]["magnitude"] == [16.0]
  assert ratio["lm_head"]["weight"] == LoRA([1.0], [16.0], None)
  assert ratio["embed_tokens"]["weight"] == LoRA([0.1], [0.1], None)


def test_lora_plus_keeps_its_rates_to_the_end_and_clips_once():
  """The norm that clips is that of all groups together; both rates follow the schedule."""
  options = OPTIONS | dict(lr=1.0, steps=2, warmup=0.0, schedule="linear", clip=1.0, b1=0.0)
  optimizer, _ = chain.chain("sgd", **options, loraplus_lr_ratio=4.0)
  params = adapter()
  update = jax.jit(optimizer.update)
  state, norm = optimizer.init(params), np.sqrt(sum(x.size for x in jax.tree.leaves(params)))
  for rate in (1.0, 0.5):
    updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
    node = updates["layers"]["self_attn"]["q_proj"]["weight"]
    np.testing.assert_allclose(node.a, -rate / norm, rtol=1e-5)
    np.testing.assert_allclose(node.b, -4 * rate / norm, rtol=1e-5)


@pytest.mark.parametrize(
  ("ratio", "params", "message"),
  [
    (16.0, cases.params, "nothing that is trained has a factor b"),
    (0.5, adapter, "loraplus_lr_ratio=0.5: write 1 or more"),
  ],
)
def test_mistakes_with_lora_plus_are_explained(ratio, params, message):
  optimizer, _ = chain.chain("adamw", lr=1.0, steps=1, loraplus_lr_ratio=ratio)
  with pytest.raises(ValueError, match=message):
    optimizer.init(params())


def test_eight_optimizers_have_the_state_that_they_promise():
  """Bytes a parameter of matrices: 8 of Adam, 4 of Lion, SGD and (and a bit) Adam-mini, 2 of 8 bits.

  GaLore keeps a projection of 16 of 256 axes, and the moments of what it projects.
  """
  params = {"layers": {"w": jnp.zeros((2, 256, 512))}}
  size = cases.nbytes(params) / 4
  options = OPTIONS | dict(rank=16)
  bytes_each = lambda name: (
    cases.nbytes(chain.chain(name, lr=1.0, steps=1, **options)[0].init(params)) / size
  )
  projection, projected = 4 * 16 / 512, 16 / 256
  expected = {
    "adamw": 8,
    "adafactor": 2 * 4 * (256 + 512) / size,  # a row and a column of each of the two
    "lion": 4,
    "sgd": 4,
    "adamw8bit": 2 + 8 / 256,
    "adam_mini": 4 + 4 / 256,
    "galore": projection + 8 * projected,
    "galore8bit": projection + (2 + 8 / 256) * projected,
  }
  assert {*expected} == {*NAMES}
  assert {name: bytes_each(name) for name in NAMES} == pytest.approx(expected, rel=2e-3)
