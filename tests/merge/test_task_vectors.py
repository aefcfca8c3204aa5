"""Task-vector operators against plain loops in numpy's float64; mergekit and peft are compared in tests/oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.merge import sparsify, task_vectors
from tests.marks import few

SHAPE = (5, 8)
SIZE = 40
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def base():
  return np.random.default_rng(9).normal(size=SHAPE).astype(np.float32)


@pytest.fixture(scope="module")
def models(base):
  return list(base + np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32))


def close(found, expected, rtol=2e-6):
  np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def deltas(models, base):
  return [np.asarray(x - base, np.float64) for x in models]


def trim(delta, count, above=0):
  ranks = np.argsort(np.argsort(-np.abs(delta).ravel(), kind="stable")).reshape(delta.shape)
  return np.where((ranks >= above) & (ranks < above + count), delta, 0)


def elect(sparse, weights, *, weighted, count=False, normalize=True):
  """Entry by entry, as the text of the paper goes."""
  result = np.zeros(SHAPE)
  for at in np.ndindex(SHAPE):
    entries = [s[at] for s in sparse]
    votes = [w * x for w, x in zip(weights, entries)] if weighted else entries
    total = sum(np.sign(votes) if count else votes)
    sign = 1 if total >= 0 else -1
    agree = [i for i, v in enumerate(votes) if np.sign(v) == sign]
    summed = sum(weights[i] * entries[i] for i in agree)
    divisor = sum(weights[i] if weighted else 1 for i in agree)
    result[at] = summed / (divisor or 1) if normalize else summed
  return result


# --- joining ---------------------------------------------------------------------------------------------------------


def test_task_arithmetic(models, base):
  a, b, c = deltas(models, base)
  found = task_vectors.task_arithmetic(models, base=base, weights=[1, 0.5, -1], lambda_=0.4)
  close(found, base + 0.4 * (a + 0.5 * b - c))
  close(task_vectors.task_arithmetic(models, base=base), base + a + b + c)
  mean = task_vectors.task_arithmetic(models, base=base, weights=[1, 0.5, 1], normalize=True)
  close(mean, base + (a + 0.5 * b + c) / 2.5)
  small = task_vectors.task_arithmetic(models, base=base, weights=[0.2, 0.1, 0.2], normalize=True)
  close(small, mean, rtol=1e-6)  # weights count by their shares, whatever their sum
  level = task_vectors.task_arithmetic(models[:2], base=base, weights=[1, -1], normalize=True)
  close(level, base + a - b)  # no sum to divide by


def test_a_task_is_added_and_taken_away(models, base):
  added = task_vectors.task_arithmetic(models[:1], base=base)
  close(added, models[0])
  close(task_vectors.task_arithmetic([added], base=base, lambda_=-1), 2.0 * base - models[0])


@pytest.mark.parametrize("semantics", ["mergekit", "peft"])
@pytest.mark.parametrize("election", ["sum", "count"])
@pytest.mark.parametrize(
  "weights", few([[1, 1, 1], [0.3, 1.7, 0.9], [1, -0.5, 0.4]], [1, -0.5, 0.4])
)
def test_ties(models, base, semantics, election, weights):
  sparse = [trim(d, c) for d, c in zip(deltas(models, base), (12, 20, 40))]
  found = task_vectors.ties(
    models,
    base=base,
    density=[0.3, 0.5, 1.0],
    weights=weights,
    lambda_=1.5,
    election=election,
    semantics=semantics,
  )
  how = dict(weighted=semantics == "mergekit", count=election == "count")
  close(found, base + 1.5 * elect(sparse, weights, **how), rtol=1e-5)


def test_ties_of_weights_one_are_the_papers_in_both_semantics(models, base):
  either = [
    task_vectors.ties(models, base=base, density=0.4, semantics=s) for s in ("mergekit", "peft")
  ]
  np.testing.assert_allclose(*either, rtol=1e-6)
  unequal = [
    task_vectors.ties(models, base=base, density=0.4, weights=[1, 2, 1], semantics=s)
    for s in ("mergekit", "peft")
  ]
  assert np.abs(unequal[0] - unequal[1]).max() > 0.1


def test_ties_by_hand():
  zero = np.zeros(4, np.float32)
  models = [np.asarray(x, np.float32) for x in ([1, -4, 3, 0.1], [2, 1, -3, 0.2], [3, 2, 0.3, 5])]
  # kept: all but the smallest; votes 6, -1, 0 (elects +), 5
  found = task_vectors.ties(models, base=zero, density=0.75)
  np.testing.assert_allclose(found, [2, -4, 3, 5], rtol=1e-6)
  found = task_vectors.ties(models, base=zero, density=0.75, election="count")
  np.testing.assert_allclose(found, [2, 1.5, 3, 5], rtol=1e-6)
  plain = task_vectors.ties(models, base=zero, density=0.75, election=None, normalize=False)
  np.testing.assert_allclose(plain, [6, -1, 0, 5], rtol=1e-6)


def test_ties_without_normalize_or_election(models, base):
  sparse = [trim(d, 20) for d in deltas(models, base)]
  weights = [1, 2, 0.5]
  options = dict(base=base, density=0.5, weights=weights)
  added = task_vectors.ties(models, **options, normalize=False)
  close(added, base + elect(sparse, weights, weighted=True, normalize=False), rtol=1e-5)
  pruned = task_vectors.ties(models, **options, election=None, semantics="peft")
  close(pruned, base + sum(w * s for w, s in zip(weights, sparse)))


def test_trimming_may_give_the_norm_back(models, base):
  (delta,) = deltas(models[:1], base)
  kept = trim(delta, 10)
  found = task_vectors.ties(models[:1], base=base, density=0.25, rescale=True)
  close(found, base + kept * np.abs(delta).sum() / np.abs(kept).sum())


def test_breadcrumbs(models, base):
  sparse = [trim(d, 20, above=4) for d in deltas(models, base)]
  weights = [1, 2, 0.5]
  options = dict(base=base, density=0.5, gamma=0.1, weights=weights)
  close(
    task_vectors.breadcrumbs(models, **options),
    base + sum(w * s for w, s in zip(weights, sparse)),
  )
  found = task_vectors.breadcrumbs(models, **options, election="sum")
  close(found, base + elect(sparse, weights, weighted=True, normalize=False), rtol=1e-5)


def test_breadcrumbs_keep_their_density_before_they_drop_the_largest(models, base):
  (delta,) = deltas(models[:1], base)
  found = task_vectors.breadcrumbs(models[:1], base=base, density=0.95, gamma=0.2)
  close(found, base + trim(delta, 38, above=2))
  small = task_vectors.breadcrumbs(models[:1], base=base, density=0.5)  # 1 % of 40 is none
  close(small, base + trim(delta, 20))


def test_breadcrumbs_may_keep_the_size_of_what_they_are_part_of(models, base):
  (delta,) = deltas(models[:1], base)
  kept = trim(delta, 20, above=4)
  scale = np.abs(delta).sum() / np.abs(kept).sum()
  found = task_vectors.breadcrumbs(models[:1], base=base, density=0.5, gamma=0.1, rescale=True)
  close(found, base + scale * kept, rtol=1e-5)


# --- drawing ---------------------------------------------------------------------------------------------------------


def masks(densities, models, base, epsilon=None):
  """As the operators draw: model i with fold_in(key, i)."""
  for i, (density, delta) in enumerate(zip(densities, deltas(models, base))):
    p = density
    if epsilon is not None:
      p = np.asarray(sparsify.by_rank(jnp.asarray(delta, jnp.float32), density, epsilon))
    yield np.asarray(jax.random.uniform(jax.random.fold_in(KEY, i), SHAPE) < p), p


@pytest.mark.parametrize("semantics", ["mergekit", "peft"])
@pytest.mark.parametrize("election", [None, "sum"])
def test_dare(models, base, semantics, election):
  densities, weights, sparse = [0.4, 0.7, 0.9], [1, 0.5, 2], []
  for (mask, p), delta in zip(masks(densities, models, base), deltas(models, base)):
    scale = np.abs(delta).sum() / np.abs(delta * mask).sum() if semantics == "mergekit" else 1 / p
    sparse.append(delta * mask * scale)
  found = task_vectors.dare(
    models,
    base=base,
    key=KEY,
    density=densities,
    weights=weights,
    election=election,
    semantics=semantics,
  )
  if election is None:
    expected = sum(w * s for w, s in zip(weights, sparse))
  else:
    weighted = semantics == "mergekit"
    expected = elect(sparse, weights, weighted=weighted, normalize=not weighted)
  close(found, base + expected, rtol=1e-5)


@pytest.mark.parametrize("semantics", ["mergekit", "paper"])
@pytest.mark.parametrize("election", [None, "sum"])
def test_della(models, base, semantics, election):
  densities, weights, sparse = [0.4, 0.6, 0.5], [1, 0.5, 2], []
  drawn = masks(densities, models, base, epsilon=0.3)
  for (mask, p), delta in zip(drawn, deltas(models, base)):
    scale = np.abs(delta).sum() / np.abs(delta * mask).sum() if semantics == "mergekit" else 1 / p
    sparse.append(delta * mask * scale)
  found = task_vectors.della(
    models,
    base=base,
    key=KEY,
    density=densities,
    epsilon=0.3,
    weights=weights,
    election=election,
    semantics=semantics,
  )
  if election is None:
    expected = sum(w * s for w, s in zip(weights, sparse))
  else:
    expected = elect(sparse, weights, weighted=semantics == "mergekit")
  close(found, base + expected, rtol=1e-5)


def test_the_mean_of_many_draws_is_the_model(models, base):
  draw = lambda key, **o: task_vectors.dare(
    models[:1], base=base, key=key, density=0.5, semantics="peft", **o
  )
  keys = jax.random.split(KEY, 2000)
  mean = np.asarray(jax.vmap(draw)(keys).mean(0))
  delta = deltas(models[:1], base)[0]
  np.testing.assert_array_less(np.abs(mean - models[0]), 5 * np.abs(delta) / 2000**0.5 + 1e-5)
  plain = jax.vmap(lambda key: draw(key, rescale=False))(keys).mean(0)
  np.testing.assert_allclose(plain - base, delta / 2, atol=0.2)


def test_draws_are_the_keys_alone(models, base):
  draw = lambda key: np.asarray(task_vectors.dare(models, base=base, key=key, density=0.5))
  np.testing.assert_array_equal(draw(KEY), draw(KEY))
  assert (draw(KEY) != draw(jax.random.key(8))).any()
  alike = task_vectors.dare([models[0]] * 2, base=base, key=KEY, density=0.5, rescale=False)
  assert len(np.unique(np.round((alike - base) / (models[0] - base), 3))) == 3  # 0, 1 or 2 kept


# --- the ends of density ---------------------------------------------------------------------------------------------


DRAWN = (task_vectors.dare, task_vectors.della)
SPARSE = (task_vectors.ties, task_vectors.breadcrumbs, *DRAWN)


@pytest.mark.parametrize("operator", SPARSE)
def test_density_one_keeps_everything_and_zero_nothing(operator, models, base):
  own = dict(key=KEY) if operator in DRAWN else {}
  plain = dict(base=base, election=None, normalize=False, **own)
  a, b, c = deltas(models, base)
  close(operator(models, density=1.0, **plain), base + a + b + c)
  for rescale in (False, True):
    found = operator(models, density=0.0, rescale=rescale, **plain)
    np.testing.assert_array_equal(found, base)
  close(operator(models, density=[1, 0, 1], **plain), base + a + c)


def test_one_entry_at_least_as_in_mergekit(models, base):
  one = task_vectors.ties(models[:1], base=base, density=0.01)
  assert int((np.asarray(one) != base).sum()) == 1
  none = task_vectors.ties(models[:1], base=base, density=0.01, semantics="peft")
  np.testing.assert_array_equal(none, base)


@pytest.mark.parametrize("operator", [*SPARSE, task_vectors.sce])
def test_one_model_is_itself_and_untouched_ones_are_the_base(operator, models, base):
  own = dict(key=KEY) if operator in DRAWN else {}
  close(operator(models[:1], base=base, **own), models[0])
  np.testing.assert_array_equal(operator([base, base], base=base, **own), base)


# --- model stock, SCE ------------------------------------------------------------------------------------------------


def stock(models, base):
  units = [d / np.linalg.norm(d) for d in deltas(models, base)]
  n = len(models)
  cosine = np.mean([(units[i] * units[j]).sum() for i in range(n) for j in range(i)])
  t = n * cosine / (1 + (n - 1) * cosine)
  return t * np.mean(np.asarray(models, np.float64), axis=0) + (1 - t) * base


@pytest.mark.parametrize("count", [2, 3])
def test_model_stock(models, base, count):
  shared = [x + 0.7 * models[2] for x in models[:count]]
  close(task_vectors.model_stock(shared, base=base), stock(shared, base), rtol=1e-5)
  rows = np.stack([stock([x[i] for x in shared], base[i]) for i in range(SHAPE[0])])
  close(task_vectors.model_stock(shared, base=base, filter_wise=True), rows, rtol=1e-4)


def test_model_stock_at_its_limits(base):
  step = np.ones(SHAPE, np.float32)
  close(task_vectors.model_stock([base + step] * 3, base=base), base + step)
  across = np.where(np.arange(SHAPE[1]) % 2, 1, -1).astype(np.float32) * step
  zero = np.zeros(SHAPE, np.float32)  # at right angles: nothing in common
  np.testing.assert_allclose(task_vectors.model_stock([step, across], base=zero), 0, atol=1e-7)
  opposite = task_vectors.model_stock([step, -2 * step], base=zero)  # 1 + cos = 0
  np.testing.assert_array_equal(opposite, 0)


def test_model_stock_of_faint_deltas(models, base):
  zero = np.zeros(SHAPE, np.float32)
  faint = [1e-4 * (x + models[2]) for x in models[:2]]
  close(
    task_vectors.model_stock(faint, base=zero, semantics="paper"), stock(faint, zero), rtol=1e-5
  )
  floored = task_vectors.model_stock([0.1 * x for x in faint], base=zero)
  assert np.abs(floored).max() < 0.5 * np.abs(stock([0.1 * x for x in faint], zero)).max()


def sce(models, base, density):
  found = np.asarray(deltas(models, base))
  variance = found.var(axis=0)
  count = int((variance > 0).sum() * density)
  mask = np.zeros(SIZE, bool)
  mask[np.argsort(-variance.ravel(), kind="stable")[:count]] = True
  found = found * mask.reshape(SHAPE)
  energy = (found**2).mean(axis=(1, 2))
  energy = energy / energy.sum()
  result = np.zeros(SHAPE)
  for at in np.ndindex(SHAPE):
    sign = 1 if found[(slice(None), *at)].sum() >= 0 else -1
    agree = [i for i in range(len(models)) if np.sign(found[(i, *at)]) == sign]
    result[at] = sum(energy[i] * found[(i, *at)] for i in agree) / (
      sum(energy[i] for i in agree) or 1
    )
  return base + result


@pytest.mark.parametrize("density", few([1.0, 0.6, 0.1], 0.6))
@pytest.mark.parametrize("semantics", ["mergekit", "paper"])
def test_sce(models, base, density, semantics):
  unequal = [base + s * (x - base) for s, x in zip((1, 2, 0.5), models)]
  found = task_vectors.sce(unequal, base=base, density=density, semantics=semantics)
  close(found, sce(unequal, base, density), rtol=1e-5)


def test_sce_of_faint_deltas(models):
  zero = np.zeros(SHAPE, np.float32)
  faint = [s * 1e-4 * x for s, x in zip((1, 3), models)]
  found = task_vectors.sce(faint, base=zero, semantics="paper")
  close(found, sce(faint, zero, 1.0), rtol=1e-5)
  alike = task_vectors.sce(faint, base=zero)  # equal weights: TIES's mean
  close(alike, task_vectors.ties(faint, base=zero), rtol=1e-5)
  assert np.abs(np.asarray(found) - alike).max() > 0.1 * np.abs(alike).max()


def test_what_varies_nowhere_is_not_selected(models, base):
  delta = np.float32(0.1) * np.arange(SIZE, dtype=np.float32).reshape(SHAPE)
  three = [base + delta] * 3
  np.testing.assert_array_equal(task_vectors.sce(three, base=base, density=0.5), base)
  three[1] = three[1] + np.eye(*SHAPE, dtype=np.float32)  # five entries do
  found = np.asarray(task_vectors.sce(three, base=base, density=0.4)) != base
  assert found.sum() == 2


# --- in general ------------------------------------------------------------------------------------------------------


def test_results_have_the_bases_dtype(models, base):
  half = [jnp.asarray(x, jnp.bfloat16) for x in (base, *models)]
  found = task_vectors.ties(half[1:], base=half[0], density=0.5)
  assert found.dtype == jnp.bfloat16
  wide = task_vectors.ties(half[1:], base=half[0], density=0.5, dtype="float32")
  assert wide.dtype == jnp.float32
  np.testing.assert_array_equal(wide.astype(jnp.bfloat16), found)
  mixed = task_vectors.ties(models, base=half[0], density=0.5)
  assert mixed.dtype == jnp.bfloat16


def test_new_numbers_compile_nothing(models, base):
  merged = lambda x: task_vectors.ties(models, base=base, density=x, weights=[x, 1, 1], lambda_=x)
  merged(0.3)
  before = task_vectors._merged._cache_size()
  merged(0.6)
  assert task_vectors._merged._cache_size() == before


def bad(name, **options):
  own = dict(key=KEY) if name in ("dare", "della") else {}
  return lambda models, base: getattr(task_vectors, name)(models, base=base, **own, **options)


@pytest.mark.parametrize(
  ("call", "said"),
  [
    (bad("ties", density=1.2), r"density=1.2: write a number in \[0, 1\]"),
    (bad("ties", density=[0.1, -0.2, 0.3]), "density=-0.2"),
    (bad("ties", density=[0.1, 0.2]), "density has 2 values for 3 models"),
    (bad("dare", density=float("nan")), "density=nan"),
    (bad("ties", weights=[1, 2]), "weights has 2 values for 3 models"),
    (bad("ties", weights=[0, 0, 0]), "all weights are zero"),
    (bad("task_arithmetic", weights=0, normalize=True), "all weights are zero"),
    (bad("ties", semantics="paper"), "semantics='paper': write 'mergekit' or 'peft'"),
    (bad("dare", semantics="mergekitty"), "write 'mergekit' or 'peft'"),
    (bad("della", density=0.5, semantics="peft"), "write 'mergekit' or 'paper'"),
    (bad("ties", election="majority"), "election='majority': write None or 'sum' or 'count'"),
    (bad("della", density=0.9), "density=0.9 and epsilon=0.15: .*below 0.1"),
    (bad("della", density=0.5, epsilon=-0.1), "epsilon=-0.1"),
    (bad("breadcrumbs", gamma=2), "gamma=2"),
    (bad("sce", density=-1), "density=-1"),
    (bad("sce", semantics="x"), "semantics='x'"),
    (lambda models, base: task_vectors.model_stock(models[:1], base=base), "at least 2"),
    (lambda models, base: task_vectors.ties(models, base=base[:2]), r"the base \(2, 8\)"),
    (lambda models, base: task_vectors.ties(models, base=base.astype(int)), "int64"),
  ],
)
def test_what_is_refused(call, said, models, base):
  with pytest.raises(ValueError, match=said):
    call(models, base)


def test_zero_weights_may_be_added(models, base):
  found = task_vectors.task_arithmetic(models, base=base, weights=[0, 0, 0])
  np.testing.assert_array_equal(found, base)
