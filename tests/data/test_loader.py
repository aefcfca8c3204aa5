import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain_jax.data.encoded import Example
from posttrain_jax.data.errors import RowError
from posttrain_jax.data.loader import Loader, channel_names, eval_batches, read
from posttrain_jax.data.mixture import replay
from tests import tiny


def data(count=37, longest=30, seed=0):
  """Examples that can be told apart: every token of example i is i + 1."""
  lengths = np.random.default_rng(seed).integers(2, longest, count)
  return [
    Example(np.full(n, i + 1, np.int32), np.arange(n) >= n // 2, "ab"[i % 2], f"a.jsonl:{i + 1}")
    for i, n in enumerate(lengths)
  ]


EXAMPLES = data()
PACKED = {"batch_size": 4, "length": 32, "window": 16}
BUCKETED = {"batch_size": 4, "length": 32, "packing": False, "edges": (8, 16, 32)}
KINDS = pytest.mark.parametrize("kind", [PACKED, BUCKETED], ids=["packed", "bucketed"])


def take(batches, count):
  return [next(batches) for _ in range(count)]


def seen(batches):
  """The examples of some batches, each segment checked against the example it must be."""
  found = []
  for batch in batches:
    for tokens, segments, mask in zip(batch["tokens"], batch["segment_ids"], batch["loss_mask"]):
      for segment in range(1, segments.max() + 1):
        here = segments == segment
        index = int(tokens[here][0]) - 1
        np.testing.assert_array_equal(tokens[here], EXAMPLES[index].tokens)
        np.testing.assert_array_equal(mask[here], EXAMPLES[index].mask)
        found.append(index)
  return found


def assert_equal(some, others):
  assert len(some) == len(others)
  for a, b in zip(some, others):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


@KINDS
def test_every_example_occurs_once_per_epoch(kind):
  loader = Loader(EXAMPLES, **kind)
  orders = []
  for epoch in range(3):
    orders.append(seen(take(loader, loader.batches(epoch))))
    assert sorted(orders[-1]) == list(range(len(EXAMPLES)))
  assert orders[0] != orders[1]
  assert loader.epoch == 3.0


@KINDS
@pytest.mark.parametrize("epochs", [0.01, 0.5, 1, 2.5, 3])
def test_steps_are_as_many_batches_as_epochs_have(kind, epochs):
  loader = Loader(EXAMPLES, **kind)
  steps = loader.steps(epochs)
  take(loader, steps)
  assert loader.epoch == pytest.approx(loader.epochs(steps))
  assert loader.epoch == pytest.approx(
    epochs, abs=0.5 / loader.batches(int(epochs)) + 0.2 * (epochs < 0.1)
  )
  if epochs >= 1:
    assert loader.steps(loader.epochs(steps)) == steps


def test_epochs_far_away_are_not_counted_one_by_one(monkeypatch):
  loader = Loader(EXAMPLES, **PACKED)
  exact = loader.epochs(loader.steps(64))
  assert exact == 64
  assert loader.epochs(loader.steps(64) * 10**6) == pytest.approx(64e6)


@KINDS
def test_the_order_follows_from_the_seed(kind):
  assert_equal(take(Loader(EXAMPLES, **kind), 9), take(Loader(EXAMPLES, **kind), 9))
  other = take(Loader(EXAMPLES, seed=1, **kind), 9)
  assert seen(other) != seen(take(Loader(EXAMPLES, **kind), 9))


@KINDS
def test_resuming_anywhere_goes_on_as_if_never_stopped(kind):
  unbroken = take(Loader(EXAMPLES, **kind), 20)
  for stop in range(20):
    first = Loader(EXAMPLES, **kind)
    take(first, stop)
    state = json.loads(json.dumps(first.get_state()))
    second = Loader(EXAMPLES, **kind)
    take(second, 3)
    second.set_state(state)
    assert_equal(take(second, 20 - stop), unbroken[stop:])


@KINDS
@pytest.mark.parametrize("count", [2, 4])
def test_shards_side_by_side_are_the_whole(kind, count):
  whole = take(Loader(EXAMPLES, **kind), 12)
  shards = [take(Loader(EXAMPLES, shard=(i, count), **kind), 12) for i in range(count)]
  joined = [
    {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for parts in zip(*shards)
  ]
  assert_equal(joined, whole)


def test_each_shards_micro_batches_are_shares_of_the_global_ones():
  kind = {**PACKED, "batch_size": 8}
  whole = next(Loader(EXAMPLES, accumulate=2, **kind))["tokens"].reshape(2, 4, 32)
  shards = [next(Loader(EXAMPLES, accumulate=2, shard=(i, 2), **kind)) for i in range(2)]
  parts = [shard["tokens"].reshape(2, 2, 32) for shard in shards]
  np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_a_checkpoint_of_two_processes_resumes_in_one():
  two = Loader(EXAMPLES, shard=(1, 2), **PACKED)
  take(two, 5)
  one = Loader(EXAMPLES, **PACKED)
  one.set_state(two.get_state())
  assert_equal([next(one)], take(Loader(EXAMPLES, **PACKED), 6)[5:])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"seed": 1}, "seed was 0, is 1"),
    ({"batch_size": 8}, "batch.rows was 4, is 8"),
    ({"window": 17}, "window was 16, is 17"),
    ({"length": 64}, r"data.length. was"),
    ({"packing": False}, "data.packing was True, is False"),
  ],
)
def test_a_stream_that_changed_is_refused(change, message):
  state = Loader(EXAMPLES, **PACKED).get_state()
  with pytest.raises(ValueError, match=message):
    Loader(EXAMPLES, **{**PACKED, **change}).set_state(state)
  changed = [*EXAMPLES[:-1], Example(EXAMPLES[-1].tokens + 1, EXAMPLES[-1].mask)]
  with pytest.raises(ValueError, match=r"order has changed: the digest of the rows was"):
    Loader(changed, **PACKED).set_state(state)


@KINDS
def test_shapes_are_few_and_counted(kind):
  loader = Loader(EXAMPLES, **kind)
  stats = loader.stats()
  batches = take(loader, loader.batches())
  shapes = [batch["tokens"].shape for batch in batches]
  assert stats.shapes == {shape: shapes.count(shape) for shape in set(shapes)}
  assert stats.examples == len(EXAMPLES)
  assert stats.tokens == sum(len(example) for example in EXAMPLES)
  assert stats.tokens == sum(int((batch["segment_ids"] > 0).sum()) for batch in batches)
  assert stats.trained == sum(int(batch["loss_mask"].sum()) for batch in batches)
  assert stats.padding == 1 - stats.tokens / sum(batch["tokens"].size for batch in batches)
  assert f"{stats.tokens:,} tokens" in str(stats)


def test_packing_wastes_less_than_buckets():
  examples = data(400)
  packed = Loader(examples, batch_size=4, length=64).stats().padding
  bucketed = Loader(examples, batch_size=4, length=64, packing=False, edges=(64,)).stats().padding
  assert packed < 0.03
  assert bucketed > 0.5


def test_rows_are_packed_anew_each_epoch():
  loader = Loader(EXAMPLES, **PACKED)
  neighbours = [
    {
      frozenset(row[row > 0].tolist())
      for b in take(loader, loader.batches(e))
      for row in b["tokens"]
    }
    for e in range(2)
  ]
  assert neighbours[0] != neighbours[1]


def test_channels_are_indices_into_a_table():
  loader = Loader(EXAMPLES, **PACKED)
  assert loader.channels == channel_names(EXAMPLES[:1], EXAMPLES[1:]) == ("a", "b")
  for batch in take(loader, 5):
    filled = batch["segment_ids"] > 0
    np.testing.assert_array_equal(batch["channel"][filled], (batch["tokens"][filled] - 1) % 2)
    assert (batch["channel"][~filled] == -1).all()
  with pytest.raises(ValueError, match=r"channel 'b' is not in the table \['a'\]"):
    Loader(EXAMPLES, channels=("a",), **PACKED)


@KINDS
def test_evaluation_is_one_pass_in_a_fixed_order(kind):
  kind = {name: value for name, value in kind.items() if name != "window"}
  batches = list(eval_batches(EXAMPLES, channels=("z", "a", "b"), **kind))
  assert sorted(seen(batches)) == list(range(len(EXAMPLES)))
  assert_equal(batches, list(eval_batches(EXAMPLES, channels=("z", "a", "b"), **kind)))
  assert set(np.unique(batches[0]["channel"])) <= {-1, 1, 2}
  one, other = (list(eval_batches(EXAMPLES, shard=(i, 2), **kind)) for i in range(2))
  assert sorted(seen(one) + seen(other)) == list(range(len(EXAMPLES)))


def test_a_mixture_is_drawn_anew_each_epoch_and_resumes():
  def mixed(shard=(0, 1)):
    return Loader(replay(EXAMPLES[:20], EXAMPLES[20:], 0.2), shard=shard, **PACKED)

  loader = mixed()
  general = []
  for epoch in range(3):
    found = seen(take(loader, loader.batches(epoch)))
    assert sorted(i for i in found if i < 20) == list(range(20))
    general.append(sorted(i for i in found if i >= 20))
  assert [len(some) for some in general] == [5, 5, 5]
  assert len({*itertools.chain(*general)}) == 15
  resumed = mixed()
  resumed.set_state(loader.get_state())
  assert_equal(take(resumed, 4), take(loader, 4))
  with pytest.raises(ValueError, match="mixture was"):
    Loader(EXAMPLES, **PACKED).set_state(loader.get_state())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 9), st.booleans(), st.integers(0, 99))
def test_no_size_loses_an_example(count, batch_size, packing, seed):
  examples = EXAMPLES[:count]
  loader = Loader(examples, batch_size=batch_size, length=32, packing=packing, seed=seed)
  batches = take(loader, loader.batches())
  assert sorted(seen(batches)) == list(range(count))
  assert {len(batch["tokens"]) for batch in batches} == {batch_size}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      {"length": 20},
      r"a.jsonl:\d+ has \d+ tokens, more than a row's 20: raise data.length",
    ),
    ({"packing": False, "edges": (8, 16)}, "more than a row's 16"),
    ({"batch_size": 6, "shard": (0, 2), "accumulate": 2}, "use a multiple of 4"),
    ({"shard": (2, 2)}, r"shard \(2, 2\)"),
  ],
)
def test_what_cannot_be_loaded(change, message):
  with pytest.raises(ValueError, match=message):
    Loader(EXAMPLES, **{**PACKED, **change})
  with pytest.raises(ValueError, match="at least one example"):
    Loader([], **PACKED)


def test_rows_in_a_list_are_those_of_a_file(tmp_path):
  rows = tiny.rows(6)
  path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
  how = dict(batch_size=2, length=64)
  tokenizer = tiny.tokenizer()
  listed, filed = read(rows, tokenizer, **how), read(path, tokenizer, **how)
  assert_equal(take(listed, 5), take(filed, 5))
  text = tokenizer.decode(listed.examples[0].tokens)
  assert text == "<|im_start|>user\nsay a<|im_end|>\n<|im_start|>assistant\naaa<|im_end|>\n"


def test_rows_of_answers_in_a_list():
  rows = [{"prompt": f"say {x}", "chosen": x, "rejected": "no"} for x in "abc"]
  batches = read(rows, tiny.tokenizer(), kind="pairs", batch_size=3, length=64)
  assert next(batches)["present"].tolist() == [[True, True]] * 3
  labels = read(rows, tiny.tokenizer(), kind="labels", batch_size=6, length=64)
  assert next(labels)["companion"]["present"].all()  # KTO's other prompts


def test_a_row_in_a_list_that_cannot_be_used_is_named():
  rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a"}]
  with pytest.raises(RowError, match="row 1"):
    read(rows, tiny.tokenizer(), batch_size=1, length=64)
  with pytest.raises(ValueError, match="the list: holds no usable row"):
    read([], tiny.tokenizer(), batch_size=1, length=64)
