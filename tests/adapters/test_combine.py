"""Several adapters as one: what the result does to the logits is what they did together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import adapters
from posttrain_jax.adapters import AdapterConfig, combine, peft_format
from posttrain_jax.adapters.lora import LoRA
from posttrain_jax.core import tree, weight
from posttrain_jax.models import decoder
from tests.adapters.cases import trained
from tests.marks import few
from tests.models import families

MODEL = families.config("llama")
TOKENS = np.arange(3, 15)[None]
WEIGHTS = (0.5, -0.3, 1.2)
KINDS = {
  "small": dict(r=2, lora_alpha=3, target_modules=("q_proj", "down_proj")),
  "wide": dict(r=5, lora_alpha=5, target_modules=("q_proj", "up_proj", "lm_head")),
  "patterned": dict(
    r=3, lora_alpha=7, target_modules="all-linear", rank_pattern={r"layers\.0\..*": 1}
  ),
  "rslora": dict(r=4, lora_alpha=2, target_modules=("q_proj",), use_rslora=True),
}


@functools.cache
def base():
  return families.params(MODEL)


@functools.cache
def adapter(kind, seed=0, **options):
  _, made = adapters.init(jax.random.key(seed), base(), AdapterConfig(**KINDS[kind], **options))
  return trained(made)


def several():
  return [adapter("small"), adapter("wide", 1), adapter("patterned", 2)]


def changes(made, params=None):
  """{path: what a merged tree adds to the base}, float64."""
  params = params or base()
  merged = tree.flatten(jax.jit(adapters.merge)(params, made))
  own = tree.flatten(base())
  if "lm_head/weight" not in own:
    own["lm_head/weight"] = weight.dense(decoder.head(base()))
  return {
    path: np.asarray(leaf, np.float64) - np.asarray(own[path], np.float64)
    for path, leaf in merged.items()
    if path in own
  }


def weighted(found, weights):
  total: dict = {}
  for w, made in zip(weights, found):
    for path, change in changes(made).items():
      total[path] = total.get(path, 0) + w * change
  return total


def assert_same(found, expected, tolerance=2e-5):
  for path, change in expected.items():
    np.testing.assert_allclose(found.get(path, 0), change, atol=tolerance, err_msg=path)


def test_side_by_side_is_exact_whatever_the_ranks_and_targets():
  made, config = combine.concatenate(several(), weights=WEIGHTS)
  assert_same(changes(made), weighted(several(), WEIGHTS))
  assert config.r == 2 + 5 + 3
  node = tree.flatten(made)["layers/self_attn/q_proj/weight"]
  assert node.ranks().tolist() == [2 + 5 + 1, *[2 + 5 + 3] * (MODEL.num_layers - 1)]


def test_ten_adapters_are_one():
  ten = [adapter("small", seed) for seed in range(10)]
  made, config = combine.concatenate(ten, weights=[0.1] * 10)
  assert config.r == 20
  assert_same(changes(made), weighted(ten, [0.1] * 10))


def test_the_result_survives_its_file(tmp_path):
  made, config = combine.concatenate(several(), weights=WEIGHTS)
  peft_format.save(tmp_path / "a", made, config, MODEL)
  again, _ = peft_format.load(tmp_path / "a", base(), MODEL)
  assert_same(changes(again), changes(made), 1e-6)


@pytest.mark.parametrize("rank", few([1, 4, 8], 4))
def test_a_chosen_rank_is_the_nearest(rank):
  """The largest singular values of the whole change, and nothing lost where the rank holds it all."""
  made, config = combine.compress(several(), rank=rank, weights=WEIGHTS)
  assert config.r == rank
  found, whole = changes(made), weighted(several(), WEIGHTS)
  for path in ("layers/self_attn/q_proj/weight", "layers/mlp/up_proj/weight"):
    for one, all_of_it in zip(found[path], whole[path]):
      u, s, v = np.linalg.svd(all_of_it)
      best = (u[:, :rank] * s[:rank]) @ v[:rank]
      np.testing.assert_allclose(one, best, atol=5e-5)
  all_of_it, _ = combine.compress(several(), rank=10, weights=WEIGHTS)
  assert_same(changes(all_of_it), whole, 1e-4)


def test_many_layers_end():
  """Batched decompositions side by side stopped for good on two cores, at sizes that no tiny model has."""
  draw = np.random.default_rng(0)
  a, b = (draw.standard_normal(shape, np.float32) for shape in ((30, 576, 32), (30, 32, 1536)))
  node = LoRA(jnp.asarray(a), jnp.asarray(b), jnp.ones(30))
  made, _ = combine.compress([{"layers": {"mlp": {"up_proj": {"weight": node}}}}], rank=32)
  found = made["layers"]["mlp"]["up_proj"]["weight"]
  np.testing.assert_allclose(found.a[0] @ found.b[0], a[0] @ b[0], atol=1e-3)


def test_an_operator_merges_the_changes_themselves():
  largest = lambda changes, weights: functools.reduce(jnp.maximum, changes)
  pair = [adapter("small"), adapter("small", 1)]
  made, _ = combine.compress(pair, rank=64, operator=largest)
  path = "layers/mlp/down_proj/weight"
  expected = np.maximum(*(changes(one)[path] for one in pair))
  np.testing.assert_allclose(changes(made)[path], expected, atol=1e-4)


def test_a_dora_is_merged_by_the_change_that_it_makes():
  dora = adapter("small", 3, use_dora=True)
  pair = [dora, adapter("small")]
  path = "layers/self_attn/q_proj/weight"
  made, _ = combine.compress(pair, rank=64, params=base())
  expected = weighted(pair, (1, 1))[path]
  np.testing.assert_allclose(changes(made)[path], expected, atol=1e-4)
  with pytest.raises(ValueError, match="is a DoRA"):
    combine.compress(pair, rank=4)
  with pytest.raises(ValueError, match="is a DoRA"):
    combine.concatenate(pair)


def test_what_began_with_a_part_of_its_base_is_merged_as_a_change_of_the_original():
  rest, started = adapters.init(
    jax.random.key(0), base(), AdapterConfig(**KINDS["small"], init_lora_weights="pissa")
  )
  started = trained(started)
  made, config = combine.concatenate([started])
  assert config.r == 4
  assert_same(changes(made), changes(started, rest), 5e-5)


def test_factors_apart_are_not_what_the_adapters_do_together():
  """One adapter is itself; of two with the same factors the scales add up as PEFT's weights say."""
  total = lambda arrays, weights: sum(w * x for w, x in zip(weights, arrays))
  one = adapter("small")
  made, _ = combine.factors([one], operator=total, weights=[-0.7])
  assert_same(changes(made), weighted([one], [-0.7]))
  made, _ = combine.factors([one, one], operator=total, weights=[0.5, 0.5])
  assert_same(changes(made), weighted([one], [2.0]))


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: combine.concatenate([]), "no adapter"),
    (lambda: combine.concatenate(several(), weights=[1]), "1 weights for 3 adapters"),
    (lambda: combine.compress(several(), rank=0), "rank=0"),
    (lambda: combine.factors(several(), operator=None), "ranks .* differ"),
  ],
)
def test_mistakes_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_adapters_of_other_bases_and_other_methods_are_refused():
  other = families.config("llama", hidden_size=2 * MODEL.hidden_size)
  params = families.params(other)
  _, made = adapters.init(jax.random.key(0), params, AdapterConfig(**KINDS["small"]))
  with pytest.raises(ValueError, match="different bases"):
    combine.concatenate([adapter("small"), made])
  _, vera = adapters.init(jax.random.key(0), base(), AdapterConfig(method="vera", r=4))
  with pytest.raises(ValueError, match="is no product of two factors"):
    combine.concatenate([vera])
