"""A recipe and the models that it names become one Hugging Face folder."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from posttrain_jax import settings
from posttrain_jax.build import merge_inputs, merge_meaning
from posttrain_jax.build import vocabulary as vocabularies
from posttrain_jax.core import files
from posttrain_jax.merge import methods, stream, vocabulary
from posttrain_jax.merge import recipe as recipes
from posttrain_jax.merge.recipe import ModelRef, Recipe, RecipeError, Wanted
from posttrain_jax.models import fetch, hf

log = logging.getLogger(__name__)


def merge(
  recipe_path: str, out: str | Path, *, workers: int = 1, evaluate: str = "", limit: int = 0
) -> Path:
  """The folder `out`, merged as the recipe says; the same call again goes on where it was killed.

  Args:
    recipe_path: mergekit's YAML, or `FILE.py[:argument,...]`, a config file whose get_config gives the same fields.
      Paths in it are relative to the working folder.
    workers: tensors computed at once, each with memory of its own; the result does not depend on it.
    evaluate: built-in tasks and data files, with commas between, on which every model and the merge are scored;
      `merge_report.{md,json,html}` is left beside the weights.
    limit: of each, so many examples; 0 for all.

  Raises:
    RecipeError: the recipe, or what it names, cannot be merged: models of different structure, shape, vocabulary
      or function.
    FileExistsError: out is there already.
    OSError: the disk is too small for the result, or full.
  """
  out, began = Path(out), time.monotonic()
  if out.exists():
    raise FileExistsError(f"{out} exists; name a new folder, or remove it first")
  recipe = read(recipe_path)
  method = methods.check(recipe)
  if workers < 1:
    raise RecipeError(f"--workers={workers}: at least one tensor is computed at a time")
  measured = [source for source in evaluate.split(",") if source]
  if measured:
    _check_sources(measured)
  folders = {model: fetch.resolve(model.name) for model in recipe.models()}
  if recipe.vocabulary is not None and recipe.vocabulary.source is not None:
    folders.setdefault(recipe.vocabulary.source, fetch.resolve(recipe.vocabulary.source.name))
  opened = merge_inputs.opened(recipe.models(), folders)
  _say_twice(recipe, folders)
  opened, tokenizer = vocabularies.lay_out(recipe, opened, folders)
  plan = stream.plan(recipe, opened)
  merge_meaning.check(recipe, folders)
  methods.rehearse(recipe, plan.wanted)
  names = ", ".join(map(str, recipe.models()))
  log.info(
    "%s of %s: %d tensors, %.2f GB", recipe.method, names, len(plan.wanted), plan.nbytes() / 1e9
  )
  operator = functools.partial(
    _operator, recipe, dict(zip((w.name for w in plan.wanted), plan.dtypes))
  )
  finish = functools.partial(_finish, plan, folders, tokenizer)
  stream.run(
    plan,
    opened,
    operator,
    out,
    finish=finish,
    elementwise=method.elementwise,
    workers=workers,
  )
  log.info("written in %.1f s: %s", time.monotonic() - began, out)
  if measured:
    _report(plan, opened, out, measured, limit)
  return out


def _check_sources(sources: Sequence[str]) -> None:
  from posttrain_jax.evals import (
    tasks,
  )  # half a second that a merge which is not scored need not wait

  for source in sources:
    if source not in tasks.TASKS and not Path(source).exists():
      known = ", ".join(tasks.TASKS)
      raise RecipeError(f"--evaluate={source}: no such file, and no built-in task ({known})")


def _say_twice(recipe: Recipe, folders: Mapping[ModelRef, Path]) -> None:
  """A model that stands in a slice twice counts twice, under whatever two names of its folder."""
  for part in recipe.slices:
    places = [
      (folders[s.model].resolve(), s.model.adapter, s.layers)
      for s in part.sources
      if s.parameters or s.model != recipe.base
    ]
    twice = [place for i, place in enumerate(places) if place in places[:i]]
    if twice:
      log.warning("%s stands in the recipe twice, and counts with both of its weights", twice[0][0])


def _report(
  plan: stream.Plan,
  opened: Mapping[ModelRef, stream.Tensors],
  out: Path,
  sources: Sequence[str],
  limit: int,
) -> None:
  """Scores of every model and of the merge, and how the task vectors meet."""
  from posttrain_jax.evals import merges

  models = plan.recipe.models()
  base = plan.recipe.base or models[0]
  others = [model for model in models if model != base]
  by_layer = merges.overlaps(_side_by_side(plan, opened, base, others), len(others))
  scores = {str(model): _scores(model.name, model.adapter, sources, limit) for model in models}
  scores["merge"] = _scores(str(out), None, sources, limit)
  merges.write(out, [str(model) for model in others], by_layer, scores)
  log.info("report: %s", out / f"{merges.NAME}.md")


def _scores(
  model: str, adapter: str | None, sources: Sequence[str], limit: int
) -> dict[str, float]:
  """{measure: value} over all sources."""
  from posttrain_jax.build import evaluation

  return {
    f"{Path(source).stem}, {measure}": value
    for source, measures in evaluation.scores(model, adapter, sources, limit).items()
    for measure, value in measures.items()
  }


def _side_by_side(plan: stream.Plan, opened, base: ModelRef, others: Sequence[ModelRef]):
  """(layer, base's tensor, the others') of every tensor that all of them hold."""
  for name in sorted(opened[base].where, key=stream.order):
    if all(name in opened[model].where for model in others):
      match = recipes.LAYER.fullmatch(name)
      layer = match[2] if match else "embedding" if recipes.precedes(name) else "end"
      yield layer, opened[base].get(name), [opened[model].get(name) for model in others]


def read(path: str) -> Recipe:
  """The recipe in a YAML file, or in a config file."""
  name, _, arguments = path.partition(":")
  if not name.endswith(".py"):
    if not Path(path).is_file():
      raise RecipeError(f"{path} does not exist: write a YAML recipe, or a config file (.py)")
    return recipes.load(path)
  return recipes.read(settings.plain(settings.module(name).get_config(arguments or None)))


def _operator(
  recipe: Recipe, dtypes: Mapping[str, str], wanted: Wanted, arrays: Sequence[np.ndarray]
) -> Any:
  # the arrays are this merge's own: nobody will write to what XLA reads in place
  taken = [jax.device_put(array, may_alias=True) for array in arrays]
  return methods.apply(recipe, wanted, taken, dtype=dtypes[wanted.name])


def _finish(plan: stream.Plan, folders: Mapping[ModelRef, Path], tokenizer: Any, out: Path) -> None:
  """Config and tokenizer of the merged model."""
  recipe = plan.recipe
  leading = recipe.leading
  described = files.read_json(folders[leading] / "config.json")
  described["dtype"] = plan.dtypes[0]
  for key in ("torch_dtype", merge_inputs.QUANTISED):
    described.pop(key, None)
  text = merge_inputs.text_config(described)
  if not recipe.whole:
    kinds = text.get("layer_types")
    text["num_hidden_layers"] = plan.layers
    if kinds:
      text["layer_types"] = _layer_types(recipe, folders)
  shapes = dict(zip((wanted.name for wanted in plan.wanted), plan.shapes))
  if tokenizer is not None:
    text["vocab_size"] = shapes[str(vocabulary.embedding(shapes))][0]
  if any(f".{name}".endswith(".lm_head.weight") for name in shapes):
    for part in (described, text):  # the head that is written is the one to be read
      part["tie_word_embeddings"] = False
  files.write_json(out / "config.json", described)
  tokenizer_from = recipe.vocabulary.source if recipe.vocabulary is not None else None
  folder = folders[tokenizer_from or leading]
  if tokenizer is None:
    hf.copy_tokenizer(folder, out)
  else:
    tokenizer.save_pretrained(out)
    hf.copy_tokenizer(folder, out, ("generation_config.json",))
  if recipe.chat_template not in (None, "auto"):
    from posttrain_jax.build import export

    export.write_template(out, recipe.chat_template)


def _layer_types(recipe: Recipe, folders: Mapping[ModelRef, Path]) -> list[str]:
  """Which layers attend how, of the layers that the slices take."""
  kinds = []
  for part in recipe.slices:
    source = part.sources[0]
    described = files.read_json(folders[source.model] / "config.json")
    layer_types = merge_inputs.text_config(described).get("layer_types") or []
    first, end = source.layers or (0, len(layer_types))
    kinds += layer_types[first:end]
  return kinds
