"""Merge recipes: mergekit's YAML, read as it is, or the same fields out of a config file.

A recipe says which models go into which layers, by which method, with which parameters.  A parameter is a number, a
gradient over the layers (a list, interpolated between the first and the last), or a list of `{filter, value}`, of which
the first whose filter is part of the tensor's name counts.  It is looked up at the model, then its slice, then the
module, then the recipe.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from posttrain_jax.core import seeds, words

FIELDS = (
  "merge_method",
  "base_model",
  "dtype",
  "out_dtype",
  "tokenizer_source",
  "tokenizer",
  "chat_template",
  "parameters",
  "models",
  "slices",
  "modules",
  "random_seed",
)
BODIES = ("models", "slices", "modules")
BYTES = 2**20  # of a file
DTYPES = ("float32", "float16", "bfloat16")
NUMBER = re.compile(r"[-+]?(\d{1,17}\.?\d*|\.\d+)([eE][-+]?\d{1,3})?", re.ASCII)
# of the text model: a vision tower has layers of its own, which are merged one by one and neither counted nor stacked
LAYER = re.compile(r"(?!.*\bvision_tower\.)(.*\blayers\.)(\d+)(\..+)")


class RecipeError(ValueError):
  """A recipe that cannot be followed; says which part and what to write instead."""


@dataclasses.dataclass(frozen=True)
class ModelRef:
  """A model's folder or name, and the adapter that is merged into it when it is read (`base+adapter`)."""

  name: str
  adapter: str | None = None

  def __str__(self) -> str:
    return self.name if self.adapter is None else f"{self.name}+{self.adapter}"


@dataclasses.dataclass(frozen=True)
class Source:
  model: ModelRef
  parameters: Mapping[str, Any]
  layers: tuple[int, int] | None = None  # from, to (not included); None: every layer


@dataclasses.dataclass(frozen=True)
class Slice:
  sources: tuple[Source, ...]
  parameters: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class TokenRow:
  """Where the row of a token comes from: a model's row of this or another token or number; no model: zeros."""

  model: ModelRef | None
  token: str | None = None
  number: int | None = None
  force: bool = False  # for models that have the token too


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """The vocabulary by which models are merged token by token: a model's, or (None) all models' together."""

  source: ModelRef | None
  tokens: Mapping[str, TokenRow]
  multiple: int = 1  # of which the number of rows is one


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A checked recipe; `slices` is one of every layer where the recipe names models."""

  method: str
  base: ModelRef | None
  slices: tuple[Slice, ...]
  whole: bool  # the recipe names models, not slices
  module: Mapping[str, Any]  # parameters of the module
  parameters: Mapping[str, Any]
  dtype: str | None  # of the result; None: the base's own, or the first model's
  vocabulary: Vocabulary | None  # None: rows as they are, and the leading model's tokenizer
  chat_template: str | None
  seed: int

  @property
  def leading(self) -> ModelRef:
    """The base, or else the first model: whose config and tokenizer the result has."""
    return self.base or self.slices[0].sources[0].model

  def models(self) -> list[ModelRef]:
    """Each once, the base first."""
    every = [self.base] if self.base else []
    every += [source.model for part in self.slices for source in part.sources]
    return list(dict.fromkeys(every))

  def setting(
    self, name: str, tensor: str, at: float, part: Slice, source: Source | None = None
  ) -> Any:
    """The value of a parameter for a tensor that lies `at` (0 to 1) of the layers; None where none is given."""
    levels = [part.parameters, self.module, self.parameters]
    for level in [source.parameters, *levels] if source else levels:
      if name in level:
        resolved = value(level[name], tensor, at)
        if resolved is not None:
          return resolved
    return None


def value(parameter: Any, tensor: str, at: float) -> Any:
  """A parameter as one tensor has it; None where no filter fits.

  >>> value([0.0, 1.0], "model.layers.3.mlp.up_proj.weight", 0.25)
  0.25
  >>> value([{"filter": "mlp", "value": 0.1}, {"value": 0.9}], "model.norm.weight", 1.0)
  0.9
  """
  if not isinstance(parameter, list | tuple):
    return parameter
  if all(_is_number(x) for x in parameter):
    place = at * (len(parameter) - 1)
    low = int(place)
    high = min(low + 1, len(parameter) - 1)
    return (1 - (place - low)) * parameter[low] + (place - low) * parameter[high]
  for case in parameter:
    pattern = case.get("filter")
    if pattern in (None, "*") or pattern in tensor:
      return value(case["value"], tensor, at)
  return None


def load(path: str | Path) -> Recipe:
  """The recipe in a YAML file.

  Raises:
    RecipeError: it is not YAML, or no recipe; the message names the file.
  """
  path = Path(path)
  if path.stat().st_size > BYTES:
    raise RecipeError(f"{path} is larger than {BYTES:,} bytes: it is no recipe")
  try:
    data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    return read(data)
  except (yaml.YAMLError, UnicodeDecodeError) as error:
    raise RecipeError(f"{path} is not YAML: {error}") from error
  except RecursionError:
    raise RecipeError(f"{path}: its lists are nested without end") from None
  except RecipeError as error:
    raise RecipeError(f"{path}: {error}") from error


class _Loader(yaml.SafeLoader):
  """YAML in which a key stands once: of two the last would count, and nothing be said."""

  def construct_mapping(self, node, deep=False):
    seen = set()
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
      if isinstance(key, yaml.ScalarNode) and key.value in seen and key.value != "<<":
        line = key.start_mark.line + 1
        raise RecipeError(
          f"line {line} says {words.shown(key.value)} a second time: write one of them"
        )
      seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
    return super().construct_mapping(node, deep)


def read(data: Any) -> Recipe:
  """The recipe that plain data describes, checked.

  Raises:
    RecipeError: an unknown key, a missing one, or a value of another kind.
  """
  if not isinstance(data, Mapping):
    raise RecipeError("a recipe is a mapping with merge_method and one of models, slices, modules")
  _known(data, FIELDS, "")
  method = data.get("merge_method")
  if not isinstance(method, str):
    raise RecipeError("merge_method is missing: the name of a method, such as ties")
  base = _model(data["base_model"], "base_model") if data.get("base_model") else None
  bodies = [name for name in BODIES if data.get(name)]
  if len(bodies) != 1:
    listed = " and ".join(bodies) or "none"
    raise RecipeError(f"write exactly one of models, slices and modules; here is {listed}")
  module, body = {}, data
  if bodies == ["modules"]:
    body, module = _module(data["modules"])
  whole = bool(body.get("models"))
  slices = _whole(body["models"], base) if whole else _slices(body["slices"])
  for name in ("dtype", "out_dtype"):
    if data.get(name) is not None and data[name] not in DTYPES:
      raise RecipeError(f"{name}={words.shown(data[name])}: known are {', '.join(DTYPES)}")
  seed = data.get("random_seed", 0)
  try:
    seeds.check(seed, "random_seed")
  except ValueError as error:
    raise RecipeError(str(error)) from None
  if not isinstance(data.get("chat_template", ""), str | None):
    raise RecipeError(
      f"chat_template={words.shown(data['chat_template'])}: write a template's name, or auto"
    )
  return Recipe(
    method=method,
    base=base,
    slices=slices,
    whole=whole,
    module=module,
    parameters=_parameters(data.get("parameters"), "parameters"),
    dtype=data.get("out_dtype") or data.get("dtype"),
    vocabulary=_vocabulary(data, base or slices[0].sources[0].model),
    chat_template=data.get("chat_template"),
    seed=seed,
  )


def _known(data: Mapping[str, Any], known: Sequence[str], where: str) -> None:
  for name in data:
    if name not in known:
      near = difflib.get_close_matches(str(name), known, n=1)
      hint = f"; did you mean {near[0]!r}?" if near else ""
      raise RecipeError(f"unknown key {where}{name}: known are {', '.join(known)}{hint}")


def _model(data: Any, where: str) -> ModelRef:
  """`name` or `name+adapter`, or mergekit's nested form of it."""
  if isinstance(data, Mapping):
    _known(data, ("model", "lora"), f"{where}.")
    path = lambda part: part.get("path") if isinstance(part, Mapping) else part
    name, adapter = path(data.get("model")), path(data.get("lora"))
    if not isinstance(name, str) or not isinstance(adapter, str | None):
      raise RecipeError(
        f"{where}: expected `model` and `lora` with a `path` each, found {words.shown(data)}"
      )
    return ModelRef(name, adapter or None)
  if not isinstance(data, str) or not data:
    raise RecipeError(f"{where}: expected a model's name or folder, found {words.shown(data)}")
  name, plus, adapter = data.rpartition("+")
  return ModelRef(name, adapter) if plus else ModelRef(data)


def _source(data: Any, where: str, *fields: str) -> Source:
  if not isinstance(data, Mapping):
    raise RecipeError(f"{where}: expected a mapping with `model`, found {words.shown(data)}")
  _known(data, ("model", "parameters", *fields), f"{where}.")
  if "model" not in data:
    raise RecipeError(f"{where}: there is no `model`")
  layers = data.get("layer_range")
  if "layer_range" in fields:
    numbers = isinstance(layers, list | tuple) and len(layers) == 2
    if not numbers or not all(isinstance(x, int) for x in layers) or not 0 <= layers[0] < layers[1]:
      raise RecipeError(
        f"{where}.layer_range={words.shown(layers)}: write [first, end], of which the end is not included"
      )
  return Source(
    _model(data["model"], f"{where}.model"),
    _parameters(data.get("parameters"), f"{where}.parameters"),
    None if layers is None else (layers[0], layers[1]),
  )


def _whole(data: Any, base: ModelRef | None) -> tuple[Slice, ...]:
  if not isinstance(data, Sequence) or isinstance(data, str) or not data:
    raise RecipeError("models: expected a list")
  sources = [_source(entry, f"models[{i}]") for i, entry in enumerate(data)]
  if base is not None and base not in [source.model for source in sources]:
    sources.append(Source(base, {}))
  return (Slice(tuple(sources), {}),)


def _slices(data: Any) -> tuple[Slice, ...]:
  if not isinstance(data, Sequence) or isinstance(data, str) or not data:
    raise RecipeError("slices: expected a list")
  slices = []
  for i, entry in enumerate(data):
    where = f"slices[{i}]"
    if not isinstance(entry, Mapping) or not entry.get("sources"):
      raise RecipeError(f"{where}: expected a mapping with `sources`, a list")
    _known(entry, ("sources", "parameters"), f"{where}.")
    sources = [
      _source(one, f"{where}.sources[{j}]", "layer_range") for j, one in enumerate(entry["sources"])
    ]
    counts = {end - first for first, end in (s.layers for s in sources if s.layers)}
    if len(counts) > 1:
      raise RecipeError(f"{where}: its sources have layer ranges of different lengths")
    slices.append(
      Slice(tuple(sources), _parameters(entry.get("parameters"), f"{where}.parameters"))
    )
  return tuple(slices)


def _module(data: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
  if not isinstance(data, Mapping) or len(data) != 1:
    raise RecipeError("modules: one module is merged, the language model; write a mapping of one")
  ((name, body),) = data.items()
  if not isinstance(body, Mapping):
    raise RecipeError(f"modules.{name}: expected a mapping with models or slices")
  _known(body, ("models", "slices", "parameters"), f"modules.{name}.")
  if bool(body.get("models")) == bool(body.get("slices")):
    raise RecipeError(f"modules.{name}: write either models or slices")
  return body, _parameters(body.get("parameters"), f"modules.{name}.parameters")


def _parameters(data: Any, where: str) -> dict[str, Any]:
  if data is None:
    return {}
  if not isinstance(data, Mapping):
    raise RecipeError(f"{where}: expected a mapping, found {words.shown(data)}")
  return {str(name): _setting(parameter, f"{where}.{name}") for name, parameter in data.items()}


def _setting(data: Any, where: str) -> Any:
  data = _number(data)
  if isinstance(data, bool | str) or _is_number(data):
    return data
  if isinstance(data, Sequence) and data:
    if all(_is_number(_number(x)) for x in data):
      return [_number(x) for x in data]
    if all(isinstance(x, Mapping) and "value" in x for x in data):
      for case in data:
        _known(case, ("filter", "value"), f"{where}.")
      return [{**case, "value": _setting(case["value"], where)} for case in data]
  raise RecipeError(
    f"{where}={words.shown(data)}: write a number, a list of them (a gradient over layers), or one of filter and value"
  )


def _vocabulary(data: Mapping[str, Any], leading: ModelRef) -> Vocabulary | None:
  source, section = data.get("tokenizer_source"), data.get("tokenizer")
  if source and section:
    raise RecipeError("write tokenizer_source or tokenizer, not both")
  if not source and not section:
    return None
  tokens, multiple = {}, 1
  if section:
    if not isinstance(section, Mapping):
      raise RecipeError("tokenizer: expected a mapping with `source`")
    _known(section, ("source", "tokens", "pad_to_multiple_of"), "tokenizer.")
    source = section.get("source", "union")
    listed, multiple = section.get("tokens") or {}, section.get("pad_to_multiple_of") or 1
    if not isinstance(listed, Mapping):
      raise RecipeError("tokenizer.tokens: expected a mapping of tokens")
    tokens = {
      str(token): _token(entry, f"tokenizer.tokens.{token}") for token, entry in listed.items()
    }
    if type(multiple) is not int or multiple < 1:
      raise RecipeError(
        f"tokenizer.pad_to_multiple_of={words.shown(multiple)}: write a whole number, 1 or more"
      )
  if source == "union":
    return Vocabulary(None, tokens, multiple)
  model = leading if source == "base" else _model(source, "tokenizer_source")
  return Vocabulary(model, tokens, multiple)


def _token(data: Any, where: str) -> TokenRow:
  """mergekit's source of a token's row: a model, a token of a model, or zeros."""
  if not isinstance(data, Mapping) or "source" not in data:
    raise RecipeError(f"{where}: expected a mapping with `source`, found {words.shown(data)}")
  _known(data, ("source", "force"), f"{where}.")
  source, force = data["source"], bool(data.get("force", False))
  if not isinstance(source, Mapping) or "kind" not in source:
    return TokenRow(_model(source, f"{where}.source"), force=force)
  if source["kind"] == "zero":
    _known(source, ("kind",), f"{where}.source.")
    return TokenRow(None, force=force)
  if source["kind"] != "model_token":
    raise RecipeError(f"{where}.source.kind={source['kind']!r}: write zero or model_token")
  _known(source, ("kind", "model", "token", "token_id"), f"{where}.source.")
  token, number = source.get("token"), source.get("token_id")
  if (token is None) == (number is None):
    raise RecipeError(f"{where}.source: write one of token and token_id")
  return TokenRow(_model(source.get("model"), f"{where}.source.model"), token, number, force)


def _number(x: Any) -> Any:
  """A number that stands in a string as one, as `5e-1` does in YAML 1.1; all else as it is."""
  if isinstance(x, str) and NUMBER.fullmatch(x):
    return int(x) if x.lstrip("+-").isdigit() else float(x)
  return x


def _is_number(x: Any) -> bool:
  return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


@dataclasses.dataclass(frozen=True)
class Wanted:
  """One tensor of the result: its name, and what goes into it, in the order of its slice's sources."""

  name: str
  inputs: tuple[tuple[Source, str], ...]  # (source, the tensor's name there)
  part: Slice
  at: float  # where in the layers of its slice it lies, 0 to 1; 0 outside the layers


def tensors(recipe: Recipe, names: Sequence[str], layers: int) -> Iterator[Wanted]:
  """Every tensor of the result, layer by layer in the order of `names`, those of one of the models.

  Args:
    names: tensors of the first model, as its files name them.
    layers: how many layers it has, for a recipe of whole models.

  What precedes the layers (the embedding) comes from the first slice, what follows from the last; of a gradient both
  have the first value, as in mergekit.
  """
  inside = {name: match for name in names if (match := LAYER.fullmatch(name))}
  one_layer = list(dict.fromkeys((m[1], m[3]) for m in inside.values()))
  before = [name for name in names if name not in inside and precedes(name)]
  after = [name for name in names if name not in inside and not precedes(name)]
  same = lambda part, name: tuple((source, name) for source in part.sources)
  first, last = recipe.slices[0], recipe.slices[-1]
  yield from (Wanted(name, same(first, name), first, 0.0) for name in before)
  depth = 0
  for part in recipe.slices:
    ranges = [source.layers or (0, layers) for source in part.sources]
    count = ranges[0][1] - ranges[0][0]
    for i in range(count):
      at = 1.0 if count == 1 else i / (count - 1)
      for head, tail in one_layer:
        inputs = tuple(
          (source, f"{head}{start + i}{tail}") for source, (start, _) in zip(part.sources, ranges)
        )
        yield Wanted(f"{head}{depth + i}{tail}", inputs, part, at)
    depth += count
  yield from (Wanted(name, same(last, name), last, 0.0) for name in after)


def precedes(name: str) -> bool:
  """Whether a tensor outside the layers stands before them: the embedding."""
  return "embed" in name
