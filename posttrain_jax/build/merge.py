"""A recipe and the models that it names become one Hugging Face folder."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax import settings
from posttrain_jax.adapters import peft_format
from posttrain_jax.build import evaluation, export
from posttrain_jax.build import vocabulary as vocabularies
from posttrain_jax.core import files, shards, tree, weight
from posttrain_jax.core.weight import Adapted
from posttrain_jax.evals import merges, tasks
from posttrain_jax.merge import methods, stream, vocabulary
from posttrain_jax.merge import recipe as recipes
from posttrain_jax.merge.recipe import ModelRef, Recipe, RecipeError, Wanted
from posttrain_jax.models import decoder, fetch, hf
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.quant import bnb

log = logging.getLogger(__name__)

QUANTISED = "quantization_config"  # of a config.json, where matrices are not stored as they are


def merge(
  recipe_path: str, out: str | Path, *, workers: int = 1, evaluate: str = "", limit: int = 0
) -> Path:
  """The folder `out`, merged as the recipe says; the same call again goes on where it was killed.

  Args:
    recipe_path: mergekit's YAML, or `FILE.py[:argument,...]`, a config file whose get_config gives the same fields.
      Paths in it are relative to the working folder.
    workers: tensors computed at once, each with memory of its own; the result does not depend on it.
    evaluate: built-in tasks and data files, with commas between, on which every model and the merge are scored;
      `merge_report.{md,json,png}` is left beside the weights.
    limit: of each, so many examples; 0 for all.

  Raises:
    RecipeError: the recipe, or what it names, cannot be merged: models of different structure, shape or vocabulary.
    FileExistsError: out is there already.
    OSError: the disk is too small for the result, or full.
  """
  out, began = Path(out), time.monotonic()
  if out.exists():
    raise FileExistsError(f"{out} exists; name a new folder, or remove it first")
  recipe = read(recipe_path)
  methods.check(recipe)
  if workers < 1:
    raise RecipeError(f"--workers={workers}: at least one tensor is computed at a time")
  measured = [source for source in evaluate.split(",") if source]
  for source in measured:
    if source not in tasks.TASKS and not Path(source).exists():
      known = ", ".join(tasks.TASKS)
      raise RecipeError(f"--evaluate={source}: no such file, and no built-in task ({known})")
  folders = {model: fetch.resolve(model.name) for model in recipe.models()}
  if recipe.vocabulary is not None and recipe.vocabulary.source is not None:
    folders.setdefault(recipe.vocabulary.source, fetch.resolve(recipe.vocabulary.source.name))
  opened = {model: opened_model(model, folders[model]) for model in recipe.models()}
  opened, tokenizer = vocabularies.lay_out(recipe, opened, folders)
  plan = stream.plan(recipe, opened)
  methods.rehearse(recipe, plan.wanted)
  names = ", ".join(map(str, recipe.models()))
  log.info(
    "%s of %s: %d tensors, %.2f GB", recipe.method, names, len(plan.wanted), plan.nbytes() / 1e9
  )
  operator = functools.partial(
    _operator, recipe, dict(zip((w.name for w in plan.wanted), plan.dtypes))
  )
  finish = functools.partial(_finish, plan, folders, tokenizer)
  stream.run(plan, opened, operator, out, finish=finish, workers=workers)
  log.info("written in %.1f s: %s", time.monotonic() - began, out)
  if measured:
    _report(plan, opened, out, measured, limit)
  return out


def _report(
  plan: stream.Plan,
  opened: Mapping[ModelRef, stream.Tensors],
  out: Path,
  sources: Sequence[str],
  limit: int,
) -> None:
  """Scores of every model and of the merge, and how the task vectors meet."""
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


def opened_model(model: ModelRef, folder: Path) -> stream.Tensors:
  """The tensors of a model by name, each read when it is asked for: dequantised, and with its adapter merged in."""
  reader: stream.Tensors = shards.Reader(folder)
  if QUANTISED in files.read_json(folder / "config.json"):
    reader = _Dequantised(reader)
  return reader if model.adapter is None else _WithAdapter(reader, folder, model.adapter)


class _Dequantised:
  """A model whose matrices bitsandbytes quantised, each made dense when it is read: what an adapter was trained on."""

  def __init__(self, reader: stream.Tensors):
    self.reader = reader
    parts = {name: bnb.parts(name, reader.where) for name in reader.where}
    self.parts = {
      name: tensor_names
      for name, tensor_names in parts.items()
      if bnb.storage(tensor_names) != "dense"
    }
    inner = {
      part for tensor_names in self.parts.values() for what, part in tensor_names.items() if what
    }
    self.where = {name: path for name, path in reader.where.items() if name not in inner}

  def shape(self, name: str) -> tuple[int, ...]:
    return self._weight(name).shape[::-1] if name in self.parts else self.reader.shape(name)

  def stored(self, name: str) -> str:
    if name not in self.parts:
      return self.reader.stored(name)
    return files.DTYPES[str(np.dtype(self._weight(name).dtype))]

  def get(self, name: str) -> np.ndarray:
    if name not in self.parts:
      return self.reader.get(name)
    return np.asarray(weight.dense(jax.tree.map(jnp.asarray, self._weight(name)))).T

  def _weight(self, name: str) -> Any:
    tensors = {part: self.reader.get(tensor_name) for part, tensor_name in self.parts[name].items()}
    return bnb.read(name, tensors, bnb.shape(tensors))


class _WithAdapter:
  """A model's tensors with an adapter merged in, each when it is read."""

  def __init__(self, reader: stream.Tensors, folder: Path, adapter: str):
    self.reader, self.where = reader, reader.where
    config = hf.read_config(folder)
    leaves = ((path, _leaf(reader, path, config)) for path in _paths(reader, config))
    nodes, adapter_config = peft_format.load(adapter, tree.unflatten(leaves), config)
    if not adapter_config.in_weights:
      raise RecipeError(
        f"{adapter}: a {adapter_config.method} stands before the text and is in no weight"
      )
    self.places = {}
    for path, node in tree.items(nodes):
      if path == "lm_head/weight" and config.tied:
        raise RecipeError(f"{adapter} changes the head, which {folder} has tied to its embedding")
      layers = range(config.num_layers) if path.startswith("layers/") else [None]
      self.places |= {hf.hf_name(path, i): (path, i, node) for i in layers}
    lacking = sorted(set(self.places) - set(self.where))
    if lacking:
      raise RecipeError(f"{adapter} changes {lacking[0]!r}, which {folder} does not hold")

  def shape(self, name: str) -> tuple[int, ...]:
    return self.reader.shape(name)

  def stored(self, name: str) -> str:
    return self.reader.stored(name)

  def get(self, name: str) -> np.ndarray:
    array = self.reader.get(name)
    if name not in self.places:
      return array
    path, i, node = self.places[name]
    layer_node = node if i is None else weight.layer(node, i)
    turn = (lambda x: x.T) if tree.turned(path) else (lambda x: x)
    return np.asarray(turn(_merged(jnp.asarray(turn(array)), layer_node)))


class _Stacked:
  """A leaf [layers, ...] of which a layer is read when it is asked for: DoRA's norms are of its base."""

  def __init__(self, reader: stream.Tensors, path: str, layers: int):
    self.reader, self.path = reader, path
    shape = reader.shape(hf.hf_name(path, 0))
    self.shape = (layers, *(shape[::-1] if tree.turned(path) else shape))
    self.dtype = np.dtype(np.float32)

  def __getitem__(self, i: int) -> np.ndarray:
    array = self.reader.get(hf.hf_name(self.path, i))
    return array.T if tree.turned(self.path) else array


def _paths(reader: stream.Tensors, config: ModelConfig) -> list[str]:
  """Paths of the decoder that the files hold under the names they are written with."""
  name = lambda path: hf.hf_name(path, 0 if path.startswith("layers/") else None)
  return [path for path, _ in tree.items(decoder.specs(config)) if name(path) in reader.where]


def _leaf(reader: stream.Tensors, path: str, config: ModelConfig) -> Any:
  if path.startswith("layers/"):
    return _Stacked(reader, path, config.num_layers)
  array = reader.get(hf.hf_name(path))
  return array.T if tree.turned(path) else array


@jax.jit
def _merged(base, node):
  """The base with its adapter in float32, whatever the base's dtype: it is rounded once, with the result."""
  return weight.dense(Adapted(base.astype(jnp.float32), node), jnp.float32)


def _finish(plan: stream.Plan, folders: Mapping[ModelRef, Path], tokenizer: Any, out: Path) -> None:
  """Config and tokenizer of the merged model."""
  recipe = plan.recipe
  leading = recipe.leading
  described = files.read_json(folders[leading] / "config.json")
  described["dtype"] = plan.dtypes[0]
  for key in ("torch_dtype", QUANTISED):
    described.pop(key, None)
  if not recipe.whole:
    kinds = described.get("layer_types")
    described["num_hidden_layers"] = plan.layers
    if kinds:
      described["layer_types"] = _layer_types(recipe, folders)
  if tokenizer is not None:
    shapes = dict(zip((wanted.name for wanted in plan.wanted), plan.shapes))
    described["vocab_size"] = shapes[vocabulary.ROWS[0]][0]
  files.write_json(out / "config.json", described)
  tokenizer_from = recipe.vocabulary.source if recipe.vocabulary is not None else None
  folder = folders[tokenizer_from or leading]
  if tokenizer is None:
    hf.copy_tokenizer(folder, out)
  else:
    tokenizer.save_pretrained(out)
    hf.copy_tokenizer(folder, out, ("generation_config.json",))
  if recipe.chat_template not in (None, "auto"):
    export.write_template(out, recipe.chat_template)


def _layer_types(recipe: Recipe, folders: Mapping[ModelRef, Path]) -> list[str]:
  """Which layers attend how, of the layers that the slices take."""
  kinds = []
  for part in recipe.slices:
    source = part.sources[0]
    layer_types = files.read_json(folders[source.model] / "config.json").get("layer_types") or []
    first, end = source.layers or (0, len(layer_types))
    kinds += layer_types[first:end]
  return kinds
