"""llama.cpp runs what is exported: the embedded model in every kind, its tokenizer, its template, a LoRA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import adapters
from posttrain_jax.build import gguf
from posttrain_jax.data import chat
from posttrain_jax.models import decoder, fetch, gguf_write, hf
from posttrain_jax.models import gguf as gguf_read
from tests.models import tiny_gguf

llama_cpp = pytest.importorskip(
  "xllamacpp", reason="xllamacpp, which carries llama.cpp, is not installed: run `make oracle`"
)

pytestmark = pytest.mark.oracle

TEXT = "The sun heats the oceans, water evaporates, rises, cools and condenses into"
TOP = 40


class Server:
  """A model in llama.cpp."""

  def __init__(self, path, adapter=None):
    given = llama_cpp.CommonParams()
    given.model.path = str(path)
    given.n_ctx, given.n_parallel, given.warmup, given.verbosity = 512, 1, False, -1
    given.cpuparams.n_threads = 2
    if adapter is not None:
      given.lora_adapters = [llama_cpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    self.server = llama_cpp.Server(given)

  def next_tokens(self, ids):
    """{id: log-probability} of the likeliest next tokens."""
    asked = dict(prompt=[int(i) for i in ids], n_predict=1, n_probs=TOP, temperature=0.0)
    answer = self.server.handle_completions({**asked, "cache_prompt": False})
    (first,) = answer["choices"][0]["logprobs"]["content"][:1]
    return {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}

  def length(self, text):
    answer = self.server.handle_completions(dict(prompt=text, n_predict=1, cache_prompt=False))
    return answer["usage"]["prompt_tokens"]

  def chat(self, content):
    messages = [dict(role="user", content=content)]
    asked = dict(messages=messages, max_tokens=16, temperature=0.0)
    return self.server.handle_chat_completions(asked)["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def folder():
  return fetch.fetch("smollm2")


@pytest.fixture(scope="module")
def ids(folder):
  return chat.load_tokenizer(folder)(TEXT).input_ids


def ours(params, config, ids):
  logits = decoder.forward(params, jnp.asarray([ids]), config)[0, -1]
  return np.asarray(jax.nn.log_softmax(logits))


def furthest(theirs, logp):
  assert len(theirs) == TOP
  return max(abs(logp[i] - value) for i, value in theirs.items())


@pytest.mark.parametrize(("kind", "near"), [("f16", 0.05), ("q8_0", 0.8), ("q4_0", 0.8)])
def test_log_probabilities_are_those_of_the_file_read_here(tmp_path, folder, ids, kind, near):
  # llama.cpp keeps keys and values in float16, and rounds activations to 8 bits where matrices are quantised
  path = gguf.of_model(folder, tmp_path / "m.gguf", kind=kind)
  logp = ours(*hf.load(gguf_read.convert(path, tmp_path / "read")), ids)
  server = Server(path)
  assert furthest(server.next_tokens(ids), logp) < near
  if kind != "f16":
    return
  assert furthest(server.next_tokens(ids), ours(*hf.load(folder), ids)) < near
  tokenizer = chat.load_tokenizer(folder)
  for text in (TEXT, "3.14159 and 1,000,000\n\n\tit's naïve", "漢字 🙂👩🏽‍🚀  three   spaces "):
    assert server.length(text) == len(tokenizer(text).input_ids)
  assert "Paris" in server.chat("What is the capital of France?")


@pytest.mark.parametrize(
  ("arch", "pre"),
  [("llama", "gpt-2"), ("llama", "llama-bpe"), ("qwen2", "qwen2"), ("qwen3", "qwen2")],
)
def test_every_family_and_kind_of_tokenizer(tmp_path, arch, pre):
  extra = {"qwen3__attention__key_length": tiny_gguf.HEAD_DIM} if arch == "qwen3" else {}
  first = tiny_gguf.write(
    tmp_path / "first.gguf", arch=arch, tied=False, tokenizer__ggml__pre=pre, **extra
  )
  folder = gguf_read.convert(first, tmp_path / "folder")
  server = Server(gguf.of_model(folder, tmp_path / "m.gguf", kind="f16"))
  tokenizer = chat.load_tokenizer(folder)
  for text in (
    "the cat sat, 12345",
    "it's\r\n56   the\t hello",
    "漢字 naïve 🙂 WORLD'S",
    "<|im_end|>x",
  ):
    assert server.length(text) == len(tokenizer(text).input_ids), text
  params, config = hf.load(folder)
  compared = 0
  for start in range(5, 105, 5):
    ids = range(start, start + 20)
    logp = ours(params, config, ids)
    # the server says nothing of a token that is a part of a letter
    if tokenizer.convert_ids_to_tokens(int(logp.argmax())).isascii():
      # weights as large as these make a step of float16 in keys and values worth some hundredths
      assert furthest(server.next_tokens(ids), logp) < 0.3
      compared += 1
  assert compared > 1


def test_a_lora_changes_what_it_changes_here(tmp_path, folder, ids):
  params, config = hf.load(folder)
  chosen = adapters.AdapterConfig(r=8, lora_alpha=16, rank_pattern={"q_proj": 4}, use_rslora=True)
  _, node = adapters.init(jax.random.key(0), params, chosen)
  keys = iter(jax.random.split(jax.random.key(1), 1000))
  noise = lambda leaf: leaf + 0.01 * jax.random.normal(next(keys), leaf.shape)
  node = jax.tree.map(noise, node, is_leaf=lambda x: isinstance(x, jax.Array) and x.ndim > 1)
  base = gguf.of_model(folder, tmp_path / "base.gguf", kind="f16")
  adapter = tmp_path / "adapter.gguf"
  gguf_write.write_adapter(adapter, dict(gguf.pairs(node, config)), config, about={})
  logp = ours(adapters.bind(params, node), config, ids)
  found = Server(base, adapter).next_tokens(ids)
  assert furthest(found, logp) < 0.05
  assert furthest(found, ours(params, config, ids)) > 0.5
