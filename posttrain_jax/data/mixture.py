"""Several sources in fixed fractions; a replay buffer is a mixture with 5-10 % of general data.

Each source is an endless stream of shuffled passes over its examples, and an epoch takes the next
stretch of each: what epoch 7 holds follows from the seed alone, without drawing the six before it.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from posttrain_jax.data.encoded import Example


@dataclasses.dataclass(frozen=True)
class Share:
  """What one source gave to an epoch."""

  source: str
  asked: float  # fraction
  fraction: float  # of the epoch, in the mixture's unit
  examples: int
  tokens: int
  passes: float  # how often the source's examples occur; above 1 they repeat

  def __str__(self):
    repeats = f", every example {self.passes:.2f} times" if self.passes > 1 else ""
    return (
      f"{self.source}: {self.fraction:.1%} (asked {self.asked:.1%}),"
      f" {self.examples:,} examples, {self.tokens:,} tokens{repeats}"
    )


class Mixture:
  """Examples of several sources in given fractions, drawn anew for each epoch.

  `by` says what the fractions count, "examples" or "tokens".  An epoch is one pass over the first
  source, unless `size` (in that unit) says otherwise; the others give their fraction beside it.
  """

  def __init__(
    self,
    sources: Mapping[str, Sequence[Example]],
    fractions: Mapping[str, float],
    *,
    by: str = "examples",
    size: int | None = None,
    seed: int = 0,
  ):
    _check(sources, fractions, by, size)
    self.names = tuple(sources)
    self.by, self.seed = by, seed
    total = sum(fractions.values())
    self.fractions = {name: fractions[name] / total for name in self.names}
    self.examples = tuple(example for name in self.names for example in sources[name])
    bounds = np.cumsum([0, *(len(sources[name]) for name in self.names)])
    self._members = {
      name: np.arange(a, b) for name, a, b in zip(self.names, bounds[:-1], bounds[1:])
    }
    self._lengths = np.array([len(example) for example in self.examples])
    self._order = functools.lru_cache(maxsize=3 * len(self.names))(self._shuffled)
    first = self.names[0]
    whole = size or self._weights(first).sum() / self.fractions[first]
    self._targets = {name: round(whole * self.fractions[name]) for name in self.names}
    starved = [name for name in self.names if not self._targets[name]]
    if starved:
      raise ValueError(
        f"{starved[0]!r} would give nothing: {self.fractions[starved[0]]:.2%} of {whole:.0f} {by}"
      )

  def holding(self, examples: Sequence[Example]) -> "Mixture":
    """The same mixture of other examples, one for one in the order of `examples`."""
    if len(examples) != len(self.examples):
      raise ValueError(f"{len(examples)} examples for a mixture of {len(self.examples)}")
    bounds = [(name, int(at[0]), int(at[-1]) + 1) for name, at in self._members.items()]
    sources = {name: examples[start:stop] for name, start, stop in bounds}
    mixture = Mixture(sources, self.fractions, by=self.by, seed=self.seed)
    # what an epoch holds stays as it was drawn, whatever the examples' lengths are now
    mixture._lengths, mixture._targets = self._lengths, self._targets
    return mixture

  def indices(self, epoch: int) -> np.ndarray:
    """Which of `examples` an epoch holds, source by source; repeats occur as often as drawn."""
    return np.concatenate([self._drawn(name, epoch) for name in self.names])

  def state(self) -> dict:
    """All that the order of the stream follows from, beside the examples."""
    return {"by": self.by, "seed": self.seed, "targets": dict(self._targets)}

  def report(self, epoch: int = 0) -> list[Share]:
    """What each source gives to an epoch, in the order of the sources."""
    drawn = {name: self._drawn(name, epoch) for name in self.names}
    tokens = {name: int(self._lengths[indices].sum()) for name, indices in drawn.items()}
    amount = tokens if self.by == "tokens" else {name: len(drawn[name]) for name in self.names}
    total = sum(amount.values())
    return [
      Share(
        name,
        self.fractions[name],
        amount[name] / total,
        len(drawn[name]),
        tokens[name],
        len(drawn[name]) / len(self._members[name]),
      )
      for name in self.names
    ]

  def _drawn(self, name, epoch):
    """The stretch of the source's stream between two multiples of its target."""
    target = self._targets[name]
    weights = self._weights(name)
    first = self._place(name, epoch * target, weights.sum())
    last = self._place(name, (epoch + 1) * target, weights.sum())
    members, stretches = self._members[name], []
    for turn in range(first[0], last[0] + 1):
      start = first[1] if turn == first[0] else 0
      stop = last[1] if turn == last[0] else len(members)
      if stop > start:
        stretches.append(members[self._order(name, turn)[start:stop]])
    return np.concatenate(stretches) if stretches else members[:0]

  def _place(self, name, amount, per_pass):
    """(pass, offset in it) of the first example that begins at or after `amount` of the stream."""
    turn, rest = divmod(int(amount), int(per_pass))
    begins = np.cumsum(self._weights(name)[self._order(name, turn)]) if rest else None
    return turn, 0 if begins is None else int(np.searchsorted(begins, rest)) + 1

  def _weights(self, name):
    members = self._members[name]
    return self._lengths[members] if self.by == "tokens" else np.ones(len(members), int)

  def _shuffled(self, name, turn):
    key = (self.seed, self.names.index(name), turn)
    return np.random.default_rng(key).permutation(len(self._members[name]))


def replay(main: Sequence[Example], general: Sequence[Example], fraction: float, **options):
  """The main data with `fraction` of general data beside it, against forgetting."""
  if not 0 < fraction < 1:
    raise ValueError(f"replay fraction {fraction}: write a share between 0 and 1, such as 0.05")
  sources = {"main": main, "replay": general}
  return Mixture(sources, {"main": 1 - fraction, "replay": fraction}, **options)


def _check(sources, fractions, by, size):
  if by not in ("examples", "tokens"):
    raise ValueError(f"by={by!r}: write 'examples' or 'tokens'")
  if set(sources) != set(fractions) or not sources:
    raise ValueError(f"sources are {sorted(sources)}, but fractions name {sorted(fractions)}")
  for name in sources:
    if not fractions[name] > 0:
      raise ValueError(f"fraction of {name!r} is {fractions[name]}; leave the source out instead")
    if not len(sources[name]):
      raise ValueError(f"source {name!r} has no examples")
  total = sum(fractions.values())
  if abs(total - 1) > 1e-6:
    raise ValueError(f"fractions add up to {total:g}, not 1: {dict(fractions)}")
  if size is not None and size < 1:
    raise ValueError(f"size={size}: an epoch holds at least one of the {by}")
