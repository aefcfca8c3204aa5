"""Rows without waste: best-fit packing, and length buckets where examples keep a row each.

A batch is a dict of arrays [batch, time], the same keys whether packed or not:

  tokens       int32  0 where there is padding
  loss_mask    bool   True where the token is a trained target, predicted from the one before it
  segment_ids  int32  1, 2, ... for the examples of a row, 0 for padding
  positions    int32  from 0 in each segment
  channel      int32  index into the table of channel names, -1 for none

Where a teacher's most likely tokens were computed beforehand, also [batch, time, k] and [batch, time, k + 1]:

  teacher_ids    int32    the k tokens that it held likeliest in the token's place
  teacher_logps  float32  their log-probabilities, and that of all others together

Rows of answers (`data.answers`) have more, in the order of the answers of a row:

  prefix_ids   int32  the segment of the common beginning that the token sees too, 0 for none; only where answers share
  answer       int32  which answer of the row the token belongs to; the number of slots where it is none's
  present      bool   [batch, slots] whether there is an answer
  group        int32  [batch, slots] which of the row's prompts it is an answer to, from 0
  <value>      float32 [batch, slots] label, score, advantage, margin, weight
  ref_logps    float32 log-probabilities under the reference, where they were computed beforehand
  sampling_logps float32 log-probabilities that tokens were drawn with, where the policy wrote them
  kept         uint32 [batch, time, words] which tokens each was drawn among, where a filter left some out
  steps        float32 labels of steps where they end, NaN elsewhere
  companion    such a batch again, of the answers' companions
"""

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from posttrain_jax.data.answers import Answers
from posttrain_jax.data.encoded import Example

Batch = dict[str, Any]
TAUGHT = ("teacher_ids", "teacher_logps")


def best_fit(lengths: ArrayLike, capacity: int) -> list[list[int]]:
  """Indices of `lengths` grouped into rows of at most `capacity`, by best-fit decreasing.

  Each length, longest first, goes to the fullest row that still has room; equal lengths keep their
  order, so the result depends on nothing but the arguments.
  """
  lengths = np.asarray(lengths)
  if len(lengths) and lengths.max() > capacity:
    at = int(lengths.argmax())
    raise ValueError(f"item {at} has length {lengths[at]}, more than a row's {capacity}")
  rows: list[list[int]] = []
  with_room: dict[int, list[int]] = {}  # room -> the rows that have exactly it
  rooms: list[int] = []  # the keys of with_room, sorted
  for index in np.argsort(-lengths, kind="stable").tolist():
    length = int(lengths[index])
    place = bisect.bisect_left(rooms, length)
    if place == len(rooms):
      row, room = len(rows), capacity
      rows.append([])
    else:
      room = rooms[place]
      row = with_room[room].pop()
      if not with_room[room]:
        del with_room[room], rooms[place]
    rows[row].append(index)
    left = room - length
    if left:
      if left not in with_room:
        with_room[left] = []
        bisect.insort(rooms, left)
      with_room[left].append(row)
  return rows


def pack(
  examples: Sequence[Example],
  rows: Sequence[Sequence[int]],
  length: int,
  channels: Sequence[str] = (),
) -> Batch:
  """The batch whose row r holds `examples[i] for i in rows[r]`, one segment each, padded at the end.

  An empty row is all padding: it fills a batch up without adding to any loss.
  """
  batch = {
    "tokens": np.zeros((len(rows), length), np.int32),
    "loss_mask": np.zeros((len(rows), length), bool),
    "segment_ids": np.zeros((len(rows), length), np.int32),
    "positions": np.zeros((len(rows), length), np.int32),
    "channel": np.full((len(rows), length), -1, np.int32),
  }
  taught = [name for name in TAUGHT if examples and getattr(examples[0], name) is not None]
  for name in taught:
    given = getattr(examples[0], name)
    batch[name] = np.zeros((len(rows), length, given.shape[1]), given.dtype)
  table = {name: at for at, name in enumerate(channels)}
  for r, row in enumerate(rows):
    start = 0
    for segment, index in enumerate(row, 1):
      example = examples[index]
      here = np.s_[r, start : start + len(example)]
      start += len(example)
      if start > length:
        raise ValueError(f"row {r} holds {start} tokens and more, but its length is {length}")
      batch["tokens"][here] = example.tokens
      batch["loss_mask"][here] = example.mask
      batch["loss_mask"][r, start - len(example)] = False  # its predecessor is another example's
      batch["segment_ids"][here] = segment
      batch["positions"][here] = np.arange(len(example))
      if example.channel is not None:
        batch["channel"][here] = table[example.channel]
      for name in taught:
        batch[name][here] = getattr(example, name)
  return batch


def slots(examples: Sequence[Answers], length: int, packing: bool) -> int:
  """How many answers a row of `length` has room for."""
  most = max(example.count for example in examples)
  if not packing:
    return most
  shortest = min(len(example) / example.count for example in examples)
  return most * max(1, -(-int(length / shortest) // most))


def pack_answers(
  examples: Sequence[Answers],
  rows: Sequence[Sequence[int]],
  length: int,
  slots: int,
  *,
  shares: bool = True,
) -> Batch:
  """The batch whose row r holds the answers of `examples[i] for i in rows[r]`, padded at the end.

  shares: whether any example has a beginning that its answers share; without, there are no `prefix_ids`.
  """
  first = examples[0]
  time, slot = (len(rows), length), (len(rows), slots)
  batch: Batch = {
    "tokens": np.zeros(time, np.int32),
    "loss_mask": np.zeros(time, bool),
    "segment_ids": np.zeros(time, np.int32),
    "positions": np.zeros(time, np.int32),
    "answer": np.full(time, slots, np.int32),
    "present": np.zeros(slot, bool),
    "group": np.zeros(slot, np.int32),
    **{name: np.zeros(slot, np.float32) for name in first.values},
  }
  if shares:
    batch["prefix_ids"] = np.zeros(time, np.int32)
  if first.ref_logps is not None:
    batch["ref_logps"] = np.zeros(time, np.float32)
  if first.sampling_logps is not None:
    batch["sampling_logps"] = np.zeros(time, np.float32)
  if first.kept is not None:
    batch["kept"] = np.zeros((*time, first.kept.shape[1]), np.uint32)
  if first.steps is not None:
    batch["steps"] = np.full(time, np.nan, np.float32)
  for r, row in enumerate(rows):
    start = segments = answers = 0
    for at, example in enumerate(examples[i] for i in row):
      n = len(example.tokens)
      if start + n > length:
        raise ValueError(f"row {r} holds {start + n} tokens and more, but its length is {length}")
      here = np.s_[r, start : start + n]
      ids, prefixes, count = example.segments()
      batch["tokens"][here] = example.tokens
      batch["loss_mask"][here] = example.mask
      batch["segment_ids"][here] = ids + segments
      if shares:
        batch["prefix_ids"][here] = np.where(prefixes > 0, prefixes + segments, 0)
      batch["positions"][here] = example.positions
      batch["answer"][here] = np.where(example.answer < 0, slots, example.answer + answers)
      batch["present"][r, answers : answers + example.count] = True
      batch["group"][r, answers : answers + example.count] = at
      for name, values in example.values.items():
        batch[name][r, answers : answers + example.count] = values
      by_token = (
        ("ref_logps", example.ref_logps),
        ("sampling_logps", example.sampling_logps),
        ("kept", example.kept),
        ("steps", example.steps),
      )
      for name, values in by_token:
        if values is not None:
          batch[name][here] = values
      start, segments, answers = start + n, segments + count, answers + example.count
  if first.companion is not None:
    companions = [e.companion for e in examples if e.companion is not None]
    batch["companion"] = pack_answers(companions, rows, length, slots, shares=shares)
  return batch


def bucket_edges(
  lengths: ArrayLike, *, count: int = 4, multiple: int = 64, longest: int | None = None
) -> tuple[int, ...]:
  """At most `count` row lengths, multiples of `multiple`, with the least padding for these lengths.

  Exact, by dynamic programming over the multiples in use.  `longest` caps the last edge, where a
  sequence length that is no multiple would otherwise be exceeded.
  """
  lengths = np.asarray(lengths)
  if not len(lengths):
    raise ValueError("bucket_edges needs at least one length")
  steps, counts = np.unique(-(-lengths // multiple), return_counts=True)
  below = np.concatenate([[0], np.cumsum(counts)])
  # Padded tokens of candidates i..j in one bucket that ends at j; cost[j] is the best so far up to j.
  alone = np.where(
    np.tri(len(steps), dtype=bool), (below[1:, None] - below[None, :-1]) * steps[:, None], np.inf
  )
  cost, choices = alone[:, 0], []
  for _ in range(min(count, len(steps)) - 1):
    options = alone + np.concatenate([[0], cost[:-1]])
    choices.append(options.argmin(1))
    cost = options.min(1)
  edges, j = [int(steps[-1])], len(steps) - 1
  for choice in reversed(choices):
    j = int(choice[j]) - 1
    if j < 0:
      break
    edges.append(int(steps[j]))
  limit = longest or edges[0] * multiple
  return tuple(sorted({min(edge * multiple, limit) for edge in edges}))
