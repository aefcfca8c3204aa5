"""DoRA, PiSSA, OLoRA and LoftQ in training: over eight devices, in runs that stop and go on, exported."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import adapters, quant
from posttrain_jax.__main__ import main
from posttrain_jax.adapters import AdapterConfig, inits, peft_format
from posttrain_jax.build import start
from posttrain_jax.core import distributed, sharding, tree, weight
from posttrain_jax.models import decoder, hf
from posttrain_jax.objectives import Context, Sft
from posttrain_jax.runs.metrics_log import Journal
from tests import tiny
from tests.adapters.cases import trained
from tests.commands.test_train import CONFIG
from tests.marks import slow
from tests.objectives.batches import assert_same, gradient, placed
from tests.train.test_kinds import lines, weights

KEY = jax.random.key(0)
TARGETS = ("q_proj", "v_proj", "down_proj")
OPTIONS = {
  "dora": dict(use_dora=True, use_rslora=True, rank_pattern={r"layers\.1\..*": 6}),
  "dora_dropout": dict(use_dora=True, lora_dropout=0.3),
  "dora_pissa": dict(use_dora=True, init_lora_weights="pissa"),
}


def setup(name):
  """(objective, trainable, context) over a base of which a part is in NF4."""
  model = tiny.config()
  params = decoder.init(KEY, model, std=tiny.STD)
  params = quant.quantize_params(params, exclude=("[kvo]_proj", "gate_proj"))
  config = AdapterConfig(r=4, lora_alpha=2, target_modules=TARGETS, **OPTIONS[name])
  params, adapter = adapters.init(KEY, params, config)
  part, fixed = tree.partition(trained(adapter))
  return Sft(model, remat="names"), part, Context(params, fixed)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_eight_devices_are_one(name):
  objective, part, context = setup(name)
  wanted, metrics = gradient(objective, part, context, tiny.batch())
  mesh = sharding.mesh(fsdp=4, tensor=2)
  with jax.set_mesh(mesh):
    part, context = placed(part, context, mesh)
    assert not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(part))
    batch = distributed.global_batch(mesh, tiny.batch())
    found, values = gradient(objective, part, context, batch, 2 if "dropout" not in name else 1)
  assert_same(found, wanted, 2e-5)
  assert values == pytest.approx(metrics, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_what_is_kept_changes_no_gradient(remat):
  objective, part, context = setup("dora")
  wanted, _ = gradient(objective, part, context, tiny.batch())
  other = Sft(objective.model, remat=remat)
  assert_same(gradient(other, part, context, tiny.batch())[0], wanted, 1e-5)


# --- runs -------------------------------------------------------------------------------------------------------------


RUNS = {
  "dora": ("dora", "dense", {"lora_dropout": 0.1}),
  "qdora": ("dora", "nf4", {"depth_ranks": "(2,6)"}),
  "pissa": ("pissa", "dense", {}),
  "qpissa": ("pissa", "nf4", {"init_lora_weights": "pissa_niter_2"}),
  "olora": ("olora", "int8", {}),
  "loftq": ("loftq", "nf4", {"lora_alpha": 4.0, "loftq_iter": 3}),
}


def train(shared, folder, name, **fields):
  method, base, options = RUNS[name]
  given = {
    "steps": 6,
    "batch.rows": 8,
    "data.length": 48,
    "data.eval_rows": 8,
    "eval.every": 0,
    "checkpoint.every": 2,
    "optimizer.lr": 0.005,
    "adapter.r": 4,
    "adapter.target_modules": "('q_proj','down_proj')",
    **{f"adapter.{option}": value for option, value in options.items()},
    **fields,
  }
  return main(
    [
      "train",
      f"--config={CONFIG}:model={shared / 'model'},data={shared / 'rows.jsonl'},adapter={method},base={base}",
      f"--workdir={folder}",
      *(f"--config.{name}={value}" for name, value in given.items()),
    ]
  )


def stop(self_write):
  def asked(self, step, values):
    self_write(self, step, values)
    if step == 3 and "loss" in values:
      signal.raise_signal(signal.SIGTERM)

  return asked


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_stopped_goes_on_as_never_stopped(
  name,
  shared,
  tmp_path,
  monkeypatch,
  capsys,
):
  """Though the decomposition of the second start is another one: its vectors have their signs turned."""
  assert train(shared, tmp_path / "a", name) == 0
  said = capsys.readouterr().out
  assert ("||W - W at the start||" in said) == (name in ("qpissa", "olora", "loftq"))
  with monkeypatch.context() as patch:
    patch.setattr(Journal, "write", stop(Journal.write))
    assert train(shared, tmp_path / "b", name) == 75
  found = []
  with monkeypatch.context() as patch:
    factors, agrees = inits._factors, start.Start.agrees
    turned = lambda *args: jax.tree.map(lambda x: x * jnp.float32(-1.001), factors(*args))
    patch.setattr(inits, "_factors", turned)
    patch.setattr(start.Start, "agrees", lambda *args: found.append(agrees(*args)) or found[-1])
    patch.setattr(start, "_error", lambda *_: start.Error(0.0, 0.0))
    assert train(shared, tmp_path / "b", name) == 0
  assert "going on from step" in capsys.readouterr().out
  assert found == ([False] if RUNS[name][0] != "dora" else [])
  wanted, again = weights(tmp_path / "a"), weights(tmp_path / "b")
  assert again.keys() == wanted.keys()
  for tensor, array in wanted.items():
    np.testing.assert_array_equal(again[tensor], array, err_msg=tensor)
  losses = [line["loss"] for line in lines(tmp_path / "a") if "loss" in line]
  assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", [slow("qdora"), "qpissa", slow("loftq")])
def test_a_run_is_exported_for_the_original(name, shared, tmp_path):
  assert train(shared, tmp_path / "run", name, steps=2) == 0
  for extra in ([], ["--merge"]):
    out = tmp_path / f"out{len(extra)}"
    assert main(["export", f"--workdir={tmp_path / 'run'}", f"--out={out}", *extra]) == 0
  params, config = hf.load(shared / "model")
  adapter, _ = peft_format.load(tmp_path / "out0", params, config)
  merged = hf.load(tmp_path / "out1")[0]
  for path, leaf in tree.items(adapters.merge(params, adapter)):
    np.testing.assert_allclose(tree.get(merged, path), leaf, atol=1e-6, err_msg=path)
  described = json.loads((tmp_path / "out0" / "adapter_config.json").read_text())
  ranks = {array.shape[0] for key, array in weights(tmp_path / "run").items() if "lora_A" in key}
  assert ranks == ({2, 6} if name == "qdora" else {8})
  assert described["init_lora_weights"] is True


def test_of_the_original_one_leaf_is_dense_at_a_time(shared, monkeypatch):
  """What was placed is stored; nothing keeps a dense leaf that was started from."""
  config = AdapterConfig(method="pissa", r=4, target_modules=("q_proj", "down_proj"))
  model = hf.read_config(shared / "model")
  begun = start.plan(KEY, config, model, "nf4")
  seen = {}
  place = lambda path, leaf: seen.setdefault(path, jax.tree.map(jnp.asarray, leaf))
  params, _ = hf.load(shared / "model", storage="dense", place=begun.begin(place))
  linear = [path for path, leaf in seen.items() if quant.is_linear(path, leaf)]
  assert len(linear) == 7
  assert all(hasattr(seen[path], "codes") for path in linear)
  original, _ = hf.load(shared / "model")
  for path, node in begun.nodes.items():
    w, base = tree.get(original, path), tree.get(params, path)
    lost = lambda x, w=w: float(jnp.linalg.norm((w - x).ravel()) / jnp.linalg.norm(w.ravel()))
    stored = quant.quantize(path, w, "nf4")
    error = begun.errors[path]
    assert error.stored == pytest.approx(lost(weight.dense(stored)), rel=1e-5)
    assert error.started == pytest.approx(lost(node.dense(base)), rel=1e-5)
    assert error.started < error.stored
  assert (
    begun.errors.keys()
    == begun.nodes.keys()
    == {
      "layers/self_attn/q_proj/weight",
      "layers/mlp/down_proj/weight",
    }
  )


def test_a_start_that_is_not_the_original_is_fatal(shared, tmp_path, monkeypatch, capsys):
  take_out = inits._take_out
  monkeypatch.setattr(
    inits, "_take_out", lambda *args: (lambda base, node: (base * 1.05, node))(*take_out(*args))
  )
  assert train(shared, tmp_path / "run", "pissa") == 1
  assert "base and adapter at the start differ from the original by" in capsys.readouterr().err
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("name", "fields", "message"),
  [
    ("pissa", {"adapter.r": 65}, "rank 65 of 'layers.0.self_attn.q_proj' is above the matrix"),
    ("pissa", {"adapter.target_modules": "('q_prj',)"}, "no module matches 'q_prj'"),
    ("qdora", {"adapter.depth_ranks": "(4,)"}, "write the ranks of the first and the last layer"),
  ],
)
def test_mistakes_are_named_before_the_base_is_read(
  name, fields, message, shared, tmp_path, capsys
):
  assert train(shared, tmp_path / "run", name, **fields) == 1
  assert message in capsys.readouterr().err
  assert not (tmp_path / "run").exists()
