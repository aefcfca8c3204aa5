"""The plan's arithmetic against real trees, its program against training's, its words on mistakes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from posttrain_jax import __main__, adapters, quant, settings
from posttrain_jax.build import adapter as adapter_build
from posttrain_jax.build import optimizer as optimizer_build
from posttrain_jax.core import sharding, tree
from posttrain_jax.models import decoder, shapes
from posttrain_jax.objectives import Context
from posttrain_jax.plan import arithmetic, estimate, program, report, topology
from posttrain_jax.train import state as state_lib
from tests.marks import needs_cuda, needs_libtpu, slow

pytestmark = pytest.mark.usefixtures("in_float32")


TINY = dataclasses.replace(
  shapes.SHAPES["llama3-8b"],
  vocab_size=512,
  hidden_size=128,
  intermediate_size=256,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=32,
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
  monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)


def config(arguments="", **fields):
  rank = {} if "adapter=none" in arguments else {"adapter.r": 4}
  fields = {"data.length": 128, "batch.rows": 8, **rank, **fields}
  overrides = [settings.override(name, value) for name, value in fields.items()]
  return settings.load(f"configs/sft.py:model=tiny{arguments}", overrides)


PLAN = ("plan", "--config=configs/sft.py:model=tiny")
RUNS = pytest.mark.parametrize(
  "arguments", ["", ",base=nf4", ",base=fp4", ",base=int8", ",adapter=none"]
)


def one_cpu():
  return topology.target(count=1)


def real(c):
  """(state, context) of arrays, made as a run makes them."""
  params = decoder.init(jax.random.key(0), TINY)
  chosen = adapter_build.described(c)
  optimizer, _ = optimizer_build.make(c, TINY)
  if chosen is None:
    return state_lib.start(params, optimizer), Context()
  if c.model.base != "dense":
    params = quant.quantize_params(params, storage=c.model.base)
  params, adapter = adapters.init(jax.random.key(c.seed), params, chosen)
  trainable, fixed = tree.partition(adapter)
  return state_lib.start(trainable, optimizer, fixed), Context(params)


@RUNS
def test_abstract_trees_are_those_of_a_run(arguments):
  c = config(arguments)
  built = program.build(c, one_cpu())
  described = lambda tree: jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), tree)
  assert described((built.state, built.context)) == described(jax.eval_shape(lambda: real(c)))


@RUNS
def test_arithmetic_counts_the_bytes_of_real_arrays(arguments):
  c = config(arguments)
  state, context = jax.eval_shape(lambda: real(c))
  found = arithmetic.arithmetic(program.build(c, one_cpu()))
  assert found["base"] == tree.nbytes((context.base, state.carried))
  assert found["trained"] == tree.nbytes(state.trainable)
  assert found["optimizer"] == tree.nbytes(state.optimizer)


def test_arguments_as_compiled_are_the_bytes_of_state_base_and_batch():
  built = program.build(config(",base=nf4"), one_cpu())
  compiled = program.compile(built)
  given = sum(map(program.bytes_a_device, (built.state, built.context, built.batch)))
  # the compiler leaves out what the step does not read, and rounds small buffers up
  assert 0.98 * given < compiled.arguments < 1.02 * given
  assert compiled.aliased > 0.95 * tree.nbytes(real(config(",base=nf4"))[0].trainable)
  assert compiled.peak >= compiled.arguments


def test_eight_devices_share_what_one_holds():
  one = program.build(config(), one_cpu())
  eight = program.build(config(), topology.target(count=8))
  alone, shared = arithmetic.arithmetic(one), arithmetic.arithmetic(eight)
  assert shared["activations"] * 8 == alone["activations"]
  assert alone["base"] / 8 <= shared["base"] < alone["base"] / 6  # norms are whole everywhere
  parts = program.build(config(**{"mesh.context": 4}), topology.target(count=8))
  assert estimate.arithmetic(parts)["activations"] == shared["activations"]
  assert estimate.arithmetic(parts)["base"] == shared["base"]


@pytest.mark.slow
def test_eight_devices_need_a_third_of_the_peak():
  one = program.build(config(), one_cpu())
  eight = program.build(config(), topology.target(count=8))
  assert program.compile(eight).peak < program.compile(one).peak / 3


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", slow("names")])
def test_temporaries_grow_with_depth_by_what_is_counted(remat):
  """Saved activations and stacked gradients, and nothing else: no layer's weights stay dense."""

  def compiled_and_counted(layers):
    shapes.SHAPES["tiny"] = dataclasses.replace(TINY, num_layers=layers)
    built = program.build(config(",base=nf4", **{"model.remat": remat}), one_cpu())
    counted = arithmetic.arithmetic(built)
    return program.compile(built).temporaries, counted["activations"] + counted["gradients"]

  (few, counted_few), (many, counted_many) = compiled_and_counted(2), compiled_and_counted(12)
  assert many - few == pytest.approx(counted_many - counted_few, rel=0.05)


def test_command_prints_and_writes_the_same_figures(tmp_path, capsys):
  out = tmp_path / "plan.json"
  arguments = [f"{PLAN[0]}", f"{PLAN[1]},base=nf4", "--config.data.length=64"]
  assert __main__.main([*arguments, "--devices=1", f"--json={out}"]) == 0
  printed, written = capsys.readouterr().out, json.loads(out.read_text())
  for name, size in written["arithmetic_gib"].items():
    assert f"{name:<14}{size:>9.3f}" in printed
  assert f"{'peak':<14}{written['compiled']['peak_gib']:>9.3f}" in printed
  assert written["fits"] is None
  assert written["compiled"]["peak_gib"] > 0


@pytest.mark.slow
def test_too_little_memory_is_a_failure(monkeypatch, capsys):
  small = dataclasses.replace(one_cpu(), memory=1e-3)
  monkeypatch.setattr(estimate, "target", lambda *_: small)
  assert __main__.main([*PLAN, "--config.data.length=64", "--devices=1"]) == 1
  assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ("--topology=v5p", "write chips and their shape"),
    ("--topology=v9:2x2", "Chips: v4, v5e, v5p, v6e, tpu7x, a100, h100, h200, b200"),
    ("--devices=9", "devices=9"),
    ("--devices=0", "devices=0"),
    ("--slices=2", "slices=2: write 1 or more, of a topology"),
    ("--topology=h100:8", "hosts and GPUs of each"),
  ],
)
def test_mistakes_are_named(changes, message, capsys):
  assert __main__.main([*PLAN, changes]) == 1
  assert message in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_told_before_anything_compiles(tmp_path, capsys):
  assert __main__.main([*PLAN, f"--json={tmp_path}/no/plan.json"]) == 1
  assert f"{tmp_path}/no/plan.json cannot be written" in (said := capsys.readouterr()).err
  assert "compiling" not in said.err + said.out


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("v5e:4x4x4", "a slice of v5e has a shape of 2 numbers, as in v5e:4x4"),
    ("v6e:256", "a slice of v6e has a shape of 2 numbers"),
    ("v5p:4x4", "a slice of v5p has a shape of 3 numbers, as in v5p:2x2x1"),
    ("v5e:16x32", "16x16 chips at most; --slices=N takes more"),
  ],
)
def test_shapes_that_no_slice_has_are_refused(name, said):
  with pytest.raises(ValueError, match=said):
    topology.target(name)


def test_what_needs_one_process_says_so_on_several_hosts(monkeypatch):
  monkeypatch.setattr(estimate, "hosts", lambda _: 2)
  monkeypatch.setattr(program, "compile", out_of_memory)
  facts = estimate.of(config(**{"eval.samples": 2}), one_cpu(), advise=False)
  assert facts["refused"].startswith("eval.samples generates text in one process")
  assert estimate.of(config(), one_cpu(), advise=False)["refused"] is None


def out_of_memory(_):
  raise program.OutOfMemory("too much")


def test_a_compiler_that_fails_is_told_in_a_sentence():
  built = program.build(config(), one_cpu())

  class Lowered:
    def lower(self, *_):
      return self

    def compile(self):
      raise jax.errors.JaxRuntimeError("INTERNAL: Sublane slicing size\nand a trace")

  with pytest.raises(
    ValueError, match=r"compiler of cpu fails .*: INTERNAL: Sublane slicing size; "
  ):
    program.compiled(built, Lowered())


def test_missing_libtpu_says_how_to_install_it(monkeypatch):
  monkeypatch.setattr(topology, "has_libtpu", lambda: False)
  with pytest.raises(ValueError, match=r"make \.venv-tpu/ready"):
    topology.target("v5p:2x2x1")


def test_nf4_cannot_be_trained():
  with pytest.raises(settings.ConfigError, match="frozen"):
    program.build(config(",base=nf4,adapter=none"), one_cpu())


def test_what_is_changed_beside_the_update_stays_on_the_device():
  on_host = settings.override("optimizer.offload", "params")
  refused = settings.load("configs/sft.py:model=tiny,adapter=adalora", [on_host])
  with pytest.raises(settings.ConfigError, match="adalora changes its parameters beside"):
    program.build(refused, one_cpu())


def test_llama_shapes_have_the_published_sizes():
  count = lambda name: tree.size(decoder.abstract(shapes.SHAPES[name]))
  assert count("llama3-8b") == 8_030_261_248
  assert count("llama3-70b") == 70_553_706_496


@needs_libtpu
@pytest.mark.parametrize(
  ("name", "devices", "memory"),
  [("v5e:1x1", 1, 16), ("v6e:1x2", 2, 32), ("v5p:1x1x1", 1, 95), ("v4:2x2x1", 8, 16)],
)
def test_a_part_of_a_host_and_a_chip_of_two_cores(name, devices, memory):
  """libtpu takes fewer chips than a host has only when it is told so, and jax no cores of a v4."""
  where = topology.target(name)
  assert (len(where.devices), where.memory) == (devices, memory)
  shape = sharding.mesh(fsdp=-1, devices=where.devices).shape
  assert shape["fsdp"] == devices


@needs_libtpu
def test_compiles_for_a_tpu_that_is_not_here():
  found = estimate.figures(config(",base=nf4"), topology="v5e:2x2")
  assert found["devices"] == 4
  assert found["device_gib"] == 16
  assert found["fits"] is True
  assert found["compiled"]["temporaries_gib"] > 0


@needs_libtpu
def test_axes_that_are_no_product_of_a_torus_split_it():
  chips = topology.target("v5p:4x4x4").devices
  mesh = sharding.mesh(data=8, fsdp=8, devices=chips)
  assert {device.id for device in mesh.devices.flat} == {device.id for device in chips}


def test_how_many_steps_epochs_are_changes_nothing_of_what_is_needed(capsys):
  """No data is read, which would say."""
  by_steps, by_epochs = (
    program.build(config(**length), one_cpu()) for length in ({}, {"epochs": 3})
  )
  assert arithmetic.arithmetic(by_steps) == arithmetic.arithmetic(by_epochs)
  shown = {
    "slices": 1,
    "compiled": None,
    "out_of_memory": "",
    "device_gib": None,
    "arithmetic_gib": {},
  }
  facts = dict.fromkeys(
    ("model", "base", "adapter", "remat", "rows", "length", "devices", "target")
  )
  said = report.written({**facts, **shown, "epochs": 3.0})
  assert "epochs=3: how many steps these are changes nothing\n" in said


@pytest.mark.slow
@needs_cuda
def test_compiles_for_gpus_that_are_not_here():
  """Between the two hosts an adapter's gradient travels, and no weight."""
  fields = {"mesh.data": 2, "adapter.target_modules": ".*q_proj"}
  found = estimate.figures(config(",base=nf4", **fields), topology="h100:2x2")
  assert (found["devices"], found["slices"], found["fits"]) == (4, 2, True)
  kinds = found["by_kind_gib"]
  peak = sum(kinds.values()) - kinds["host"]
  assert peak == pytest.approx(found["compiled"]["peak_gib"], abs=2e-3)
  gathered = [one for one in found["collectives"] if one["kind"] == "all-gather"]
  assert {one["axis"] for one in gathered} == {"fsdp"}
  assert 0 < found["network_bytes"] <= 4 * found["trained"] + 4096
