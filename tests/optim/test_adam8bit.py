"""8-bit Adam against its update written out in float64 with the nearest code found by search."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from posttrain_jax.optim import adam8bit
from posttrain_jax.quant import blockwise
from tests.marks import few
from tests.optim import cases

RATE, B1, B2, EPS, DECAY = 0.03, 0.9, 0.99, 1e-6, 0.2
SHAPES = {"rows_of_blocks": (20, 512), "across_rows": (48, 100), "small": (63, 64)}


class Reference:
  """One tensor: blocks of 256 of the flattened matrix, as bitsandbytes' CUDA kernel updates them."""

  def __init__(self, w, eight_bit):
    self.w, self.t, self.eight_bit = w.astype(np.float64), 0, eight_bit
    self.m, self.v = np.zeros(w.size), np.zeros(w.size)
    self.codes = None

  def update(self, g):
    self.t, g = self.t + 1, g.astype(np.float64).ravel()
    finite = np.isfinite(g)
    m = np.where(finite, B1 * self.m + (1 - B1) * np.where(finite, g, 0), 0)
    v = np.where(finite, B2 * self.v + (1 - B2) * np.where(finite, g, 0) ** 2, 0)
    c1, c2 = 1 - B1**self.t, np.sqrt(1 - B2**self.t)
    w = self.w.ravel() - RATE * c2 / c1 * m / (np.sqrt(v) + c2 * EPS)
    w *= 1 - RATE * DECAY
    self.w = np.where(finite, w, self.w.ravel()).reshape(self.w.shape)
    if self.eight_bit:
      (mc, m), (vc, v) = self.rounded(m, signed=True), self.rounded(v, signed=False)
      self.codes = mc, vc
    self.m, self.v = m, v

  def rounded(self, x, signed):
    table = blockwise.dynamic_map(signed).astype(np.float64)
    codes, values = np.zeros(x.size, int), np.zeros(x.size)
    for start in range(0, x.size, 256):
      block = x[start : start + 256]
      scale = np.abs(block).max()
      near = np.argmin(np.abs(block[:, None] / max(scale, 1e-38) - table), axis=1)
      if signed:
        near = np.where((block < 0) & (table[near] == 0), near - 1, near)
      codes[start : start + 256], values[start : start + 256] = near, table[near] * scale
    return codes, values


def ours(**options):
  return adam8bit.adamw(
    lambda _: RATE,
    b1=B1,
    b2=B2,
    eps=EPS,
    weight_decay=DECAY,
    mask=lambda params: jax.tree.map(lambda _: True, params),
    **options,
  )


def heavy(rng, shape):
  """Gradients over several decades, so that small values share blocks with large ones."""
  return rng.normal(size=shape) * 10.0 ** rng.uniform(-4, 0, size=shape)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("stacked", few([True, False], True))
def test_it_is_the_published_update(name, stacked):
  rng = np.random.default_rng(0)
  shape = (2, *SHAPES[name]) if stacked else SHAPES[name]
  wrap = lambda x: {"layers" if stacked else "top": {"w": jnp.asarray(x, jnp.float32)}}
  w = rng.normal(size=shape)
  gradients = [heavy(rng, shape).astype(np.float32) for _ in range(6)]
  found, state = cases.after(ours(), wrap(w), [wrap(g) for g in gradients])
  found, mu, nu = (jax.tree.leaves(x, is_leaf=is_moment)[0] for x in (found, state.mu, state.nu))
  assert isinstance(mu, adam8bit.Blockwise) == (name != "small")
  for layer in range(2) if stacked else [...]:
    wanted = Reference(w.astype(np.float32)[layer], name != "small")
    for g in gradients:
      wanted.update(g[layer])
    np.testing.assert_allclose(found[layer], wanted.w, rtol=1e-4, atol=1e-5)
    if name != "small":
      for ours_, theirs in zip((mu, nu), wanted.codes):
        codes = np.asarray(ours_.codes[layer], int).ravel()
        assert np.mean(codes != theirs) < 2e-3  # float32 falls on the other side of a midpoint
        assert np.abs(codes - theirs).max() <= 1


def is_moment(x):
  return isinstance(x, adam8bit.Blockwise)


def test_blocks_are_those_of_the_flattened_matrix():
  """Rows that are whole blocks are not flattened, and have the same ones."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 512)), jnp.float32)
  by_rows = adam8bit.zeros(x.shape, signed=True, stacked=True, min_size=0).stored(x)
  flat = adam8bit.zeros((2, 3072), signed=True, stacked=True, min_size=0).stored(x.reshape(2, -1))
  assert by_rows.absmax.shape == (2, 6, 2)
  assert np.array_equal(by_rows.absmax.ravel(), flat.absmax.ravel())
  assert np.array_equal(by_rows.codes.ravel(), flat.codes.ravel())
  one = adam8bit.zeros((2, 3, 100), signed=True, stacked=True, min_size=0)
  assert one.absmax.shape == (2, 2)  # 300 entries a layer, two layers: no block has entries of both


def test_a_negative_moment_does_not_become_zero():
  x = jnp.asarray([[1.0, 1e-9, -1e-9, -0.5]])
  kept = adam8bit.zeros((1, 4), signed=True, stacked=False, min_size=0).stored(x, keep_sign=True)
  assert np.asarray(kept.codes).tolist()[0][1:3] == [127, 126]
  assert np.sign(kept.value()).tolist() == [[1.0, 0.0, -1.0, -1.0]]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_has_no_finite_gradient_stays_and_forgets(bad):
  w = jnp.full((64, 64), 2.0)
  params, good = {"w": w}, {"w": jnp.ones_like(w)}
  optimizer = ours()
  before, state = cases.after(optimizer, params, [good])
  found, state = cases.after(optimizer, before, [{"w": good["w"].at[3, 5].set(bad)}], state=state)
  assert found["w"][3, 5] == before["w"][3, 5]
  assert state.mu["w"].value()[3, 5] == state.nu["w"].value()[3, 5] == 0
  assert bool(jnp.all(jnp.isfinite(found["w"])))
  assert found["w"][3, 6] < before["w"][3, 6]


def test_embeddings_stay_in_float32_unless_asked():
  params = cases.params()
  kinds = lambda **o: jax.tree.map(
    is_moment, cases.made("adamw8bit", **o).init(params)[1].mu, is_leaf=is_moment
  )
  default, asked = kinds(), kinds(embeddings_in_float32=False)
  assert not default["embed_tokens"]["weight"]
  assert asked["embed_tokens"]["weight"]
  assert default["lm_head"]["weight"]
  assert default["layers"]["mlp"]["up_proj"]["weight"]
  assert not default["layers"]["self_attn"]["k_proj"]["weight"]  # 64 x 32 of one layer


def test_state_bytes():
  moments = cases.made("adamw8bit").init({"layers": {"w": jnp.zeros((3, 64, 100))}})[1]
  assert cases.nbytes(moments.mu) == cases.nbytes(moments.nu) == 3 * (6400 + 4 * 25)


@pytest.mark.slow
def test_it_follows_adamw():
  params = cases.params()
  gradients = [cases.like(params, seed) for seed in range(5)]
  found, wanted = (
    cases.after(cases.made(name, clip=None), params, gradients)[0]
    for name in ("adamw8bit", "adamw")
  )
  moved = optax.tree.norm(jax.tree.map(jnp.subtract, wanted, params))
  assert optax.tree.norm(jax.tree.map(jnp.subtract, found, wanted)) < 0.06 * moved


def test_semantics_are_known():
  with pytest.raises(ValueError, match="semantics='gpu': known are cuda, cpu"):
    ours(semantics="gpu")
