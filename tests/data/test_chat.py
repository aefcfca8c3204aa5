import os
import time
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain_jax.build import self_checks
from posttrain_jax.data import chat, encoded, schema, templates
from posttrain_jax.data.errors import RowError
from posttrain_jax.data.schema import Row
from tests.data.conftest import make_tokenizer

FAMILY = {
  "chatml": "chatml",
  "llama3": "llama3",
  "llama2": "sentence",
  "mistral": "sentence",
  "vicuna": "sentence",
  "gemma": "gemma",
}
ENDING = {
  "chatml": "<|im_end|>",
  "llama3": "<|eot_id|>",
  "llama2": " </s>",
  "mistral": "</s>",
  "vicuna": "</s>",
  "gemma": "<end_of_turn>",
}
# The space that two formats write before an answer belongs to its first token.
LEADING = {"llama2": " ", "mistral": " ", "vicuna": " "}


def row(**fields):
  return Row(fields, "talk.jsonl:7", schema.kind(fields, "talk.jsonl:7"))


def talk(*contents):
  roles = ("user", "assistant") * len(contents)
  return [{"role": role, "content": content} for role, content in zip(roles, contents)]


def trained_texts(example, tokenizer):
  edges = np.flatnonzero(np.diff(example.mask.astype(int), prepend=0, append=0))
  return [tokenizer.decode(example.tokens[a:b].tolist()) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("name", templates.NAMED)
def test_assistant_turns_and_their_endings_are_trained_and_nothing_else(name, tokenizers):
  tokenizer = tokenizers[FAMILY[name]]
  template = chat.template(tokenizer, name)
  messages = talk("Hello", "I am fine.", "What is the capital of France?", "Paris.")
  example = chat.encode(row(messages=messages), tokenizer, template, max_length=512)
  lead, end = LEADING.get(name, ""), ENDING[name]
  assert trained_texts(example, tokenizer) == [f"{lead}I am fine.{end}", f"{lead}Paris.{end}"]
  assert tokenizer.decode(example.tokens.tolist()) == template.render(messages)
  assert list(example.tokens).count(tokenizer.bos_token_id) == (
    2 if name == "llama2" else int(tokenizer.bos_token_id is not None)
  )
  self_checks.end_of_turn([example], tokenizer, template)


@pytest.mark.parametrize("name", templates.NAMED)
def test_prompt_and_completion_equal_the_conversation(name, tokenizers):
  tokenizer = tokenizers[FAMILY[name]]
  template = chat.template(tokenizer, name)
  messages = talk("Hello", "I am fine.", "How are you?", "Fine.")
  whole = chat.encode(row(messages=messages), tokenizer, template, max_length=512)
  some = row(prompt=messages[:3], completion=messages[3:])
  last = chat.encode(some, tokenizer, template, max_length=512)
  np.testing.assert_array_equal(whole.tokens, last.tokens)
  assert trained_texts(last, tokenizer) == trained_texts(whole, tokenizer)[1:]


def test_a_message_of_weight_zero_is_not_trained(tokenizers):
  tokenizer = tokenizers["chatml"]
  template = chat.template(tokenizer, "chatml")
  messages = talk("a", "b", "c", "d")
  messages[1]["weight"] = 0
  example = chat.encode(row(messages=messages), tokenizer, template, max_length=99)
  assert trained_texts(example, tokenizer) == ["d<|im_end|>"]


words = st.text(st.sampled_from("aeht o.\n'é語🙂"), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(st.lists(words, min_size=2, max_size=6))
def test_masks_are_the_contents_whatever_they_are(contents):
  contents = contents[: len(contents) // 2 * 2]
  example = chat.encode(row(messages=talk(*contents)), CHATML, TEMPLATE, max_length=4096)
  assert trained_texts(example, CHATML) == [f"{text}<|im_end|>" for text in contents[1::2]]


CHATML = make_tokenizer("chatml")
TEMPLATE = chat.template(CHATML, "chatml")


@settings(max_examples=60, deadline=None)
@given(words, words)
# one token, "he", which is cut: a prompt is tokenised before there is an answer
@hypothesis.example("h", "e")
def test_the_prompt_is_tokenised_as_it_is_asked_and_exactly_the_completion_is_trained(
  prompt, completion
):
  example = chat.encode(row(prompt=prompt, completion=completion), CHATML, max_length=4096)
  asked = CHATML(prompt, add_special_tokens=False)["input_ids"]
  assert example.tokens[: len(asked)].tolist() == asked
  assert trained_texts(example, CHATML) == [completion + CHATML.eos_token]
  ids = CHATML(prompt + completion, add_special_tokens=False)["input_ids"]
  if ids[: len(asked)] == asked:  # no token lies across the border, as mostly
    assert example.tokens.tolist() == [*ids, CHATML.eos_token_id]


def test_a_token_across_the_border_is_cut(tokenizers):
  tokenizer = tokenizers["chatml"]
  assert len(tokenizer(" capital")["input_ids"]) == 1
  example = chat.encode(row(prompt="The cap", completion="ital"), tokenizer, max_length=99)
  assert trained_texts(example, tokenizer) == ["ital<|endoftext|>"]
  assert tokenizer.decode(example.tokens.tolist()) == "The capital<|endoftext|>"
  # behind the line break that ends ChatML's opening of a turn, too
  tokenizer = make_tokenizer("chatml")
  tokenizer.add_tokens(["\n\n"])
  example = chat.encode(row(messages=talk("a", "\n\nb")), tokenizer, TEMPLATE, max_length=99)
  assert trained_texts(example, tokenizer) == ["\n\nb<|im_end|>"]


@pytest.mark.parametrize("family", ["chatml", "llama3", "sentence", "gemma"])
def test_plain_text_has_one_bos_and_one_eos_and_is_all_trained(family, tokenizers):
  tokenizer = tokenizers[family]
  bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
  written = f"{tokenizer.bos_token or ''}Hello{tokenizer.eos_token}"
  for text in ("Hello", written):
    example = chat.encode(row(text=text), tokenizer, max_length=99)
    assert tokenizer.decode(example.tokens.tolist()) == written
    assert (example.tokens == eos).sum() == 1
    assert bos is None or (example.tokens == bos).sum() == 1
    assert example.mask.tolist() == [False] + [True] * (len(example) - 1)
    self_checks.end_of_turn([example], tokenizer)


def test_padding_that_equals_eos_stays_trained(tokenizers):
  tokenizer = tokenizers["sentence"]
  assert tokenizer.pad_token_id == tokenizer.eos_token_id
  example = chat.encode(row(prompt="Hello", completion=" there"), tokenizer, max_length=99)
  assert example.tokens[-1] == tokenizer.pad_token_id
  assert example.mask[-1]


LONG = row(prompt="hello there " * 20, completion="fine")


def test_a_prompt_longer_than_the_sequence_is_named():
  with pytest.raises(
    RowError, match=r"talk.jsonl:7: a prompt of 4\d tokens.*a row has 20 .data.length"
  ):
    chat.encode(LONG, CHATML, max_length=20)
  short = row(prompt="Hi", completion="hello there " * 20)
  with pytest.raises(
    RowError,
    match=r"talk.jsonl:7: \d+ tokens .*a row has 20 .data.length.; raise --config.data.length",
  ):
    chat.encode(short, CHATML, max_length=20)


def test_cutting_and_dropping_are_counted():
  fits = row(prompt="Hi", completion=" there")
  cut = row(prompt="Hi", completion=" there" * 40)
  kept = chat.encode_all([fits, cut, LONG], CHATML, max_length=20, truncate="keep_start")
  assert [len(example) for example in kept] == [len(kept[0]), 20]
  assert [example.is_cut for example in kept] == [False, True]
  assert kept.cut == 1
  assert dict(kept.skipped.counts) == {"nothing to train after the cut": 1}
  dropped = chat.encode_all([fits, cut, LONG], CHATML, max_length=20, truncate="drop")
  assert len(dropped) == 1
  assert dict(dropped.skipped.counts) == {"too long": 2}
  assert "2 too long (first: talk.jsonl:7" in str(dropped)
  with pytest.raises(ValueError, match="no row gave an example"):
    chat.encode_all([LONG], CHATML, max_length=20, truncate="drop")


@settings(max_examples=40, deadline=None)
@given(words, st.integers(2, 9))
def test_split_text_trains_every_token_once(text, length):
  whole = chat.encode(row(text=text), CHATML, max_length=999)
  pieces = chat.encode_all([row(text=text)], CHATML, max_length=length, truncate="split")
  assert max(map(len, pieces)) <= length
  trained = np.concatenate([piece.tokens[piece.mask] for piece in pieces])
  np.testing.assert_array_equal(trained, whole.tokens[whole.mask])


def test_conversations_are_not_split():
  with pytest.raises(RowError, match="only plain text can be split"):
    chat.encode_all([LONG], CHATML, max_length=20, truncate="split")


@pytest.mark.parametrize(
  ("reason", "fields"),
  [
    ("wrong schema", {"prompt": "a", "chosen": "b", "rejected": "c"}),
    ("wrong schema", {"messages": talk("a", "b"), "label": True}),
    ("nothing to train", {"messages": talk("a")}),
    ("starts with the assistant", {"messages": talk("a", "b")[1:]}),
    ("refused by the template", {"messages": [*talk("a", "b"), *talk("c", "d")[1:]]}),
  ],
)
def test_rows_that_cannot_be_trained_on(reason, fields, tokenizers):
  tokenizer = tokenizers["sentence"]
  template = chat.template(tokenizer, "mistral")
  rows = [row(messages=talk("a", "b")), row(**fields)]
  with pytest.raises(RowError) as caught:
    chat.encode_all(rows, tokenizer, template, max_length=99)
  assert caught.value.reason == reason
  encoded = chat.encode_all(rows, tokenizer, template, max_length=99, on_error="skip")
  assert len(encoded) == 1
  assert dict(encoded.skipped.counts) == {reason: 1}


def own_template(text, tmp_path):
  (tmp_path / "own.jinja").write_text(text)
  return chat.template(CHATML, str(tmp_path / "own.jinja"))


FORGETFUL = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"""


def test_a_template_that_rewrites_the_past_is_refused(tmp_path):
  template = own_template(FORGETFUL, tmp_path)
  messages = talk("a", "b", "c", "d")
  with pytest.raises(RowError, match=r"talk.jsonl:7: message 1 is rendered differently"):
    chat.encode(row(messages=messages), CHATML, template, max_length=99)
  messages[1]["weight"] = 0
  example = chat.encode(row(messages=messages), CHATML, template, max_length=99)
  assert trained_texts(example, CHATML) == ["<think></think>d<|im_end|>"]


def test_a_template_that_closes_the_last_turn_with_more(tmp_path):
  closing = FORGETFUL.replace("<think></think>", "") + (
    "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
  )
  template = own_template(closing, tmp_path)
  example = chat.encode(row(messages=talk("a", "b", "c", "d")), CHATML, template, max_length=99)
  assert trained_texts(example, CHATML) == ["b<|im_end|>", "d<|im_end|>"]


def test_a_template_without_an_ending_is_caught(tmp_path):
  template = own_template("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", tmp_path)
  example = chat.encode(row(messages=talk("a", "b")), CHATML, template, max_length=99)
  with pytest.raises(ValueError, match="would not learn to stop"):
    self_checks.end_of_turn([example], CHATML, template)


def test_an_untrained_ending_is_caught(tokenizers):
  example = chat.encode(row(messages=talk("a", "b")), CHATML, TEMPLATE, max_length=99)
  example.mask[np.flatnonzero(example.mask)[-1]] = False
  with pytest.raises(
    ValueError, match=r"talk.jsonl:7: a trained span does not end with '<\|im_end"
  ):
    self_checks.end_of_turn([example], CHATML, TEMPLATE)


def test_messages_need_a_template():
  with pytest.raises(RowError, match="pass a chat template"):
    chat.encode(row(messages=talk("a", "b")), CHATML, max_length=99)


def test_describe_marks_what_is_trained():
  messages = talk("Hi", "Hello there", "Bye", "é語")
  example = chat.encode(row(messages=messages), CHATML, TEMPLATE, max_length=99)
  assert encoded.describe(example, CHATML) == (
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Hello there<|im_end|>]]\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n[[é語<|im_end|>]]\n"
  )


def test_channel_and_origin_are_kept():
  example = chat.encode(row(text="Hello", channel="prose"), CHATML, max_length=99)
  assert (example.channel, example.origin) == ("prose", "talk.jsonl:7")


def smollm2():
  folder = Path.home() / ".cache" / "posttrain_jax" / "models" / "smollm2"
  if not (folder / "tokenizer.json").exists():
    pytest.skip("the embedded model is not in the cache; `posttrain fetch smollm2` puts it there")
  tokenizer = chat.load_tokenizer(folder)
  return tokenizer, chat.template(tokenizer)


def test_the_embedded_models_own_template():
  tokenizer, template = smollm2()
  messages = talk("What is the capital of France?", "Paris.", "And of Spain?", "Madrid.")
  example = chat.encode(row(messages=messages), tokenizer, template, max_length=256)
  assert trained_texts(example, tokenizer) == ["Paris.<|im_end|>", "Madrid.<|im_end|>"]
  expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
  assert example.tokens.tolist() == expected
  assert templates.end_of_turn(tokenizer, template) == tokenizer.convert_tokens_to_ids("<|im_end|>")
  self_checks.end_of_turn([example], tokenizer, template)


def test_gsm8k_with_the_embedded_models_tokenizer():
  if "POSTTRAIN_DATA" not in os.environ:
    pytest.skip("POSTTRAIN_DATA is not set, so there is no gsm8k to encode")
  tokenizer, template = smollm2()
  rows = schema.read(
    Path(os.environ["POSTTRAIN_DATA"]) / "gsm8k" / "test.jsonl",
    columns={"prompt": "question", "completion": "answer"},
    chat=True,
  )
  encoded = chat.encode_all(rows, tokenizer, template, max_length=1024)
  assert len(encoded) == 1319
  self_checks.end_of_turn(encoded, tokenizer, template)
  for source, example in zip(rows, encoded):
    answer = source.fields["completion"][0]["content"]
    assert trained_texts(example, tokenizer) == [f"{answer}<|im_end|>"]


def test_a_conversation_is_checked_with_its_template():
  example = chat.encode(row(messages=talk("a", "b")), CHATML, TEMPLATE, max_length=99)
  with pytest.raises(ValueError, match=r"talk.jsonl:7 is a conversation: pass the chat template"):
    self_checks.end_of_turn([example], CHATML)


WORDS = "word " * 3_000_000


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"text": WORDS}, "more than 99 tokens"),
    ({"prompt": "a", "completion": WORDS}, "more than 99 tokens"),
    ({"prompt": WORDS, "completion": "a"}, "more than 99 tokens"),
    ({"messages": talk("a", WORDS)}, r"15,000,001 characters, more than 4,000,000"),
    ({"messages": talk("a", WORDS[:3_000_000])}, "more than 99 tokens"),
    ({"messages": talk("a", "b") * 20_000}, "40,000 messages"),
  ],
  ids=lambda x: str(x)[:30],
)
def test_a_row_of_any_size_is_refused_at_once(fields, message):
  began = time.process_time()
  with pytest.raises(RowError, match=rf"talk.jsonl:7: .*{message}"):
    chat.encode(row(**fields), CHATML, TEMPLATE, max_length=99)
  dropped = chat.encode_all(
    [row(text="a"), row(**fields)], CHATML, TEMPLATE, max_length=99, truncate="drop"
  )
  assert dict(dropped.skipped.counts) == {"too long": 1}
  assert time.process_time() - began < 5


def test_a_beginning_of_any_row_is_kept():
  rows = [row(text=WORDS), row(prompt="a", completion=WORDS), row(messages=talk("a", "b") * 900)]
  kept = chat.encode_all(rows, CHATML, TEMPLATE, max_length=99, truncate="keep_start")
  assert [len(example) for example in kept] == [99] * 3
  rows = [row(text="a"), row(prompt=WORDS, completion="a")]
  kept = chat.encode_all(rows, CHATML, TEMPLATE, max_length=99, truncate="keep_start")
  assert dict(kept.skipped.counts) == {"nothing to train after the cut": 1}


def test_a_conversation_of_very_many_turns_is_to_be_parted():
  with pytest.raises(RowError, match=r"800 messages to train of 1,600.*part the"):
    chat.encode(row(messages=talk("a", "b") * 800), CHATML, TEMPLATE, max_length=9999)


def test_many_turns_are_found_piece_by_piece():
  messages = talk("Hello there", "I am fine.", "capital", "\n\nof é") * 10
  whole = chat.encode(row(messages=messages), CHATML, TEMPLATE, max_length=9999)
  assert trained_texts(whole, CHATML) == ["I am fine.<|im_end|>", "\n\nof é<|im_end|>"] * 10
  ids = CHATML(TEMPLATE.render(messages), add_special_tokens=False)["input_ids"]
  assert CHATML.decode(whole.tokens) == CHATML.decode(ids)
