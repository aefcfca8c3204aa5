"""What drawn runs read: eight tiny models with a tokenizer each, eight rows of every kind, and what scores answers."""

import contextlib
import hashlib
import json
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

from posttrain_jax.models.config import FULL, SLIDING, ModelConfig
from tests import tiny
from tests.compose import draws, online, road

WINDOW = 16
GEMMA = dict(
  head_dim=16,
  query_pre_attn_scalar=24,
  hidden_activation="gelu_pytorch_tanh",
  tie_word_embeddings=True,
  sliding_window=WINDOW,
)
FAMILIES: dict[str, dict[str, Any]] = {
  "llama": dict(family="llama", rope_theta=10_000.0),
  "qwen2": dict(family="qwen2", rope_theta=1e6, tie_word_embeddings=True),
  "qwen3": dict(family="qwen3", head_dim=16, rope_parameters=dict(rope_theta=1e6)),
  "gemma2": dict(GEMMA, family="gemma2", attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
  "gemma3": dict(
    GEMMA,
    family="gemma3_text",
    layer_types=[SLIDING, FULL],
    rope_parameters={
      FULL: dict(rope_type="linear", factor=8.0, rope_theta=1e6),
      SLIDING: dict(rope_type="default", rope_theta=100.0),
    },
  ),
  "mistral": dict(family="mistral", sliding_window=WINDOW),
  "mixtral": dict(family="mixtral", num_local_experts=4, num_experts_per_tok=2),
  "qwen3_moe": dict(
    family="qwen3_moe",
    head_dim=16,
    moe_intermediate_size=64,
    num_experts=4,
    num_experts_per_tok=2,
    norm_topk_prob=True,
  ),
}


def make(parent: pathlib.Path) -> pathlib.Path:
  """The folder in `parent` with all that draws read; made once, and anew where this file has changed."""
  digest = hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()[:8]
  folder = parent / f"shared-{digest}"
  if not folder.exists():
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as new:
      _fill(pathlib.Path(new) / "whole")
      # another process may have been as quick
      with contextlib.suppress(OSError):
        (pathlib.Path(new) / "whole").rename(folder)
  return folder


def _fill(folder: pathlib.Path) -> None:
  for name in (*draws.FAMILIES, *draws.MIXTURES):
    path = folder / "models" / name
    for seed, of in enumerate((path, path.with_name(f"{name}-other"))):
      road.save_model(of, config(name), seed)
      tiny.tokenizer().save_pretrained(of)
    road.save_adapter(path.with_name(f"{name}-adapter"), path)
    # so that an answer of random bytes ends now and then
    ends = {"eos_token_id": [tiny.SIZES["eos_token_id"], *range(70, 84)]}
    (path / "generation_config.json").write_text(json.dumps(ends))
  asked = [_asked(word) for word in WORDS]
  tiny.write_jsonl(folder / online.PROMPTS, asked)
  (folder / online.FILE).write_text(SCORING)
  for kind, row in ROWS.items():
    for name, count, first in (("", 8, 0), ("-other", 4, 8)):
      some = [row(i, "") for i in range(first, first + count)]
      tiny.write_jsonl(folder / f"{kind}{name}.jsonl", some)
    long = [row(i, "now " * 40 if i == 5 else "") for i in range(8)]
    tiny.write_jsonl(folder / f"{kind}-long.jsonl", long)


WORDS = ("one", "two", "red", "sky", "sea", "hat", "cat")
SCORING = '''
def early(prompt, completion, example) -> float:
  return sum(map(ord, completion)) % 97 / 97

def rare(prompt, completion, example) -> bool:
  return sum(map(ord, completion)) % 3 == 0

def missing(prompt, completion, example):
  if sum(map(ord, completion)) % 3 == 0:
    return float("nan")
  return len(completion) % 2

def listed(prompts, completions, answer, **columns):
  return [float(len(str(one)) % 2) for one in completions]

def empty(prompts, completions, **columns):
  return [None if len(str(one)) % 2 else 0.5 for one in completions]

def double(number: int) -> int:
  """
  Doubles a number.

  Args:
    number: The number.
  """
  return 2 * number

class Echo:
  def reset(self, answer, **row):
    return ""

  def step(self, action: str):
    return "and?", float(len(action) % 2), len(action) % 3 == 0, False, {}
'''


def _asked(word: str) -> dict[str, Any]:
  said = lambda role, content: [{"role": role, "content": content}]
  return {
    "prompt": said("user", f"say {word}"),
    "completion": said("assistant", word),
    "answer": word,
  }


def config(name: str) -> ModelConfig:
  return tiny.config(**FAMILIES[name])


def _text(i: int, before: str) -> dict[str, Any]:
  letter = "abcdefg"[i % 7]
  return {
    "prompt": f"{before}say {letter * (1 + i % 4)}",
    "completion": letter * (2 + i % 3),
    "channel": tiny.CHANNELS[i % 2],
  }


def _pair(i: int, before: str) -> dict[str, Any]:
  text = _text(i, before)
  return {"prompt": text["prompt"], "chosen": text["completion"], "rejected": "z" * (1 + i % 4)}


def _labelled(i: int, before: str) -> dict[str, Any]:
  pair = _pair(i, before)
  return {
    "prompt": pair["prompt"],
    "completion": pair["chosen" if i % 2 else "rejected"],
    "label": bool(i % 2),
  }


ROWS: dict[str, Callable[[int, str], dict[str, Any]]] = {
  "text": _text,
  "pairs": _pair,
  "triples": lambda i, before: _pair(i, before) | {"reference": "say " + "abcdefg"[i % 7]},
  "labels": _labelled,
  "outcomes": _labelled,
  "steps": lambda i, before: {
    "prompt": _text(i, before)["prompt"],
    "completions": ["ab", "cd"],
    "labels": [True, bool(i % 2)],
  },
  "scored": lambda i, before: {
    "prompt": _text(i, before)["prompt"],
    "completions": [_pair(i, "")["chosen"], _pair(i, "")["rejected"], "q"],
    "scores": [1.0, 0.0, float(i % 2)],
  },
}
