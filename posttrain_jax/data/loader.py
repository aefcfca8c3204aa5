"""Batches in an order that follows from (seed, epoch) alone, so that a run resumes anywhere.

The state is two numbers.  Process i of n takes its own rows of each global batch, so the data seen
in a step does not depend on how many processes there are.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain_jax.data import answers, chat, companions, schema
from posttrain_jax.data.answers import Answers
from posttrain_jax.data.mixture import Mixture
from posttrain_jax.data.packing import Batch, best_fit, bucket_edges, pack, pack_answers
from posttrain_jax.data.packing import slots as packing_slots

COUNTED = 64  # epochs whose batches are counted one by one
# what a config calls that which the order of the stream follows from
CALLED = {
  "data": "the digest of the rows",
  "examples": "the number of rows",
  "batch_size": "batch.rows",
  "packing": "data.packing",
  "edges": "lengths of rows (data.length)",
}


@dataclasses.dataclass(frozen=True)
class Stats:
  """What one epoch holds, over all processes."""

  examples: int
  tokens: int
  trained: int
  batches: int
  slots: int  # token positions computed, padding included
  shapes: dict[tuple[int, int], int]  # global [batch, time] -> how many batches

  @property
  def padding(self) -> float:
    """Share of the computed positions that hold no token."""
    return 1 - self.tokens / self.slots

  def __str__(self):
    shapes = ", ".join(f"{b} x {t} ({n})" for (b, t), n in sorted(self.shapes.items()))
    return (
      f"{self.examples:,} examples, {self.tokens:,} tokens, {self.trained:,} trained,"
      f" {self.batches:,} batches, {self.padding:.1%} padding, shapes {shapes}"
    )


class Loader:
  """An endless, resumable iterator over optimizer batches; each epoch is shuffled anew.

  `batch_size` is the rows of a global optimizer batch and `length` the longest row.  With packing a
  row holds several examples; without, rows are padded to one of `edges` (at most four, found from
  the data).  `channels` is the table of names behind the batches' `channel`, by default those that
  occur.  Every example occurs exactly once per epoch (in a mixture, as often as it is drawn):
  the last batch is filled with empty rows rather than dropped.

  `shard=(i, n)` gives process i of n its rows.  With `accumulate=a` a batch reshaped to
  [a, rows / a, time] is its micro-batches, each of them this process's share of the global one.
  """

  def __init__(
    self,
    examples: Sequence[Any] | Mixture,
    *,
    batch_size: int,
    length: int,
    packing: bool = True,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    accumulate: int = 1,
    window: int = 4096,
    edges: Sequence[int] | None = None,
    shuffle: bool = True,
    channels: Sequence[str] | None = None,
  ):
    self._mixture = examples if isinstance(examples, Mixture) else None
    self.examples: tuple[Any, ...] = tuple(
      examples.examples if isinstance(examples, Mixture) else examples
    )
    self.batch_size, self.length, self.packing = batch_size, length, packing
    self.seed, self.shard, self.accumulate = seed, shard, accumulate
    self.window, self.shuffle = window, shuffle
    self._lengths = np.array([len(example) for example in self.examples])
    self._check(edges)
    if packing:
      self.edges = (length,)
    else:
      self.edges = tuple(edges or bucket_edges(self._lengths, longest=length))
    self.channels = channel_names(self.examples) if channels is None else tuple(channels)
    unnamed = sorted({*channel_names(self.examples)} - {*self.channels})
    if unnamed:
      raise ValueError(f"channel {unnamed[0]!r} is not in the table {list(self.channels)}")
    self._plan = functools.lru_cache(maxsize=2)(self._planned)
    self._epoch, self._batch = 0, 0

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    while self._batch >= len(self._plan(self._epoch)):
      self._epoch, self._batch = self._epoch + 1, 0
    edge, rows = self._plan(self._epoch)[self._batch]
    self._batch += 1
    if isinstance(self.examples[0], Answers):
      local_rows = self._local(rows)
      return pack_answers(self.examples, local_rows, edge, self._slots, shares=self._shares)
    return pack(self.examples, self._local(rows), edge, self.channels)

  def batch(self, state: Any, stopping: Any = None) -> Batch:
    """The next one, whatever the state that takes it; it is there at once, so that nothing has to stop it."""
    del state, stopping
    return next(self)

  def told(self, step: int) -> Mapping[str, float]:
    """What else is to be logged of a step: nothing."""
    del step
    return {}

  @property
  def epoch(self) -> float:
    """Epochs gone through, the current one in part."""
    return self._epoch + self._batch / len(self._plan(self._epoch))

  def batches(self, epoch: int = 0) -> int:
    """How many batches an epoch has; with packing this differs a little between epochs."""
    return len(self._plan(epoch))

  def steps(self, epochs: float) -> int:
    """How many batches so many epochs have, the last one in part; at least one."""
    whole = int(epochs)
    part = round((epochs - whole) * self.batches(whole)) if epochs > whole else 0
    if self._is_steady:
      return max(whole * self.batches() + part, 1)
    return max(sum(map(self.batches, range(whole))) + part, 1)

  def epochs(self, steps: int) -> float:
    """How many epochs so many batches are; beyond COUNTED of them as if those that follow had as many batches."""
    left = steps
    for epoch in range(1 if self._is_steady else COUNTED):
      if left <= self.batches(epoch):
        return epoch + left / self.batches(epoch)
      left -= self.batches(epoch)
    counted = 1 if self._is_steady else COUNTED
    return steps * counted / (steps - left)

  @property
  def _is_steady(self):
    """Whether each epoch has as many batches: packing depends on the order, a mixture draws anew."""
    return not self.packing and self._mixture is None

  def stats(self, epoch: int = 0) -> Stats:
    """What an epoch holds: tokens, trained tokens, padding and shapes."""
    shapes: dict[tuple[int, int], int] = {}
    for edge, _ in self._plan(epoch):
      shape = (self.batch_size, edge)
      shapes[shape] = shapes.get(shape, 0) + 1
    indices = self._indices(epoch)
    trained = np.array([int(example.mask[1:].sum()) for example in self.examples])
    return Stats(
      examples=len(indices),
      tokens=int(self._lengths[indices].sum()),
      trained=int(trained[indices].sum()),
      batches=len(self._plan(epoch)),
      slots=sum(b * t * n for (b, t), n in shapes.items()),
      shapes=shapes,
    )

  def get_state(self) -> dict:
    """Where the stream stands: plain data for a checkpoint, the same on every process."""
    return {"epoch": self._epoch, "batch": self._batch, "stream": self._stream}

  def set_state(self, state: dict):
    """Goes on from `get_state()`; refused where this loader's stream would be another one."""
    was, now = state["stream"], self._stream
    if was != now:
      keys = sorted(key for key in {*was, *now} if was.get(key) != now.get(key))
      changes = ", ".join(
        f"{CALLED.get(key, key)} was {was.get(key)}, is {now.get(key)}" for key in keys
      )
      raise ValueError(
        f"the data cannot go on where it stopped, since its order has changed: {changes};"
        " restore these, or start over in another folder"
      )
    self._epoch, self._batch = state["epoch"], state["batch"]

  @functools.cached_property
  def _stream(self):
    """All that the order of the stream follows from.  The number of processes is not part of it."""
    digest = hashlib.blake2b(digest_size=8)
    for example in self.examples:
      digest.update(len(example).to_bytes(8, "little"))
      digest.update(example.tokens.tobytes())
      digest.update(example.mask.tobytes())
      if isinstance(example, Answers):
        digest.update(repr((example.count, sorted(example.values.items()))).encode())
    mixture = self._mixture
    return {
      "data": digest.hexdigest(),
      "examples": len(self.examples),
      "mixture": None if mixture is None else mixture.state(),
      "seed": self.seed,
      "batch_size": self.batch_size,
      "packing": self.packing,
      "window": self.window if self.packing else None,
      "edges": list(self.edges),
      "shuffle": self.shuffle,
    }

  @functools.cached_property
  def _shares(self):
    return any(example.shares for example in self.examples)

  @functools.cached_property
  def _slots(self):
    return packing_slots(self.examples, self.length, self.packing)

  def _check(self, edges):
    index, count = self.shard
    if not self.examples:
      raise ValueError("a loader needs at least one example")
    if not 0 <= index < count:
      raise ValueError(f"shard {self.shard}: write (index, count) with 0 <= index < count")
    if self.batch_size < 1 or self.batch_size % (count * self.accumulate):
      raise ValueError(
        f"a batch of {self.batch_size} rows (batch.rows, eval.rows) cannot be split evenly into {self.accumulate}"
        f" micro-batches for {count} processes; use a multiple of {count * self.accumulate}"
      )
    longest = int(self._lengths.argmax())
    limit = min(self.length, max(edges)) if edges and not self.packing else self.length
    if self._lengths[longest] > limit:
      raise ValueError(
        f"{self.examples[longest].origin or f'example {longest}'} has {self._lengths[longest]} tokens,"
        f" more than a row's {limit}: raise data.length, or encode the rows within it"
      )

  def _local(self, rows):
    """This process's rows: its slice of each micro-batch, in turn."""
    index, count = self.shard
    share = self.batch_size // (self.accumulate * count)
    starts = range(index * share, self.batch_size, count * share)
    return [row for start in starts for row in rows[start : start + share]]

  def _indices(self, epoch):
    if self._mixture is not None:
      return self._mixture.indices(epoch)
    return np.arange(len(self.examples))

  def _planned(self, epoch: int) -> list[tuple[int, list[list[int]]]]:
    """The epoch's batches: (row length, rows of example indices)."""
    rng = np.random.default_rng((self.seed, epoch))
    order = self._indices(epoch)
    if self.shuffle:
      order = rng.permutation(order)
    rows = self._packed(order) if self.packing else self._bucketed(order)
    batches = []
    for edge in self.edges:
      some = rows.get(edge, [])
      if self.shuffle:
        some = [some[i] for i in rng.permutation(len(some))]
      for start in range(0, len(some), self.batch_size):
        batch = some[start : start + self.batch_size]
        batches.append((edge, batch + [[]] * (self.batch_size - len(batch))))
    if self.shuffle and not self.packing:
      batches = [batches[i] for i in rng.permutation(len(batches))]
    return batches

  def _packed(self, order):
    """Windows of the shuffled examples are packed, so that rows differ from epoch to epoch."""
    rows = []
    for start in range(0, len(order), self.window):
      some = order[start : start + self.window]
      rows += [some[row].tolist() for row in best_fit(self._lengths[some], self.length)]
    return {self.length: rows}

  def _bucketed(self, order):
    """One row per example; what does not fill a batch of its bucket moves up to the next."""
    bucket = np.searchsorted(self.edges, self._lengths[order])
    rows, left = {}, []
    for at, edge in enumerate(self.edges):
      some = left + [[int(i)] for i in order[bucket == at]]
      full = len(some) if at == len(self.edges) - 1 else len(some) - len(some) % self.batch_size
      rows[edge], left = some[:full], some[full:]
    return rows


def read(
  source: str | Path | Sequence[Mapping[str, Any]],
  tokenizer: Any,
  *,
  kind: str = "text",
  batch_size: int,
  length: int,
  packing: bool = False,
  seed: int = 0,
) -> Loader:
  """An endless stream of batches of a file's rows, or of rows in a list, rendered by the tokenizer's chat template.

  Args:
    kind: "text" for rows to imitate; of answers, what `answers.encode_all` calls them ("pairs", "labels", ...).
    length: tokens of the longest row; what does not fit is an error that names its row.
  """
  template = chat.template(tokenizer) if tokenizer.chat_template else None
  rows = schema.read(source, chat=template is not None)
  if kind == "text":
    examples = chat.encode_all(rows, tokenizer, template, max_length=length)
  else:
    examples = answers.encode_all(rows, tokenizer, template, kind=kind, max_length=length).examples
    if kind in ("labels", "outcomes"):
      answers.check_classes(examples, "the rows", "add the other class")
    if kind == "labels":
      examples = companions.beside(examples, length)
  return Loader(examples, batch_size=batch_size, length=length, packing=packing, seed=seed)


def eval_batches(
  examples: Sequence[Any],
  *,
  batch_size: int,
  length: int,
  packing: bool = True,
  shard: tuple[int, int] = (0, 1),
  edges: Sequence[int] | None = None,
  channels: Sequence[str] | None = None,
) -> Iterator[Batch]:
  """One pass in a fixed order, every example once; `channels` is the training loader's table."""
  loader = Loader(
    examples,
    batch_size=batch_size,
    length=length,
    packing=packing,
    shard=shard,
    edges=edges,
    shuffle=False,
    channels=channels,
  )
  for _ in range(loader.batches()):
    yield next(loader)


def channel_names(*data_sets: Sequence[Any]) -> tuple[str, ...]:
  """The channels that occur in the data, sorted: one table for training and evaluation."""
  names = {example.channel for examples in data_sets for example in examples}
  return tuple(sorted(name for name in names if name is not None))
