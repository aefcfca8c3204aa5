"""Which of several answers are kept, and what they say of the model that wrote them."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence

from posttrain_jax.core import words
from posttrain_jax.evals.samples import Sample
from posttrain_jax.rewards import reward as rewards
from posttrain_jax.rewards.reward import Scored

Right = Callable[[Scored], bool]

BEST, ALL_RIGHT, ALL, TOP, ABOVE = "best", "all_right", "all", "top", "above"
PAIRS = "pairs"
RULES = f"{BEST}, {ALL_RIGHT}, {ALL}, {PAIRS}, {TOP}:K or {ABOVE}:X"
SAME, CUT, EMPTY, MISSING, RULED_OUT, BEYOND = (
  "the same tokens again",
  "cut by max_new_tokens",
  "empty",
  "without a score",
  "not what --keep asks for",
  "beyond --per_prompt",
)
# why a prompt has no pair
NO_WRONG, NO_BETTER, NO_SCORES = (
  "without a wrong answer",
  "whose answers are none better than another",
  "without a score",
)


@dataclasses.dataclass(frozen=True)
class Keep:
  """rule: one of RULES.  number: the K or X of it.  per_prompt: at most so many of a prompt, 0 for all."""

  rule: str
  number: float = 0.0
  per_prompt: int = 0


def parse(text: str, per_prompt: int = 0) -> Keep:
  """What `--keep` and `--per_prompt` say.

  >>> parse("top:2").number, parse("all_right", 4).per_prompt
  (2.0, 4)

  Raises:
    ValueError: there is no such rule.
  """
  if per_prompt < 0:
    raise ValueError(f"--per_prompt={per_prompt}: it is a count, or 0 for all")
  rule, colon, number = text.partition(":")
  if rule == PAIRS and per_prompt:
    raise ValueError(f"--per_prompt={per_prompt}: a prompt has one pair at most")
  if rule in (BEST, ALL_RIGHT, ALL, PAIRS) and not colon:
    return Keep(rule, per_prompt=per_prompt)
  try:
    value = float(number)
  except ValueError:
    value = math.nan
  is_count = math.isfinite(value) and value >= 1 and value == int(value)
  if (rule == ABOVE and math.isfinite(value)) or (rule == TOP and is_count):
    return Keep(rule, value, per_prompt)
  raise ValueError(f"--keep={text}: write {RULES}, with a count K from 1 and a score X")


@dataclasses.dataclass(frozen=True)
class Kept:
  """The answers of a prompt that are kept, in the order of their numbers, and why others are not."""

  samples: tuple[Sample, ...]
  left_out: Counter[str]


def kept(keep: Keep, samples: Sequence[Sample], right: Right | None) -> Kept:
  """Of one prompt's answers those that a rule keeps; of equal ones the first.

  Only `all` keeps answers that were cut or have no score: there is no end to be learned from the one, and nothing is
  known of the other.

  Args:
    right: whether an answer that has a score is right; None where nothing says so.
  """
  left_out: Counter[str] = Counter()
  fit = []
  seen: set[tuple[int, ...] | str] = set()
  # of the same tokens a copy that has a score stands for one that has none
  for sample in sorted(samples, key=lambda sample: sample.score is None):
    why = _unfit(keep, sample, seen)
    seen.add(sample.drawn.said)
    if why:
      left_out[why] += 1
    else:
      fit.append(sample)
  chosen = _ruled(keep, fit, right)
  left_out[RULED_OUT] += len(fit) - len(chosen)
  some = chosen[: keep.per_prompt or None]
  left_out[BEYOND] += len(chosen) - len(some)
  return Kept(tuple(sorted(some, key=lambda sample: sample.drawn.sample)), +left_out)


@dataclasses.dataclass(frozen=True)
class Pair:
  """A better answer over a worse one; chosen is None where it is the expected answer."""

  chosen: Sample | None
  rejected: Sample


def paired(
  samples: Sequence[Sample], right: Right | None, *, has_gold: bool
) -> tuple[Pair | None, str]:
  """(the pair that a prompt's answers make, or None and why there is none).

  Chosen is the best right answer, the first of equals; where none is right the expected one, and without that the best
  of all, if it is better than another; one that ended by itself comes before all that were cut.  Rejected is the worst
  answer that is wrong, and no better than what is chosen, that ended by itself, or else the worst such one.  What has
  no score and what is empty is in no pair, and a text is no pair with itself.

  Args:
    right: whether an answer is right; None where nothing says so: then the best and the worst make the pair.
    has_gold: whether the prompt has an expected answer.
  """
  value = lambda sample: -math.inf if sample.score is None else sample.score
  some = [s for s in samples if s.score is not None and s.drawn.text.strip()]
  if not some:
    return None, NO_SCORES
  wrong = [s for s in some if not is_right(s, right)]
  if not wrong:
    return None, NO_WRONG
  fits = [s for s in some if is_right(s, right)]
  worst = lambda some: min(some, key=lambda s: (not s.drawn.finished, value(s)))
  if not fits and right is not None and has_gold:
    return Pair(None, worst(wrong)), ""
  best = max(fits or wrong, key=lambda s: (s.drawn.finished, value(s)))
  other = [s for s in wrong if s.drawn.text != best.drawn.text]  # which a judge may score unlike
  lower = other if fits else [s for s in other if value(s) < value(best)]
  return (Pair(best, worst(lower)), "") if lower else (None, NO_BETTER)


def _unfit(keep: Keep, sample: Sample, seen: set[tuple[int, ...] | str]) -> str:
  if sample.drawn.said in seen:
    return SAME
  if not sample.drawn.text.strip():
    return EMPTY
  if keep.rule != ALL and not sample.drawn.finished:
    return CUT
  return MISSING if keep.rule != ALL and sample.score is None else ""


def _ruled(keep: Keep, samples: Sequence[Sample], right: Right | None) -> list[Sample]:
  """What the rule keeps, the best first."""
  value = lambda sample: -math.inf if sample.score is None else sample.score
  best = sorted(samples, key=value, reverse=True)  # stable: of equal ones the first
  match keep.rule:
    case "best":
      return best[:1]
    case "top":
      return best[: int(keep.number)]
    case "above":
      return [sample for sample in best if value(sample) > keep.number]
    case "all_right":
      return [sample for sample in best if is_right(sample, right)]
  return best


def is_right(sample: Sample, right: Right | None) -> bool:
  return right is not None and sample.score is not None and right(sample.scored)


def from_on(score: float) -> Right:
  """A total of at least that."""
  return lambda scored: scored.total.value is not None and scored.total.value >= score


def pass_at(k: int, count: int, right: int) -> float:
  """1 - C(count - right, k) / C(count, k): whether one of k answers is right, of `count` drawn, without bias.

  Chen et al. 2021, equation 1.

  >>> pass_at(1, 4, 1), pass_at(4, 4, 1), pass_at(2, 4, 0)
  (0.25, 1.0, 0.0)
  """
  if not 0 <= right <= count or not 1 <= k <= count:
    raise ValueError(f"pass@{k} of {right} right answers among {count}")
  return 1.0 - math.comb(count - right, k) / math.comb(count, k)


@dataclasses.dataclass(frozen=True)
class Summary:
  """What answers to prompts came to.

  passes: {k: pass@k} over the prompts that have k scored answers; empty where nothing says which are right.
  none_right: prompts without a right answer, of those that have scores.
  unscored: prompts of which no answer has a score.
  missing: {(part, reason, with the first one in full): how often}.
  """

  prompts: int
  answers: int
  scored: int
  mean: float | None
  passes: dict[int, float]
  none_right: int
  unscored: int
  missing: dict[tuple[str, str], int]
  kept: int  # answers, or pairs
  left_out: dict[str, int]
  gold: int | None = (
    None  # of so many pairs the expected answer is the chosen one; None: no pairs were asked for
  )

  def __str__(self) -> str:
    lines = [f"{words.count(self.answers, 'answer')} to {words.count(self.prompts, 'prompt')}"]
    if self.mean is not None:
      lines[0] += f", mean score {self.mean:.3g}"
    if self.passes:
      told = ", ".join(f"pass@{k} {value:.1%}" for k, value in self.passes.items())
      lines.append(f"{told}; {words.count(self.none_right, 'prompt')} had no right answer")
    why = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
    if self.gold is None:
      lines.append(f"{self.kept} kept" + (f"; left out: {why}" if why else ""))
    else:
      lines.append(f"{self.kept} pairs, in {self.gold} the expected answer for want of a right one")
      lines += [f"no pair of {count} prompts {reason}" for reason, count in self.left_out.items()]
    if self.missing:
      lines.append(f"{self.answers - self.scored} answers have no score:")
      lines += [f"  {count} {part}: {why}" for (part, why), count in self.missing.items()]
    return "\n".join(lines)


def summary(
  groups: Sequence[Sequence[Sample]],
  some: Sequence[Kept] | Sequence[tuple[Pair | None, str]],
  right: Right | None,
) -> Summary:
  """What the answers to each prompt came to, and what is kept of them, as `kept` or `paired` gives it."""
  every = [sample for group in groups for sample in group]
  scores = [sample.score for sample in every if sample.score is not None]
  counts = [
    (sum(s.score is not None for s in group), sum(is_right(s, right) for s in group))
    for group in groups
  ]
  told = [one for one in some if isinstance(one, Kept)]
  pairs = [pair for one in some if not isinstance(one, Kept) and (pair := one[0]) is not None]
  left_out = sum((one.left_out for one in told), Counter())
  left_out += Counter(one[1] for one in some if not isinstance(one, Kept) and one[1])
  return Summary(
    prompts=len(groups),
    answers=len(every),
    scored=len(scores),
    mean=statistics.fmean(scores) if scores else None,
    passes={} if right is None else passes(counts, _powers(max(map(len, groups), default=0))),
    none_right=0 if right is None else sum(n > 0 and not c for n, c in counts),
    unscored=sum(not n for n, _ in counts),
    missing=dict(_missing(every).most_common()),
    kept=sum(len(one.samples) for one in told) + len(pairs),
    left_out=dict(left_out.most_common()),
    gold=sum(pair.chosen is None for pair in pairs) if len(told) < len(some) else None,
  )


def _powers(most: int) -> list[int]:
  """1, the powers of two, and the most."""
  return sorted({*(2**i for i in range(most.bit_length()) if 2**i < most), most} - {0})


def passes(counts: Sequence[tuple[int, int]], wanted: Sequence[int]) -> dict[int, float]:
  """{k: pass@k} of prompts with (scored answers, right ones), each over those that have k scored answers."""
  told = {}
  for k in wanted:
    values = [pass_at(k, n, c) for n, c in counts if n >= k]
    if values:
      told[k] = statistics.fmean(values)
  return told


def _missing(samples: Sequence[Sample]) -> Counter[tuple[str, str]]:
  scored = [sample.scored for sample in samples]
  first = rewards.reasons(scored)
  return Counter(
    {
      (name, rewards.counted(why, first[name, why])): times
      for (name, why), times in rewards.missing(scored).items()
    }
  )
