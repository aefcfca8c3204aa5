"""The converted embedded model in transformers: the weights mean what they should."""

import gguf as gguf_package
import pytest

from posttrain_jax.models import fetch, gguf
from tests.models import tiny_gguf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def folder():
  return fetch.fetch("smollm2")


@pytest.fixture(scope="module")
def tokenizer(folder):
  return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder):
  model, report = transformers.AutoModelForCausalLM.from_pretrained(
    folder, output_loading_info=True
  )
  assert isinstance(model, transformers.LlamaForCausalLM)
  assert not report["missing_keys"]
  assert not report["unexpected_keys"]
  return model.eval()


def test_greedy_answer_is_right(model, tokenizer):
  chat = [{"role": "user", "content": "What is the capital of France?"}]
  inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
  out = model.generate(**inputs, max_new_tokens=24, do_sample=False)
  reply = out[0, inputs["input_ids"].shape[1] :]
  assert "Paris" in tokenizer.decode(reply)
  assert reply[-1] == tokenizer.eos_token_id  # it also knows how to stop


def test_prose_is_likely_in_order_and_not_in_reverse(model, tokenizer):
  # Rows left permuted, or a wrong RoPE base, still give fluent-looking short answers; the loss
  # of a longer text tells.
  text = (
    "The water cycle describes how water moves on, above and below the surface of the Earth. "
    "The sun heats the oceans, water evaporates, rises, cools and condenses into clouds, and "
    "falls again as rain or snow. Some of it flows over the land into rivers and lakes, some "
    "soaks into the ground, and most of it finally returns to the sea, where the cycle begins "
    "again."
  )
  ids = tokenizer(text, return_tensors="pt").input_ids
  with torch.no_grad():
    forward = model(ids, labels=ids).loss.item()
    backward = model(ids.flip(1), labels=ids.flip(1)).loss.item()
  assert forward < 2.6
  assert backward > forward + 2


DIFFICULT = [
  "emoji 🙂👩🏽‍🚀🇫🇷 end",
  "3.14159 and 2026-01-31, 1,000,000",
  "line\n\n\nline\r\n\ttab   three spaces ",
  "naïve façade Ångström — “quotes” … 漢字 ひらがな العربية",
  "SELECT * FROM t WHERE x >= 10 AND name LIKE '%a_b%';",
  "\u00a0\u200b\ufeff\x00\x7f",
  " leading space",
  "",
]


@pytest.mark.parametrize("text", DIFFICULT)
def test_text_survives_the_tokenizer(tokenizer, text):
  ids = tokenizer(text).input_ids
  assert tokenizer.decode(ids) == text
  assert tokenizer.bos_token_id not in ids


# Equal to what the tokenizer of HuggingFaceTB/SmolLM2-135M-Instruct on the hub gives.
KNOWN = {
  "Hello world": [19556, 905],
  "  leading spaces": [216, 2899, 5600],
  "What is the capital of France?": [1780, 314, 260, 3575, 282, 4649, 47],
}


def test_ids_are_those_of_the_original(tokenizer):
  assert {text: tokenizer(text).input_ids for text in KNOWN} == KNOWN


def test_chat_template_uses_special_tokens(tokenizer):
  chat = [{"role": "user", "content": "1 🙂\n"}, {"role": "assistant", "content": "x"}]
  ids = tokenizer.apply_chat_template(chat)["input_ids"]
  text = tokenizer.apply_chat_template(chat, tokenize=False)
  assert ids == tokenizer(text).input_ids  # no second BOS
  assert tokenizer.decode(ids) == text
  assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
  assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3
  assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize(
  ("arch", "tied", "kind"),
  [
    ("llama", True, "Q4_1"),
    ("llama", False, "F32"),
    ("qwen2", False, "Q8_0"),
    ("qwen3", True, "Q8_0"),
  ],
)
def test_folder_gives_the_logits_of_transformers_own_import(tmp_path, arch, tied, kind):
  kind = gguf_package.GGMLQuantizationType[kind]
  keys = {f"{arch}__vocab_size": len(tiny_gguf.vocabulary()[0])}
  if arch == "qwen3":
    keys["qwen3__attention__key_length"] = tiny_gguf.HEAD_DIM
  path = tiny_gguf.write(tmp_path / "m.gguf", arch=arch, tied=tied, matrices=kind, **keys)
  folder = gguf.convert(path, tmp_path / "out")
  # Their import of Qwen 3 does not read the width of its heads.
  config = {"config": transformers.AutoConfig.from_pretrained(folder)} if arch == "qwen3" else {}
  auto = transformers.AutoModelForCausalLM
  ours = auto.from_pretrained(folder, dtype=torch.float32)
  theirs = auto.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32, **config)
  tokens = torch.arange(3, 40)[None]
  with torch.no_grad():
    found, expected = ours.eval()(tokens).logits, theirs.eval()(tokens).logits
  assert expected.std() > 0.5
  torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
