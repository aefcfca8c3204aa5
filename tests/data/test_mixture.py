from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain_jax.data.encoded import Example
from posttrain_jax.data.mixture import Mixture, replay


def examples(count, rng=None, length=4):
  lengths = [length] * count if rng is None else rng.integers(2, 30, count)
  return [Example(np.zeros(n, np.int32), np.ones(n, bool)) for n in lengths]


def test_the_first_source_occurs_once_and_the_other_gives_its_fraction():
  mixture = replay(examples(90), examples(1000), 0.1)
  for epoch in range(3):
    drawn = mixture.indices(epoch)
    assert sorted(drawn[drawn < 90]) == list(range(90))
    assert (drawn >= 90).sum() == 10
  main, general = mixture.report()
  assert (main.fraction, general.fraction) == (0.9, 0.1)
  assert (main.passes, general.passes) == (1.0, 0.01)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.05, 0.95), st.sampled_from([3, 4]))
def test_a_stream_goes_through_its_source_evenly(first, second, fraction, epochs):
  fractions = {"a": 1 - fraction, "b": fraction}
  sources = {"a": examples(first), "b": examples(second)}
  mixture = Mixture(sources, fractions, size=100)
  counts = Counter(np.concatenate([mixture.indices(epoch) for epoch in range(epochs)]).tolist())
  for members in (range(first), range(first, first + second)):
    times = [counts[i] for i in members]
    assert max(times) - min(times) <= 1
  assert sum(counts.values()) == 100 * epochs


def test_by_tokens_the_fractions_are_of_tokens():
  rng = np.random.default_rng(0)
  short, long = examples(2000, length=5), examples(400, rng)
  mixture = Mixture({"a": short, "b": long}, {"a": 0.7, "b": 0.3}, by="tokens")
  for epoch in range(3):
    a, b = mixture.report(epoch)
    assert a.fraction == pytest.approx(0.7, abs=0.005)
    assert (a.examples, a.passes) == (2000, 1)
    assert b.tokens == pytest.approx(10_000 * 3 / 7, rel=0.01)
  drawn = np.concatenate([mixture.indices(epoch) for epoch in range(5)])
  times = np.bincount(drawn[drawn >= 2000] - 2000, minlength=400)
  assert times.max() - times.min() <= 1


def test_epochs_differ_and_follow_from_the_seed():
  def drawn(seed, epoch):
    return replay(examples(50), examples(50), 0.2, seed=seed).indices(epoch).tolist()

  assert drawn(0, 0) == drawn(0, 0)
  assert drawn(0, 0) != drawn(1, 0)
  assert drawn(0, 3) != drawn(0, 2)


def test_each_pass_over_a_source_is_shuffled_anew():
  mixture = Mixture({"a": examples(20)}, {"a": 1.0}, size=60)
  passes = mixture.indices(0).reshape(3, 20)
  assert len({tuple(one) for one in passes}) == 3
  assert (np.sort(passes) == np.arange(20)).all()


def test_a_repeated_source_says_so():
  mixture = Mixture({"a": examples(30), "b": examples(4)}, {"a": 0.75, "b": 0.25})
  text = str(mixture.report()[1])
  assert text == "b: 25.0% (asked 25.0%), 10 examples, 40 tokens, every example 2.50 times"


@pytest.mark.parametrize(
  ("sources", "fractions", "options", "message"),
  [
    ({"a": 3}, {"b": 1.0}, {}, r"sources are \['a'\], but fractions name \['b'\]"),
    ({"a": 3, "b": 3}, {"a": 0.5, "b": 0.6}, {}, "add up to 1.1, not 1"),
    ({"a": 3, "b": 3}, {"a": 1.0, "b": 0.0}, {}, "leave the source out"),
    ({"a": 3, "b": 0}, {"a": 0.5, "b": 0.5}, {}, "'b' has no examples"),
    ({"a": 3, "b": 9}, {"a": 0.95, "b": 0.05}, {}, "'b' would give nothing: 5.00% of 3"),
    ({"a": 3}, {"a": 1.0}, {"by": "rows"}, "'examples' or 'tokens'"),
    ({"a": 3}, {"a": 1.0}, {"size": 0}, "at least one"),
  ],
)
def test_what_cannot_be_mixed(sources, fractions, options, message):
  with pytest.raises(ValueError, match=message):
    Mixture({name: examples(n) for name, n in sources.items()}, fractions, **options)
  with pytest.raises(ValueError, match="between 0 and 1"):
    replay(examples(3), examples(3), 5)
