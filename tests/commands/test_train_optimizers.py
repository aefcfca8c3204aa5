"""`posttrain train` with the memory-saving optimizers: offloaded runs end where others do, and go on."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from posttrain_jax.__main__ import main
from tests.commands.test_train import arguments, lines


def fields(**more):
  """Full fine-tuning, four steps; eps so large that a gradient's last bits do not decide its sign."""
  eps = {} if more.get("optimizer__name") == "adafactor" else dict(optimizer__eps=1e-3)
  return dict(steps=4, more=",adapter=none") | eps | more


def run(shared, folder, *flags, **more):
  return main([*arguments(shared, folder, **fields(**more)), *flags])


def weights(folder):
  return safetensors.numpy.load_file(folder / "model" / "model.safetensors")


@pytest.mark.slow
# 8-bit codes would round last bits away or up
@pytest.mark.parametrize("name", ["adamw", "adam_mini"])
def test_an_offloaded_run_ends_where_others_do(name, shared, tmp_path):
  for mode in ("none", "params"):
    options = dict(optimizer__name=name, optimizer__offload=mode)
    assert run(shared, tmp_path / mode, **options) == 0
  wanted, found = weights(tmp_path / "none"), weights(tmp_path / "params")
  for path, x in wanted.items():
    np.testing.assert_allclose(found[path], x, rtol=1e-4, atol=1e-4, err_msg=path)
  losses = [
    [line["loss"] for line in lines(tmp_path / mode) if "loss" in line]
    for mode in ("none", "params")
  ]
  np.testing.assert_allclose(*losses, rtol=1e-4)
  assert losses[0][-1] < losses[0][0]


@pytest.mark.slow
def test_an_offloaded_run_goes_on_as_if_never_stopped(shared, tmp_path):
  folder, options = tmp_path / "run", dict(optimizer__offload="params")
  assert run(shared, folder, **options) == 0
  wanted = weights(folder)
  checkpoints = sorted((folder / "checkpoints").iterdir(), key=lambda p: p.name)
  shutil.rmtree(checkpoints[-1])
  shutil.rmtree(folder / "model")
  (folder / "done.json").unlink()
  assert run(shared, folder, **options) == 0
  assert json.loads((folder / "done.json").read_text())["steps"] == 4
  for path, x in weights(folder).items():
    assert x.tobytes() == wanted[path].tobytes(), path


@pytest.mark.slow
@pytest.mark.parametrize("more", [",base=nf4", ",adapter=dora"])
def test_a_base_on_the_host_changes_nothing(more, shared, tmp_path):
  """Base, adapter, moments and the layers' inputs there."""
  there = dict(model__offload="layers", optimizer__offload="params", model__remat="host")
  for name, options in (("here", {}), ("there", there)):
    assert run(shared, tmp_path / name, more=more, **options) == 0
  losses = [
    [line["loss"] for line in lines(tmp_path / name) if "loss" in line]
    for name in ("here", "there")
  ]
  np.testing.assert_allclose(*losses, rtol=1e-5)
  assert losses[0][-1] < losses[0][0]


@pytest.mark.slow
@pytest.mark.parametrize(
  "more", [dict(optimizer__name="adamw8bit"), dict(optimizer__name="galore", optimizer__rank=2)]
)
def test_adapters_train_with_them_too(more, shared, tmp_path):
  """LoRA+ and state on the host at once."""
  options = dict(more="", optimizer__loraplus_lr_ratio=4.0, optimizer__offload="state") | more
  assert run(shared, tmp_path / "run", **options) == 0
  losses = [line["loss"] for line in lines(tmp_path / "run") if "loss" in line]
  assert losses[-1] < losses[0]


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    (dict(optimizer__offload="stat"), "optimizer.offload='stat': known are none, state, params"),
    (dict(model__offload="layers"), "model.offload=layers is for a frozen base"),
    (dict(model__offload="layers", more="", model__remat="none"), "would keep every layer"),
    (
      dict(optimizer__offload="params", model__remat="none"),
      "model.remat=none would keep every layer",
    ),
    (dict(optimizer__offload="state", optimizer__name="adafactor"), "not kept by layer"),
    (dict(optimizer__name="galore", optimizer__rank=999), "optimizer.rank=999 is above the"),
    (dict(optimizer__loraplus_lr_ratio=16.0), "nothing that is trained has a factor b"),
  ],
)
def test_mistakes_are_explained_before_anything_is_written(
  wrong, message, shared, tmp_path, capsys
):
  folder = tmp_path / "run"
  assert run(shared, folder, **wrong) in (1, 2)
  said = capsys.readouterr()
  assert message in said.out + said.err
  assert not folder.exists()
