"""Rows of answers: prompts that are shared, what is counted and what is refused."""

import numpy as np
import pytest

from posttrain_jax.data import answers, chat, schema
from posttrain_jax.data.answers import SHARED
from posttrain_jax.data.errors import RowError
from posttrain_jax.data.packing import pack_answers
from posttrain_jax.data.schema import Row
from tests import tiny

TOKENIZER = tiny.tokenizer()
TEMPLATE = chat.template(TOKENIZER)
PAIR = dict(prompt="name a fruit", chosen="apple", rejected="a stone")


def row(**fields):
  checked = schema.validate(dict(fields), "x.jsonl:1")
  return Row(checked, "x.jsonl:1", schema.kind(checked, "x.jsonl:1"))


def encode(*rows, kind="pairs", max_length=400, template=None, **options):
  return answers.encode_all(
    list(rows), TOKENIZER, template, kind=kind, max_length=max_length, **options
  )


def text(made, i):
  """The prompt and answer i as one would read them, and the part of it that is trained."""
  here = (made.answer == SHARED) | (made.answer == i)
  order = np.argsort(made.positions[here], kind="stable")
  tokens, mask = made.tokens[here][order], made.mask[here][order]
  return TOKENIZER.decode(tokens), TOKENIZER.decode(tokens[mask])


def test_a_prompt_is_there_once_and_each_answer_goes_on_from_it():
  (made,) = encode(row(**PAIR))
  assert text(made, 0) == ("name a fruitapple<|im_end|>", "apple<|im_end|>")
  assert text(made, 1) == ("name a fruita stone<|im_end|>", "a stone<|im_end|>")
  assert (made.answer == SHARED).sum() == len("name a fruit") - 1  # its last token predicts both
  (apart,) = encode(row(**PAIR), share=False)
  assert not (apart.answer == SHARED).any()
  assert text(apart, 1) == text(made, 1)
  assert made.lengths == apart.lengths == (6, 8)


def test_conversations_and_implicit_prompts_are_the_same_pair():
  turn = lambda role, content: dict(role=role, content=content)
  prompt = [turn("user", "name a fruit")]
  said = [[turn("assistant", "apple")], [turn("assistant", "a stone")]]
  explicit = row(prompt=prompt, chosen=said[0], rejected=said[1])
  implicit = row(chosen=prompt + said[0], rejected=prompt + said[1])
  (first,), (second,) = (encode(r, template=TEMPLATE) for r in (explicit, implicit))
  np.testing.assert_array_equal(first.tokens, second.tokens)
  assert text(first, 0)[1] == "apple<|im_end|>"
  chat_row = schema.as_chat(PAIR, "x", None)
  (third,) = encode(row(**chat_row), template=TEMPLATE)
  np.testing.assert_array_equal(first.tokens, third.tokens)
  (plain,) = encode(row(chosen="name a fruit: apple", rejected="name a fruit: a stone"))
  assert text(plain, 0)[1] == " apple<|im_end|>"


def test_a_message_may_stand_without_its_list():
  fields = schema.validate(
    dict(
      prompt=[{"from": "human", "value": "hi"}],
      chosen={"from": "gpt", "value": "hello"},
      rejected={"from": "gpt", "value": "no"},
    ),
    "x",
  )
  assert fields["chosen"] == [{"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(PAIR, rejected="apple"), "'chosen' and 'rejected' are the same"),
    (dict(PAIR, rejected=" "), "'rejected' is empty"),
    (dict(chosen="abc", rejected="xyz"), "no 'prompt'"),
    (dict(PAIR, margin="large"), "'margin' is the string"),
    (dict(prompt="x", completion="y"), '"chosen" and "rejected"'),
  ],
)
def test_what_is_no_pair_is_named_with_its_row(fields, message):
  with pytest.raises(RowError, match=message) as error:
    encode(row(**fields))
  assert "x.jsonl:1" in str(error.value)


def test_bad_rows_are_counted_when_asked_for():
  found = encode(row(**PAIR), row(**dict(PAIR, rejected="apple")), on_error="skip")
  assert len(found) == 1
  assert "1 identical answers" in str(found.skipped)


def test_an_answer_is_never_cut():
  long = row(prompt="p" * 50, chosen="yes", rejected="no")
  with pytest.raises(RowError, match="58 tokens, prompt and answers together, but a row has 40"):
    encode(long, max_length=40)
  with pytest.raises(ValueError, match="no row gave an example; 1 skipped: 1 too long"):
    encode(long, max_length=40, truncate="drop")
  (cut,) = encode(long, max_length=40, truncate="prompt")
  assert len(cut) == 40
  assert cut.positions.min() == 0
  assert text(cut, 0) == ("p" * 32 + "yes<|im_end|>", "yes<|im_end|>")
  (apart,) = encode(long, max_length=60, truncate="prompt", share=False)
  assert len(apart) in (59, 60)
  assert text(apart, 0)[1] == "yes<|im_end|>"
  assert text(apart, 0)[0].count("p") == text(apart, 1)[0].count("p")
  with pytest.raises(RowError, match="tokens, prompt and answers together"):
    encode(row(prompt="p", chosen="y" * 30, rejected="n" * 30), max_length=40, truncate="prompt")
  with pytest.raises(ValueError, match="kept whole"):
    encode(long, max_length=40, truncate="keep_start")


def test_a_pair_is_two_labels():
  both = encode(row(**PAIR), kind="labels")
  assert [one.values["label"][0] for one in both] == [1.0, 0.0]


def test_one_class_of_labels_is_refused():
  rows = [row(prompt="q", completion="a", label=True), row(prompt="q", completion="b", label=True)]
  with pytest.raises(
    ValueError, match=r"all 2 completions of the rows are labelled desirable, .*; add"
  ):
    answers.check_classes(encode(*rows, kind="labels"), "the rows", "add the other class")


def test_groups_have_a_score_an_answer():
  (made,) = encode(
    row(prompt="q", completions=["a", "bb", "c"], scores=[1, None, 0.5]), kind="scored"
  )
  assert made.count == 3
  np.testing.assert_array_equal(made.values["score"], [1.0, np.nan, 0.5])
  for scores, message in (([1, 2], "3 completions but 2 scores"), (["a", 1, 2], "list of numbers")):
    with pytest.raises(RowError, match=message):
      row(prompt="q", completions=["a", "b", "c"], scores=scores)


def test_steps_are_labelled_where_they_end():
  (made,) = encode(
    row(prompt="2+2", completions=["think", "4"], labels=[True, False]), kind="steps"
  )
  assert TOKENIZER.decode(made.tokens) == "2+2think\n4\n"
  at = np.flatnonzero(~np.isnan(made.steps))
  assert [TOKENIZER.decode(made.tokens[: i + 1]) for i in at] == ["2+2think\n", "2+2think\n4\n"]
  np.testing.assert_array_equal(made.steps[at], [1.0, 0.0])


def test_a_row_holds_segments_that_see_their_own_prompt():
  found = encode(row(**PAIR), row(prompt="and a tree", chosen="oak", rejected="a brick"))
  batch = pack_answers(found, [[0, 1], []], 80, 6)
  first, second = len(found[0].tokens), len(found[1].tokens)
  ids, prefixes = batch["segment_ids"][0], batch["prefix_ids"][0]
  assert set(ids[:first]) == {1, 2, 3}
  assert set(ids[first : first + second]) == {4, 5, 6}
  assert set(prefixes[:first]) == {0, 1}
  assert set(prefixes[first : first + second]) == {0, 4}
  assert batch["present"].tolist() == [[True] * 4 + [False] * 2, [False] * 6]
  assert batch["answer"][0, first + second - 1] == 3
  assert not batch["loss_mask"][1].any()
  with pytest.raises(ValueError, match="its length is 20"):
    pack_answers(found, [[0, 1]], 20, 6)
