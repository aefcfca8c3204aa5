"""Filters against a loop in numpy, draws against the distribution they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.core import bits
from posttrain_jax.rollout import sampling
from posttrain_jax.rollout.sampling import GREEDY, Sampling

LOGITS = np.random.default_rng(0).normal(0, 2, (4, 300)).astype(np.float32)
SETTINGS = [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.8), (0.9, 40, 0.6)]


def kept_by_hand(row, temperature, top_k, top_p):
  """{token: logit} that stay, one token after another from the highest down."""
  row = row.astype(np.float64) / temperature
  order = np.argsort(-row)[: top_k or len(row)]
  mass = np.exp(row[order]) / np.exp(row[order]).sum()
  count = 1 + np.sum(np.cumsum(mass) < top_p) if top_p < 1 else len(order)
  return {int(token): row[token] for token in order[:count]}


def asked(how, rows):
  return sampling.Rows.of([how] * rows)


def keys(rows, seed=0):
  return jax.random.split(jax.random.key(seed), rows)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_filter_keeps_what_a_loop_keeps(temperature, top_k, top_p):
  how = asked(Sampling(top_k=top_k, top_p=top_p), 4)
  found = sampling.filtered(LOGITS / np.float32(temperature), how)
  for row, logits in zip(np.asarray(found), LOGITS):
    expected = kept_by_hand(logits, temperature, top_k, top_p)
    assert set(np.flatnonzero(row > -np.inf)) == set(expected)
    np.testing.assert_allclose(row[list(expected)], list(expected.values()), rtol=1e-6)


def test_filter_keeps_the_most_likely_whatever_the_mass_and_all_of_a_tie():
  logits = jnp.asarray([[0.0, 5.0, 5.0, -1.0]])
  for options in (dict(top_p=1e-6), dict(top_k=1), dict(min_p=1.0)):
    np.testing.assert_array_equal(
      sampling.filtered(logits, asked(Sampling(**options), 1))[0] > -np.inf,
      [False, True, True, False],
    )


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_draws_follow_the_filtered_distribution(temperature, top_k, top_p):
  draws = 8_000
  row = LOGITS[0]
  token, _ = jax.jit(sampling.sample)(
    keys(draws), jnp.tile(row, (draws, 1)), asked(Sampling(temperature, top_k, top_p), draws)
  )
  kept = kept_by_hand(row, temperature, top_k, top_p)
  expected = np.zeros(len(row))
  expected[list(kept)] = np.exp(list(kept.values()))
  expected = expected / expected.sum() * draws
  counts = np.bincount(token, minlength=len(row))
  assert not counts[expected == 0].any()
  common = expected > 5
  chi2 = np.sum((counts - expected)[common] ** 2 / expected[common])
  assert chi2 < common.sum() + 5 * np.sqrt(2 * common.sum())


def test_min_p_keeps_what_is_likely_enough():
  probabilities = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
  for least in (0.01, 0.3):
    found = sampling.filtered(jnp.asarray(LOGITS), asked(Sampling(min_p=least), 4)) > -np.inf
    np.testing.assert_array_equal(
      found, probabilities >= least * probabilities.max(axis=1, keepdims=True)
    )


def test_a_repetition_is_dearer_whatever_the_sign_of_its_logit():
  text = np.asarray([[3, 7, 3, 250], [0, 0, 0, 0], [9, 8, 7, 6], [1, 2, 3, 4]])
  lengths = np.asarray([3, 0, 1, 4])
  hows = [Sampling(repetition_penalty=p) for p in (1.5, 2.0, 1.0, 0.5)]
  none = jnp.zeros_like(lengths)
  found = sampling.penalised(jnp.asarray(LOGITS), text, lengths, none, sampling.Rows.of(hows))
  expected = LOGITS.copy()
  for row, how in enumerate(hows):
    for token in set(text[row, : lengths[row]]):
      old = LOGITS[row, token]
      penalty = how.repetition_penalty
      expected[row, token] = old / penalty if old > 0 else old * penalty
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert (expected != LOGITS).sum() == 2 + 4


def test_each_row_draws_as_it_was_asked():
  hows = [GREEDY, Sampling(1e-3), Sampling(top_k=1), Sampling(0.7, 5, 0.9)]
  together, logits = sampling.sample(keys(4), jnp.asarray(LOGITS), sampling.Rows.of(hows))
  best = LOGITS.argmax(axis=1)
  np.testing.assert_array_equal(together[:3], best[:3])
  for row, how in enumerate(hows):
    one, kept = sampling.sample(keys(4)[row, None], LOGITS[row, None], asked(how, 1))
    assert one[0] == together[row]
    np.testing.assert_array_equal(kept[0], logits[row])
  assert (logits[3] > -np.inf).sum() <= 5
  expected = jax.nn.log_softmax(logits)[np.arange(4), together]
  np.testing.assert_allclose(sampling.logp_of(together, logits), expected, rtol=1e-5)


def test_settings_that_mean_nothing_are_refused():
  for wrong, message in [
    (dict(temperature=-1.0), "temperature must be 0 .greedy., or from 0.001 to 1000, found -1.0"),
    (dict(temperature=float("nan")), "found nan"),
    (dict(temperature=1e-30), "found 1e-30"),  # logits would be infinite
    (dict(temperature=1e-50), "found 1e-50"),  # 0 in float32
    (dict(temperature=1e39), "found 1e.39"),
    (dict(top_k=-1), "top_k must be 0 .off."),
    (dict(top_k=2.5), "top_k must be 0 .off. .* found 2.5"),
    (dict(top_k=2**31), "at most 2147483647, found 2147483648"),
    (dict(repetition_penalty=1e-30), "repetition_penalty must be from 0.001 to 1000, 1 for none"),
    (dict(top_p=0.0), "top_p must be above 0"),
    (dict(top_p=1.5), "found 1.5"),
    (dict(min_p=-0.1), "min_p must be from 0 .off. to 1, found -0.1"),
    (dict(repetition_penalty=0.0), "repetition_penalty must be from 0.001"),
  ]:
    with pytest.raises(ValueError, match=message):
      Sampling(**wrong)


def test_presence_and_frequency_penalties_count_the_answer_alone():
  """OpenAI's: logit - count * frequency - (count > 0) * presence, of what was drawn and not of the prompt."""
  text = np.asarray([[3, 7, 3, 3, 5], [1, 1, 1, 9, 9], [4, 4, 4, 4, 4], [2, 2, 0, 0, 0]])
  lengths, drawn = np.asarray([5, 4, 5, 2]), np.asarray([3, 1, 5, 0])
  how = [Sampling(presence_penalty=p, frequency_penalty=f) for p, f in PENALTIES]
  args = (jnp.asarray(text), jnp.asarray(lengths), jnp.asarray(drawn), sampling.Rows.of(how))
  found = sampling.penalised(jnp.asarray(LOGITS), *args)
  expected = LOGITS.astype(np.float64).copy()
  for row, (presence, frequency) in enumerate(PENALTIES):
    answer = text[row, lengths[row] - drawn[row] : lengths[row]]
    for token in set(answer.tolist()):
      expected[row, token] -= frequency * (answer == token).sum() + presence
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
  assert (np.asarray(found) != LOGITS).sum() == 2 + 1 + 1


PENALTIES = [(0.5, 0.25), (0.0, -1.0), (2.0, 2.0), (1.0, 1.0)]


def test_a_bias_is_added_to_its_tokens_and_twice_where_it_is_named_twice():
  how = [Sampling(bias=((3, 2.5), (7, -100.0), (3, 1.0))), *[Sampling()] * 3]
  none = jnp.zeros(4, jnp.int32)
  text = jnp.zeros((4, 5), jnp.int32)
  found = sampling.penalised(jnp.asarray(LOGITS), text, none, none, sampling.Rows.of(how))
  expected = LOGITS.copy()
  expected[0, 3] += 3.5
  expected[0, 7] -= 100
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_mask_removes_what_a_grammar_does_not_allow():
  allowed = np.random.default_rng(0).random(LOGITS.shape) < 0.3
  has = np.asarray([True, False, True, True])
  found = sampling.masked(jnp.asarray(LOGITS), jnp.asarray(has), bits.pack(jnp.asarray(allowed)))
  np.testing.assert_array_equal(found, np.where(allowed | ~has[:, None], LOGITS, -np.inf))


def test_the_most_likely_are_told_in_order():
  ids, logps = sampling.most_likely(jnp.asarray(LOGITS), 4)
  every = LOGITS - np.log(np.exp(LOGITS.astype(np.float64)).sum(-1, keepdims=True))
  np.testing.assert_array_equal(ids, np.argsort(-LOGITS, axis=-1, kind="stable")[:, :4])
  np.testing.assert_allclose(logps, np.sort(every, axis=-1)[:, ::-1][:, :4], rtol=1e-5)


@pytest.mark.parametrize(
  "fields",
  [
    dict(presence_penalty=2.1),
    dict(frequency_penalty=float("nan")),
    dict(bias=((1, 101.0),)),
    dict(bias=tuple((i, 1.0) for i in range(301))),
  ],
)
def test_penalties_and_biases_have_bounds(fields):
  with pytest.raises(ValueError, match=r"penalty must be|bias of token|tokens have a bias"):
    Sampling(**fields)
