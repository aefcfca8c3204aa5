"""Where a prompt ends that no column says, and that what is trained is the answer and its end, in every schema."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from posttrain_jax.data import answers, borders, chat, schema
from posttrain_jax.data.errors import RowError
from tests import tiny
from tests.data.conftest import make_tokenizer

BYTES = tiny.tokenizer()
MERGES = make_tokenizer("chatml")  # whose tokens hold words and the space before them


def sentencepiece():
  """As Llama 2's: a space is a mark that stands before a word, and before the beginning of a text."""
  letters = ["<unk>", "</s>", "\n", *"▁abcdefghijklmnopqrstuvwxyz.:?", "▁a", "▁an"]
  tokenizer = Tokenizer(
    models.BPE({x: i for i, x in enumerate(letters)}, [("▁", "a"), ("▁a", "n")], unk_token="<unk>")
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
  tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
  return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def encoded(rows, kind, tokenizer=MERGES, template=None):
  return answers.encode_all(
    list(schema.read(rows)), tokenizer, template, kind=kind, max_length=999
  ).examples


def trained(example, tokenizer):
  """What is trained of each answer."""
  return [
    tokenizer.decode(example.tokens[example.mask & (example.answer == i)])
    for i in range(example.count)
  ]


@pytest.mark.parametrize(
  ("texts", "prompt"),
  [
    (("Human: capital of France?\n\nAssistant:\nParis", "Human: capital of France?\n\nAssistant:\nLyon"),
     "Human: capital of France?\n\nAssistant:\n"),
    (("name a fruit: apple", "name a fruit: apricot"), "name a fruit:"),
    (("2+2 = 12", "2+2 = 13"), "2+2 ="),
    (("问:法国的首都是哪里?答:巴黎", "问:法国的首都是哪里?答:里昂"), "问:法国的首都是哪里?答:"),
    (("say yes", "say yes please"), "say"),
    (("día: él", "día: ella"), "día:"),
    (("abc", "abd"), ""),
    (("apple", "stone"), ""),
    (("same words", "same words"), "same"),
  ],
)  # fmt: skip
@pytest.mark.parametrize("tokenizer", [BYTES, MERGES], ids=["bytes", "merges"])
def test_what_texts_have_in_common_ends_before_a_word_and_its_space(texts, prompt, tokenizer):
  assert texts[0][: borders.common(texts, tokenizer)] == prompt


def test_a_letter_of_two_tokens_is_not_cut():
  """巴 and 左 begin with the same byte or not; a prompt ends with whole letters either way."""
  texts = ("答:巴黎", "答:巴西", "答:左右")
  at = borders.common(texts[:2], BYTES)
  assert texts[0][:at] == "答:巴"  # one letter a word: of Chinese no more is known
  pair = {"chosen": texts[0], "rejected": texts[2]}
  assert trained(encoded([pair], "pairs", BYTES)[0], BYTES) == ["巴黎<|im_end|>", "左右<|im_end|>"]


ENDS = {id(BYTES): "<|im_end|>", id(MERGES): "<|endoftext|>"}
PROMPTS = ("The cap", "The capital of", "Two and two is ", "hell", "é", "line\n", "q")
COMPLETIONS = ("ital", " France", "four", "o there", "語", "\n\nnew", " ")


@pytest.mark.parametrize("tokenizer", [BYTES, MERGES], ids=["bytes", "merges"])
def test_exactly_the_answer_is_trained_in_every_schema(tokenizer):
  """Whatever token would lie across the border."""
  end = ENDS[id(tokenizer)]
  for prompt in PROMPTS:
    for said in COMPLETIONS:
      a, b = said + "x", said + " y"
      pair = encoded([{"prompt": prompt, "chosen": a, "rejected": b}], "pairs", tokenizer)[0]
      assert trained(pair, tokenizer) == [a + end, b + end]
      group = encoded(
        [{"prompt": prompt, "completions": [a, b], "scores": [1, 0]}], "scored", tokenizer
      )[0]
      assert trained(group, tokenizer) == [a + end, b + end]
      (labelled, _) = encoded(
        [{"prompt": prompt, "completion": x, "label": x == a} for x in (a, b)],
        "labels",
        tokenizer,
      )
      assert trained(labelled, tokenizer) == [a + end]
      steps = encoded(
        [{"prompt": prompt, "completions": [a, b], "labels": [True, False]}],
        "steps",
        tokenizer,
      )[0]
      assert trained(steps, tokenizer) == [f"{a}\n{b}\n"]
      assert tokenizer.decode(steps.tokens) == f"{prompt}{a}\n{b}\n"
      at = np.flatnonzero(~np.isnan(steps.steps))
      read = [tokenizer.decode(steps.tokens[: i + 1]) for i in at]
      assert read == [f"{prompt}{a}\n", f"{prompt}{a}\n{b}\n"]
      example = chat.encode_all(
        schema.read([{"prompt": prompt, "completion": a}]), tokenizer, max_length=999
      )[0]
      assert tokenizer.decode(example.tokens[example.mask]) == a + end


def test_a_prompt_is_tokenised_as_it_is_when_the_model_is_asked():
  for prompt in PROMPTS:
    (pair,) = encoded([{"prompt": prompt, "chosen": "ital", "rejected": " four"}], "pairs")
    for i in range(2):
      assert pair.prompt(i).tolist() == MERGES(prompt)["input_ids"]


@pytest.mark.parametrize(("prompt", "completion"), [("a", "n apple"), ("a b", "anc"), ("x", " an")])
def test_tokenizers_that_put_a_space_before_a_text_put_none_into_it(prompt, completion):
  tokenizer = sentencepiece()
  rows = schema.read([{"prompt": prompt, "completion": completion}])
  (example,) = chat.encode_all(rows, tokenizer, max_length=99)
  assert tokenizer.decode(example.tokens) == f"{prompt}{completion}</s>"
  asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
  assert example.tokens[: example.mask.argmax()].tolist() == asked


def test_letters_that_the_tokenizer_does_not_know_are_not_trained_as_one():
  rows = schema.read([{"prompt": "a", "completion": "é"}])
  with pytest.raises(RowError, match=r"row 0: the tokenizer reads 'é' as '<unk>'"):
    chat.encode_all(rows, sentencepiece(), max_length=99)


USER = [{"role": "user", "content": "Capital?"}]
SYSTEM = [{"role": "system", "content": "Be brief."}]


def said(text):
  return [{"role": "assistant", "content": text}]


REPEATED = [
  {"prompt": USER, "chosen": USER + said("Paris"), "rejected": USER + said("Lyon")},
  {"prompt": SYSTEM + USER, "chosen": SYSTEM + USER + said("Paris"),
   "rejected": SYSTEM + USER + said("Lyon")},
  {"prompt": "Capital?", "chosen": USER + said("Paris"), "rejected": USER + said("Lyon")},
  {"prompt": "Capital?", "chosen": SYSTEM + USER + said("Paris"),
   "rejected": SYSTEM + USER + said("Lyon")},
  {"prompt": SYSTEM, "chosen": USER + said("Paris"), "rejected": USER + said("Lyon")},
  {"chosen": USER + said("Paris"), "rejected": USER + said("Lyon")},
]  # fmt: skip


@pytest.mark.parametrize("row", REPEATED)
def test_a_prompt_that_answers_repeat_stands_once(row):
  (example,) = encoded([row], "pairs", BYTES, chat.template(BYTES))
  assert trained(example, BYTES) == ["Paris<|im_end|>", "Lyon<|im_end|>"]
  assert BYTES.decode(example.tokens).count("Capital?") == 1


def test_a_completion_that_repeats_its_prompt():
  for prompt in (USER, "Capital?"):
    rows = schema.read([{"prompt": prompt, "completion": USER + said("Paris")}])
    (example,) = chat.encode_all(rows, BYTES, chat.template(BYTES), max_length=99)
    assert BYTES.decode(example.tokens).count("Capital?") == 1
  group = {"prompt": USER, "completions": [USER + said("a"), USER + said("b")], "scores": [1, 0]}
  (example,) = encoded([group], "scored", BYTES, chat.template(BYTES))
  assert trained(example, BYTES) == ["a<|im_end|>", "b<|im_end|>"]


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ({"prompt": USER, "chosen": USER + said("a"), "rejected": said("b")}, "'chosen' repeats 'prompt'"),
    ({"prompt": SYSTEM + USER, "chosen": USER + said("a"), "rejected": USER + said("b")},
     "'chosen' begins with a user's message behind"),
    ({"prompt": USER, "chosen": USER, "rejected": USER}, "'chosen' is the prompt and nothing else"),
    ({"chosen": USER + said("a"), "rejected": [{"role": "user", "content": "Other?"}, *said("b")]},
     "do not begin with the same message"),
    ({"chosen": SYSTEM + USER + said("a"), "rejected": SYSTEM + USER + USER + said("b")},
     "part at a message of the user's"),
    ({"chosen": "Capital? Paris", "rejected": "Kapital? Lyon"}, "do not begin with the same text"),
  ],
)  # fmt: skip
def test_answers_to_unlike_prompts_are_no_pair(row, message):
  with pytest.raises(RowError, match=message) as error:
    encoded([row], "pairs", BYTES, chat.template(BYTES))
  assert str(error.value).startswith("row 0: ")


def test_an_answers_field_is_named_as_the_row_names_it():
  call = {"function": {"name": "f", "arguments": {}}}
  bad = [{"role": "assistant", "content": "", "tool_calls": [call]}]
  with pytest.raises(RowError, match=r"rejected\[0\]\['tool_calls'\]\[0\]"):
    encoded(
      [{"prompt": USER, "chosen": said("a"), "rejected": bad}], "pairs", BYTES, chat.template(BYTES)
    )
  group = {"prompt": USER, "completions": [said("a"), bad], "scores": [1, 0]}
  with pytest.raises(RowError, match=r"completions\[1\]\[0\]\['tool_calls'\]"):
    encoded([group], "scored", BYTES, chat.template(BYTES))
