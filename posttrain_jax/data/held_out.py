"""Which rows are used and which are held out: drawn by a seed, of each label its share, no prompt on both sides.

Files are sorted more often than not: by label, by source, by length.  The head or the tail of one is no sample of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from posttrain_jax.data.answers import Answers

MOST = 64  # rows that are held out where nobody says how many
LIMIT, HELD_OUT = 1, 2  # what is drawn, so that one draw is not the other's


def limited(examples: Sequence[Any], count: int, *, seed: int) -> Sequence[Any]:
  """`count` of the examples, in their order; all of them where there are no more."""
  if len(examples) <= count:
    return examples
  return _of(examples, draw([(i,) for i in range(len(examples))], examples, count, seed, LIMIT))


def parted(
  examples: Sequence[Any], count: int, *, seed: int
) -> tuple[Sequence[Any], Sequence[Any], str]:
  """(the rest, `count` examples that are held out, what is to be said of it), both in their order.

  All examples of a prompt, and all pieces of a row, stay on one side, so that there may be fewer than `count`.  Where
  no prompt has so few, as where all rows have one, prompts are told apart by nothing, and rows are drawn.
  """
  groups = together(examples)
  taken = draw(groups, examples, count, seed, HELD_OUT)
  note = ""
  if not taken:
    taken = draw([(i,) for i in range(len(examples))], examples, count, seed, HELD_OUT)
    note = f"held out: each prompt has more than {count} rows, so that prompts of held-out rows are trained on too"
  elif len(taken) < count:
    note = f"held out: {len(taken)} rows, not {count}, since all rows of a prompt stay on one side"
  rest = sorted({*range(len(examples))} - {*taken})
  return _of(examples, rest), _of(examples, taken), note


def draw(
  groups: Sequence[Sequence[int]], examples: Sequence[Any], count: int, seed: int, what: int
) -> list[int]:
  """Members of whole groups, `count` of them or as near below as there is, in rising order.

  Each label has its share of them (at least one, where there is room), and keeps one at least where it has several.
  """
  rng = np.random.default_rng((seed, what))
  order = [groups[i] for i in rng.permutation(len(groups))]
  strata: dict[Hashable, list[Sequence[int]]] = {}
  for group in order:
    strata.setdefault(tuple(sorted({label(examples[i]) for i in group})), []).append(group)
  taken: list[int] = []
  left: list[Sequence[int]] = []
  sizes = [sum(map(len, some)) for some in strata.values()]
  for some, share in zip(strata.values(), _shares(sizes, count)):
    left += _fill(some, share, taken)
  _fill(left, count - len(taken), taken)
  return sorted(taken)


def together(examples: Sequence[Any]) -> list[list[int]]:
  """Examples by their prompt, or where there is none by their row."""
  groups: dict[Hashable, list[int]] = {}
  for i, example in enumerate(examples):
    groups.setdefault(prompt(example) or example.origin or i, []).append(i)
  return list(groups.values())


def prompt(example: Any) -> bytes:
  """The tokens before the first trained one; b"" where there is one at most, which every text begins with."""
  if isinstance(example, Answers):
    tokens = example.prompt(0)
  else:
    tokens = example.tokens[: int(np.argmax(example.mask))]
  return tokens.tobytes() if len(tokens) > 1 else b""


def label(example: Any) -> float:
  """The label of an answer, of labelled steps the lowest; -1 where there is none."""
  if not isinstance(example, Answers):
    return -1.0
  if example.steps is not None and not np.isnan(example.steps).all():
    return float(np.nanmin(example.steps))
  return example.values["label"][0] if "label" in example.values else -1.0


def _fill(groups: Sequence[Sequence[int]], room: int, taken: list[int]) -> list[Sequence[int]]:
  """Adds the groups that fit to `taken`; returns the others."""
  left = []
  for group in groups:
    if len(group) <= room:
      taken += group
      room -= len(group)
    else:
      left.append(group)
  return left


def _shares(sizes: Sequence[int], count: int) -> list[int]:
  """`count` in parts as `sizes` are: largest remainders, each 1 at least where there is room for it."""
  exact = np.asarray(sizes) * (count / sum(sizes))
  shares = np.floor(exact).astype(int)
  if count >= len(sizes):
    shares = np.maximum(shares, 1)
  for i in np.argsort(-(exact - shares), kind="stable"):
    if shares.sum() < count:
      shares[i] += 1
  while shares.sum() > count:
    shares[np.argmax(shares - exact)] -= 1
  # what is left over of a label trains
  return [int(min(n, max(size - 1, 1))) for n, size in zip(shares, sizes)]


def _of(examples: Sequence[Any], indices: Sequence[int]) -> Sequence[Any]:
  return tuple(examples[i] for i in indices)
