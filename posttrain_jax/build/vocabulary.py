"""The vocabularies of models that are merged, and the tokenizer of the merge."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from posttrain_jax.data import chat
from posttrain_jax.merge import vocabulary
from posttrain_jax.merge.recipe import ModelRef, Recipe, RecipeError
from posttrain_jax.merge.tensors import Tensors
from posttrain_jax.merge.vocabulary import Layout

log = logging.getLogger(__name__)


def lay_out(
  recipe: Recipe, opened: Mapping[ModelRef, Tensors], folders: Mapping[ModelRef, Path]
) -> tuple[Mapping[ModelRef, Tensors], Any]:
  """(the models' tensors by one vocabulary, the merge's tokenizer or None where a model's own will do).

  Models that have one vocabulary and as many rows are left as they are.  Without `tokenizer_source` rows are merged by
  their numbers; that two models' tokenizers disagree about a row is then said in a warning.

  Raises:
    RecipeError: a tokenizer that cannot be read, or `tokens` that are not there; no embedding to lay out.
  """
  wanted = recipe.vocabulary
  if wanted is None:
    _warn(recipe, opened, folders)
    return opened, None
  tokenizer_of = _tokenizers(recipe, folders)
  vocabularies = {model: other.get_vocab() for model, other in tokenizer_of.items()}
  rows = {model: _rows(model, held) for model, held in opened.items()}
  source = recipe.leading if wanted.source is None else wanted.source
  tokenizer = tokenizer_of.get(source)
  if tokenizer is None:
    tokenizer = chat.load_tokenizer(folders[source])
  first = vocabularies[recipe.leading]
  alike = all(known == first for known in (*vocabularies.values(), tokenizer.get_vocab()))
  if alike and len(set(rows.values())) == 1 and not wanted.tokens and wanted.multiple == 1:
    return opened, None
  # a copy: other models' tokenizers are still asked for their tokens
  merged = chat.load_tokenizer(folders[source])
  if wanted.source is None:
    for model, other in tokenizer_of.items():
      _add(merged, other, rows[model])
  known = merged.get_vocab()
  merged.add_tokens([token for token in wanted.tokens if token not in known])
  layout = vocabulary.layout(wanted, merged.get_vocab(), vocabularies, rows, recipe.base)
  log.info("%d tokens in %d rows, of %s", len(merged.get_vocab()), layout.size, _counts(layout))
  return {model: vocabulary.LaidOut(layout, model, opened) for model in opened}, merged


def _counts(layout: Layout) -> str:
  counts = {
    model: int((rows != vocabulary.MISSING).sum()) for model, rows in layout.own_rows.items()
  }
  return ", ".join(f"{model} {count}" for model, count in counts.items())


def _tokenizers(recipe: Recipe, folders: Mapping[ModelRef, Path]) -> dict[ModelRef, Any]:
  """The tokenizer of every model; one without files of its own has the leading model's, as in mergekit."""
  tokenizer_of = {recipe.leading: chat.load_tokenizer(folders[recipe.leading])}
  for model in recipe.models():
    if model in tokenizer_of:
      continue
    try:
      tokenizer_of[model] = chat.load_tokenizer(folders[model])
    except FileNotFoundError:
      log.warning("%s has no tokenizer: taken to have that of %s", model, recipe.leading)
      tokenizer_of[model] = tokenizer_of[recipe.leading]
    except ValueError as error:
      raise RecipeError(f"tokenizer_source: {error}") from error
  return tokenizer_of


def _add(merged: Any, other: Any, rows: int) -> None:
  """The other's tokens that have a row and are not there yet: in its order, special ones as it has them, last."""
  known, special = merged.get_vocab(), other.added_tokens_decoder
  plain = sorted((number, token) for token, number in other.get_vocab().items())
  plain = [token for number, token in plain if number < rows and number not in special]
  merged.add_tokens([token for token in plain if token not in known])
  merged.add_tokens([token for number, token in sorted(special.items()) if number < rows])


def _rows(model: ModelRef, held: Tensors) -> int:
  name = vocabulary.embedding(held.where)
  if name is None:
    raise RecipeError(
      f"tokenizer_source: {model} has no {vocabulary.EMBEDDING}, whose rows are the tokens'"
    )
  return held.shape(name)[0]


def _warn(
  recipe: Recipe, opened: Mapping[ModelRef, Tensors], folders: Mapping[ModelRef, Path]
) -> None:
  """Says where rows of one number are of different tokens."""
  paths = {model: folders[model] / "tokenizer.json" for model in recipe.models()}
  embedded = [model for model, held in opened.items() if vocabulary.embedding(held.where)]
  paths = {model: path for model, path in paths.items() if model in embedded and path.exists()}
  if len({path.read_bytes() for path in paths.values()}) < 2:
    return
  known = {model: _vocabulary(path) for model, path in paths.items()}
  first, *others = paths
  for other in others:
    rows = min(_rows(first, opened[first]), _rows(other, opened[other]))
    differ = vocabulary.difference(known[first], known[other], rows)
    if differ is not None:
      log.warning(
        "the tokenizers of %s and %s differ: %s; rows are merged by number. To merge them by token write"
        " tokenizer_source: union, or base",
        first,
        other,
        differ,
      )


def _vocabulary(path: Path) -> Mapping[str, int]:
  try:
    return tokenizers.Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
  except Exception as error:  # the library raises nothing narrower
    raise RecipeError(f"{path} is no tokenizer: {error}; fetch it again") from error
