"""FLOPs and times of a step by the formulas that everybody uses."""

import dataclasses

import pytest

from posttrain_jax.models import shapes
from posttrain_jax.plan import chips, collectives, costs, program
from tests.plan.test_estimate import TINY, config, one_cpu

TOKENS = 2 * 32
FIELDS = {"data.length": 32, "batch.rows": 2}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
  monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)


def built(arguments="", **fields):
  return program.build(config(arguments, **{**FIELDS, **fields}), one_cpu())


def matrices():
  c = TINY
  attention = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
  layer = attention + 3 * c.hidden_size * c.intermediate_size
  return c.num_layers * layer + c.hidden_size * c.vocab_size


def attention(keys):
  return 4 * TINY.num_layers * TINY.num_heads * TINY.head_dim * keys


def test_full_fine_tuning_takes_6n_and_remat_2n_more():
  found = costs.flops(built(",adapter=none", **{"model.remat": "full"}))
  assert found["model"] == TOKENS * (6 * matrices() + 3 * attention(16))
  assert found["computed"] == TOKENS * (8 * matrices() + 4 * attention(32))


def test_an_adapter_takes_4n_and_6_times_its_own():
  one = built(**{"model.remat": "dots"})
  adapter = 6 * costs.numbers(one.state.trainable)
  assert costs.flops(one)["model"] == TOKENS * (4 * matrices() + adapter + 3 * attention(16))


def test_the_slowest_part_is_the_bound():
  one = built()
  sizes = dict(arguments=10, temporaries=5, outputs=0, aliased=0, code=0, host=0, seconds=0.0)
  compiled = program.Compiled(**sizes, executable=None)
  sent = [collectives.Collective("all-gather", "fsdp", 1, 200, 30)]
  slow = dataclasses.replace(chips.TPUS["v5e"], links=100.0, network=10.0)
  roofline = costs.roofline(one, slow, compiled, sent)
  assert (roofline["bound"], roofline["step_seconds"]) == ("network", 3.0)
  assert roofline["seconds"]["links"] == 2.0
  assert roofline["tokens_per_second"] == pytest.approx(TOKENS / 3, abs=0.05)
