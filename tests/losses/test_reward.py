"""Losses of reward models in closed form; TRL's trainer is compared in tests/oracle."""

import numpy as np
import pytest

from posttrain_jax.losses import reward
from tests.losses.closed_form import assert_is

pytestmark = pytest.mark.usefixtures("float64")
CHOSEN, REJECTED, MARGIN = (
  np.asarray([1.0, 0.2, -3.0]),
  np.asarray([0.5, 0.4, 2.0]),
  np.asarray([0.3, 0, 1]),
)
LABELS = np.asarray([1, 0, 0])


def test_bradley_terry():
  assert_is(
    lambda w, l: reward.bradley_terry(w, l, margin=MARGIN, centering=0.01)[0],
    lambda w, l: np.log1p(np.exp(-(w - l - MARGIN))) + 0.01 * (w + l) ** 2,
    CHOSEN,
    REJECTED,
  )
  _, stats = reward.bradley_terry(CHOSEN, REJECTED)
  np.testing.assert_array_equal(stats.correct, [True, False, False])
  np.testing.assert_array_equal(stats.margin, CHOSEN - REJECTED)


def test_a_step_is_right_or_wrong():
  logits = np.asarray([2.0, -1.0, 3.0])
  assert_is(
    lambda z: reward.binary_cross_entropy(z, LABELS)[0],
    lambda z: np.log1p(np.exp(np.where(LABELS == 1, -z, z))),
    logits,
  )
  _, right = reward.binary_cross_entropy(logits, LABELS)
  np.testing.assert_array_equal(right, [True, True, False])
