"""Who is next: no adapter starves, whatever the others ask for."""

import dataclasses

import numpy as np
import pytest

from posttrain_jax.serve.turns import BASE, Turns


@dataclasses.dataclass(eq=False)
class Asked:
  content: str | None
  since: float


def served(turns, arrivals, rows, steps, length=3, tick=1.0):
  """[(content, time in the queue)] in the order of admission; a row is busy for `length` ticks."""
  waiting, busy, order = [], [], []
  for step in range(steps):
    now = step * tick
    waiting += [Asked(content, now) for content in arrivals(step)]
    for end, content in [one for one in busy if one[0] <= step]:
      busy.remove((end, content))
      turns.end(content, now)
    while len(busy) < rows and (turn := turns.next(waiting, now)):
      in_slots = [slot.content for slot in turns.slots]
      if turn.is_new:
        assert not turns.live[in_slots[turn.slot]], "a slot in use was taken"
      turns.begin(turn, now)
      waiting.remove(turn.request)
      busy.append((step + length, turn.request.content))
      order.append((turn.request.content, now - turn.request.since))
  return order, waiting


def test_a_flood_of_one_adapter_holds_up_no_other():
  turns = Turns(2, patience=5)
  arrivals = lambda step: ["a"] * 50 if step == 0 else ["b", BASE] if step == 1 else []
  order, _ = served(turns, arrivals, rows=2, steps=12)
  waits = {content: wait for content, wait in order if content != "a"}
  assert waits == {
    "b": 2,
    BASE: 5,
  }  # of the rows that fall free next, the first has no more than its turn


def test_more_adapters_than_slots_take_turns_under_floods_of_each():
  names = [f"adapter {i}" for i in range(8)]
  turns = Turns(2, patience=4)
  arrivals = lambda step: names * 20 if step == 0 else []
  order, _ = served(turns, arrivals, rows=4, steps=120)
  first = {}
  for place, (content, _) in enumerate(order):
    first.setdefault(content, place)
  assert set(first) == set(names)
  counts = np.bincount([names.index(content) for content, _ in order])
  assert counts.min() > 0.5 * counts.max()


def test_a_slot_in_use_is_not_taken_and_one_that_waits_long_gets_one():
  turns = Turns(1, patience=10)
  arrivals = lambda step: ["a"] + (["b"] if step == 3 else [])
  order, _ = served(turns, arrivals, rows=2, steps=60)
  (wait,) = [wait for content, wait in order if content == "b"]
  assert 10 <= wait <= 10 + 2 * 3
  assert order[-1][0] == "a"  # which gets its slot back


def test_what_is_in_a_slot_stays_while_others_have_room():
  turns = Turns(3)
  order, _ = served(turns, lambda step: ["a", "b", "c"] if step % 4 == 0 else [], rows=3, steps=40)
  assert len(order) == 30
  assert turns.evictions == 0


def test_the_slot_unused_for_longest_goes_first():
  turns = Turns(2)
  plan = {0: ["a"], 5: ["b"], 10: ["a"], 20: ["c"], 30: ["a"], 40: ["b"]}
  served(turns, lambda step: plan.get(step, []), rows=1, steps=29)
  assert {slot.content for slot in turns.slots} == {"a", "c"}


@pytest.mark.parametrize("seed", range(4))
def test_whoever_waits_is_served_whatever_comes(seed):
  """Random arrivals at nine tenths of what the rows can do: nobody waits for more than the bound."""
  rng = np.random.default_rng(seed)
  names = [*"abcdefghij", BASE]
  slots, rows, length, patience = 3, 6, 3, 5
  turns = Turns(slots, patience=patience)
  popular = rng.dirichlet(np.full(len(names), 0.3))
  arrivals = lambda step: [names[i] for i in rng.choice(len(names), rng.poisson(0.9), p=popular)]
  order, waiting = served(turns, arrivals, rows, steps=2000, length=length)
  assert len(order) > 1500
  assert max(wait for _, wait in order) < 20 * patience
  assert all(2000 - one.since < 20 * patience for one in waiting)
