"""The search finds the largest batch that fits, whatever the compiler says fits."""

import dataclasses

import pytest

from posttrain_jax.plan import chips, estimate, search, topology
from tests.plan.test_estimate import config

NEEDS = {"none": 8.0, "dots": 4.0, "names": 3.0, "full": 1.0}  # GiB a row
SPEED = {"none": 4.0, "dots": 4.0, "names": 4.0, "full": 3.0}


def facts(changed, target, *, advise):
  """A step that needs so much for each row beside 5 GiB."""
  assert not advise
  rows, remat = changed.batch.rows, changed.model.remat
  between = NEEDS[remat] * rows
  return {
    "fits": 5 + between <= target.memory,
    "compiled": {"compile_seconds": 40},
    "peak_gib": 5 + between,
    "by_kind_gib": {"activations": between},
    "roofline": {"tokens_per_second": SPEED[remat]},
  }


@pytest.mark.parametrize(("memory", "wanted", "compiled"), [
  # none 1, 2; dots 1, 2, not 4 as the line says 21; names 2, 4; full 2, 4, 8, and not 16
  # of dots, the best, 3 rows do not fit
  (16.0, [("names", 2), ("dots", 2), ("none", 1), ("full", 8)], 10),
  # names, the best: 2, 4, then not 6 but 5
  (20.5, [("names", 5), ("dots", 2), ("none", 1), ("full", 8)], 12),
  (7.0, [("full", 2)], 6),
  (5.5, [], 4),
])  # fmt: skip
def test_the_largest_batch_of_each_mode(memory, wanted, compiled, monkeypatch):
  monkeypatch.setattr(estimate, "of", facts)
  target = dataclasses.replace(topology.target(count=1), memory=memory, chip=chips.TPUS["v5e"])
  said = []
  tried = search.search(config(), target, said.append)
  assert len(said) == compiled
  assert sorted((one["remat"], one["rows"]) for one in tried) == sorted(wanted)
  assert [one["remat"] for one in tried[-1:]] == [mode for mode, _ in wanted[-1:]]
  answer = search.written(config(), tried)
  if wanted:
    assert (
      f"--config.model.remat={tried[0]['remat']} --config.batch.rows={tried[0]['rows']}" in answer
    )
  else:
    assert "nothing fits" in answer
  assert "GiB, does not fit; compiled in 40 s" in "\n".join(said)


@pytest.mark.parametrize(
  ("fields", "rows"),
  [
    ({"mesh.fsdp": -1, "mesh.tensor": 2}, 4),
    ({"mesh.fsdp": 1, "mesh.tensor": -1}, 1),
    ({"mesh.fsdp": 2, "mesh.context": -1, "batch.accumulate": 2}, 4),
  ],
)
def test_the_fewest_rows_are_those_that_the_mesh_takes(fields, rows):
  assert search.unit(config(**fields), topology.target(count=8)) == rows


def test_memory_has_to_be_known():
  with pytest.raises(ValueError, match="its memory is not known"):
    search.search(config(), topology.target(count=1))
