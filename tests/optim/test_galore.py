"""GaLore against its authors' loop written out in float64, on PyTorch's side of the transpose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.optim import galore
from tests.marks import few
from tests.optim import cases

RATE, B1, B2, EPS, DECAY, SCALE, RANK, GAP = 0.05, 0.8, 0.95, 1e-3, 0.3, 0.7, 3, 2
SHAPES = {"wide": (5, 9), "tall": (9, 5), "square": (6, 6)}  # [in, out]


def authors(w, gradients, projection, *, rank=RANK, svd=np.linalg.svd):
  """w after the gradients; w, gradients: [out, in], float64.  A projector is made at updates 0, GAP, ..."""
  m = v = 0.0
  for step, g in enumerate(gradients):
    if step % GAP == 0:
      u, _, vh = svd(g, full_matrices=False)
      u, vh = positive(u[:, :rank], 0), positive(vh[:rank], 1)
    tall = g.shape[0] >= g.shape[1]
    side = {"std": "right" if tall else "left", "reverse_std": "left" if tall else "right"}
    side = side.get(projection, projection)
    whole = np.eye(g.shape[0]), np.eye(g.shape[1])
    a, b = {"right": (whole[0], vh), "left": (u, whole[1]), "full": (u, vh)}[side]
    r, t = a.T @ g @ b.T, step + 1
    m, v = B1 * m + (1 - B1) * r, B2 * v + (1 - B2) * r * r
    corrected = RATE * np.sqrt(1 - B2**t) / (1 - B1**t)
    w = w - corrected * SCALE * a @ (m / (np.sqrt(v) + EPS)) @ b
    w = w - RATE * DECAY * w
  return w, np.shape(m)


def positive(vectors, axis):
  """Singular vectors with their largest entry positive."""
  at = np.argmax(np.abs(vectors), axis=axis, keepdims=True)
  return vectors * np.sign(np.take_along_axis(vectors, at, axis))


def ours(w, gradients, projection):
  """The same through `galore.adamw`, for a stack of matrices [layers, in, out]."""
  optimizer = galore.adamw(
    lambda _: RATE,
    rank=RANK,
    update_gap=GAP,
    scale=SCALE,
    projection=projection,
    b1=B1,
    b2=B2,
    eps=EPS,
    weight_decay=DECAY,
    mask=lambda params: jax.tree.map(lambda _: True, params),
  )
  tree = lambda x: {"layers": {"w": jnp.asarray(x, jnp.float32)}}
  found, state = cases.after(optimizer, tree(w), [tree(g) for g in gradients])
  return found["layers"]["w"], state.leaves["layers"]["w"].mu.shape


@pytest.mark.parametrize("shape", few(SHAPES, "wide", "tall"))
@pytest.mark.parametrize("projection", galore.PROJECTIONS)
def test_it_is_the_authors_loop(shape, projection):
  rng = np.random.default_rng(0)
  w, *gradients = rng.normal(size=(6, 2, *SHAPES[shape]))
  found, kept = ours(w, gradients, projection)
  for layer in range(2):
    wanted, low = authors(w[layer].T, [g[layer].T for g in gradients], projection)
    np.testing.assert_allclose(found[layer], wanted.T, rtol=2e-4, atol=2e-5)
    assert kept == (2, *low[::-1])


def test_an_embedding_is_stored_as_pytorch_stores_it():
  """So that `right` is its columns there too."""
  assert galore.sides("right", 100, 8) == (True, False)
  assert galore.sides("right", 100, 8, as_torch=True) == (False, True)
  for shape in [(8, 100), (100, 8)]:  # std takes the shorter side, whoever stores it
    assert galore.sides("std", *shape) == galore.sides("std", *shape, as_torch=True)
  assert galore.sides("std", 8, 8) == (True, False)
  assert galore.sides("std", 8, 8, as_torch=True) == (False, True)
  assert galore.sides("full", 8, 9, as_torch=True) == (True, True)


def test_only_matrices_of_the_layers_are_projected_unless_asked():
  leaves = cases.made("galore").init(cases.params())[1].leaves
  is_kept = lambda x: isinstance(x, galore.Projected | galore.Whole)
  kinds = jax.tree.map(lambda x: isinstance(x, galore.Projected), leaves, is_leaf=is_kept)
  layer = kinds["layers"]
  assert layer["mlp"]["up_proj"]["weight"]
  assert layer["self_attn"]["k_proj"] == {"weight": True, "bias": False}
  assert not layer["input_layernorm"]["weight"]
  assert not kinds["embed_tokens"]["weight"]
  assert not kinds["lm_head"]["weight"]
  some = cases.made("galore", target=r"lm_head/.*|layers/mlp/.*").init(cases.params())[1].leaves
  assert isinstance(some["lm_head"]["weight"], galore.Projected)
  assert isinstance(some["layers"]["self_attn"]["q_proj"]["weight"], galore.Whole)


def test_the_subspace_changes_every_gap_and_moments_stay_in_their_numbers():
  params, optimizer = cases.params(), cases.made("galore", update_gap=3)
  state, bases, moments = optimizer.init(params), [], []
  for seed in range(4):
    _, state = cases.after(optimizer, params, [cases.like(params, seed)], state=state)
    kept = state[1].leaves["layers"]["mlp"]["up_proj"]["weight"]
    bases.append(np.asarray(kept.subspace.left))
    moments.append(np.asarray(kept.mu))
  assert np.array_equal(bases[0], bases[1])
  assert np.array_equal(bases[0], bases[2])
  assert not np.array_equal(bases[0], bases[3])
  identity = np.einsum("lir,lis->lrs", bases[3], bases[3])
  np.testing.assert_allclose(identity, np.broadcast_to(np.eye(8), (2, 8, 8)), atol=1e-5)
  assert moments[3].shape == moments[0].shape == (2, 8, 160)


def test_state_bytes():
  """rank 8: 8 x 160 twice and a projector of 64 x 8 for up_proj, where Adam has 64 x 160 twice."""
  params = cases.params()
  kept = cases.made("galore").init(params)[1].leaves["layers"]["mlp"]["up_proj"]["weight"]
  assert cases.nbytes(kept) == 2 * 4 * (2 * 8 * 160 + 64 * 8)
  eight = cases.made("galore8bit", rank=32).init(params)[1].leaves["layers"]["mlp"]["up_proj"]
  codes, scales = 2 * 32 * 160, 2 * 32 * 160 // 256
  assert cases.nbytes(eight) == 2 * codes + 2 * 4 * scales + 4 * 2 * 64 * 32


@pytest.mark.slow
def test_eight_bit_moments_stay_near_the_others():
  params = cases.params()
  gradients = [cases.like(params, seed) for seed in range(4)]
  run = lambda name: cases.after(cases.made(name, rank=32, clip=None, eps=1e-8), params, gradients)[
    0
  ]
  far, near = jax.tree.leaves(params), jax.tree.leaves(run("galore8bit"))
  for start, found, wanted in zip(far, near, jax.tree.leaves(run("galore"))):
    moved = np.linalg.norm(wanted - start)
    assert np.linalg.norm(found - wanted) < 0.1 * moved


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    (dict(rank=65), r"rank=65 is above the 64 of layers/mlp/down_proj/weight"),
    (dict(rank=0), r"rank=0"),
    (dict(update_gap=0), r"update_gap=0"),
    (dict(projection="sideways"), r"sideways.*reverse_std"),
    (dict(target=r"layers/q_prj"), r"layers/q_prj.*matches no matrix of embed_tokens/weight"),
    (dict(target=r"norm/.*"), r"matches no matrix"),
    (dict(target="("), r"^'\(' is no regular expression: missing \)"),
  ],
)
def test_mistakes_are_explained(wrong, message):
  with pytest.raises(ValueError, match=message):
    cases.made("galore", **wrong).init(cases.params())
