"""A run that is asked to stop at an awkward moment and goes on: in an evaluation, in a save, on other devices."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from posttrain_jax.train import loop
from tests.commands import test_train
from tests.commands.test_train import arguments, assert_equal, environment, steps, train, weights

FIELDS = dict(steps=8, checkpoint__every=2, eval__every=0, data__eval_rows=0)


@pytest.mark.slow
def test_sigterm_during_an_evaluation_loses_no_step(shared, tmp_path, monkeypatch):
  evaluate, asked = loop._evaluate, []

  def interrupted(*given):
    asked.append(signal.raise_signal(signal.SIGTERM))
    return evaluate(*given)

  monkeypatch.setattr(loop, "_evaluate", interrupted)
  assert train(shared, tmp_path, checkpoint__every=0) == 75
  assert len(asked) == 1
  assert steps(tmp_path) == [1, 2, 3]
  assert os.listdir(tmp_path / "checkpoints") == ["3"]
  assert "eval_loss" in test_train.lines(tmp_path)[-1]  # which was not cut short


# A child that is asked to stop at step 3; `then` comes as the save that follows is being committed.
CHILD = """
import json, os, signal, sys
from orbax.checkpoint._src.path import atomicity
from posttrain_jax.__main__ import main
from posttrain_jax.runs.metrics_log import Journal

write, whole, state = Journal.write, atomicity.AtomicRenameTemporaryPath.finalize, []

def asked(self, step, values):
  write(self, step, values)
  if step == 3:
    state.append(1)
    os.kill(os.getpid(), signal.SIGTERM)

def finalize(*args, **kwargs):
  if state and len(state) == 1:
    state.append(2)
    os.kill(os.getpid(), signal.Signals[sys.argv[1]])
  return whole(*args, **kwargs)

Journal.write = asked
atomicity.AtomicRenameTemporaryPath.finalize = finalize
sys.exit(main(sys.argv[2:]))
"""


def ended(shared, folder, *program, devices=1, **fields):
  """(exit code, what was said) of a run in a process of its own."""
  child = subprocess.run(
    [sys.executable, *(program or ("-m", "posttrain_jax")), *arguments(shared, folder, **fields)],
    env=environment(devices),
    capture_output=True,
    text=True,
    timeout=240,
  )
  return child.returncode, child.stdout + child.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("then", "code", "kept"), [("SIGTERM", 75, None), ("SIGKILL", -9, 2)])
def test_a_second_signal_in_the_save_of_the_first(then, code, kept, shared, tmp_path):
  first, said = ended(shared, tmp_path / "run", "-c", CHILD, then, **FIELDS)
  assert first == code, said
  reached = steps(tmp_path / "run")[-1]
  again, said = ended(shared, tmp_path / "run", **FIELDS)
  assert again == 0, said
  assert f"going on from step {kept or reached} of 8" in said
  assert ended(shared, tmp_path / "whole", **FIELDS)[0] == 0
  assert_equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))
  assert steps(tmp_path / "run") == list(range(1, 9))


@pytest.mark.slow
def test_it_goes_on_with_another_number_of_devices(shared, tmp_path):
  """With plain gradient descent: Adam would divide the rounding of small gradients by their size."""
  fields = dict(FIELDS, mesh__fsdp=-1, optimizer__name="sgd", optimizer__lr=0.5)
  fields |= {
    "model__dtype": "float32"
  }  # a processor that multiplies in bfloat16 has two digits fewer

  assert ended(shared, tmp_path / "run", devices=4, **fields | {"steps": 4})[0] == 0
  shutil.copytree(tmp_path / "run", tmp_path / "same")
  code, said = ended(shared, tmp_path / "run", devices=1, **fields)
  assert code == 0, said
  assert "going on from step 4 of 8" in said
  assert ended(shared, tmp_path / "same", devices=4, **fields)[0] == 0
  losses = lambda run: [line["loss"] for line in test_train.lines(tmp_path / run)]
  # other rows in a batch, or rows in another order, change the third digit
  np.testing.assert_allclose(losses("run"), losses("same"), rtol=2e-4)
  assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["steps"] == 8
