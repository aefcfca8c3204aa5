"""What became of a suite between two measurements: a verdict for each part, and for the whole.

A part dropped where "it fell by no more than its tolerance" is refused, at 5 % over all parts (Holm): of models that
are as good as before, at most 5 in 100 fail.  It passes where its whole 95 % interval is above minus the tolerance.
What is neither cannot be told, and the drop that would have been seen is told beside it.  A model whose
log-probabilities are no numbers any more has dropped, wherever it had some before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain_jax.evals import intervals, measure, paired, stages, suite
from posttrain_jax.evals.measure import Measured, Result
from posttrain_jax.evals.paired import Difference
from posttrain_jax.evals.suite import Part, Suite

DROP, PASS, UNKNOWN = "drop", "pass", "cannot tell"
ALPHA = 0.05  # of the whole suite
LONGEST = 2_000  # characters of an answer that are kept
SCORE, BITS = "eval_suite/", "eval_bits_per_byte/"  # before the names of parts, as metrics of a run
CHANGE = f"{SCORE}change"
RESULTS = "regress.json"  # in the folder of a comparison


@dataclasses.dataclass(frozen=True)
class Item:
  """An item that was right before and is not after, or the other way round."""

  id: str
  prompt: str
  gold: str
  before: str
  after: str
  reason: str


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What became of a part.

  before, after: {"mean", "low", "high", "count"}; of text bits per byte.
  difference: after - before, and of text before - after: higher is better.
  p: of "it fell by no more than the tolerance", after Holm; None of a part that is not judged.
  visible: the drop that would have been told in 80 of 100 cases; None where none could.
  missing: items that one side or both have no score of.
  broken: of those, items that had a score before, and of which the model's log-probabilities are no numbers after.
  lost, gained: items that became wrong, and right.
  pass_at: {"pass@k": (before, after)}.
  """

  part: str
  kind: str
  verdict: str
  before: Mapping[str, Any]
  after: Mapping[str, Any]
  difference: Difference | None
  tolerance: float
  p: float | None
  visible: float | None
  missing: int
  lost: tuple[Item, ...]
  gained: tuple[Item, ...]
  pass_at: Mapping[str, tuple[float, float]]
  trained: bool
  every: bool
  broken: int = 0

  @property
  def is_better(self) -> bool:
    low = None if self.difference is None else self.difference.low
    return low is not None and low > 0

  @property
  def unit(self) -> str:
    return suite.UNIT[self.kind]


@dataclasses.dataclass(frozen=True)
class Comparison:
  """before, after: what was measured.  verdicts: a part each, in the suite's order.

  tax: the mean of what parts lost that were not trained, those with scores (not text); None without such parts.
  """

  suite: str
  before: Mapping[str, Any]
  after: Mapping[str, Any]
  verdicts: tuple[Verdict, ...]
  tax: float | None

  @property
  def dropped(self) -> list[str]:
    return [one.part for one in self.verdicts if one.verdict == DROP]

  @property
  def unknown(self) -> list[str]:
    return [one.part for one in self.verdicts if one.verdict == UNKNOWN and not one.trained]

  def finals(self) -> dict[str, float]:
    """What sweeps and pages compare runs by: of each part the result after, and `CHANGE`, minus what was paid."""
    name = lambda one: BITS if one.kind == suite.TEXT else SCORE
    known = [one for one in self.verdicts if one.after["mean"] is not None]
    paid = {} if self.tax is None else {CHANGE: -self.tax}
    return {**{name(one) + one.part: one.after["mean"] for one in known}, **paid}

  def as_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> Comparison:
    """What `as_json` gave, out of a file."""
    fields: dict[str, Any] = {field.name: value[field.name] for field in dataclasses.fields(cls)}
    fields["verdicts"] = tuple(map(_from_json, value["verdicts"]))
    return cls(**fields)


def _from_json(value: Mapping[str, Any]) -> Verdict:
  fields: dict[str, Any] = dict(value)
  if fields["difference"] is not None:
    fields["difference"] = Difference(**fields["difference"])
  for name in ("lost", "gained"):
    fields[name] = tuple(Item(**item) for item in fields[name])
  fields["pass_at"] = {name: tuple(pair) for name, pair in fields["pass_at"].items()}
  return Verdict(**fields)


def compare(asked: Suite, before: Measured, after: Measured, *, alpha: float = ALPHA) -> Comparison:
  """The verdicts.

  Raises:
    ConfigError: the two do not compare: other rows, prompts, templates or decoding.
  """
  measure.check_alike(before.header, after.header)
  sides = [(before.results[part.name], after.results[part.name]) for part in asked.parts]
  paired_up = [_pairs(*side) for side in sides]
  differences = [_difference(part, pairs) for part, (pairs, _) in zip(asked.parts, paired_up)]
  judged = [i for i, p in enumerate(asked.parts) if not (p.trained or p.every)]
  ps = [_p(differences[i], asked.parts[i].tolerance) for i in judged]
  adjusted = dict(zip(judged, paired.holm(ps)))
  share = alpha / max(len(judged), 1)
  verdicts = tuple(
    _verdict(
      part, pairs, missing, _broken(*sides[i]), differences[i], adjusted.get(i), alpha, share
    )
    for i, (part, (pairs, missing)) in enumerate(zip(asked.parts, paired_up))
  )
  return Comparison(asked.name, before.header, after.header, verdicts, _tax(verdicts))


Pair = tuple[int, Result, Result]


def _pairs(before: Sequence[Result], after: Sequence[Result]) -> tuple[list[Pair], int]:
  """(items that both sides have a score of, how many others there are)."""
  known = [
    (i, one, other)
    for i, (one, other) in enumerate(zip(before, after, strict=True))
    if one.value is not None and other.value is not None
  ]
  return known, len(before) - len(known)


def _broken(before: Sequence[Result], after: Sequence[Result]) -> int:
  """Items that had a score, and of which the model says no numbers any more."""
  pairs = zip(before, after, strict=True)
  return sum(
    one.value is not None and other.reason == measure.NO_NUMBERS and other.value is None
    for one, other in pairs
  )


def _values(part: Part, results: Sequence[Result]) -> list[float]:
  """Higher is better."""
  sign = -1.0 if part.kind == suite.TEXT else 1.0
  return [sign * result.value for result in results if result.value is not None]


def _difference(part: Part, pairs: Sequence[Pair]) -> Difference | None:
  if not pairs:
    return None
  was, now = [one for _, one, _ in pairs], [other for _, _, other in pairs]
  return paired.difference(
    _values(part, was),
    _values(part, now),
    sizes=[one.size for one in was] if part.kind == suite.TEXT else None,
    groups=[one.group for one in was],
  )


def _p(difference: Difference | None, tolerance: float) -> float:
  return 1.0 if difference is None else difference.p_of_drop(tolerance)


def _verdict(
  part: Part,
  pairs: Sequence[Pair],
  missing: int,
  broken: int,
  difference: Difference | None,
  p: float | None,
  alpha: float,
  share: float,
) -> Verdict:
  lost, gained = _changed(part, pairs, 1), _changed(part, pairs, -1)
  if part.trained:
    verdict = PASS if difference and (difference.low or 0) > 0 else UNKNOWN
  elif broken:
    verdict = DROP
  elif part.every:
    verdict = DROP if lost else UNKNOWN if missing or difference is None else PASS
  elif p is not None and p < alpha:
    verdict = DROP
  else:
    low = None if difference is None else difference.low
    verdict = PASS if low is not None and low >= -part.tolerance else UNKNOWN
  return Verdict(
    part=part.name,
    kind=part.kind,
    verdict=verdict,
    before=estimate(part, [one for _, one, _ in pairs]),
    after=estimate(part, [other for _, _, other in pairs]),
    difference=difference,
    tolerance=part.tolerance,
    p=p,
    visible=None if difference is None else difference.visible(part.tolerance, share),
    missing=missing,
    lost=lost,
    gained=gained,
    pass_at=_pass_at(part, pairs),
    trained=part.trained,
    every=part.every,
    broken=broken,
  )


def estimate(part: Part, results: Sequence[Result]) -> dict[str, Any]:
  """A side's result with its interval: Wilson's of a share, none of bits per byte, which only differences have here."""
  values = [result.value for result in results if result.value is not None]
  if not values:
    return dict(mean=None, low=None, high=None, count=0, right=None)
  if part.kind == suite.TEXT:
    rate = sum(values) / sum(result.size for result in results)
    return dict(mean=rate, low=None, high=None, count=len(values), right=None)
  return intervals.mean(values)


def _changed(part: Part, pairs: Sequence[Pair], sign: int) -> tuple[Item, ...]:
  """Items that were right and are not (sign 1), or that were not and are (-1); of text none."""
  if part.kind == suite.TEXT:
    return ()
  wanted = (True, False) if sign > 0 else (False, True)
  return tuple(
    _item(part, i, one, other, sign)
    for i, one, other in pairs
    if (is_right(one), is_right(other)) == wanted
  )


def is_right(result: Result) -> bool:
  """Whether every answer to an item is, by its metric where that says so, else by its score."""
  if result.right is None:
    return result.value == 1
  return result.right == max(len(result.answers), 1)


def _item(part: Part, i: int, one: Result, other: Result, sign: int) -> Item:
  fields = part.rows[i].fields
  said = lambda value: (
    value if isinstance(value, str) else "\n".join(m["content"] or "" for m in value)
  )
  written = lambda r: "\n---\n".join(r.answers)[:LONGEST]
  prompt, gold = fields.get("prompt", fields.get("messages", "")), fields.get("completion", "")
  reason = other.reason if sign > 0 else one.reason
  return Item(
    one.id, said(prompt)[:LONGEST], said(gold)[:LONGEST], written(one), written(other), reason
  )


def _pass_at(part: Part, pairs: Sequence[Pair]) -> dict[str, tuple[float, float]]:
  """{"pass@k": (before, after)}, means over items of the unbiased estimate."""
  known = [(a, b) for _, a, b in pairs if a.right is not None and b.right is not None]
  if not known:
    return {}
  n = part.samples
  mean = lambda k, side: sum(paired.pass_at(n, pair[side].right, k) for pair in known) / len(known)
  return {f"pass@{k}": (mean(k, 0), mean(k, 1)) for k in part.pass_at}


def _tax(verdicts: Sequence[Verdict]) -> float | None:
  """What was paid in scores on parts that were not trained."""
  scored = [one for one in verdicts if one.kind != suite.TEXT and one.before["mean"] is not None]
  before = {one.part: one.before["mean"] for one in scored}
  after = {one.part: one.after["mean"] for one in scored}
  return stages.tax(before, after, [one.part for one in scored if one.trained])
