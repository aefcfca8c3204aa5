"""What a recipe's method reads, and its operator called with it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from posttrain_jax.merge.operators import OPERATORS
from posttrain_jax.merge.recipe import Recipe, RecipeError, Source, Wanted
from posttrain_jax.merge.trees import tensor_key

Array = jax.Array
REQUIRED = object()
# the operators' own defaults are mergekit's where this is given
DEFAULT = None


@dataclasses.dataclass(frozen=True)
class Method:
  """mergekit's names of parameters, with defaults: `per_model` those of a model, `whole` those of a tensor."""

  per_model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  whole: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  needs_base: bool = False
  draws: bool = False  # at random, from the recipe's seed
  models: int | None = None  # how many it takes, base not counted; None: any
  # where the base is one of the models and no origin of task vectors
  base_is_model: bool = False
  elementwise: bool = False  # a number of the result follows from the models' numbers at its place


def _sparse(normalize: bool | None = DEFAULT, draws: bool = False, **per_model: Any) -> Method:
  whole = {
    "normalize": normalize,
    "lambda": 1.0,
    "rescale": DEFAULT,
    "int8_mask": False,  # of mergekit's memory; changes no number
  }
  if "gamma" not in per_model:
    whole["semantics"] = DEFAULT
  return Method({"weight": REQUIRED, **per_model}, whole, needs_base=True, draws=draws)


METHODS: Mapping[str, Method] = {
  "linear": Method({"weight": REQUIRED}, {"normalize": True}, base_is_model=True, elementwise=True),
  "slerp": Method({}, {"t": REQUIRED}, needs_base=True, models=1),
  "nuslerp": Method(
    {"weight": REQUIRED}, {"nuslerp_flatten": True, "nuslerp_row_wise": False}, models=2
  ),
  "multislerp": Method({"weight": REQUIRED}, {"normalize_weights": True}),
  "karcher": Method({}, {"max_iter": 10, "tol": 1e-5}, base_is_model=True),
  "passthrough": Method({"scale": DEFAULT}, {}, models=1, elementwise=True),
  "task_arithmetic": Method(
    {"weight": REQUIRED},
    {"normalize": False, "lambda": 1.0, "int8_mask": False},
    needs_base=True,
    elementwise=True,
  ),
  "ties": _sparse(density=1.0),
  "dare_linear": _sparse(density=1.0, draws=True),
  "dare_ties": _sparse(density=1.0, draws=True),
  "della": _sparse(density=1.0, epsilon=0.15, draws=True),
  "della_linear": _sparse(density=1.0, epsilon=0.15, draws=True),
  "breadcrumbs": _sparse(density=1.0, gamma=0.01),
  "breadcrumbs_ties": _sparse(density=1.0, gamma=0.01),
  "model_stock": Method({}, {"filter_wise": False, "semantics": DEFAULT}, needs_base=True),
  "sce": Method({}, {"select_topk": 1.0, "semantics": DEFAULT}, needs_base=True),
}


# parameters that are no numbers with a fraction
SWITCHES = (
  *("normalize", "normalize_weights", "rescale", "int8_mask", "filter_wise"),
  *("nuslerp_flatten", "nuslerp_row_wise"),
)
WORDS, COUNTS = ("semantics",), ("max_iter",)


def check(recipe: Recipe) -> Method:
  """The recipe's method, every parameter of which it reads.

  Raises:
    RecipeError: an unknown method or parameter, a missing base or parameter, too many or too few models.
  """
  if recipe.method not in METHODS:
    near = difflib.get_close_matches(recipe.method, METHODS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise RecipeError(f"merge_method={recipe.method!r}: known are {', '.join(METHODS)}{hint}")
  method = METHODS[recipe.method]
  known = [*method.per_model, *method.whole]
  sections = [recipe.parameters, recipe.module]
  for part in recipe.slices:
    sections += [part.parameters, *(source.parameters for source in part.sources)]
  for name, parameter in (item for section in sections for item in section.items()):
    if name not in known:
      raise RecipeError(f"parameter {name!r}: {recipe.method} reads {', '.join(known) or 'none'}")
    _check_kind(name, parameter)
  if method.needs_base and recipe.base is None:
    raise RecipeError(f"{recipe.method} starts from a base: write base_model")
  for part in recipe.slices:
    others = [s for s in part.sources if s.model != recipe.base or method.base_is_model]
    if method.models is not None and len(others) != method.models:
      raise RecipeError(
        f"{recipe.method} takes {method.models} model{'s' * (method.models > 1)} beside the base, here are"
        f" {len(others)}: {', '.join(str(s.model) for s in others)}"
      )
    if not others:
      raise RecipeError(f"{recipe.method}: there is no model beside the base")
    if method.needs_base and recipe.base not in [s.model for s in part.sources]:
      raise RecipeError(
        f"a slice has no source of the base, {recipe.base}: name which of its layers the others are compared with"
      )
  return method


def _check_kind(name: str, parameter: Any) -> None:
  """Raises RecipeError where a value, or one of a list or filter, is not of the parameter's kind."""
  if isinstance(parameter, list | tuple):
    for part in parameter:
      _check_kind(name, part["value"] if isinstance(part, Mapping) else part)
    return
  kinds = {
    **dict.fromkeys(SWITCHES, bool),
    **dict.fromkeys(WORDS, str),
    **dict.fromkeys(COUNTS, int),
  }
  kind = kinds.get(name, int | float)
  is_switch = isinstance(parameter, bool) or (name in SWITCHES and parameter in (0, 1))
  if is_switch != (name in SWITCHES) or not (is_switch or isinstance(parameter, kind)):
    said = {bool: "true or false", str: "a word", int: "a whole number"}.get(kind, "a number")
    raise RecipeError(f"{name}={parameter!r}: write {said}")


def apply(recipe: Recipe, wanted: Wanted, arrays: Sequence[np.ndarray], *, dtype: str) -> Array:
  """The merged tensor, of the dtype named; arrays are in the order of wanted's inputs.

  Raises:
    RecipeError: a parameter that is needed and not given for this tensor, or out of range; names model and tensor.
  """
  method = METHODS[recipe.method]
  sources = _sources(recipe, method, wanted)
  base, models = None, []
  for (source, _), array in zip(wanted.inputs, arrays):
    if source in sources:
      models.append(array)
    else:
      base = array
  options = _options(recipe, method, wanted, sources)
  if base is not None and _weightless(options):
    return jax.numpy.asarray(base).astype(dtype)  # filters may leave a tensor to the base
  if base is not None:
    options["base"] = base
  if method.draws:
    options["key"] = tensor_key(jax.random.key(recipe.seed), wanted.name)
  try:
    return _called(recipe.method, models, {**options, "dtype": dtype})
  except ValueError as error:
    raise RecipeError(f"{wanted.name}: {error}") from error


def rehearse(recipe: Recipe, wanted: Sequence[Wanted]) -> None:
  """Merges small arrays in every tensor's place, so that what a parameter is refused for is said beforehand.

  Raises:
    RecipeError: as `apply`.
  """
  method, seen = METHODS[recipe.method], set()
  if method.needs_base and all(
    _weightless(_options(recipe, method, tensor, _sources(recipe, method, tensor)))
    for tensor in wanted
  ):
    raise RecipeError("all weights are zero: the merge would be the base; give a model a weight")
  for tensor in wanted:
    settings = [
      recipe.setting(name, tensor.name, tensor.at, tensor.part, source)
      for source in (None, *(source for source, _ in tensor.inputs))
      for name in (*method.whole, *method.per_model)
    ]
    key = (repr(settings), len(tensor.inputs))
    if key not in seen:
      seen.add(key)
      arrays = [np.eye(2, dtype=np.float32) * (2 + i) for i in range(len(tensor.inputs))]
      apply(recipe, tensor, arrays, dtype="float32")


def _sources(recipe: Recipe, method: Method, wanted: Wanted) -> list[Source]:
  """Those that are merged, without the base where that is the origin of task vectors."""
  return [s for s, _ in wanted.inputs if s.model != recipe.base or _counts(method, s)]


def _weightless(options: Mapping[str, Any]) -> bool:
  """Whether no model counts for this tensor."""
  weights = options.get("weight")
  return weights is not None and not any(weights)


def _counts(method: Method, source: Source) -> bool:
  """Whether a source of the base is merged as a model: it is one, and says how."""
  return method.base_is_model and (not method.per_model or bool(source.parameters))


def _options(recipe: Recipe, method: Method, wanted: Wanted, sources: Sequence[Source]) -> dict:
  options: dict[str, Any] = {}
  for name, default in method.whole.items():
    options[name] = _setting(recipe, wanted, name, default, None)
  for name, default in method.per_model.items():
    options[name] = [_setting(recipe, wanted, name, default, source) for source in sources]
  return options


def _setting(recipe: Recipe, wanted: Wanted, name: str, default: Any, source: Source | None) -> Any:
  value = recipe.setting(name, wanted.name, wanted.at, wanted.part, source)
  if value is None and default is REQUIRED:
    of = f" of {source.model}" if source is not None else ""
    raise RecipeError(
      f"{recipe.method} needs the parameter {name!r}{of} for {wanted.name}: none is given, or no filter fits"
    )
  return default if value is None else value


def _called(name: str, models: Sequence[Array], options: dict[str, Any]) -> Array:
  """The operator, with mergekit's names of parameters turned to its own."""
  arguments = {option: value for option, value in options.items() if value is not None}
  arguments.pop("int8_mask", None)
  for theirs, ours in RENAMED.items():
    if theirs in arguments:
      arguments[ours] = arguments.pop(theirs)
  if name == "slerp":
    return OPERATORS[name](arguments.pop("base"), *models, **arguments)
  if name == "nuslerp":
    flat, rows = arguments.pop("nuslerp_flatten"), arguments.pop("nuslerp_row_wise")
    arguments["along"] = "all" if flat else "out" if rows else "in"
    return OPERATORS[name](*models, **arguments)
  if name == "passthrough":
    (scale,) = arguments.pop("scale", [None])
    arguments.pop("base", None)
    return OPERATORS[name](*models, **arguments, scale=scale)
  if name in ("linear", "karcher"):
    arguments.pop("base", None)
  return OPERATORS[name](models, **arguments)


RENAMED = {
  "weight": "weights",
  "lambda": "lambda_",
  "normalize_weights": "normalize",
  "select_topk": "density",
}
