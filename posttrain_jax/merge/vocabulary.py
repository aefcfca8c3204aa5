"""Models whose tokenizers differ, laid out by one vocabulary: which row of which model each token's row is.

The rules are mergekit's.  A token's row is each model's own where that model has the token.  Where it has not, the row
is that of the only model that has the token, or the base's, or else the mean of those that have it; a recipe's
`tokenizer.tokens` names another.  Rows of no token (padding to a multiple) are the mean of all others.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from posttrain_jax.core import shards
from posttrain_jax.merge.recipe import ModelRef, RecipeError, TokenRow, Vocabulary
from posttrain_jax.merge.tensors import Tensors

log = logging.getLogger(__name__)

EMBEDDING = "embed_tokens.weight"
MISSING = -1


def has_rows(name: str) -> bool:
  """Whether a tensor has a row a token, wherever in a larger model its text model stands."""
  return f".{name}".endswith((f".{EMBEDDING}", ".lm_head.weight"))


def embedding(names: Iterable[str]) -> str | None:
  """The embedding among a model's tensors."""
  return next((name for name in names if f".{name}".endswith(f".{EMBEDDING}")), None)


@dataclasses.dataclass(frozen=True)
class Layout:
  """The rows of the merged vocabulary.

  own_rows: of each model, its row of each row of the result; MISSING where it lends one.
  lent: of a row that some model lacks, the (model, row) whose mean it is; none: zeros.
  unnamed: the rows of no token.
  """

  size: int
  own_rows: Mapping[ModelRef, np.ndarray]
  lent: Mapping[int, Sequence[tuple[ModelRef, int]]]
  unnamed: np.ndarray

  def lay(self, model: ModelRef, read: Callable[[ModelRef], np.ndarray]) -> np.ndarray:
    """One model's rows in the order of the result: [size, ...] in float32.

    Args:
      read: a model's tensor as it is stored.
    """
    own_rows, held = self.own_rows[model], {model: read(model)}
    out = np.zeros((self.size, *held[model].shape[1:]), np.float32)
    has = own_rows != MISSING
    out[has] = held[model][own_rows[has]]
    for row in np.flatnonzero(~has):
      lenders = self.lent.get(int(row), ())
      for lender, its_row in lenders:
        if lender not in held:
          held[lender] = read(lender)
        out[row] += held[lender][its_row].astype(np.float32) / len(lenders)
    if len(self.unnamed):
      named = np.delete(np.arange(self.size), self.unnamed)
      out[self.unnamed] = out[named].mean(axis=0)
    return out


class LaidOut:
  """A model's tensors, those with a row a token in the order of the layout."""

  def __init__(self, layout: Layout, model: ModelRef, opened: Mapping[ModelRef, Tensors]):
    self.layout, self.model, self.opened = layout, model, opened

  @property
  def where(self) -> Mapping[str, Path]:
    return self.opened[self.model].where

  def shape(self, name: str) -> tuple[int, ...]:
    shape = self.opened[self.model].shape(name)
    return (self.layout.size, *shape[1:]) if has_rows(name) else shape

  def stored(self, name: str) -> str:
    return self.opened[self.model].stored(name)

  def get(self, name: str) -> np.ndarray:
    if not has_rows(name):
      return self.opened[self.model].get(name)
    return self.layout.lay(self.model, lambda model: self.opened[model].get(name))

  def place(self, name: str) -> shards.Place | None:
    return None if has_rows(name) else self.opened[self.model].place(name)


def layout(
  wanted: Vocabulary,
  out: Mapping[str, int],
  vocabularies: Mapping[ModelRef, Mapping[str, int]],
  rows: Mapping[ModelRef, int],
  base: ModelRef | None,
) -> Layout:
  """The layout of models by the vocabulary `out`.

  Args:
    out: the result's tokens and their numbers.
    vocabularies: each model's.
    rows: how many its embedding has; a token beyond them is one that the model lacks.
    base: whose row is lent first.

  Raises:
    RecipeError: `tokens` names a token, a row or a model that is not there.
  """
  count = max(out.values()) + 1
  size = -(-count // wanted.multiple) * wanted.multiple
  own_rows = {model: np.full(size, MISSING) for model in vocabularies}
  lent: dict[int, list[tuple[ModelRef, int]]] = {}
  nobody = []
  for token, number in out.items():
    having = {}
    for model, vocabulary in vocabularies.items():
      row = vocabulary.get(token, MISSING)
      if 0 <= row < rows[model]:
        having[model] = row
    asked = wanted.tokens.get(token)
    for model, row in having.items():
      if asked is None or not asked.force:
        own_rows[model][number] = row
    if asked is not None and (asked.force or len(having) < len(own_rows)):
      lent[number] = _asked(asked, token, having, vocabularies, rows)
    elif base in having:
      lent[number] = [(base, having[base])]
    else:
      lent[number] = list(having.items())
      nobody += [] if having else [token]
  if nobody:
    log.warning("no model has a row for %s: zeros", ", ".join(map(repr, nobody[:5])))
  unnamed = np.setdiff1d(np.arange(size), np.fromiter(out.values(), int))
  lacking = np.flatnonzero(np.any([places == MISSING for places in own_rows.values()], axis=0))
  return Layout(size, own_rows, {int(i): lent[int(i)] for i in lacking if int(i) in lent}, unnamed)


def _asked(
  asked: TokenRow,
  token: str,
  having: Mapping[ModelRef, int],
  vocabularies: Mapping[ModelRef, Mapping[str, int]],
  rows: Mapping[ModelRef, int],
) -> list[tuple[ModelRef, int]]:
  """The row that a recipe asks for."""
  model = asked.model
  if model is None:
    return []
  if model not in vocabularies:
    raise RecipeError(f"tokenizer.tokens: {token!r} takes a row of {model}, which is not merged")
  if asked.token is None and asked.number is None:
    row = having.get(model)
  else:
    row = asked.number if asked.token is None else vocabularies[model].get(asked.token)
  if row is None or not 0 <= row < rows[model]:
    of = token if asked.token is None else asked.token
    what = f"the row {asked.number}" if asked.number is not None else f"the token {of!r}"
    raise RecipeError(
      f"tokenizer.tokens: {token!r} takes {what} of {model}, whose {rows[model]} rows lack it"
    )
  return [(model, row)]


def difference(one: Mapping[str, int], other: Mapping[str, int], rows: int) -> str | None:
  """The first row that two vocabularies give different tokens; None where all rows agree."""
  ours = {number: token for token, number in one.items()}
  theirs = {number: token for token, number in other.items()}
  for number in range(rows):
    if ours.get(number) != theirs.get(number):
      return f"row {number} is {ours.get(number)!r} in one and {theirs.get(number)!r} in the other"
  return None
