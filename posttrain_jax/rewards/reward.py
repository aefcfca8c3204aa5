"""A reward is made of parts, and each part is a verifier with a weight.

total = min(s, s · Π gates), s = Σ weight · part over the parts that are no gates.  A gate, which is within 0 and 1,
multiplies and does not add: what fails a format gets no reward for anything else, and a format alone earns nothing.
The minimum keeps a gate from raising a sum that is negative.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from posttrain_jax.core import words
from posttrain_jax.rewards import score
from posttrain_jax.rewards.judge import Judge
from posttrain_jax.rewards.score import Score
from posttrain_jax.rewards.verifier import (
  OUTSIDE,
  Answer,
  Batch,
  Context,
  Known,
  Verifier,
  called,
)
from posttrain_jax.rewards.workers import Apart

TOTAL = "total"  # the outcome that is the reward itself
LOGGED = "logged"  # before the names of what functions log
ROUNDING = 1e-6  # of a total, in whatever order its terms were added


@dataclasses.dataclass(frozen=True)
class Part:
  """verifier: a function (prompt, completion, example), or a `Batch`.  range: what is outside of it is missing.

  known: answers of which is known whether they are right, for `selftest`.
  untested: it does not ask whether an answer is right (a form, a length), so that rows of the data cannot try it, and
  that it is no part of the outcome.
  """

  name: str
  verifier: Verifier | Batch
  weight: float = 1.0
  gate: bool = False
  range: tuple[float, float] = score.ANY
  known: tuple[Known, ...] = ()
  untested: bool = False

  def __post_init__(self):
    if not abs(self.weight) <= score.LARGEST:
      raise ValueError(
        f"reward: the weight of {self.name} is {self.weight}; it is a finite number that float32 holds"
      )
    low, high = self.range
    if not low < high:
      raise ValueError(
        f"reward: the scores of {self.name} would lie within {low:g} and {high:g}, so that no two differ, and others"
        " are missing; name a lower and a higher end in reward.ranges"
      )
    if self.gate and self.weight != 1:
      raise ValueError(
        f"reward: {self.name} is a gate, which multiplies: its weight {self.weight:g} would mean nothing"
      )
    if self.gate and self.range != score.ANY and not 0 <= low <= high <= 1:
      raise ValueError(
        f"reward: {self.name} is a gate, and its scores lie within {low:g} and {high:g}; a gate multiplies the sum and"
        " is within 0 and 1, so name it in reward.parts, where it is added"
      )

  @property
  def within(self) -> tuple[float, float]:
    """What its scores lie in; of a gate at most 0 to 1."""
    low, high = self.range
    return (max(low, 0.0), min(high, 1.0)) if self.gate else (low, high)

  @property
  def has_ends(self) -> bool:
    """Whether its scores have a lowest and a highest."""
    return all(map(math.isfinite, self.within))


@dataclasses.dataclass(frozen=True)
class Scored:
  """total and parts of one answer; is_fixed: a total that was said of it whatever its parts are."""

  total: Score
  parts: Mapping[str, Score]
  is_fixed: bool = False

  def as_json(self) -> dict[str, Any]:
    flat = lambda given: [given.value, given.reason, given.applies]
    return {
      "total": flat(self.total),
      "parts": {name: flat(given) for name, given in self.parts.items()},
    }

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> Scored:
    parts = {name: Score(*given) for name, given in value["parts"].items()}
    return cls(Score(*value["total"]), parts)


@dataclasses.dataclass(frozen=True)
class Result:
  """answers: in order.  columns: what functions log of each answer, None where they logged nothing of it.

  logged: the numbers that functions log of all of them, by the names that they give; as metrics LOGGED/NAME, which no
    metric of a run is called, is the mean of the finite ones.  retried: how often a part was asked again.
  """

  answers: tuple[Scored, ...]
  columns: Mapping[str, Sequence[Any]]
  logged: Mapping[str, Sequence[float]]
  retried: int

  @property
  def missing(self) -> Mapping[tuple[str, str], int]:
    """How often each part was missing in the end, by (part, reason); "reward" where no part applies."""
    return missing(self.answers)

  @property
  def why(self) -> Mapping[tuple[str, str], str]:
    """What the first of them said in full, by the same (part, reason); counted together, they have no numbers."""
    return reasons(self.answers)

  @property
  def metrics(self) -> dict[str, float]:
    finite = {name: [*filter(math.isfinite, values)] for name, values in self.logged.items()}
    return _metrics(self.answers) | {
      "rewards/retried": float(self.retried),
      **{f"{LOGGED}/{name}": statistics.fmean(some) for name, some in finite.items() if some},
    }


def together(results: Sequence[Result]) -> Result:
  """The results of several calls as that of one with all their answers, in order."""
  columns = dict.fromkeys(name for result in results for name in result.columns)
  logged = dict.fromkeys(name for result in results for name in result.logged)
  listed = lambda result, name: result.columns.get(name, [None] * len(result.answers))
  return Result(
    tuple(answer for result in results for answer in result.answers),
    {name: [value for result in results for value in listed(result, name)] for name in columns},
    {name: [x for result in results for x in result.logged.get(name, ())] for name in logged},
    sum(result.retried for result in results),
  )


class Reward:
  """Scores answers by parts.

  Args:
    retries: how often a part that is missing is asked again before the total of the answer is missing, too.
  """

  def __init__(self, parts: Sequence[Part], *, retries: int = 1):
    names = [part.name for part in parts]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
      raise ValueError(f"reward: two parts are called {twice[0]}; give each a name of its own")
    if all(part.gate for part in parts):
      raise ValueError("reward: it has no part that is not a gate, so there is nothing to multiply")
    if all(part.gate or not part.weight for part in parts):
      raise ValueError(
        "reward: every part has the weight 0, so that all answers get the same; give one another"
      )
    if retries < 0:
      raise ValueError(f"reward: retries={retries}; it is 0 or more")
    self.parts, self.retries = tuple(parts), retries

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(part.name for part in self.parts)

  def renamed(self, scored: Scored) -> Scored:
    """A score of an earlier version, to which parts were called by whole paths, by the names that they have now."""
    if scored.parts.keys() == {*self.names} or len(scored.parts) != len(self.names):
      return scored
    parts = dict(zip(self.names, scored.parts.values(), strict=True))
    return dataclasses.replace(scored, parts=parts)

  def bounds(self, applying: Collection[str] | None = None) -> tuple[float, float]:
    """The lowest and the highest total that there are; infinite where a part has no bound.

    Args:
      applying: names of the parts that apply; None: all.
    """
    there = [p for p in self.parts if applying is None or p.name in applying]
    ends = [sorted(p.weight * end for end in p.within) for p in there if not p.gate and p.weight]
    low, high = sum(ends[0] for ends in ends), sum(ends[1] for ends in ends)
    gates = [p.within for p in there if p.gate]
    if low > 0:
      low *= math.prod(least for least, _ in gates)
    if high > 0:
      high *= math.prod(most for _, most in gates)
    return float(low), float(high)

  def bounds_of(self, scored: Scored) -> tuple[float, float]:
    """`bounds` of an answer to its row, to which some parts may not apply."""
    return self.bounds([name for name, given in scored.parts.items() if given.applies])

  @property
  def has_most(self) -> bool:
    """Whether there is a highest total, so that it can be said which answers are right."""
    return math.isfinite(self.bounds()[1])

  def outcome(self, name: str = "") -> Reward:
    """What says whether an answer is right, of the parts of this reward and of its scores.

    Args:
      name: of a part, whose score alone is the outcome; TOTAL for what is trained on; "" for the total without the
        parts that do not ask whether an answer is right (`Part.untested`), where others are left.
    """
    if name == TOTAL:
      return self
    if name:
      (part,) = [p for p in self.parts if p.name == name]
      return Reward([dataclasses.replace(part, weight=1.0, gate=False, range=part.within)])
    asking = [p for p in self.parts if p.gate or (p.weight and not p.untested)]
    return self if all(p.gate for p in asking) else Reward(asking)

  def value(self, scored: Scored) -> float | None:
    """The total by these parts of an answer that was scored by these and perhaps others; None where it has none."""
    if scored.total.is_missing or scored.is_fixed:
      return scored.total.value
    return self._total(scored.parts).total.value

  def is_right(self, scored: Scored) -> bool:
    """Whether an answer has the highest total that there is for its row."""
    value, (_, most) = self.value(scored), self.bounds_of(scored)
    return value is not None and math.isfinite(most) and value >= most - ROUNDING * abs(most)

  @property
  def is_per_answer(self) -> bool:
    """Whether each answer is judged alone, so that some can be scored while others are not there yet."""
    return all(map(_is_per_answer, self.parts))

  def score(self, answers: Sequence[Answer], *, trainer_state: Any = OUTSIDE) -> Result:
    """Each answer's total and parts, in order.

    Args:
      trainer_state: what TRL's functions are given under this name.
    """
    context, retried = Context(trainer_state), 0
    by_part: dict[str, list[Score]] = {}
    for part in self.parts:
      by_part[part.name], again = self._part(part, answers, context)
      retried += again
    _without_gaps(by_part, answers)
    scored = tuple(
      self._total({name: scores[i] for name, scores in by_part.items()})
      for i in range(len(answers))
    )
    columns = {
      name: [values.get(i) for i in range(len(answers))] for name, values in context.columns.items()
    }
    return Result(scored, columns, context.metrics, retried)

  def _part(
    self, part: Part, answers: Sequence[Answer], context: Context
  ) -> tuple[list[Score], int]:
    """The part's scores, and how many of them had to be asked for again.

    What compares answers is given all of them again: a rank among those that are missing would be another one.
    """
    scores, retried = scores_of(part, answers, context), 0
    for _ in range(self.retries):
      again = [i for i, given in enumerate(scores) if given.is_missing and given.applies]
      if not again:
        break
      retried += len(again)
      some, asked = Context(context.trainer_state), again
      if not _is_per_answer(part):
        asked = [*range(len(answers))]
      for i, given in zip(asked, scores_of(part, [answers[i] for i in asked], some), strict=True):
        if i in again:
          scores[i] = given
      for name, values in some.columns.items():
        context.columns.setdefault(name, {}).update(
          {asked[i]: value for i, value in values.items() if asked[i] in again}
        )
      for name, numbers in some.metrics.items():
        context.metrics.setdefault(name, []).extend(numbers)
    return scores, retried

  def _total(self, parts: Mapping[str, Score]) -> Scored:
    for part in self.parts:
      given = parts[part.name]
      if given.is_missing and given.applies:
        return Scored(score.missing(f"{part.name}: {given.reason}"), parts)
    values = {name: given.value for name, given in parts.items() if given.value is not None}
    terms = [
      part.weight * values[part.name]
      for part in self.parts
      if part.name in values and not part.gate
    ]
    if not terms:
      return Scored(score.missing("no part applies to this row"), parts)
    gates = [values[part.name] for part in self.parts if part.gate and part.name in values]
    total = sum(terms)
    return Scored(score.of(min(total, total * math.prod(gates))), parts)


def _is_per_answer(part: Part) -> bool:
  """Whether it judges each answer alone."""
  return callable(part.verifier) or isinstance(part.verifier, Apart | Judge)


def scores_of(part: Part, answers: Sequence[Answer], context: Context) -> list[Score]:
  """The scores of one part, asked once; each within the part's range or missing."""
  if not answers:
    return []
  verifier = part.verifier
  if callable(verifier):
    returned: Sequence[Any] = [called(verifier, answer) for answer in answers]
  else:
    returned = verifier.scores(answers, context)
    if len(returned) != len(answers):
      raise ValueError(
        f"reward: {part.name} returned {words.count(len(returned), 'score')} for"
        f" {words.count(len(answers), 'answer')}; return one for each"
      )
  return [score.of(value, part.within) for value in returned]


def _without_gaps(by_part: Mapping[str, list[Score]], answers: Sequence[Answer]) -> None:
  """A part that applies to one answer of a prompt applies to all of them.

  Left out of the sum of some it would count as 0 beside the others, which are compared with them.
  """
  for scores in by_part.values():
    judged = {a.group for a, s in zip(answers, scores, strict=True) if s.applies} - {None}
    for i, answer in enumerate(answers):
      if not scores[i].applies and answer.group in judged:
        scores[i] = score.missing(
          f"{scores[i].reason}, though to another answer of the same prompt it does"
        )


def lost(one: Scored) -> Mapping[str, Score]:
  """The parts that are missing of an answer, by name; "reward" where no part applies, so that there is none."""
  parts = {name: p for name, p in one.parts.items() if p.is_missing and p.applies}
  return parts or ({"reward": one.total} if one.total.is_missing else {})


def missing(scored: Sequence[Scored]) -> Counter[tuple[str, str]]:
  """{(part, reason as it is counted): how often}."""
  return Counter((name, kind(given.reason)) for one in scored for name, given in lost(one).items())


def reasons(scored: Sequence[Scored]) -> Mapping[tuple[str, str], str]:
  """{(part, reason as it is counted): the first such reason in full}."""
  first: dict[tuple[str, str], str] = {}
  for one in scored:
    for name, given in lost(one).items():
      first.setdefault((name, kind(given.reason)), given.reason)
  return first


def counted(why: str, full: str) -> str:
  """A reason as people read it beside its count, with one in full where that says more.

  >>> counted("returned N", "returned nan"), counted("timed out", "timed out")
  ('returned N, as: returned nan', 'timed out')
  """
  return why if why == full else f"{why}, as: {full}"


def kind(reason: str) -> str:
  """What a reason is counted under: without the place, and without numbers, quotations and lists that differ.

  >>> kind("mine.py:7: raised KeyError: 'gold'"), kind("returned 7.5, which is not within 0 and 1")
  ('raised KeyError', 'returned N, which is not within N and N')
  >>> kind("the row's answer 'one' is no number")
  "the row's answer '…' is no number"
  >>> kind("returned <generator object f at 0x7f01>, a generator"), kind("returned [1, 2.5], a list")
  ('returned <generator object f at N>, a generator', 'returned […], a list')
  """
  plain = _QUOTED.sub("'…'", reason)
  if raised := _RAISED.search(plain):
    return raised[1]
  return _LISTED.sub("…", _NUMBER.sub("N", plain))


# An apostrophe stands behind a letter, and a quotation does not; one that was cut short (`words.shown`) has no end.
_QUOTED = re.compile(
  r"""(?<!\w)(?:'(?:[^'\\]|\\.)*'(?!\w)|"(?:[^"\\]|\\.)*"(?!\w)|['"](?:[^'"\\]|\\.)*?\.\.\.)"""
)
_RAISED = re.compile(r"(?:^|: )(raised \w+)")
_NUMBER = re.compile(r"0x[0-9a-f]+|-?\d+(\.\d+)?(e[-+]?\d+)?")
_LISTED = re.compile(r"(?<=[\[({])((?:'…': )?)('…'|N)(?:, \1\2)*(?:,? ?\.\.\.)?(?=[\])}]|,|$)")


def _metrics(scored: Sequence[Scored]) -> dict[str, float]:
  """Under TRL's names: reward, rewards/NAME/mean and /std; rewards/missing is the share without a total."""
  metrics = {}
  names = scored[0].parts if scored else ()
  by_part = {name: [one.parts[name] for one in scored] for name in names}
  totals = [one.total.value for one in scored if one.total.value is not None]
  if totals:
    metrics["reward"] = statistics.fmean(totals)
  for name, scores in by_part.items():
    values = [given.value for given in scores if given.value is not None]
    if values:
      metrics[f"rewards/{name}/mean"] = statistics.fmean(values)
      metrics[f"rewards/{name}/std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    if scores:
      lost = sum(given.is_missing and given.applies for given in scores)
      metrics[f"rewards/{name}/missing"] = lost / len(scores)
  if scored:
    metrics["rewards/missing"] = 1 - len(totals) / len(scored)
  return metrics
