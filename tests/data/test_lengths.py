"""Too long rows are told together: how many, how long rows are, and what to write."""

import pytest

from posttrain_jax.data import answers, chat, schema
from posttrain_jax.data.errors import RowError
from tests import tiny

TOKENIZER = tiny.tokenizer()


def texts(*lengths):
  return schema.read([{"text": "a" * length} for length in lengths])


def said(function, *arguments, **options):
  with pytest.raises(RowError) as caught:
    function(*arguments, **options)
  return str(caught.value)


def test_all_rows_that_are_too_long_are_told_at_once(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text("".join(f'{{"prompt": "{"q" * n}", "completion": "a"}}\n' for n in range(1, 101)))
  sentence = said(chat.encode_all, schema.read(path), TOKENIZER, max_length=80)
  assert sentence == (
    f"{path}: 22 of 100 rows have more than data.length=80 tokens: 50 % have up to 52, 90 % have up to 92,"
    f" 99 % have up to 101, the longest has 102; the first too long is {path}:79; write --config.data.length=102, which"
    " takes every row, or --config.data.truncate=keep_start (their ends are cut) or drop (they are left out and"
    " counted), or --config.data.on_error=skip (left out and counted, as every row that cannot be used)"
  )
  assert len(chat.encode_all(schema.read(path), TOKENIZER, max_length=102)) == 100
  assert len(chat.encode_all(schema.read(path), TOKENIZER, max_length=80, truncate="drop")) == 78


def test_a_length_that_the_model_has_no_room_for_is_not_advised():
  rows = texts(5, 30, 60)
  sentence = said(chat.encode_all, rows, TOKENIZER, max_length=20, room=40)
  assert (
    "the model reads 40 tokens at most (data.length), so write --config.data.truncate=" in sentence
  )
  assert "data.length=6" not in sentence
  assert "split (they become pieces)" in sentence


def test_a_text_whose_tokens_are_not_all_counted_is_longer_than_that():
  sentence = said(chat.encode_all, texts(5, 100_000), TOKENIZER, max_length=20)
  assert "the longest has more than 2," in sentence
  assert "which takes every row" not in sentence


def test_answers_are_told_together_too():
  rows = schema.read([{"prompt": "p", "chosen": "y" * n, "rejected": "n"} for n in (2, 20, 40)])
  sentence = said(answers.encode_all, rows, TOKENIZER, kind="pairs", max_length=20)
  assert sentence.startswith("the rows: 2 of 3 rows have more than data.length=20 tokens")
  assert (
    "write --config.data.length=45, which takes every row, or --config.data.truncate=prompt"
    in sentence
  )
  assert len(answers.encode_all(rows, TOKENIZER, kind="pairs", max_length=45)) == 3
