"""An answer's companion is another prompt's, whole, behind as much of the own prompt as a row has room for."""

import pytest

from posttrain_jax.data import companions
from tests.data.test_answers import PAIR, TOKENIZER, encode, row, text


def beside(*rows, max_length=400, share=True, kind="pairs"):
  examples = encode(*rows, max_length=max_length, share=share, kind=kind).examples
  return companions.beside(examples, max_length, share=share)


def test_labels_stand_beside_the_answer_before_them():
  rows = [row(prompt=f"q{i}", completion=f"a{i}", label=i % 2 == 0) for i in range(3)]
  found = beside(*rows, kind="labels")
  assert [one.values["label"][0] for one in found] == [1.0, 0.0, 1.0]
  seen = [TOKENIZER.decode(one.companion.tokens) for one in found]
  assert seen == ["q0a2<|im_end|>", "q1a0<|im_end|>", "q2a1<|im_end|>"]


def test_a_companion_is_always_another_prompts_answer():
  """Of pairs told apart into labels, the one before may be the other answer to the same prompt."""
  rows = [row(prompt=f"q{i}", chosen=f"yes{i}", rejected=f"no{i}") for i in (0, 1)]
  found = beside(*rows, kind="labels")
  seen = [TOKENIZER.decode(one.companion.tokens) for one in found]
  end = "<|im_end|>"
  assert seen == [f"q0no1{end}", f"q0no1{end}", f"q1no0{end}", f"q1no0{end}"]
  pairs = beside(*rows)
  assert [one.values["label"] for one in pairs] == [(1.0, 0.0)] * 2
  assert text(pairs[0].companion, 0) == (f"q0yes1{end}", f"yes1{end}")
  assert text(pairs[0].companion, 1) == (f"q0no1{end}", f"no1{end}")
  with pytest.raises(ValueError, match="all answers are to one prompt"):
    beside(row(**PAIR), kind="labels")


@pytest.mark.parametrize("share", [True, False])
def test_a_companion_fits_into_a_row(share):
  """Of its prompt as much is kept as there is room for; of the answers everything."""
  long = row(prompt="p" * 30, chosen="yes", rejected="no")
  other = row(prompt="q", chosen="c" * 12, rejected="r" * 10)
  limit = 74 if not share else 45
  found = beside(long, other, share=share, max_length=limit)
  companion = found[0].companion
  assert limit - 1 <= len(companion.tokens) <= limit
  assert text(companion, 0)[1] == "c" * 12 + "<|im_end|>"
  assert text(companion, 1)[1] == "r" * 10 + "<|im_end|>"
  assert 1 <= text(companion, 0)[0].count("p") < 30
