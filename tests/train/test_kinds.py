"""VeRA, AdaLoRA and (IA)3 in training: eight devices are one, a run that was stopped is as never stopped."""

import json
import signal

import jax
import numpy as np
import pytest
import safetensors.numpy

from posttrain_jax import adapters, quant
from posttrain_jax.__main__ import main
from posttrain_jax.adapters import AdapterConfig
from posttrain_jax.core import distributed, sharding, tree
from posttrain_jax.models import decoder
from posttrain_jax.objectives import Context, Sft
from posttrain_jax.optim import chain
from posttrain_jax.runs.metrics_log import Journal
from posttrain_jax.train import state as state_lib
from posttrain_jax.train import step
from tests import tiny
from tests.adapters.kinds import moved
from tests.commands.test_train import CONFIG
from tests.objectives.batches import assert_same, gradient, placed

TARGETS = ("q_proj", "v_proj", "down_proj")
OPTIONS = {
  "vera": dict(r=6),
  "adalora": dict(init_r=4, target_r=2, lora_alpha=2, tinit=1),
  "ia3": {},
}


def setup(method):
  """(objective, trainable, context, config) over a base with biases, a part of it in NF4."""
  model = tiny.config("llama", attention_bias=True, mlp_bias=True)
  params = decoder.init(jax.random.key(0), model, std=tiny.STD)
  for name in ("v_proj", "q_proj"):
    path = f"layers/self_attn/{name}/bias"
    bias = jax.random.normal(jax.random.key(1), tree.get(params, path).shape)
    params = tree.put(params, path, bias)
  params = quant.quantize_params(params, exclude=("[kvo]_proj", "gate_proj"))
  config = AdapterConfig(method=method, target_modules=TARGETS, **OPTIONS[method])
  params, adapter = adapters.init(jax.random.key(2), params, config)
  part, fixed = tree.partition(moved(adapter, size=0.1))
  return Sft(model, remat="names"), part, Context(params, fixed), config


@pytest.mark.slow
@pytest.mark.parametrize("method", OPTIONS)
def test_eight_devices_are_one(method):
  objective, part, context, _ = setup(method)
  wanted, metrics = gradient(objective, part, context, tiny.batch())
  mesh = sharding.mesh(fsdp=4, tensor=2)
  with jax.set_mesh(mesh):
    part, context = placed(part, context, mesh)
    spread = [leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(part)]
    assert not all(spread)
    batch = distributed.global_batch(mesh, tiny.batch())
    found, values = gradient(objective, part, context, batch, 2)
  assert_same(found, wanted, 2e-5)
  assert values == pytest.approx(metrics, rel=1e-5)


@pytest.mark.slow
def test_ranks_are_spent_the_same_over_eight_devices():
  objective, part, context, config = setup("adalora")
  optimizer, _ = chain.chain("adamw", lr=0.02, steps=4)
  made = jax.jit(step.make(objective, optimizer, hooks=adapters.hooks(config, 4)))

  def masks(part, context, batch):
    state = state_lib.start(part, optimizer, context.fixed)
    for _ in range(4):
      state, _ = made(state, context, batch)
    return {path: np.asarray(node.mask) for path, node in tree.items(state.carried)}

  wanted = masks(part, context, tiny.batch())
  assert sum(mask.sum() for mask in wanted.values()) == 2 * 6
  mesh = sharding.mesh(data=2, fsdp=2, tensor=2)
  with jax.set_mesh(mesh):
    found = masks(*placed(part, context, mesh), distributed.global_batch(mesh, tiny.batch()))
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


# --- runs -------------------------------------------------------------------------------------------------------------


FIELDS = {
  "vera": {"r": 6, "lora_dropout": 0.1},
  "adalora": {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "lora_dropout": 0.1},
  "ia3": {},
}


def train(shared, folder, method, **fields):
  given = {
    "steps": 6,
    "batch.rows": 8,
    "data.length": 48,
    "data.eval_rows": 8,
    "eval.every": 0,
    "checkpoint.every": 2,
    "optimizer.lr": 0.02,
    **{f"adapter.{name}": value for name, value in FIELDS[method].items()},
    **fields,
  }
  return main(
    [
      "train",
      f"--config={CONFIG}:model={shared / 'model'},data={shared / 'rows.jsonl'},adapter={method},base=nf4",
      f"--workdir={folder}",
      *(f"--config.{name}={value}" for name, value in given.items()),
    ]
  )


def weights(folder):
  return safetensors.numpy.load_file(folder / "adapter" / "adapter_model.safetensors")


def lines(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("method", OPTIONS)
def test_a_run_that_was_stopped_goes_on_as_never_stopped(
  method, shared, tmp_path, monkeypatch, capsys
):
  assert train(shared, tmp_path / "a", method) == 0
  write = Journal.write

  def asked(self, step, values):
    write(self, step, values)
    if step == 3 and "loss" in values:
      signal.raise_signal(signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(Journal, "write", asked)
    assert train(shared, tmp_path / "b", method) == 75
  assert train(shared, tmp_path / "b", method) == 0
  assert "going on from step" in capsys.readouterr().out
  found, wanted = weights(tmp_path / "b"), weights(tmp_path / "a")
  assert found.keys() == wanted.keys()
  for name, array in wanted.items():
    np.testing.assert_array_equal(found[name], array, err_msg=name)
  losses = [line["loss"] for line in lines(tmp_path / "a") if "loss" in line]
  assert losses[-1] < losses[0]
  if method == "adalora":
    check_pruned(tmp_path / "a")


def check_pruned(folder):
  described = json.loads((folder / "adapter" / "adapter_config.json").read_text())
  assert described["total_step"] == 6
  kept = [sum(flags) for flags in described["rank_pattern"].values()]
  assert (len(kept), sum(kept)) == (14, 2 * 14)
  ranks = [array.shape[0] for name, array in weights(folder).items() if name.endswith("lora_E")]
  assert sorted(ranks) == sorted(kept)
  means = [line["adalora/mean_rank"] for line in lines(folder) if "loss" in line]
  assert means[0] == 4
  assert means[3:] == [2, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("method", OPTIONS)
def test_a_run_is_exported_merged(method, shared, tmp_path, capsys):
  assert (
    train(
      shared,
      tmp_path / "run",
      method,
      steps=2,
      **{"adapter.tfinal": 0} if method == "adalora" else {},
    )
    == 0
  )
  for extra in ([], ["--merge"]):
    out = tmp_path / f"out{len(extra)}"
    assert main(["export", f"--workdir={tmp_path / 'run'}", f"--out={out}", *extra]) == 0
  assert (tmp_path / "out0" / "adapter_model.safetensors").exists()
  assert (tmp_path / "out1" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_schedule_that_cannot_be_run_stops_the_run_before_it_starts(shared, tmp_path, capsys):
  assert train(shared, tmp_path / "run", "adalora", **{"adapter.tfinal": 5}) == 1
  assert "tinit=1 and tfinal=5 leave none of 6 steps to prune in" in capsys.readouterr().err
  assert not (tmp_path / "run").exists()
