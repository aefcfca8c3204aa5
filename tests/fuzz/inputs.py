"""Inputs that people's files come in, each spoiled at a random place, and what reading it must give.

A function of KINDS makes the input of a seed: `read` gives None where what was read is what the input says, or in words
what else it was read as; it raises what the user would be told.
"""

import copy
import dataclasses
import gzip
import json
import pathlib
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from safetensors import numpy as safetensors_numpy

from posttrain_jax import adapters, settings
from posttrain_jax.adapters import AdapterConfig, peft_format
from posttrain_jax.build import checks, scoring, use
from posttrain_jax.build import data as data_build
from posttrain_jax.build import model as model_build
from posttrain_jax.merge import recipe
from posttrain_jax.models import decoder, hf
from posttrain_jax.rewards.verifier import Answer
from tests import tiny
from tests.adapters import kinds

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
TOKENS = jnp.arange(40, 56)[None]
VALUES: tuple[Any, ...] = (
  *(None, True, False, 0, 1, -1, 3, 0.5, -2.5, 1e30, 10**30, float("nan"), float("inf")),
  *(
    "",
    " ",
    "\n",
    "a",
    "-1",
    "1e5",
    "nan",
    "None",
    "true",
    "[",
    "(a+)+$",
    "..",
    "/",
    "~",
    "*",
    "\0",
  ),
  *(
    "<|im_end|>",
    "<|im_start|>user\n",
    "{{ 1 }}",
    "中文の文",
    "e\u0301 🙂",
    "\u202eabc",
    "a b " * 200,
  ),
  *([], [[]], [None], [1], ["a", "b"], {}, {"a": None}, {"role": "user"}, {"content": "x"}),
)


@dataclasses.dataclass(frozen=True)
class Spoiled:
  """An input: in words what was done to it, one of whose names a refusal must say, and the reading of it."""

  what: str
  names: tuple[str, ...]
  read: Callable[[], str | None]


class Base:
  """A tiny model with its adapters, in a folder of its own."""

  def __init__(self, folder: pathlib.Path):
    self.folder = tiny.tiny_model_folder(folder / "model")
    self.params, self.config = hf.load(self.folder)
    self.other = tiny.tiny_model_folder(folder / "other")
    self.adapters: dict[str, pathlib.Path] = {}
    for i, method in enumerate(("lora", "dora", "vera", "ia3", "adalora", "prompt", "prefix")):
      config = AdapterConfig(method=method)
      if method in ("lora", "dora"):
        config = dataclasses.replace(config, r=4)
      node = kinds.moved(adapters.init(jax.random.key(i), self.params, config)[1], size=0.3)
      self.adapters[method] = folder / method
      peft_format.save(self.adapters[method], node, config, self.config)
    self.models: dict[str, Any] = {}
    self.forward = jax.jit(lambda params: decoder.forward(params, TOKENS, self.config))
    self.logits = np.asarray(self.forward(self.params))

  def model(self, config: Any) -> model_build.Model:
    if "one" not in self.models:
      self.models["one"] = model_build.load(config)
    model = self.models["one"]
    template = use.of(model.tokenizer, config.model.template)
    return dataclasses.replace(model, template=template)


# --- spoiling ---------------------------------------------------------------------------------------------------------


def spoil(rng: random.Random, value: Any) -> tuple[Any, str]:
  """(a copy of nested dicts and lists with one change, what it was)."""
  value = copy.deepcopy(value)
  places = list(_places(value))
  parent, key, path = rng.choice(places)
  how = rng.choice(("value", "value", "value", "delete", "rename", "wrap", "add"))
  if how == "delete":
    del parent[key]
  elif how == "rename" and isinstance(parent, dict):
    new = rng.choice((key.upper(), f" {key}", f"{key}s", ""))
    parent[new] = parent.pop(key)
    path = f"{path} -> {new!r}"
  elif how == "wrap":
    parent[key] = rng.choice(([parent[key]], {"value": parent[key]}, json.dumps(parent[key])))
  elif how == "add" and isinstance(parent, dict):
    path = f"{path} beside it"
    parent["extra"] = rng.choice(VALUES)
  else:
    parent[key] = rng.choice(VALUES)
    path = f"{path} = {str(parent[key])[:40]!r}"
  return value, f"{how} {path}"


def _places(value: Any, path: str = ""):
  pairs = value.items() if isinstance(value, dict) else enumerate(value)
  for key, inner in list(pairs):
    here = f"{path}.{key}" if path else str(key)
    yield value, key, here
    if isinstance(inner, dict | list):
      yield from _places(inner, here)


def spoil_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
  at = rng.randrange(max(len(data), 1))
  how = rng.choice(("cut", "flip", "zeros", "empty", "bom", "latin", "carriage"))
  changed = {
    "cut": data[:at],
    "flip": data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :],
    "zeros": data[:at] + b"\0" * 16 + data[at + 16 :],
    "empty": b"",
    "bom": b"\xef\xbb\xbf" + data,
    "latin": data[:at] + b"\xe9" + data[at:],
    "carriage": data.replace(b"\n", b"\r\n"),
  }[how]
  return changed, f"{how} at byte {at}"


# --- rows -------------------------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
MESSAGES = [
  {"role": "system", "content": "be brief"},
  {"role": "user", "content": "hello there"},
  {"role": "assistant", "content": "good day"},
  {"role": "user", "content": "and now"},
  {"role": "assistant", "content": "good night"},
]
ROWS: dict[str, tuple[str, list[dict[str, Any]]]] = {
  "text": ("sft.py", [{"text": "one two three"}]),
  "messages": ("sft.py", [{"messages": MESSAGES}]),
  "completion": ("sft.py", [{"prompt": "say it", "completion": "the word"}]),
  "in_messages": ("sft.py", [{"prompt": MESSAGES[:2], "completion": MESSAGES[2:3]}]),
  "pairs": ("preference.py", [{"prompt": "say it", "chosen": "yes I do", "rejected": "no"}]),
  "pair_messages": (
    "preference.py",
    [{"chosen": MESSAGES[1:3], "rejected": [MESSAGES[1], {"role": "assistant", "content": "no"}]}],
  ),
  "labels": (
    "kto.py",
    [{"prompt": f"say {x}", "completion": f"done {x}", "label": x < 1} for x in range(2)],
  ),
  "steps": (
    "reward.py:kind=steps",
    [{"prompt": "count", "completions": ["one", "two"], "labels": [True, False]}],
  ),
  "drawn": (
    "sft.py",
    [
      {
        "prompt": "say it",
        "completion": "the word",
        "completion_ids": [*tiny.tokenizer()("the word<|im_end|>")["input_ids"]],
        "reward": 1.0,
        "finished": True,
        "seed": 0,
      }
    ],
  ),
  "scored": (
    "grouped.py",
    [{"prompt": "count", "completions": ["one", "two"], "scores": [1.0, 0.0]}],
  ),
}


def rows(seed: int, base: Base, folder: pathlib.Path) -> Spoiled:
  rng = random.Random(seed)
  kind = rng.choice([*ROWS])
  config, good = ROWS[kind]
  items = [*good, *copy.deepcopy(good), *good]
  at = len(good) + rng.randrange(len(good))
  what = "nothing"
  path = folder / "rows.jsonl"
  if rng.random() < 0.8:
    items[at], what = spoil(rng, items[at])
  text = "".join(json.dumps(item, ensure_ascii=rng.random() < 0.5) + "\n" for item in items)
  data = text.encode(errors="surrogatepass")
  if what == "nothing":
    data, what = spoil_bytes(rng, data)
    items = None
  match rng.choice(("plain", "plain", "plain", "gz", "array")):
    case "gz":
      path, data = folder / "rows.jsonl.gz", gzip.compress(data)
    case "array" if items is not None:
      path, data = folder / "rows.json", json.dumps(items).encode()
  path.write_bytes(data)

  def read() -> str | None:
    arguments = (
      f"{'' if ':' in config else ':'}{',' if ':' in config else ''}model={base.folder},data={path}"
    )
    fields = ["data.eval_rows=0", "data.length=4096"]
    loaded = settings.load(f"{CONFIGS}/{config}{arguments}", [f"--config.{f}" for f in fields])
    found = data_build.read(loaded, base.model(loaded))
    if items is None:
      return None
    tokenizer = base.models["one"].tokenizer
    if len(found.examples) != len(items):
      return f"{len(found.examples)} examples of {len(items)} rows"
    trained = tokenizer.decode(found.examples[at].tokens[found.examples[at].mask])
    missing = [text for text in _answers(items[at]) if text.strip() not in trained]
    return f"trained is {trained!r}, not {missing!r}" if missing else None

  return Spoiled(f"{kind}: {what}", (path.name,), read)


def _answers(item: dict[str, Any]) -> list[str]:
  """What the row says that the model is to write, where it says it in the usual places."""
  texts = []
  for name in ("text", "completion", "chosen", "rejected", "messages", "completions"):
    value = item.get(name)
    for part in value if isinstance(value, list) else [value]:
      if isinstance(part, dict) and part.get("role") == "assistant":
        texts.append(part.get("content"))
      elif isinstance(part, str):
        texts.append(part)
  # the first text of plain text's own beginning has nothing before it, and a token cannot be trained
  return [text[1:] if "text" in item else text for text in texts if isinstance(text, str)]


# --- adapters ---------------------------------------------------------------------------------------------------------


def adapter_folders(seed: int, base: Base, folder: pathlib.Path) -> Spoiled:
  rng = random.Random(seed)
  method = rng.choice([*base.adapters])
  old = base.adapters[method]
  config = json.loads((old / "adapter_config.json").read_text())
  tensors = safetensors_numpy.load_file(old / "adapter_model.safetensors")
  data = (old / "adapter_model.safetensors").read_bytes()
  changed = copy.deepcopy(config)
  names = ("adapter_config.json", "adapter_model.safetensors", str(folder))
  match rng.choice(("config", "config", "config", "tensor", "bytes", "text")):
    case "config":
      changed, what = spoil(rng, config)
      text = json.dumps(changed)
    case "text":
      spoiled_bytes, what = spoil_bytes(rng, json.dumps(config).encode())
      text = spoiled_bytes.decode(errors="surrogateescape")
    case "tensor":
      tensors, what = _spoil_tensors(rng, tensors)
      text, data = json.dumps(config), None
    case _:
      data, what = spoil_bytes(rng, data)
      text = json.dumps(config)
  (folder / "adapter_config.json").write_text(text, errors="surrogateescape")
  if data is None:
    safetensors_numpy.save_file(tensors, folder / "adapter_model.safetensors")
  else:
    (folder / "adapter_model.safetensors").write_bytes(data)
  (folder / "posttrain.json").write_bytes((old / "posttrain.json").read_bytes())

  def logits(path):
    node, _ = peft_format.load(path, base.params, base.config)
    return np.asarray(base.forward(adapters.bind(base.params, node)))

  def read() -> str | None:
    found, known = logits(folder), logits(old)
    if not np.isfinite(found).all():
      return "its logits are not finite"
    same = np.allclose(found, known, atol=1e-4)
    means_much = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora"}
    means_much |= {"target_modules", "feedforward_modules", "fan_in_fan_out"}
    differs = {key for key in {*config, *changed} if config.get(key) != changed.get(key)}
    return (
      None if same or differs & means_much or "tensor" in what or "byte" in what else "other logits"
    )

  return Spoiled(f"{method}: {what}", (*names, *_keys(config, changed)), read)


def _keys(*configs: Any) -> tuple[str, ...]:
  return tuple(
    {str(key) for config in configs if isinstance(config, dict) for key in config if key}
  )


def _spoil_tensors(rng, tensors):
  name = rng.choice(sorted(tensors))
  array = tensors[name]
  how = rng.choice(
    ("rename", "drop", "turn", "nan", "inf", "float16", "int", "cut", "scalar", "add")
  )
  new = dict(tensors)
  del new[name]
  match how:
    case "rename":
      new[rng.choice((f"module.{name}", name.replace("layers", "layer"), name.upper()))] = array
    case "turn":
      new[name] = np.ascontiguousarray(array.T)
    case "nan" | "inf":
      new[name] = array.copy()
      new[name].reshape(-1)[rng.randrange(array.size)] = float(how)
    case "float16":
      new[name] = array.astype(np.float16)
    case "int":
      new[name] = array.astype(np.int32)
    case "cut":
      new[name] = np.ascontiguousarray(array[:-1])
    case "scalar":
      new[name] = np.zeros((), np.float32)
    case "add":
      new[name], new["base_model.model.extra.weight"] = array, array.copy()
  return new, f"tensor {name}: {how}"


# --- overrides --------------------------------------------------------------------------------------------------------

TEXTS = (
  *("-1", "0", "1", "-0.5", "1.5", "nan", "inf", "1e400", "-inf", "", " ", "abc", "None", "True"),
)
TEXTS += (
  "[",
  "(",
  "{}",
  "{'a': 1}",
  "()",
  "('a',)",
  "[1, 2]",
  "'",
  "1_000",
  "0x10",
  "１",
  "~",
  "*",
  "(a+)+$",
)
ARGUMENTS = ("sft.py", "preference.py", "kto.py", "grouped.py", "reward.py", "sft.py:adapter=none")
ARGUMENTS += ("rl.py", "rl.py:method=dapo,reward=number+tags")


def overrides(seed: int, base: Base, folder: pathlib.Path) -> Spoiled:
  rng = random.Random(seed)
  config = rng.choice(ARGUMENTS)
  plain = settings.flat(settings.plain(settings.load(f"{CONFIGS}/{config}")))
  field, text = rng.choice(sorted(plain)), rng.choice(TEXTS)
  if rng.random() < 0.1:
    field = rng.choice((field[:-1], f"{field}.x", field.upper(), "", ".", "lr", "model"))

  def read() -> str | None:
    loaded = settings.load(f"{CONFIGS}/{config}", [f"--config.{field}={text}"])
    checks.check(loaded)
    value, old = settings.flat(settings.plain(loaded)).get(field), plain.get(field)
    if isinstance(value, float) and not np.isfinite(value):
      return f"{field} is {value}"
    if old is not None and type(value) is not type(old) and not isinstance(old, str | dict):
      return f"{field} was {old!r} and is {value!r}"
    return None

  names = (field, field.split(".")[-1]) if field else ("--config",)
  return Spoiled(f"{config} --config.{field}={text}", names, read)


# --- templates --------------------------------------------------------------------------------------------------------

PIECES = (
  *("{% for i in range(10**9) %}x{% endfor %}", "{{ messages.__class__ }}", "{{ 'a' * 10**9 }}"),
  *(
    "{% set x = messages | tojson %}",
    "{{ raise_exception('no') }}",
    "{% include 'a' %}",
    "{{ ''.format }}",
  ),
  *(
    "{{ (1).__class__.__mro__ }}",
    "{% if %}",
    "{{ tools }}",
    "{{ messages[99]['content'] }}",
    "{{",
    "%}",
  ),
  *("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ 1 / 0 }}", "{{ namespace(a=1).b }}"),
  *(
    "{{ messages[0]['content'] | upper }}",
    "{%- ",
    " -%}",
    "{{ bos_token }}",
    "{# #}",
    "\n\n",
    "{{ now() }}",
  ),
)


def templates(seed: int, base: Base, folder: pathlib.Path) -> Spoiled:
  rng = random.Random(seed)
  text = tiny.CHATML
  at = rng.randrange(len(text))
  match rng.choice(("insert", "insert", "cut", "drop", "replace")):
    case "insert":
      piece = rng.choice(PIECES)
      text, what = text[:at] + piece + text[at:], f"{piece!r} at {at}"
    case "cut":
      text, what = text[:at], f"cut at {at}"
    case "drop":
      size = rng.randrange(1, 20)
      text, what = text[:at] + text[at + size :], f"{size} characters gone at {at}"
    case _:
      old, new = rng.choice(
        (
          ("content", "text"),
          ("role", "name"),
          ("message['content']", "''"),
          ("add_generation_prompt", "true"),
          ("'\n'", "''"),
          ("<|im_end|>", ""),
        )
      )
      text, what = text.replace(old, new), f"{old!r} is {new!r}"
  path = folder / "own.jinja"
  path.write_text(text)
  data = tiny.write_jsonl(folder / "rows.jsonl", [{"messages": MESSAGES}] * 3)

  def read() -> str | None:
    fields = ["data.eval_rows=0", "data.length=4096", f"model.template={path}"]
    config = f"{CONFIGS}/sft.py:model={base.folder},data={data}"
    loaded = settings.load(config, [f"--config.{field}" for field in fields])
    model = base.model(loaded)
    example = data_build.read(loaded, model).examples[0]
    trained = model.tokenizer.decode(example.tokens[example.mask])
    # a filter on the text is the template's own affair
    wrong = [
      text for text in ("good day", "good night") if text not in trained and "upper" not in what
    ]
    wrong += [text for text in ("hello there", "and now", "be brief") if text in trained]
    return f"trained is {trained!r}" if wrong else None

  return Spoiled(what, ("own.jinja", "rows.jsonl", "template"), read)


# --- recipes ----------------------------------------------------------------------------------------------------------

RECIPES: tuple[dict[str, Any], ...] = (
  {
    "merge_method": "ties",
    "base_model": "a",
    "models": [
      {"model": "b", "parameters": {"weight": 0.5, "density": [0.2, 0.8]}},
      {"model": "c"},
    ],
    "parameters": {"weight": 1.0, "density": 0.5, "normalize": True, "int8_mask": True},
    "dtype": "float32",
  },
  {
    "merge_method": "slerp",
    "base_model": "a",
    "slices": [
      {"sources": [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 2]}]}
    ],
    "parameters": {"t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]},
  },
  {
    "merge_method": "linear",
    "models": [
      {"model": "a+x", "parameters": {"weight": 1}},
      {"model": "b", "parameters": {"weight": 2}},
    ],
    "tokenizer": {"source": "union", "tokens": {"<x>": {"source": "a", "force": True}}},
    "chat_template": "auto",
    "out_dtype": "bfloat16",
  },
)


def recipes(seed: int, base: Base, folder: pathlib.Path) -> Spoiled:
  rng = random.Random(seed)
  good = rng.choice(RECIPES)
  path = folder / "recipe.yml"
  changed: Any = None
  if rng.random() < 0.8:
    changed, what = spoil(rng, good)
    text = yaml.safe_dump(changed, allow_unicode=True)
  else:
    data, what = spoil_bytes(rng, yaml.safe_dump(good).encode())
    text = data.decode(errors="surrogateescape")
  path.write_text(text, errors="surrogateescape")

  def read() -> str | None:
    found, known = recipe.load(path), recipe.read(good)
    # what is not said stands in no recipe: a key that is gone or renamed may leave its default, never another's
    fields = [
      f.name for f in dataclasses.fields(found) if getattr(found, f.name) != getattr(known, f.name)
    ]
    values = [value for value in _numbers(found) if not np.isfinite(value)]
    return f"{fields} hold {values}" if values else None

  named = tuple(str(key) for _, key, _ in _places(good) if isinstance(key, str))
  return Spoiled(f"{good['merge_method']}: {what}", ("recipe.yml", "merge_method", *named), read)


def _numbers(value: Any):
  if isinstance(value, float):
    yield value
  elif dataclasses.is_dataclass(value):
    for field in dataclasses.fields(value):
      yield from _numbers(getattr(value, field.name))
  elif isinstance(value, dict):
    for inner in value.values():
      yield from _numbers(inner)
  elif isinstance(value, list | tuple):
    for inner in value:
      yield from _numbers(inner)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoints(seed: int, base: Base, folder: pathlib.Path) -> Spoiled:
  rng = random.Random(seed)
  for file in base.folder.iterdir():
    (folder / file.name).write_bytes(file.read_bytes())
  name = rng.choice(
    ("config.json", "config.json", "model.safetensors", "tensors", "tokenizer.json")
  )
  config = json.loads((base.folder / "config.json").read_text())
  changed = copy.deepcopy(config)
  if name == "tensors":
    tensors, what = _spoil_tensors(
      rng, safetensors_numpy.load_file(base.folder / "model.safetensors")
    )
    safetensors_numpy.save_file(tensors, folder / "model.safetensors")
  elif name == "config.json" and rng.random() < 0.8:
    changed, what = spoil(rng, config)
    (folder / name).write_text(json.dumps(changed))
  else:
    data, what = spoil_bytes(rng, (base.folder / name).read_bytes())
    (folder / name).write_bytes(data)

  def read() -> str | None:
    loaded = settings.load(f"{CONFIGS}/sft.py:model={folder},data=x")
    model = model_build.load(loaded)
    found = np.asarray(decoder.forward(model.params, TOKENS, model.config))
    if not np.isfinite(found).all():
      return "its logits are not finite"
    differs = {key for key in {*config, *changed} if config.get(key) != changed.get(key)}
    same = found.shape == base.logits.shape and np.allclose(found, base.logits, atol=1e-3)
    if same or differs or "tensor" in what or "flip" in what or "zeros" in what:
      return None
    return "other logits"

  names = (*(file.name for file in folder.iterdir()), folder.name, *_keys(config, changed))
  return Spoiled(f"{name}: {what}", names, read)


# --- rewards ----------------------------------------------------------------------------------------------------------

SCHEMA = {
  "type": "object",
  "properties": {"a": {"type": "array", "items": {"type": "number", "minimum": 0.5}}},
  "required": ["a"],
  "$ref": "#/$defs/b",
  "$defs": {"b": {"additionalProperties": {"pattern": "^x"}}},
}
REWARDS: tuple[dict[str, Any], ...] = (
  {"parts": ["schema"], "options": {"schema": {"schema": SCHEMA}}},
  {"parts": ["schema"], "options": {"schema": {"column": "schema"}}},
  {
    "parts": ["number", "length"],
    "weights": [1.0, 0.5],
    "gates": ["regex"],
    "options": {
      "regex": {"pattern": r"\d+"},
      "length": {"longest": 100, "soft": 20},
      "number": {"column": "gold"},
    },
    "ranges": {"number": [0, 1]},
    "untested": ["regex"],
    "seconds": 2.0,
    "retries": 1,
  },
  {
    "parts": "exact,is_json",
    "gates": ["tags"],
    "options": {"tags": {"names": ["think", "answer"]}},
    "unsafe_code": False,
  },
)
SAID = ("4", '{"a": [1, 2.5]}', "<think>x</think><answer>4</answer>", "")


def rewards(seed: int, base: Base, folder: pathlib.Path) -> Spoiled:
  """A section of a reward in a file; half of those with a schema of the row's have that spoiled instead."""
  rng = random.Random(seed)
  good = rng.choice(REWARDS)
  asked, schema = good, SCHEMA
  if good is REWARDS[1] and rng.random() < 0.8:
    schema, what = spoil(rng, SCHEMA)
    schema = rng.choice((schema, json.dumps(schema), rng.choice(VALUES)))
  else:
    asked, what = spoil(rng, good)
  path = folder / "reward.json"
  path.write_text(json.dumps(asked))
  example = {"gold": "4", "schema": schema}

  def read() -> str | None:
    reward = scoring.of(scoring.spec(str(path)), [*example])
    return _unscored(reward.score([Answer("?", text, example) for text in SAID]))

  return Spoiled(f"{good['parts']}: {what}", (path.name, "reward", *_names_in(good)), read)


def _names_in(value: Any) -> tuple[str, ...]:
  return tuple(key for _, key, _ in _places(value) if isinstance(key, str))


def _unscored(result: Any) -> str | None:
  """What is neither a finite number nor missing with a reason in words."""
  for scored in result.answers:
    for name, given in {**scored.parts, "total": scored.total}.items():
      if given.is_missing and not given.reason.strip():
        return f"{name} is missing without a reason"
      if given.value is not None and not np.isfinite(given.value):
        return f"{name} is {given.value}"
  return None


RETURNED = (
  *(
    "1.0",
    "True",
    "0",
    "-3",
    "2.5",
    "None",
    "float('nan')",
    "float('inf')",
    "10**400",
    "'1'",
    "''",
  ),
  *("[]", "[1.0]", "[1.0] * 2", "[1.0] * 3", "[None, 1.0]", "[float('nan')] * 2", "['a', 'b']"),
  *("[[1.0]] * 2", "{}", "{'score': 1}", "object()", "1j", "b'1'", "lambda: 1", "(1.0, 'why')"),
  *("numpy.float32(1)", "numpy.ones(2)", "numpy.array(float('nan'))", "(x for x in [1.0, 2.0])"),
  *("1 / 0", "[][0]", "sys.exit(1)", "sys.stdout.write('x' * 10**6)", "exec('raise ValueError')"),
  *("exec('raise KeyboardInterrupt')", "os._exit(0)", "open('/no/such/file')", "print(1)"),
)
SIGNATURES = (
  *("prompt, completion, example", "prompt, completion", "completions, **columns", "completions"),
  *("prompts, completions, gold", "prompts, completions, gold, **columns", "", "*arguments"),
)


def verifiers(seed: int, base: Base, folder: pathlib.Path) -> Spoiled:
  """A file of one's own whose function takes or gives what it should not."""
  rng = random.Random(seed)
  signature, returned = rng.choice(SIGNATURES), rng.choice(RETURNED)
  text = f"import os\nimport sys\nimport numpy\n\n\ndef own({signature}):\n  return {returned}\n"
  what = f"own({signature}) gives {returned}"
  if rng.random() < 0.1:
    data, spoiled = spoil_bytes(rng, text.encode())
    text, what = data.decode(errors="surrogateescape"), f"{what}, {spoiled}"
  path = folder / "mine.py"
  path.write_text(text, errors="surrogateescape")

  def read() -> str | None:
    spec = {"parts": [f"{path}:own"], "seconds": 2.0, "retries": 0}
    answers = [Answer("?", text, {"gold": "4"}) for text in SAID[:2]]
    return _unscored(scoring.of(spec, ["gold"]).score(answers))

  return Spoiled(what, ("mine.py", "own"), read)


KINDS = {
  "rows": rows,
  "adapters": adapter_folders,
  "overrides": overrides,
  "templates": templates,
  "recipes": recipes,
  "checkpoints": checkpoints,
  "rewards": rewards,
  "verifiers": verifiers,
}
