"""What a plan advises where links bind a mixture's step is what the compiled program sends."""

import dataclasses

import pytest

from posttrain_jax import settings
from posttrain_jax.models import shapes
from posttrain_jax.plan import advice, chips, collectives, estimate, program, report, topology

MIXTURE = dataclasses.replace(
  shapes.SHAPES["qwen3-30b-a3b"],
  vocab_size=264,
  hidden_size=64,
  intermediate_size=64,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  experts=8,
  experts_per_token=2,
)
SLOW_LINKS = dataclasses.replace(chips.TPUS["v5e"], links=1.0)
pytestmark = pytest.mark.usefixtures("in_float32")


@pytest.fixture(autouse=True)
def mixture(monkeypatch):
  monkeypatch.setitem(shapes.SHAPES, "mixture", MIXTURE)
  dense = dataclasses.replace(MIXTURE, experts=0, experts_per_token=0)
  monkeypatch.setitem(shapes.SHAPES, "dense", dense)


def config(model="mixture", **fields):
  fields = {"data.length": 128, "batch.rows": 8, "eval.rows": 8, "adapter.r": 4, **fields}
  overrides = [settings.override(name, value) for name, value in fields.items()]
  return settings.load(f"configs/sft.py:model={model}", overrides)


def eight():
  return topology.target("cpu:8")


@pytest.mark.parametrize(("model", "fields", "advised"), [
  ("mixture", {}, "--config.mesh.expert=2"),
  ("mixture", {"mesh.fsdp": 8}, "--config.mesh.expert=2 --config.mesh.fsdp=4"),
  # more tokens are more rows that would travel, and fewer are fewer
  ("mixture", {"data.length": 1024}, None),
  ("mixture", {"data.length": 16}, "--config.mesh.expert=8"),
  ("mixture", {"mesh.expert": 2}, None),
  ("mixture", {"mesh.expert": 8}, "--config.mesh.expert=2"),
  ("dense", {}, None),
])  # fmt: skip
def test_experts_are_spread_where_their_weights_weigh_more_than_rows(model, fields, advised):
  built = program.build(config(model, **fields), eight())
  found = advice.lighter(built, 3e6)
  assert [one["field"] for one in found] == ([] if advised is None else [advised])


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"model.base": "nf4", "data.length": 16}], ids=str)
def test_what_is_advised_sends_as_much_as_was_said(fields):
  """And the plan says so where links bind the step."""
  more = {"model.remat": "full", "batch.rows": 16, **fields}
  target = dataclasses.replace(eight(), chip=SLOW_LINKS)
  facts = estimate.of(config(**more), target)
  (one,) = facts["lighter"]
  assert f"links bind it: with {one['field']} it would send" in report.written(facts)
  size = int(one["field"].removeprefix("--config.mesh.expert="))
  changed = program.build(config(**more, **{"mesh.expert": size}), target)
  text = program.compile(changed).executable.as_text()
  sent = sum(one.sent for one in collectives.read(text, changed.mesh, target.slice_of))
  assert one["sends"] == pytest.approx(sent, rel=0.15)
