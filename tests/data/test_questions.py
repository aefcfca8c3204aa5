"""Rows as questions: what is asked, and which answer is expected."""

import pytest

from posttrain_jax.data import chat, questions, schema
from posttrain_jax.data.errors import RowError
from tests import tiny

USER = {"role": "user", "content": "hi"}
said = lambda text: {"role": "assistant", "content": text}


def of(row, **options):
  (read,) = schema.read([row], **options)
  return questions.of(read, tiny.tokenizer())


@pytest.mark.parametrize(
  ("row", "prompt", "gold"),
  [
    ({"prompt": "hi", "completion": " you"}, "hi", " you"),
    ({"prompt": "hi"}, "hi", None),
    ({"messages": [USER, said("a"), USER, said("b"), USER]}, [USER, said("a"), USER], "b"),
    ({"prompt": [USER], "completion": [said("a"), USER, said("b")]}, [USER, said("a"), USER], "b"),
    ({"prompt": [USER], "chosen": [said("a")], "rejected": [said("b")]}, [USER], "a"),
    ({"chosen": [USER, said("a")], "rejected": [USER, said("b")]}, [USER], "a"),
    ({"prompt": "hi", "completion": "a", "label": True}, "hi", "a"),
    ({"prompt": "hi", "completion": "a", "label": False}, "hi", None),
    ({"messages": [USER, said("a")], "label": True}, [USER], "a"),
    ({"prompt": "hi", "completions": ["a", "b", "c"], "scores": [1, 3, None]}, "hi", "b"),
  ],
)
def test_what_is_asked_and_expected(row, prompt, gold):
  asked = of(row)
  assert (asked["prompt"], asked["gold"], asked["row"]) == (prompt, gold, row)


def test_the_row_is_that_of_its_file_whatever_its_columns_are_called():
  row = {"question": "hi", "answer": "you", "id": 3}
  asked = of(row, columns={"prompt": "question", "completion": "answer"}, chat=True, system="be")
  assert asked["prompt"] == [{"role": "system", "content": "be"}, USER]
  assert (asked["question"], asked["gold"], asked["row"]) == ("hi", "you", row)
  assert of({"prompt": "hi"}, chat=True)["prompt"] == [USER]


def test_a_longer_conversation_is_shown_with_its_roles():
  asked = of({"messages": [USER, said("a"), USER, said("b")]})
  assert asked["question"] == "user: hi\n\nassistant: a\n\nuser: hi"


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ({"text": "once"}, "row 0: the row is plain text, which asks nothing"),
    ({"prompt": "a", "completions": ["b"], "labels": [True]}, "steps to be judged"),
    ({"messages": [USER]}, "has no message of the assistant's"),
    ({"messages": [said("a"), USER]}, "begins with the assistant"),
  ],
)
def test_a_row_that_asks_nothing_is_told(row, message):
  with pytest.raises(RowError, match=message):
    of(row)


def test_prompts_are_what_training_gave_before_the_answer():
  """In strings and as turns: the tokens before the first trained one."""
  tokenizer = tiny.tokenizer()
  template = chat.template(tokenizer)
  for options in ({}, {"chat": True, "system": "be"}):
    rows = schema.read([{"prompt": "hi there", "completion": " you"}], **options)
    (example,) = chat.encode_all(rows, tokenizer, template, max_length=100)
    (ids,) = questions.tokens([questions.of(rows[0], tokenizer)], tokenizer, template)
    assert ids == example.tokens[: example.mask.argmax()].tolist()
