"""Several answers in a row: sums over each, and back."""

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.losses import spans
from posttrain_jax.losses.spans import Spans

# two answers and a prompt in row 0; one answer in row 1, whose second slot is empty; slot 2 is no answer's
SPANS = Spans(
  mask=jnp.asarray([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0]], bool),
  answer=jnp.asarray([[2, 0, 0, 1, 1], [2, 0, 0, 0, 2]]),
  present=jnp.asarray([[1, 1], [1, 0]], bool),
)
VALUES = jnp.asarray([[9.0, 1.0, 2.0, 4.0, 9.0], [9.0, 9.0, 8.0, 9.0, 9.0]])


def test_sums_are_over_the_scored_tokens_of_each_answer():
  np.testing.assert_array_equal(SPANS.per_answer(VALUES), [[3, 4], [8, 0]])
  np.testing.assert_array_equal(SPANS.lengths, [[2, 1], [1, 1]])  # an empty slot's is 1


def test_each_token_has_what_its_answer_has():
  per_token = SPANS.per_token(jnp.asarray([[5.0, 6.0], [7.0, 3.0]]))
  np.testing.assert_array_equal(per_token, [[0, 5, 5, 6, 6], [0, 7, 7, 7, 0]])


def test_what_is_not_scored_reaches_neither_sum_nor_gradient():
  for rest in (jnp.nan, jnp.inf):
    values = jnp.where(SPANS.mask, VALUES, rest)
    np.testing.assert_array_equal(SPANS.per_answer(values), [[3, 4], [8, 0]])
    slope = jax.grad(lambda x: jnp.sum(SPANS.per_answer(x) ** 2))(values)
    np.testing.assert_array_equal(slope, [[0, 6, 6, 8, 0], [0, 0, 16, 0, 0]])


def test_one_answer_a_row():
  rows = spans.whole(np.asarray([[0, 1, 1], [0, 0, 0]]))
  np.testing.assert_array_equal(rows.present, [[True], [False]])
  np.testing.assert_array_equal(rows.per_answer(jnp.asarray([[7.0, 1, 2], [7, 7, 7]])), [[3], [0]])
  np.testing.assert_array_equal(rows.per_token(jnp.asarray([[5.0], [6.0]])), [[5] * 3, [6] * 3])
