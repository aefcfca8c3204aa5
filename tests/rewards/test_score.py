"""What a verifier may return, and what becomes of it."""

import decimal
import fractions
import math

import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.rewards import score
from posttrain_jax.rewards.score import Score
from posttrain_jax.rewards.verifier import Answer, called

NUMBERS = [1, 1.0, True, np.float32(1), np.int8(1), np.bool_(True), np.array(1.0), jnp.ones(()), fractions.Fraction(1),
           decimal.Decimal(1), Score(1.0)]  # fmt: skip
NO_NUMBERS = {
  "None": (None, "returned None"),
  "str": ("1", "a str"),
  "list": ([1.0], "a list"),
  "nan": (math.nan, "returned nan"),
  "infinite": (-math.inf, "returned -inf"),
  "NumPy's nan": (np.float32("nan"), "returned nan"),
  "huge": (10**400, "is no float"),
  "beyond float32": (1e39, "returned 1e+39, which float32 does not hold"),
  "far below float32": (Score(-4e38), "returned -4e+38, which float32 does not hold"),
  "complex": (1j, "a complex"),
  "array": (np.ones(2), "is no float"),
  "nan inside": (Score(math.nan), "returned nan"),
  "text inside": (Score("1"), "a str"),
  "above": (1.5, "returned 1.5, which is not within 0 and 1"),
  "below": (Score(-0.1), "not within 0 and 1"),
}


@pytest.mark.parametrize("value", NUMBERS, ids=lambda v: type(v).__name__)
def test_numbers_are_scores(value):
  assert score.of(value, (0, 1)) == Score(1.0)
  assert type(score.of(value).value) is float


@pytest.mark.parametrize(("value", "reason"), NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_anything_else_is_missing_and_says_why(value, reason):
  given = score.of(value, (0, 1))
  assert given.value is None
  assert given.is_missing
  assert given.applies
  assert reason in given.reason


def test_a_reason_stays_with_its_score():
  assert score.of(Score(0.5, "half"), (0, 1)) == Score(0.5, "half")
  assert score.of(score.missing("no network")) == Score(None, "no network")
  assert not score.of(score.not_applicable()).applies


def test_what_a_verifier_raises_is_told_with_the_line_of_its_file():
  def verifier(prompt, completion, example):
    return float("x")

  def ends(prompt, completion, example):
    raise SystemExit(2)

  given = called(verifier, Answer("?", "!", {}))
  line = verifier.__code__.co_firstlineno + 1
  assert (
    given.reason == f"{__file__}:{line}: raised ValueError: could not convert string to float: 'x'"
  )
  assert called(ends, Answer("?", "!", {})).reason.endswith("raised SystemExit: 2")


def test_a_coroutine_is_said_to_be_one():
  async def verifier(prompt, completion, example):
    return 1.0

  assert "only a function of TRL's form" in called(verifier, Answer("?", "!", {})).reason


def test_a_verifier_gets_the_row_and_the_tokens():
  seen = []
  answer = Answer([{"role": "user", "content": "?"}], "text", {"gold": "g"}, tokens=[1, 2])
  called(lambda *arguments: seen.append(arguments) or 1, answer)
  assert seen == [(answer.prompt, "text", {"gold": "g", "completion_ids": [1, 2]})]
