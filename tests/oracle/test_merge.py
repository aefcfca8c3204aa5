"""Merge operators against mergekit's methods and command, and against peft's `merge_utils`; where they differ and why.

Random methods are compared through their masks: `torch.bernoulli` is handed the uniform numbers that we draw.
"""

import collections
import contextlib
import itertools
import json
import warnings
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: run `make oracle`")
peft_merge = pytest.importorskip("peft.utils.merge_utils", reason="peft is not installed")
registry = pytest.importorskip(
  "mergekit.merge_methods.registry", reason="mergekit is not installed: run `make oracle`"
)

from mergekit.config import MergeConfiguration  # noqa: E402
from mergekit.merge import run_merge  # noqa: E402
from mergekit.merge_methods.base import TensorGroup  # noqa: E402
from mergekit.options import MergeOptions  # noqa: E402

from posttrain_jax import merge  # noqa: E402
from posttrain_jax.core import tree  # noqa: E402
from posttrain_jax.merge import averages, sparsify, task_vectors  # noqa: E402
from posttrain_jax.models import hf  # noqa: E402
from tests.models import families  # noqa: E402

pytestmark = pytest.mark.oracle

KEY = jax.random.key(11)
SHAPES = [(23, 40), (64,)]


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def arrays(request):
  """base and three models of one shape, their deltas of unequal sizes and partly alike."""
  rng = np.random.default_rng(0)
  draw = lambda scale: rng.normal(0, scale, request.param).astype(np.float32)
  base, shared = draw(1.0), draw(0.3)
  return base, [base + shared + draw(scale) for scale in (0.2, 0.4, 0.6)]


def close(found, expected, rtol=1e-6):
  """Within 1e-6 of the largest entry: float32 sums have no smaller error, whoever takes them."""
  expected = np.asarray(expected)
  np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def mergekit(name, models, base=None, **parameters):
  """The method's own tensor function; base, where there is one, stands first."""
  tensors = [torch.tensor(x) for x in ([] if base is None else [base]) + list(models)]
  group = TensorGroup.from_tensors(tensors, base_index=None if base is None else 0)
  (merged,) = registry.get(name)([group], parameters=parameters)
  return merged.numpy()


@contextlib.contextmanager
def coins():
  """torch.bernoulli's i-th call answers with the uniform draws of fold_in(KEY, i)."""
  calls = itertools.count()

  def bernoulli(p, *args, **kwargs):
    uniform = jax.random.uniform(jax.random.fold_in(KEY, next(calls)), tuple(p.shape))
    return (torch.tensor(np.asarray(uniform)) < p).to(p.dtype)

  with mock.patch.object(torch, "bernoulli", bernoulli):
    yield
  assert next(calls) > 0


# --- mergekit's methods ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [[1, 1, 1], [0.2, 0.5, -0.1]])
def test_linear(arrays, weights, normalize):
  found = averages.linear(arrays[1], weights=weights, normalize=normalize)
  close(found, mergekit("linear", arrays[1], weight=weights, normalize=normalize))


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["apart", "near", "parallel", "opposite", "zeros"])
def test_slerp(arrays, t, kind):
  base, (model, other, _) = arrays
  second = dict(
    apart=model,
    near=base + 0.05 * (other - model),
    parallel=2 * base,
    opposite=-base,
    zeros=np.zeros_like(base),
  )[kind]
  close(averages.slerp(base, second, t=t), mergekit("slerp", [second], base, t=t))


@pytest.mark.parametrize("along", ["all", "in", "out"])
@pytest.mark.parametrize("with_base", [False, True])
def test_nuslerp(arrays, along, with_base):
  base = arrays[0] if with_base else None
  first, second = arrays[1][:2]
  weights = [0.7, 0.2]
  expected = mergekit(
    "nuslerp",
    [first, second],
    base,
    weight=weights,
    nuslerp_flatten=along == "all",
    nuslerp_row_wise=along == "out",
  )
  found = averages.nuslerp(first, second, weights=weights, base=base, along=along)
  close(found, expected, rtol=2e-6)


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_multislerp(arrays, with_base, normalize, count):
  base = arrays[0] if with_base else None
  weights = [0.5, 0.3, 0.4][:count]
  found = averages.multislerp(arrays[1][:count], weights=weights, base=base, normalize=normalize)
  expected = mergekit(
    "multislerp", arrays[1][:count], base, weight=weights, normalize_weights=normalize
  )
  close(found, expected)


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_karcher(arrays, count, steps):
  # a cosine of float32 rounded near 1 leaves its angle 1e-4 of itself: both are as near to the exact mean
  found = averages.karcher(arrays[1][:count], max_iter=steps)
  close(found, mergekit("karcher", arrays[1][:count], max_iter=steps), rtol=2e-6)


@pytest.mark.parametrize("scale", [None, 0.5, 0.0])
def test_passthrough(arrays, scale):
  found = averages.passthrough(arrays[0], scale=scale)
  close(found, mergekit("passthrough", [arrays[0]], scale=[scale]))


WEIGHTS = [[1, 1, 1], [0.9, 0.3, 1.4], [1, -0.5, 0.3]]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("normalize", [True, False])
def test_task_arithmetic(arrays, weights, normalize):
  base, models = arrays
  options = dict(normalize=normalize)
  found = task_vectors.task_arithmetic(models, base=base, weights=weights, lambda_=0.8, **options)
  parameters = {"weight": weights, "lambda": 0.8, **options}
  close(found, mergekit("task_arithmetic", models, base, **parameters))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("density", [[0.5, 0.2, 0.8], [1.0, 1.0, 0.0], [1e-5, 0.3, 0.3]])
@pytest.mark.parametrize("switches", [(True, False), (False, False), (True, True)])
def test_ties(arrays, weights, density, switches):
  base, models = arrays
  options = dict(zip(("normalize", "rescale"), switches))
  found = task_vectors.ties(
    models, base=base, weights=weights, density=density, lambda_=1.3, **options
  )
  parameters = {"weight": weights, "density": density, "lambda": 1.3, **options}
  close(found, mergekit("ties", models, base, **parameters))


@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("density", [[0.5, 0.2, 0.8], [1.0, 0.995, 0.0]])
@pytest.mark.parametrize("gamma", [[0.01, 0.1, 0.0], [0.4, 0.3, 0.2]])
@pytest.mark.parametrize("switches", [(True, False), (False, False), (False, True)])
def test_breadcrumbs(arrays, name, density, gamma, switches):
  base, models = arrays
  options = dict(zip(("normalize", "rescale"), switches))
  given = dict(density=density, gamma=gamma, **options)
  found = merge.OPERATORS[name](models, base=base, weights=WEIGHTS[1], **given)
  close(found, mergekit(name, models, base, weight=WEIGHTS[1], **given))


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("switches", [{}, dict(rescale=False), dict(normalize=True)])
def test_dare(arrays, name, weights, switches):
  base, models = arrays
  given = dict(density=[0.5, 0.2, 0.8], **switches)
  found = merge.OPERATORS[name](models, base=base, key=KEY, weights=weights, **given)
  with coins():
    close(found, mergekit(name, models, base, weight=weights, **given))


@pytest.mark.parametrize("name", ["della", "della_linear"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("switches", [{}, dict(rescale=False), dict(normalize=False)])
def test_della(arrays, name, weights, switches):
  base, models = arrays
  given = dict(density=[0.5, 0.4, 0.7], epsilon=[0.15, 0.3, 0.05], **switches)
  found = merge.OPERATORS[name](models, base=base, key=KEY, weights=weights, **given)
  with coins():
    close(found, mergekit(name, models, base, weight=weights, **given))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock(arrays, count, filter_wise):
  base, models = arrays[0], arrays[1][:count]
  found = task_vectors.model_stock(models, base=base, filter_wise=filter_wise)
  close(found, mergekit("model_stock", models, base, filter_wise=filter_wise))


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 0.0])
@pytest.mark.parametrize("count", [1, 3])
def test_sce(arrays, density, count):
  base, models = arrays[0], arrays[1][:count]
  found = task_vectors.sce(models, base=base, density=density)
  close(found, mergekit("sce", models, base, select_topk=density))


@pytest.mark.parametrize("scale", [1e-2, 1e-5])
def test_the_floors_of_faint_deltas(arrays, scale):
  """What semantics="mergekit" stands for in model_stock and SCE; "paper" has no floors and differs."""
  base, models = arrays[0] * 0, [scale * (x - arrays[0]) for x in arrays[1]]
  for ours, name in ((task_vectors.model_stock, "model_stock"), (task_vectors.sce, "sce")):
    expected = mergekit(name, models, base)
    close(ours(models, base=base), expected)
    apart = np.abs(ours(models, base=base, semantics="paper") - expected).max() > 1e-3 * scale
    assert apart == (scale == 1e-5)


def test_every_method_of_ours_is_one_of_mergekits():
  theirs = {method.spec.name for method in registry.registered_methods()}
  assert merge.OPERATORS.keys() <= theirs
  assert theirs - merge.OPERATORS.keys() == {"nearswap", "arcee_fusion", "ram", "ramplus_tl"}


def test_defaults_are_mergekits(arrays):
  base, models = arrays
  for name, operator in merge.OPERATORS.items():
    spec = {p.name: p.default for p in registry.get(name).spec.parameters}
    if "normalize" not in spec or "lambda" not in spec:
      continue
    own = dict(key=KEY) if name.startswith(("dare", "della")) else {}
    density = {} if name == "task_arithmetic" else dict(density=0.5)
    with coins() if own else contextlib.nullcontext():
      expected = mergekit(name, models, base, weight=[1.0, 0.5, 2.0], **density)
    close(operator(models, base=base, weights=[1, 0.5, 2], **own, **density), expected)


def test_draws_have_mergekits_distribution():
  """Kept shares by rank in a row, 40 rows a bin, ours and torch's: within 5 deviations of each other."""
  delta = np.random.default_rng(0).normal(size=(4000, 20)).astype(np.float32)
  order = np.argsort(np.abs(delta), axis=1)
  zero = np.zeros_like(delta)
  options = dict(density=0.5, epsilon=0.3, rescale=False)
  torch.manual_seed(0)
  pairs = {
    "della_linear": options,
    "dare_linear": dict(density=0.5, rescale=False),
  }
  for name, given in pairs.items():
    ours = merge.OPERATORS[name]([delta], base=zero, key=KEY, **given)
    theirs = mergekit(name, [delta], zero, weight=[1.0], **given)
    share = lambda x: np.take_along_axis(np.asarray(x) != 0, order, axis=1).mean(axis=0)
    assert np.abs(share(ours) - share(theirs)).max() < 5 * (2 * 0.25 / 4000) ** 0.5
    wanted = np.linspace(0.2, 0.8, 20) if name == "della_linear" else 0.5
    assert np.abs(share(ours) - wanted).max() < 5 * (0.25 / 4000) ** 0.5


# --- what differs from mergekit, and why -----------------------------------------------------------------------------


def test_multislerp_of_directions_that_cancel():
  """mergekit's floor of 1e-8 is below float32's rounding, so that two give noise; three are an error.  Ours: a line."""
  a = np.random.default_rng(0).normal(size=64).astype(np.float32)
  line = averages.multislerp([a, -3 * a])
  np.testing.assert_allclose(line, -a, rtol=1e-5)
  noise = mergekit("multislerp", [a, -3 * a], weight=[1.0, 1.0])
  assert np.abs(noise + a).max() > 1
  with pytest.raises(ValueError, match="zero"):
    mergekit("multislerp", [a, a, a], a, weight=[1.0, 1.0, 1.0])
  np.testing.assert_array_equal(averages.multislerp([a, a, a], base=a), a)


def test_della_of_rows_of_one_entry():
  """mergekit divides rank 0 by 0; ours keeps the one entry with probability density."""
  column = np.ones((50, 1), np.float32)
  with pytest.raises(RuntimeError):
    mergekit("della_linear", [column], 0 * column, weight=[1.0], density=[0.5])
  found = task_vectors.della(
    [column], base=0 * column, key=KEY, density=0.5, election=None, rescale=False
  )
  assert 10 < int(np.sum(found)) < 40


def test_what_mergekit_lets_pass_and_we_refuse(arrays):
  base, models = arrays
  assert not np.isfinite(mergekit("linear", models[:2], weight=[1, -1])).any()
  with pytest.raises(ValueError, match="sum to zero"):
    averages.linear(models[:2], weights=[1, -1])
  close(mergekit("nuslerp", models[:2], weight=[1, -1]), averages.nuslerp(*models[:2]), 2e-6)
  with pytest.raises(ValueError, match="sum to zero"):
    averages.nuslerp(*models[:2], weights=[1, -1])
  close(mergekit("ties", models, base, weight=[0, 0, 0]), base)
  with pytest.raises(ValueError, match="all weights are zero"):
    task_vectors.ties(models, base=base, weights=[0, 0, 0])
  close(mergekit("ties", models[:1], base, weight=[1], density=[1.5]), models[0])
  with pytest.raises(ValueError, match=r"density=1.5"):
    task_vectors.ties(models[:1], base=base, density=1.5)


def test_of_equal_entries_ours_keeps_the_first():
  """torch's argsort promises no order; the count is the same."""
  equal = np.ones((10, 10), np.float32)
  found = np.asarray(task_vectors.ties([equal], base=0 * equal, density=0.3)).ravel()
  np.testing.assert_array_equal(found, np.arange(100) < 30)
  assert mergekit("ties", [equal], 0 * equal, weight=[1.0], density=[0.3]).sum() == 30


# --- peft ------------------------------------------------------------------------------------------------------------


def tensors(arrays):
  return [torch.tensor(x) for x in arrays]


ELECTIONS = {"sum": "total", "count": "frequency"}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("density", [0.3, 0.7, 1.0, 0.001])
@pytest.mark.parametrize("election", ["sum", "count", None])
@pytest.mark.filterwarnings("ignore:The density")
def test_pefts_ties_and_magnitude_prune(arrays, weights, density, election):
  deltas = [x - arrays[0] for x in arrays[1]]
  if election is None:
    expected = peft_merge.magnitude_prune(tensors(deltas), torch.tensor(weights), density)
  else:
    how = ELECTIONS[election]
    expected = peft_merge.ties(tensors(deltas), torch.tensor(weights), density, how)
  found = task_vectors.ties(
    deltas,
    base=0 * deltas[0],
    weights=weights,
    density=density,
    election=election,
    semantics="peft",
  )
  close(found, expected)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("election", ["sum", "count", None])
def test_pefts_dare(arrays, weights, election):
  deltas = [x - arrays[0] for x in arrays[1]]
  with coins():
    if election is None:
      expected = peft_merge.dare_linear(tensors(deltas), torch.tensor(weights), 0.4)
    else:
      how = ELECTIONS[election]
      expected = peft_merge.dare_ties(tensors(deltas), torch.tensor(weights), 0.4, how)
  found = task_vectors.dare(
    deltas,
    base=0 * deltas[0],
    key=KEY,
    weights=weights,
    density=0.4,
    election=election,
    semantics="peft",
  )
  close(found, expected)


def test_pefts_task_arithmetic(arrays):
  deltas = [x - arrays[0] for x in arrays[1]]
  expected = peft_merge.task_arithmetic(tensors(deltas), torch.tensor(WEIGHTS[2]))
  found = task_vectors.task_arithmetic(deltas, base=0 * deltas[0], weights=WEIGHTS[2])
  close(found, expected)


def test_the_libraries_differ_with_weights_and_agree_without(arrays):
  deltas = [x - arrays[0] for x in arrays[1]]
  zero = 0 * deltas[0]
  for weights, equal in (([1.0, 1.0, 1.0], True), ([0.9, 0.3, 1.4], False)):
    one = mergekit("ties", deltas, zero, weight=weights, density=[0.5] * 3)
    other = peft_merge.ties(tensors(deltas), torch.tensor(weights), 0.5).numpy()
    assert np.allclose(one, other, atol=1e-6) == equal


def test_at_density_zero_peft_gives_nan_and_we_the_base(arrays):
  deltas = [x - arrays[0] for x in arrays[1]]
  expected = peft_merge.dare_linear(tensors(deltas), torch.ones(3), 0.0)
  assert torch.isnan(expected).all()
  found = task_vectors.dare(deltas, base=0 * deltas[0], key=KEY, density=0.0, semantics="peft")
  np.testing.assert_array_equal(found, 0)


# --- mergekit's command on checkpoints -------------------------------------------------------------------------------


Checkpoints = collections.namedtuple("Checkpoints", "folders trees config")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
  """Folders and trees of three tiny Llamas: a base and two that came from it."""
  root = tmp_path_factory.mktemp("merge")
  config, base = families.make("llama")
  trees = dict(base=base)
  for seed, name in enumerate(("first", "second")):
    rng = np.random.default_rng(seed)
    moved = lambda x, rng=rng: x + jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype)
    trees[name] = tree.unflatten((path, moved(x)) for path, x in tree.items(base))
  for name, params in trees.items():
    hf.save(root / name, params, config)
    said = json.loads((root / name / "config.json").read_text())
    said["architectures"] = ["LlamaForCausalLM"]  # mergekit goes by it
    (root / name / "config.json").write_text(json.dumps(said))
  return Checkpoints({name: str(root / name) for name in trees}, trees, config)


def command(checkpoints, out, **recipe):
  """What mergekit writes for a recipe, read back."""
  options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    run_merge(MergeConfiguration.model_validate(dict(dtype="float32", **recipe)), str(out), options)
  return tree.flatten(hf.load(out, dtype=jnp.float32)[0])


def models(checkpoints, *parameters):
  pairs = zip(("first", "second"), parameters)
  return [dict(model=checkpoints.folders[name], parameters=own) for name, own in pairs]


COMMANDS = {
  "linear": (dict(weight=0.3), dict(weight=0.9), {}),
  "task_arithmetic": (dict(weight=0.3), dict(weight=0.9), {"lambda": 0.7}),
  "ties": (dict(weight=0.3, density=0.2), dict(weight=0.9, density=0.6), {}),
  "breadcrumbs_ties": (dict(weight=1.0, density=0.5), dict(weight=0.5, density=0.7), {}),
  "model_stock": ({}, {}, dict(filter_wise=True)),
  "sce": ({}, {}, dict(select_topk=0.4)),
  "nuslerp": (dict(weight=1.0), dict(weight=2.0), dict(nuslerp_flatten=False)),
  "multislerp": (dict(weight=1.0), dict(weight=2.0), {}),
  "karcher": ({}, {}, {}),
}
OURS = {
  "linear": lambda base, both: merge.linear(both, weights=[0.3, 0.9]),
  "task_arithmetic": lambda base, both: merge.task_arithmetic(
    both, base=base, weights=[0.3, 0.9], lambda_=0.7
  ),
  "ties": lambda base, both: merge.ties(both, base=base, weights=[0.3, 0.9], density=[0.2, 0.6]),
  "breadcrumbs_ties": lambda base, both: merge.breadcrumbs(
    both, base=base, weights=[1, 0.5], density=[0.5, 0.7], election="sum"
  ),
  "model_stock": lambda base, both: merge.model_stock(both, base=base, filter_wise=True),
  "sce": lambda base, both: merge.sce(both, base=base, density=0.4),
  "nuslerp": lambda base, both: merge.nuslerp(*both, weights=[1, 2], along="in"),
  "multislerp": lambda base, both: merge.multislerp(both, weights=[1, 2]),
  "karcher": lambda base, both: merge.karcher(both),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_trees_merge_as_mergekits_command_does(checkpoints, tmp_path, name):
  first, second, shared = COMMANDS[name]
  based = registry.get(name).spec.contract.base.value == "required"
  recipe = dict(base_model=checkpoints.folders["base"]) if based else {}
  expected = command(
    checkpoints,
    tmp_path / "out",
    merge_method=name,
    models=models(checkpoints, first, second),
    parameters=shared,
    **recipe,
  )
  base, *both = checkpoints.trees.values()
  found = tree.flatten(OURS[name](base, both))
  assert found.keys() == expected.keys()
  for path, leaf in found.items():
    close(leaf, expected[path], rtol=2e-6)


def test_slerp_as_mergekits_command_does(checkpoints, tmp_path):
  expected = command(
    checkpoints,
    tmp_path / "out",
    merge_method="slerp",
    base_model=checkpoints.folders["base"],
    models=[dict(model=checkpoints.folders[name]) for name in ("base", "first")],
    parameters=dict(t=0.3),
  )
  found = merge.slerp(checkpoints.trees["base"], checkpoints.trees["first"], t=0.3)
  for path, leaf in tree.items(found):
    close(leaf, expected[path])


def test_rows_are_mergekits_rows(checkpoints, tmp_path):
  """DELLA over whole checkpoints, with a coin that falls on heads where the probability is above a half."""
  heads = lambda p, *_, **__: (p > 0.5).to(p.dtype)
  with mock.patch.object(torch, "bernoulli", heads):
    expected = command(
      checkpoints,
      tmp_path / "out",
      merge_method="della",
      base_model=checkpoints.folders["base"],
      models=models(checkpoints, *[dict(weight=1.0, density=0.45, epsilon=0.3)] * 2),
    )
  base, *both = checkpoints.trees.values()
  heads = lambda key, shape, p: jnp.broadcast_to(p > 0.5, shape)
  jax.clear_caches()
  with mock.patch.object(sparsify, "drawn", heads):
    found = merge.della(both, base=base, key=KEY, density=0.45, epsilon=0.3)
  jax.clear_caches()
  for path, leaf in tree.items(found):
    close(leaf, expected[path])


def test_layers_stack_as_mergekits_do(checkpoints, tmp_path):
  part = lambda name, *layers: dict(
    sources=[dict(model=checkpoints.folders[name], layer_range=list(layers))]
  )
  slices = [part("first", 0, 2), part("second", 1, 3), part("base", 0, 1)]
  expected = command(checkpoints, tmp_path / "out", merge_method="passthrough", slices=slices)
  trees = checkpoints.trees
  found = merge.passthrough(
    [(trees["first"], 0, 2), (trees["second"], 1, 3), (trees["base"], 0, 1)]
  )
  for path, leaf in tree.items(found):
    np.testing.assert_array_equal(leaf, expected[path])
