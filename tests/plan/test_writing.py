"""The engine of an online run, compiled from shapes: laid out as it is in a run, on one device and on eight."""

import math

import jax
import pytest

from posttrain_jax import settings
from posttrain_jax.core import tree
from posttrain_jax.plan import estimate, program, report, topology, writing
from tests import tiny


def config(folder, **fields):
  given = {
    "data.length": 128,
    "batch.rows": 4,
    "eval.rows": 4,
    "online.samples": 4,
    "online.rows": 8,
    **fields,
  }
  given |= {"online.max_new_tokens": 8, "adapter.r": 2, "adapter.target_modules": "('q_proj',)"}
  where = f"rl:model={folder},data={folder}/none.jsonl,reward=exact"
  return settings.load(where, [settings.override(*item) for item in given.items()])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  made = tmp_path_factory.mktemp("writes") / "model"
  tiny.tiny_model_folder(made)
  return made


def test_what_writes_is_counted_beside_what_trains(folder):
  found = estimate.figures(config(folder), devices=1)
  writes = found["writing"]
  # eight answers of eight tokens and their stop leave 92 tokens of a row of 128 to the prompt
  assert (writes["rows"], writes["length"]) == (8, 128 - 4 * 9 + 8)
  assert len(writes["programs"]) == 2
  peaks = [sizes["peak_gib"] for sizes in writes["programs"].values()]
  assert found["peak_gib"] >= max(peaks) > 0
  printed = report.written(found)
  assert "to write 8 answers at once, of 100 tokens with their prompts" in printed
  assert "does not run" not in printed


def test_a_pod_that_a_run_does_not_start_on_is_told(folder, monkeypatch):
  assert estimate.hosts(jax.devices()) == 1
  monkeypatch.setattr(estimate, "hosts", lambda devices: 2)
  assert "does not run" not in report.written(estimate.figures(config(folder), devices=1))
  found = estimate.figures(config(folder, **{"eval.samples": 2}), devices=1)
  told = "does not run on these 2 hosts: eval.samples generates text in one process"
  assert told in report.written(found)


def bytes_of(params):
  return {path: sum(_shard(x) for x in jax.tree.leaves(leaf)) for path, leaf in tree.items(params)}


def _shard(x):
  return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["auto", "int8"])
def test_on_a_mesh_weights_are_cut_along_tensor_alone(folder, storage):
  fields = {"mesh.fsdp": 4, "mesh.tensor": 2, "online.storage": storage}
  fields |= {} if storage == "auto" else {"objective.importance": "token"}
  eight = program.build(config(folder, **fields), topology.target(count=8))
  one = program.build(
    config(folder, **{**fields, "mesh.fsdp": 1, "mesh.tensor": 1}), topology.target(count=1)
  )
  cut, whole = bytes_of(writing.parameters(eight)), bytes_of(writing.parameters(one))
  for path, size in whole.items():
    if path.endswith("_proj/weight"):
      scales = 0.05 * size  # of outputs that lie whole
      assert size / 2 <= cut[path] <= size / 2 + scales, path
  assert writing.figures(eight)["programs"].keys() == writing.figures(one)["programs"].keys()
