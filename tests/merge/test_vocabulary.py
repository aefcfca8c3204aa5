"""Rows by token: each model's own, lent ones, and those of no token."""

import numpy as np
import pytest

from posttrain_jax.merge import vocabulary
from posttrain_jax.merge.recipe import ModelRef, RecipeError, TokenRow, Vocabulary

A, B, C = map(ModelRef, "abc")
VOCABULARIES = {
  A: {"x": 0, "y": 1, "a": 2},
  B: {"y": 0, "x": 1, "b": 2, "both": 3},
  C: {"x": 0, "y": 1, "both": 2, "beyond": 9},
}
ROWS = {A: 3, B: 4, C: 4}
OUT = {"x": 0, "y": 1, "a": 2, "b": 3, "both": 4, "beyond": 5}
TENSORS = {m: np.arange(4.0)[: ROWS[m], None] + 10 * (i + 1) for i, m in enumerate(ROWS)}


def rows(model, out=OUT, base=None, multiple=1, **tokens):
  wanted = Vocabulary(None, tokens, multiple)
  found = vocabulary.layout(wanted, out, VOCABULARIES, ROWS, base)
  return found.lay(model, TENSORS.get).ravel().tolist()


def test_a_row_is_ones_own_or_lent():
  # a and b are lent by the one that has them, both by the mean of b's and c's, beyond has no row anywhere
  assert rows(A) == [10, 11, 12, 22, 27.5, 0]
  assert rows(B) == [21, 20, 12, 22, 23, 0]
  assert rows(C) == [30, 31, 12, 22, 32, 0]


def test_the_base_lends_before_the_mean():
  assert rows(A, base=C)[4] == 32
  assert rows(A, base=B)[4] == 23
  assert rows(A, base=A)[4] == 27.5


def test_rows_of_no_token_are_the_mean_of_the_others():
  found = rows(A, multiple=4)
  assert len(found) == 8
  assert found[6:] == pytest.approx([np.mean(found[:6])] * 2)
  hole = rows(A, out={"x": 0, "y": 2})
  assert hole == [10, 10.5, 11]


def test_a_recipe_says_whose_row_a_token_has():
  assert rows(A, both=TokenRow(C))[4] == 32
  assert rows(B, both=TokenRow(C))[4] == 23  # its own
  assert rows(B, both=TokenRow(C, force=True))[4] == 32
  assert rows(A, b=TokenRow(None))[3] == 0
  assert rows(A, b=TokenRow(B, token="x"))[3] == 21
  assert rows(A, b=TokenRow(B, number=3))[3] == 23


class Held:
  """A model's embedding and its final norm, as files hold them."""

  def __init__(self, model):
    self.tensors = {"model.embed_tokens.weight": TENSORS[model], "model.norm.weight": np.ones(2)}
    self.where = dict.fromkeys(self.tensors, model.name)

  def shape(self, name):
    return self.tensors[name].shape

  def stored(self, name):
    return f"{name} of {self.where[name]}"

  def get(self, name):
    return self.tensors[name]


def test_a_laid_out_model_has_its_rows_in_the_layout_and_the_rest_as_it_was():
  held = {model: Held(model) for model in ROWS}
  found = vocabulary.layout(Vocabulary(None, {}, 1), OUT, VOCABULARIES, ROWS, None)
  laid = vocabulary.LaidOut(found, B, held)
  embedding, norm = laid.where
  assert laid.shape(embedding) == laid.get(embedding).shape == (6, 1)
  assert laid.get(embedding).ravel().tolist() == rows(B)
  assert laid.shape(norm) == (2,)
  assert laid.get(norm) is held[B].tensors[norm]
  assert laid.stored(embedding) == "model.embed_tokens.weight of b"


@pytest.mark.parametrize(
  ("asked", "message"),
  [
    (TokenRow(ModelRef("d")), "d, which is not merged"),
    (TokenRow(A), "the token 'both' of a, whose 3 rows"),
    (TokenRow(A, token="z"), "the token 'z' of a"),
    (TokenRow(A, number=3), "the row 3 of a, whose 3 rows"),
    (TokenRow(C, token="beyond"), "the token 'beyond' of c, whose 4 rows"),
  ],
)
def test_rows_that_are_not_there_are_named(asked, message):
  with pytest.raises(RecipeError, match=message):
    rows(A, both=asked)


def test_the_first_difference_is_named():
  same, other = {"x": 0, "y": 1, "z": 5}, {"x": 0, "w": 1}
  assert vocabulary.difference(same, dict(same), 3) is None
  assert vocabulary.difference(same, other, 1) is None
  assert vocabulary.difference(same, other, 3) == "row 1 is 'y' in one and 'w' in the other"
