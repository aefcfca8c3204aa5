"""The adapters of the engine's rows: each is its request's own, whatever was in the row or in the stack before."""

import jax
import numpy as np
import pytest

from posttrain_jax import adapters
from posttrain_jax.adapters import AdapterConfig
from posttrain_jax.adapters.seated import Seated
from posttrain_jax.core import weight
from posttrain_jax.models import decoder
from posttrain_jax.rollout import engine, seats
from posttrain_jax.rollout.requests import Request
from tests.adapters.kinds import moved
from tests.models import families

KINDS = (
  AdapterConfig(r=3),
  AdapterConfig(r=2, target_modules=("q_proj", "embed_tokens")),
  AdapterConfig(method="dora", r=4, target_modules=("v_proj", "down_proj")),
)
NONE = len(KINDS)
PROMPT = [5, 9, 2]


@pytest.fixture(scope="module")
def model():
  return families.make("llama")


def stack(params, seed):
  nodes = [moved(adapters.init(jax.random.key(seed), params, c)[1], seed, 0.5) for c in KINDS]
  return adapters.stack(nodes, params)


def bound(params, seed=0):
  return adapters.bind(params, stack(params, seed), rows=[0, 1, 2, -1])


def greedy(params, tokens, row, count, config):
  """The likeliest tokens by the whole forward pass, one after the other."""
  own = weight.take_rows(params, np.asarray([row]))
  said = list(tokens)
  for _ in range(count):
    padded = np.zeros((1, 16), np.int32)
    padded[0, : len(said)] = said
    logits = jax.jit(decoder.forward, static_argnames="config")(own, padded, config=config)
    said.append(int(np.argmax(logits[0, len(said) - 1])))
  return said[len(tokens) :]


@pytest.mark.parametrize("narrow", [16, 2])
def test_a_row_has_the_adapter_of_its_request_and_of_none_before_it(model, narrow, monkeypatch):
  """Where all ranks lie together, and where those beyond 2 lie apart."""
  monkeypatch.setattr(seats, "NARROW", narrow)
  config, params = model
  whole = bound(params)
  machine = engine.Engine(whole, config, rows=2, length=32)
  order = (0, 1, 2, NONE, 2, 0, NONE, 1)
  expected = [greedy(whole, PROMPT, row, 4, config) for row in range(NONE + 1)]
  assert len({tuple(tokens) for tokens in expected}) > 2
  asked = [Request(PROMPT, 4, row=row) for row in order]
  answers = dict(machine.run(asked))
  assert [list(answers[i].tokens) for i in range(len(order))] == [expected[row] for row in order]


@pytest.mark.parametrize("narrow", [16, 2])
def test_empty_seats_have_the_types_that_seating_leaves(model, narrow, monkeypatch):
  """A weak type among them was a second program, compiled at the first request of a server."""
  monkeypatch.setattr(seats, "NARROW", narrow)
  config, params = model
  machine = engine.Engine(bound(params), config, rows=2, length=32)
  assert not any(leaf.weak_type for leaf in jax.tree.leaves(machine._seats))


def test_rows_under_way_go_on_with_weights_that_are_loaded(model):
  """As where what draws is what reads, and has no seats."""
  config, params = model
  told = []
  for form in (lambda p: p, lambda p: engine.Ready(p, p)):
    machine = engine.Engine(form(bound(params)), config, rows=2, length=32, window=3)
    for row in (0, 2):
      machine.submit(Request(PROMPT, 8, row=row))
    first = [progress.tokens for progress in machine.advance()]
    machine.load(form(bound(params, 7)))
    told.append((first, [list(answer.tokens) for _, answer in sorted(machine.answers())]))
  assert told[0] == told[1]


def test_a_row_of_the_stack_that_is_given_another_adapter_is_seated_anew(model):
  config, params = model
  whole, other = bound(params), bound(params, 7)
  machine = engine.Engine(whole, config, rows=1, length=32)
  one = lambda: list(dict(machine.run([Request(PROMPT, 4, row=0)]))[0].tokens)
  assert one() == greedy(whole, PROMPT, 0, 4, config)
  ready = engine.prepare(other, config)
  machine.swap(ready, 1)  # says that row 0 is what it was
  assert machine._seated == [0]
  machine.swap(ready, 0)
  machine._held = [None]
  assert one() == greedy(other, PROMPT, 0, 4, config)


def test_only_what_the_layers_multiply_with_has_a_seat(model):
  config, params = model
  ready = engine.prepare(bound(params), config)
  nodes = seats.nodes(ready.stacked)
  made = seats.empty(nodes, 3)
  assert len(made) == config.num_layers
  assert all(isinstance(seated, Seated) for seated in made[0].values())
  assert "mlp/down_proj/weight" in made[0]
  assert made[0]["self_attn/q_proj/weight"].a.shape == (3, 3, config.hidden_size)
  assert isinstance(ready.layers_apart["embed_tokens"]["weight"], weight.Adapted)
  assert seats.empty({}, 3) == ()


def test_ranks_that_no_row_has_are_not_read(model):
  config, params = model
  nodes = seats.nodes(engine.prepare(bound(params), config).stacked)
  made = seats.empty(nodes, 2, narrow=2)  # both rows have the first adapter, of rank 3
  for row, expected in ((1, 1), (2, 0), (0, 2)):
    made = seats.seat(made, nodes, np.int32(0), np.int32(row))
    seated = made[0]["self_attn/q_proj/weight"]
    assert (seated.a.shape[-2], seated.beyond.a.shape[-2]) == (2, 1)
    assert int(seated.acts[0]) == expected
    assert not np.any(seated.of_live(np.asarray([False, False])).acts)
