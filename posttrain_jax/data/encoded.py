"""Tokens of a row with a mask of those that are trained, and the examples of a data set."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from posttrain_jax.data.schema import Skipped


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
  """Tokens of one row; `mask` is True where the token is a trained target (never the first)."""

  tokens: np.ndarray  # int32 [time]
  mask: np.ndarray  # bool [time]
  channel: str | None = None
  origin: str = ""
  is_chat: bool = False
  is_cut: bool = False  # lost its end to the length limit, or is a piece of a split text
  is_drawn: bool = (
    False  # the trained tokens are a model's own, and its end is the one that it drew
  )
  spans: tuple[tuple[int, int], ...] = ()  # where each answer, or step of one, begins and ends
  # int32 [time, k] and float32 [time, k + 1]: what a teacher holds likeliest in a token's place, and the rest
  teacher_ids: np.ndarray | None = None
  teacher_logps: np.ndarray | None = None

  def __len__(self):
    return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class Encoded(Sequence):
  """The examples of a data set, what was left out, and how many were cut."""

  examples: tuple[Any, ...]  # of Example, or of answers.Answers
  skipped: Skipped

  @property
  def cut(self) -> int:
    return sum(example.is_cut for example in self.examples)

  def __len__(self):
    return len(self.examples)

  def __getitem__(self, index):
    return self.examples[index]

  def __str__(self):
    tokens = sum(map(len, self.examples))
    trained = sum(int(example.mask.sum()) for example in self.examples)
    return (
      f"{len(self):,} examples, {tokens:,} tokens, {trained:,} trained"
      f" ({trained / max(tokens, 1):.0%}), {self.cut:,} cut, {self.skipped}"
    )


def split(example, limit):
  """Pieces that overlap by one token, so that every token but the first is trained once."""
  return [piece(example, at, limit) for at in range(0, len(example) - 1, limit - 1)]


def piece(example, at, limit):
  mask = example.mask[at : at + limit].copy()
  mask[0] = False
  return dataclasses.replace(
    example, tokens=example.tokens[at : at + limit], mask=mask, is_cut=True, spans=()
  )


def describe(example: Example, tokenizer, *, marks=("[[", "]]")) -> str:
  """The decoded example, its trained tokens between marks."""
  edges = np.flatnonzero(np.diff(example.mask.astype(int), prepend=0, append=0))
  text, done = "", 0
  for at in [*edges, len(example.tokens)]:
    # Decoded from the beginning each time: a piece alone would lose its leading space.
    decoded = tokenizer.decode(example.tokens[:at].tolist(), skip_special_tokens=False)
    piece = decoded[done:]
    trained = at > 0 and example.mask[at - 1]
    text += f"{marks[0]}{piece}{marks[1]}" if trained else piece
    done = len(decoded)
  return text
