"""The environment that the page about turns prints, as a model meets it that says anything."""

from posttrain_jax.environments import shapes
from tests.docs import printed


def test_the_printed_environment_scores_words_that_are_no_guess():
  blocks = printed.fences(printed.ROOT / "docs" / "turns.md", "python")
  values: dict = {}
  exec(next(block for block in blocks if "class Guess" in block), values)
  shape = shapes.of(values["Guess"], ())
  shape.reset({"answer": "7"}, 0, "a")
  assert shape.act("It is seven!") == shapes.Stepped("Say a number alone.", 0.0, False)
  assert shape.act("3") == shapes.Stepped("higher", 0.0, False)
  assert shape.act("7").done
  assert shape.reward() == 1.0
