"""A batch whose rows have different adapters: every row as with its own alone."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from posttrain_jax import adapters, quant, rollout
from posttrain_jax.adapters import AdapterConfig, layout
from posttrain_jax.core import sharding, tree, weight
from posttrain_jax.models import decoder
from posttrain_jax.rollout import engine
from tests.adapters.kinds import moved
from tests.marks import slow
from tests.models import families

KEY = jax.random.key(0)
SEVERAL = [
  AdapterConfig(r=3),
  AdapterConfig(r=5, lora_alpha=3, target_modules=("q_proj", "embed_tokens", "lm_head")),
  AdapterConfig(method="dora", r=2, target_modules=("q_proj", "down_proj")),
  AdapterConfig(method="dora", r=4, target_modules="all-linear", layers_to_transform=(0, 2)),
  AdapterConfig(
    r=2, rank_pattern={r"layers\.1\..*": 6}, exclude_modules=(r"layers.0.mlp.up_proj",)
  ),
  AdapterConfig(method="adalora", init_r=4, target_r=2),
  AdapterConfig(method="prompt", num_virtual_tokens=3),
  AdapterConfig(method="prompt", num_virtual_tokens=6),
  AdapterConfig(method="prefix", num_virtual_tokens=4),
]
NONE = -1
INDEX = np.asarray([2, NONE, 0, 7, 1, 3, 8, 4, 5, 6, 2])
TOLERANCE = 1e-5


def close(actual, expected, rtol=TOLERANCE):
  scale = np.abs(np.asarray(expected)).max()
  np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * scale)


def several(params, configs=SEVERAL):
  return [moved(adapters.init(KEY, params, c)[1], i, 0.2) for i, c in enumerate(configs)]


@pytest.fixture(scope="module", params=["llama", slow("gemma2")])
def mixed(request):
  """(model config, params, adapters)."""
  model, params = families.make(request.param)
  return model, params, several(params)


def alone(params, made, i):
  return params if i == NONE else adapters.bind(params, made[i])


@pytest.mark.slow
def test_every_row_is_as_with_its_adapter_alone_whatever_the_index(mixed):
  """One program for every index, with DoRA's factors computed as it goes and beforehand."""
  model, params, made = mixed
  tokens = families.tokens(len(INDEX), 12)
  one = jax.jit(lambda params, row: decoder.forward(params, row, model))
  expected = [one(alone(params, made, i), t[None])[0] for i, t in zip(INDEX, tokens)]
  traced = []

  @jax.jit
  def run(params, stacked, index, tokens):
    traced.append(1)
    return decoder.forward(adapters.bind(params, stacked, rows=index), tokens, model)

  for count, stacked in enumerate((adapters.stack(made), adapters.stack(made, params)), 1):
    for order in (np.arange(len(INDEX)), np.arange(len(INDEX))[::-1]):
      found = run(params, stacked, INDEX[order], tokens[order])
      for row, i in zip(found, order):
        close(row, expected[i])
    assert len(traced) == count
  base = decoder.forward(params, tokens, model)
  different = [np.abs(e - b).max() > 0.05 for e, b in zip(expected, base)]
  assert different == [i != NONE for i in INDEX]


@pytest.mark.slow
def test_generation_serves_ragged_rows_of_mixed_adapters(mixed):
  model, params, made = mixed
  index = INDEX[:7]
  prompts = [families.tokens(n, seed=n).tolist() for n in (11, 3, 17, 8, 5, 9, 4)]
  bound = adapters.bind(params, adapters.stack(made, params), rows=index)
  generate = lambda params, prompts: engine.generate(
    params, model, prompts, max_new_tokens=8, batch_size=3
  )
  found = generate(bound, prompts)  # in three batches, by length, one row of them filling up
  for row, i in enumerate(index):
    [expected] = generate(alone(params, made, i), [prompts[row]]).tokens
    assert found.tokens[row] == expected
  streamed = rollout.stream(
    adapters.bind(params, adapters.stack(made, params), rows=[7]),
    model,
    prompts[3],
    max_new_tokens=8,
  )
  assert list(streamed) == found.tokens[3]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [dict(data=2, fsdp=4), dict(fsdp=4, tensor=2)])
def test_eight_devices_compute_the_same(shape):
  model, params = families.make("llama")
  made = several(params)
  index, tokens = np.asarray([2, NONE, 0, 7, 1, 3, 8, 4]), families.tokens(8, 12)
  stacked = adapters.stack(made)
  run = jax.jit(lambda p, s: decoder.forward(adapters.bind(p, s, rows=index), tokens, model))
  expected = run(params, stacked)
  mesh = sharding.mesh(**shape)
  with jax.set_mesh(mesh):
    placed = layout.laid_out(params, mesh)
    found = run(placed, layout.laid_out(stacked, mesh))
  close(jax.device_get(found), expected, 2e-5)


def test_stacked_prefixes_lie_with_the_heads_of_keys():
  """[layers, prefixes + 1, slots, kv_heads * head_dim]: no device lacks an adapter."""
  params = families.make("llama")[1]
  made = several(params, [AdapterConfig(method="prefix", num_virtual_tokens=n) for n in (2, 4)])
  (node,) = [x for path, x in tree.items(adapters.stack(made)) if path.endswith("prefix")]
  for spec in (P(None, None, "tensor"), P("tensor")):
    specs = node.partition_specs(spec)
    assert specs.k == specs.v == P(None, None, None, "tensor")
    assert specs.used == P()
  assert node.partition_specs(P("fsdp", None, "tensor")).k == P("fsdp", None, None, "tensor")
  for one in (node, node.of_rows(np.asarray([1, 0]))):
    assert jax.tree.structure(one.partition_specs(P())) == jax.tree.structure(one)


@pytest.mark.slow
def test_a_stored_base_serves_them():
  model = families.config("llama", hidden_size=64, intermediate_size=64, head_dim=16)
  params = quant.quantize_params(families.params(model))
  made = several(params, SEVERAL[:4])
  tokens, index = families.tokens(4, 9), np.asarray([3, 1, NONE, 2])
  for stacked in (adapters.stack(made), adapters.stack(made, params)):
    found = decoder.forward(adapters.bind(params, stacked, rows=index), tokens, model)
    for row, i in enumerate(index):
      own = decoder.forward(alone(params, made, i), tokens[row : row + 1], model)[0]
      close(found[row], own, 2e-5)


def test_a_stack_holds_the_ranks_that_its_adapters_have():
  """And a block of zeros, however large the largest is."""
  params = families.make("llama")[1]
  ranks = (4, 32, 8)
  made = several(params, [AdapterConfig(r=r, target_modules=("q_proj",)) for r in ranks])
  node = adapters.stack(made)["layers"]["self_attn"]["q_proj"]["weight"]
  layers, inputs, outputs = params["layers"]["self_attn"]["q_proj"]["weight"].shape
  assert node.size() == layers * (sum(ranks) + 4) * (inputs + outputs)


def test_rows_can_be_taken_and_reordered():
  _, params = families.make("llama")
  bound = adapters.bind(params, adapters.stack(several(params, SEVERAL[:2])), rows=[0, 1, NONE])
  assert weight.batch_rows(bound) == 3
  assert weight.batch_rows(params) is None
  taken = weight.take_rows(bound, np.asarray([2, 0]))
  node = taken["layers"]["self_attn"]["q_proj"]["weight"].node
  assert node.index.value.tolist() == [2, 0]  # 2 is none


def test_what_cannot_be_mixed_is_refused():
  model, params = families.make("llama")
  made = several(params, SEVERAL[:2])
  stacked = adapters.stack(made)
  tokens = families.tokens(3, 8)
  start = lambda **options: adapters.init(KEY, params, AdapterConfig(**options))[1]
  refused = [
    (lambda: adapters.stack([]), "no adapter to stack"),
    (
      lambda: adapters.stack([made[0], start(method="ia3")]),
      "adapter 1 has a IA3 at .*serve this one alone",
    ),
    (lambda: adapters.stack([start(method="vera", r=2)]), "adapter 0 has a VeRA at"),
    (lambda: adapters.stack([start(modules_to_save=("norm",))]), "has a Replaced at"),
    (lambda: adapters.stack([start(method="pissa", r=2)]), "began with a part of its base"),
    (lambda: adapters.bind(params, stacked), "rows go with what adapters.stack made"),
    (lambda: adapters.bind(params, made[0], rows=[0]), "rows go with what adapters.stack made"),
    (lambda: adapters.bind(params, stacked, rows=[0, 2, 3]), r"rows=\[0, 2, 3\]: .* 0 to 1"),
    (lambda: adapters.bind(params, stacked, rows=[-2]), "-1 for none"),
    (
      lambda: decoder.forward(adapters.bind(params, stacked, rows=[0, 1]), tokens, model),
      "bound for 2 rows, the batch has 3",
    ),
    (
      lambda: engine.generate(
        adapters.bind(params, stacked, rows=[0, 1]), model, [[5]], max_new_tokens=2
      ),
      "1 prompts, but the parameters are bound for 2 rows",
    ),
    (
      lambda: adapters.merge(adapters.bind(params, stacked, rows=[0, 1])),
      "merge its adapters one at a time",
    ),
  ]
  for run, message in refused:
    with pytest.raises(ValueError, match=message):
      run()
  wide = families.params(families.config("llama", hidden_size=64))
  other = adapters.init(KEY, wide, AdapterConfig(r=2))[1]
  with pytest.raises(ValueError, match="adapters of different bases"):
    adapters.stack([made[0], other])
