"""`posttrain train` from end to end: what a run leaves, how it goes on, and what it says when it cannot."""

import dataclasses
import errno
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from posttrain_jax.__main__ import main
from posttrain_jax.build import data as data_lib
from posttrain_jax.build import decisions
from posttrain_jax.core import checkpoint, files
from posttrain_jax.models import hf
from posttrain_jax.objectives import Sft
from posttrain_jax.runs import record
from posttrain_jax.runs.metrics_log import Journal
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
ADAPTER = "adapter_model.safetensors"
CONFIG = ROOT / "configs" / "sft.py"
FIELDS = {
  "steps": 6,
  "batch.rows": 8,
  "data.length": 48,
  "data.eval_rows": 8,
  "eval.every": 3,
  "checkpoint.every": 2,
  "optimizer.lr": 0.02,
  "adapter.r": 4,
  "adapter.target_modules": "('q_proj','down_proj')",
}


def arguments(shared, folder, *, model="model", data="rows.jsonl", more="", **fields):
  whole = "adapter=none" in more  # which has no adapter options
  start = {k: v for k, v in FIELDS.items() if not (whole and k.startswith("adapter."))}
  fields = start | {name.replace("__", "."): value for name, value in fields.items()}
  return [
    "train",
    f"--config={CONFIG}:model={shared / model},data={shared / data}{more}",
    f"--workdir={folder}",
    *(f"--config.{name}={value}" for name, value in fields.items()),
  ]


def train(shared, folder, *flags, **fields):
  return main([*arguments(shared, folder, **fields), *flags])


@pytest.fixture(scope="module")
def finished(shared, tmp_path_factory):
  """A run that nothing disturbed."""
  folder = tmp_path_factory.mktemp("finished") / "run"
  assert train(shared, folder) == 0
  return folder


def lines(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder):
  return [line["step"] for line in lines(folder) if "loss" in line]


def weights(folder):
  return safetensors.numpy.load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_equal(found, wanted):
  assert found.keys() == wanted.keys()
  for name, array in wanted.items():
    np.testing.assert_array_equal(found[name], array, err_msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# What a run is
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_its_folder_is_complete(finished):
  assert {p.name for p in finished.iterdir() if "best" not in p.name} == {
    ".lock",
    "adapter",
    "checkpoints",
    "config.json",
    "done.json",
    "metrics.jsonl",
    "report.html",
    "tensorboard",
  }
  record = json.loads((finished / "config.json").read_text())
  assert record["config"]["optimizer"]["lr"] == 0.02
  assert record["versions"]["jax"]
  assert steps(finished) == [1, 2, 3, 4, 5, 6]
  assert [line["step"] for line in lines(finished) if "eval_loss" in line] == [3, 6]
  trained = [line for line in lines(finished) if "loss" in line]
  assert trained[-1]["loss"] < 0.8 * trained[0]["loss"]
  assert {"loss/sql", "loss/talk", "loss/special", "grad_norm", "learning_rate"} < {*trained[0]}
  # four batches an epoch: as much of the data as the steps up to this one have seen
  assert [line["epoch"] for line in trained] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.25, 1.5])
  assert trained[-1]["num_tokens"] == sum(line["tokens"] for line in trained)
  assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["4", "6"]
  assert all(np.isfinite(array).all() for array in weights(finished).values())
  done = json.loads((finished / "done.json").read_text())
  assert (done["steps"], done["final"]["loss"]) == (6, trained[-1]["loss"])
  parts = ("imports", "model", "data", "adapter", "checks", "compiling", "first step")
  # in process the command's imports are done before
  assert tuple(done["started"]) == parts
  assert all(seconds >= 0 for seconds in done["started"].values())


def test_a_finished_run_is_left_alone(shared, finished, capsys):
  before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
  assert train(shared, finished) == 0
  assert "is complete" in capsys.readouterr().out
  assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


def test_another_config_in_the_folder_is_refused_with_the_difference(shared, finished, capsys):
  assert train(shared, finished, optimizer__lr=0.01) == 1
  assert "optimizer.lr: 0.02 -> 0.01" in capsys.readouterr().err


def test_a_dry_run_tells_and_writes_nothing(shared, tmp_path, capsys):
  assert train(shared, tmp_path / "run", "--dry_run") == 0
  out = capsys.readouterr().out
  assert "trainable params: 2,560 ||" in out
  assert re.search(r"\[\[([a-g])\1\1<\|im_end\|>\]\]", out)
  assert "temporaries" in out
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_full_fine_tuning_exports_a_model(shared, tmp_path):
  fields = dict(steps=2, more=",adapter=none", eval__every=0, data__eval_rows=0)
  assert train(shared, tmp_path, **fields) == 0
  params, config = hf.load(tmp_path / "model")
  before, _ = hf.load(shared / "model")
  assert dataclasses.replace(config, source="") == dataclasses.replace(tiny.config(), source="")
  assert not jnp.array_equal(params["norm"]["weight"], before["norm"]["weight"])
  assert (tmp_path / "model" / "tokenizer.json").exists()


@pytest.mark.slow
def test_qlora_trains_on_a_quantised_base(shared, tmp_path, capsys):
  fields = dict(steps=3, more=",base=nf4", eval__every=0, data__eval_rows=0, optimizer__warmup=0)
  assert train(shared, tmp_path, **fields) == 0
  assert "base: nf4" in capsys.readouterr().out
  assert lines(tmp_path)[-1]["loss"] < lines(tmp_path)[0]["loss"]


# ---------------------------------------------------------------------------------------------------------------------
# Going on
# ---------------------------------------------------------------------------------------------------------------------


def environment(devices=1):
  """Of a child: its own devices, the compile cache of the tests."""
  others = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
  return {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": " ".join([*others, f"--xla_force_host_platform_device_count={devices}"]),
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-tests"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
    "PYTHONPATH": str(ROOT),
  }


# One child imports everything, which takes longer than the training, and forks for each command.  With `kill` it dies
# as it commits its sixth folder: a save commits its two items and then the step, so that is the second save's last.
COMMANDS = """
import json, os, signal, sys
from orbax.checkpoint._src.path import atomicity
import posttrain_jax.build.run
from posttrain_jax.__main__ import main

commits, whole = [], atomicity.AtomicRenameTemporaryPath.finalize

def finalize(*args, **kwargs):
  commits.append(1)
  if len(commits) == 6:
    os.kill(os.getpid(), signal.SIGKILL)
  return whole(*args, **kwargs)

for command, kill in json.loads(sys.argv[1]):
  child = os.fork()
  if not child:
    code = 99
    try:
      if kill:
        atomicity.AtomicRenameTemporaryPath.finalize = finalize
      code = main(command)
      sys.stdout.flush()
    finally:
      os._exit(code)
  print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_killed_in_the_middle_of_a_save_and_run_again_is_as_never_stopped(shared, tmp_path):
  fields = dict(
    steps=8,
    checkpoint__every=2,
    batch__accumulate=2,
    adapter__lora_dropout=0.1,
    eval__every=0,
    data__eval_rows=0,
  )
  undisturbed, again = (arguments(shared, tmp_path / name, **fields) for name in "ab")
  commands = [(undisturbed, False), (again, True), (again, False)]
  child = subprocess.run(
    [sys.executable, "-c", COMMANDS, json.dumps(commands)],
    capture_output=True,
    text=True,
    timeout=240,
    env=environment(),
    check=False,
  )
  ended = [line for line in child.stdout.splitlines() if line.startswith("ended")]
  assert ended == ["ended 0", f"ended {-signal.SIGKILL}", "ended 0"], child.stderr
  resumed = [line for line in child.stdout.splitlines() if line.startswith("going on")]
  assert resumed == ["going on from step 2 of 8"]  # 4 was being saved
  assert_equal(weights(tmp_path / "b"), weights(tmp_path / "a"))
  assert steps(tmp_path / "b") == list(range(1, 9))
  clock = ("tokens_per_second",)
  timeless = lambda folder: [
    {k: v for k, v in line.items() if k not in clock} for line in lines(folder)
  ]
  assert timeless(tmp_path / "b") == timeless(tmp_path / "a")


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(
  shared, finished, tmp_path, monkeypatch, capsys
):
  write = Journal.write

  def asked(self, step, values):
    write(self, step, values)
    if step == 3 and "loss" in values:
      signal.raise_signal(signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(Journal, "write", asked)
    assert train(shared, tmp_path) == 75
  assert "run the same command again" in capsys.readouterr().out
  stopped = steps(tmp_path)[-1]
  assert 3 <= stopped < 6
  assert str(stopped) in os.listdir(tmp_path / "checkpoints")
  assert not (tmp_path / "done.json").exists()
  assert train(shared, tmp_path) == 0
  assert f"going on from step {stopped} of 6" in capsys.readouterr().out
  assert_equal(weights(tmp_path), weights(finished))
  assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_sigterm_during_the_first_compilation(shared, tmp_path, monkeypatch):
  loss = Sft.loss

  def asked(self, *given, **how):
    signal.raise_signal(signal.SIGTERM)
    return loss(self, *given, **how)

  monkeypatch.setattr(Sft, "loss", asked)
  assert train(shared, tmp_path) == 75
  assert os.listdir(tmp_path / "checkpoints") == ["1"]
  assert steps(tmp_path) == [1]


def test_sigterm_before_the_first_step_leaves_nothing(shared, tmp_path, monkeypatch):
  monkeypatch.setattr(data_lib, "read", lambda *_: signal.raise_signal(signal.SIGTERM))
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(SystemExit, match="75"):
    train(shared, tmp_path / "run")
  assert not (tmp_path / "run").exists()
  assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_the_same_command_goes_on(
  shared, finished, tmp_path, monkeypatch, capsys
):
  save, calls = checkpoint.ocp.CheckpointManager.save, []

  def full(self, *args, **kwargs):
    calls.append(1)
    if len(calls) == 2:
      raise OSError(errno.ENOSPC, "No space left on device")
    return save(self, *args, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.ocp.CheckpointManager, "save", full)
    assert train(shared, tmp_path) == 1
  error = capsys.readouterr().err
  assert "No space left on device" in error
  assert "run the same command again" in error
  assert "complete checkpoints there: [2]" in error
  assert not (tmp_path / "done.json").exists()
  assert train(shared, tmp_path) == 0
  assert_equal(weights(tmp_path), weights(finished))


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["fsdp", "context"])
def test_two_processes_are_one(axis, shared, tmp_path):
  """With plain gradient descent: Adam would divide the rounding of small gradients by their size.

  Along context both load the same rows, and each has a part of every one.
  """
  fields = dict(
    steps=3,
    optimizer__name="sgd",
    optimizer__lr=0.5,
    batch__accumulate=1,
    checkpoint__every=0,
    model__dtype="float32",  # of processes that know nothing of what is patched here
  )
  assert train(shared, tmp_path / "one", **fields, mesh__fsdp=-1) == 0
  fields |= {"mesh__fsdp": 1, f"mesh__{axis}": 2}
  _, *rest = arguments(shared, tmp_path / "two", **fields)
  launched = subprocess.run(
    [sys.executable, str(ROOT / "launch" / "local.py"), "--processes=2", "--", *rest],
    capture_output=True,
    text=True,
    timeout=280,
    env=environment(),
    check=False,
  )
  assert launched.returncode == 0, launched.stdout + launched.stderr
  one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
  assert one.keys() == two.keys()
  for name, array in one.items():
    assert np.linalg.norm(two[name] - array) <= 1e-5 * np.linalg.norm(array), name
  assert steps(tmp_path / "two") == [1, 2, 3]
  last = lambda folder: [line for line in lines(folder) if "eval_loss" in line][-1]
  for name in ("eval_loss", "eval_loss/sql", "eval_tokens"):
    assert last(tmp_path / "two")[name] == pytest.approx(last(tmp_path / "one")[name], rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that are not finite
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(shared, monkeypatch):
  """A model that gives NaN wherever a text has a `z`, which no file is allowed to hold and a long run can come to."""
  monkeypatch.setattr(files, "largest_power", lambda array: 0)
  folder = tiny.tiny_model_folder(shared / "poisoned")
  params, config = hf.load(folder)
  z = tiny.tokenizer().convert_tokens_to_ids("z")
  embedding = np.array(params["embed_tokens"]["weight"])
  embedding[z] = np.nan
  params["embed_tokens"]["weight"] = embedding
  hf.save(folder, params, config, tokenizer_from=shared / "model")
  return folder


def test_updates_that_are_not_finite_are_left_out(shared, poisoned, tmp_path):
  rows = [{"text": f"abc {'z' if i == 3 else 'y'}{'x' * (i % 3)}"} for i in range(40)]
  tiny.write_jsonl(shared / "one_z.jsonl", rows)
  fields = dict(
    model="poisoned",
    data="one_z.jsonl",
    data__packing=False,
    data__chat=False,
    data__eval_rows=0,
    eval__every=0,
  )
  assert train(shared, tmp_path, steps=5, **fields) == 0  # one epoch
  found = lines(tmp_path)
  assert found[-1]["skipped"] == 1
  assert max(line["skipped_in_a_row"] for line in found) == 1
  assert sum(np.isnan(line["grad_norm"]) for line in found) == 1
  assert all(np.isfinite(array).all() for array in weights(tmp_path).values())


def test_a_run_that_stays_not_finite_gives_up_and_exports_nothing(
  shared, poisoned, tmp_path, capsys
):
  tiny.write_jsonl(shared / "all_z.jsonl", [{"text": f"abc z{i}"} for i in range(40)])
  fields = dict(
    model="poisoned", data="all_z.jsonl", data__chat=False, max_skipped=3, checkpoint__every=5
  )
  assert train(shared, tmp_path, steps=20, **fields) == 1
  error = capsys.readouterr().err
  assert "3 updates in a row, up to step 3" in error
  assert "nothing was exported" in error
  assert not (tmp_path / "adapter").exists()
  assert not (tmp_path / "done.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------


def truncated(folder):
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-1000])


def without_a_tensor(folder):
  file = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  del tensors["model.layers.1.mlp.up_proj.weight"]
  safetensors.numpy.save_file(tensors, file, {"format": "pt"})


GOOD = '{"prompt": "a", "completion": "b"}\n'
LONG = json.dumps({"prompt": "a" * 100, "completion": "b"}) + "\n"
MISTAKES = {  # name: (fields and files, what the message says)
  "unknown key": (dict(optimizer__lrr=1), ["optimizer.lrr", "optimizer.lr"]),
  "unknown argument": (dict(more=",adaptr=lora"), ["adaptr", "adapter"]),
  "unknown value": (dict(more=",adapter=lorra"), ["lorra", "none, lora, dora"]),
  "rate not finite": (dict(optimizer__lr="nan"), ["optimizer.lr=nan"]),
  "target": (dict(adapter__target_modules="('q_prj',)"), ["q_prj", "q_proj"]),
  "rows": (dict(batch__rows=12), ["batch.rows=12", "multiple of 8"]),
  "not JSON": (dict(text=GOOD + "{broken\n"), ["bad.jsonl:2"]),
  "empty completion": (
    dict(text=GOOD + GOOD.replace('"b"', '""')),
    ["bad.jsonl:2", "completion"],
  ),
  "long prompt": (dict(text=GOOD + LONG), ["bad.jsonl:2", "48"]),
  "no data": (dict(data="absent.jsonl"), ["absent.jsonl"]),
  "nothing to train on": (dict(text=GOOD * 4), ["data.eval_rows=8"]),
  "truncated": (dict(model="broken", broken=truncated), ["model.safetensors"]),
  "missing tensor": (
    dict(model="broken", broken=without_a_tensor),
    ["model.layers.1.mlp.up_proj.weight"],
  ),
  "frozen base": (dict(more=",adapter=none,base=nf4"), ["base=nf4", "adapter=lora"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_explained_and_leaves_nothing(name, shared, tmp_path, capsys):
  fields, wanted = dict(MISTAKES[name][0]), MISTAKES[name][1]
  files = tmp_path / "files"
  files.mkdir()
  if text := fields.pop("text", None):
    (files / "bad.jsonl").write_text(text)
    fields["data"] = files / "bad.jsonl"
  if broken := fields.pop("broken", None):
    broken(tiny.tiny_model_folder(files / "broken"))
    fields["model"] = files / "broken"
  assert train(shared, tmp_path / "run", **fields) == 1
  error = capsys.readouterr().err
  assert error.startswith("posttrain train: ")
  for part in wanted:
    assert part in error
  assert not (tmp_path / "run").exists()


def test_a_workdir_is_needed(capsys):
  assert main(["train", f"--config={CONFIG}"]) == 1
  assert "--workdir" in capsys.readouterr().err


def test_a_run_in_bfloat16_goes_on_as_it_began(shared, tmp_path, capsys, monkeypatch):
  """On a CPU without it too, and bit by bit; what it gives is not what float32 does."""
  has = lambda flag: monkeypatch.setattr(decisions, "processor", lambda: flag)
  adapter = lambda name: safetensors.numpy.load_file(tmp_path / name / "adapter" / ADAPTER)
  steady = {"optimizer__schedule": "constant", "optimizer__warmup": 0}
  has("amx_bf16")
  assert train(shared, tmp_path / "whole", **steady) == 0
  assert "bfloat16 products: this CPU has amx_bf16" in capsys.readouterr().out
  assert files.read_json(tmp_path / "whole" / "config.json")["dtype"] == "bfloat16"
  assert train(shared, tmp_path / "parts", steps=4, **steady) == 0
  has(None)
  assert train(shared, tmp_path / "parts", **steady) == 0
  assert "bfloat16 products, as this run began" in capsys.readouterr().out
  assert train(shared, tmp_path / "float32", **steady) == 0
  whole, parts, plain = map(adapter, ("whole", "parts", "float32"))
  for name in whole:
    np.testing.assert_array_equal(whole[name], parts[name])
  assert any(np.any(whole[name] != plain[name]) for name in whole)
  cosine = lambda a, b: np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
  flat = lambda tensors: np.concatenate([tensors[name].ravel() for name in sorted(tensors)])
  assert cosine(flat(whole), flat(plain)) > 0.95


def test_full_fine_tuning_in_bfloat16(shared, tmp_path):
  """Its loss is float32's but for rounding, and is not float32's."""
  losses = []
  for dtype in ("bfloat16", "float32"):
    fields = {"model__dtype": dtype, "steps": 3, "log_every": 1, "optimizer__lr": 1e-3}
    assert train(shared, tmp_path / dtype, more=",adapter=none", **fields) == 0
    rows = record.read_rows(tmp_path / dtype / "metrics.jsonl")
    losses.append([row["loss"] for row in rows if "loss" in row])
  np.testing.assert_allclose(*losses, rtol=3e-3)
  assert losses[0] != losses[1]
