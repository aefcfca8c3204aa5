"""Known right and wrong answers, tried before a run starts: a verifier that cannot tell them apart teaches nothing.

A time-out that does not work, a package that is too old or a column of another form make every answer wrong, which
looks like a hard task.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence

from posttrain_jax.core import words
from posttrain_jax.rewards.reward import Part, Reward
from posttrain_jax.rewards.score import Score
from posttrain_jax.rewards.verifier import Answer
from posttrain_jax.settings import ConfigError

PAIRS = 8  # rows whose own answer and another row's are tried


def check(
  reward: Reward, references: Sequence[Answer] = (), *, section: str = "reward"
) -> list[str]:
  """Raises ConfigError, with two answers and their scores, where a part cannot tell right from wrong.

  What it returns is to be said: of a part that told right from wrong in some of the rows, in how many.

  Built-in verifiers are tried on answers of their own.  A verifier of the user's that is no gate is tried on rows: it
  should give the row's own answer more than another row's in at least one of them.  Every part should have a score for
  an answer to at least one row.

  Args:
    references: rows of the data, each with its own right answer as the completion, or with any where that is not known,
      and with that answer's token ids, which verifiers are given.
    section: of the config that describes the reward; commands without one say how they write its fields.
  """
  pairs, told = _pairs(references), []
  for part in reward.parts:
    if part.known:
      _on_known(part, reward.retries)
    if part.known or part.gate or part.untested or not pairs:
      _can_read(part, references[:PAIRS], reward.retries)
    else:
      names = [one.name for one in reward.parts if one.untested and not one.gate] + [part.name]
      flag = shlex.quote(f"--config.{section}.untested={','.join(names)}")
      told += _on_rows(part, pairs, reward.retries, flag)
  return told


def _on_known(part: Part, retries: int) -> None:
  answers = [Answer("", k.completion, k.example, k.tokens) for k in part.known]
  scores = _scores(part, answers, retries)
  right = [(a, s) for a, s, k in zip(answers, scores, part.known, strict=True) if k.is_right]
  wrong = [(a, s) for a, s, k in zip(answers, scores, part.known, strict=True) if not k.is_right]
  for one in right:
    if _has_none(one[1]):
      raise ConfigError(
        f"reward: {part.name} has no score for an answer that is known to be right,"
        f" {words.shown(one[0].completion, 60)}: {one[1].reason}"
      )
    for other in wrong:
      if not _is_above(one[1], other[1]):
        raise ConfigError(f"reward: {_told(part, one, other)}")


def _can_read(part: Part, references: Sequence[Answer], retries: int) -> None:
  """Whether the part has a number for any answer to these rows."""
  _check_there(part, _scores(part, references, retries), len(references))


def _check_there(part: Part, scores: Sequence[Score], rows: int) -> None:
  """Raises ConfigError where no answer has a score: what failed has not said that it cannot tell right from wrong."""
  if scores and all(map(_has_none, scores)):
    reason = scores[0].reason
    place, was_raised, error = reason.partition(": raised ")
    is_no_number = reason.startswith("returned") and "not within" not in reason
    wanted = "; a verifier returns a finite number, true or false" if is_no_number else ""
    raise ConfigError(
      f"reward: {part.name} raised {error}, at {place}, on all {rows} rows that were tried"
      if was_raised
      else f"reward: {part.name} has no score for any of the {rows} rows that were tried: {reason}{wanted}"
    )


def _has_none(given: Score) -> bool:
  return given.is_missing and given.applies


def _on_rows(
  part: Part, pairs: Sequence[tuple[Answer, Answer]], retries: int, flag: str
) -> list[str]:
  """What is to be said: in how many rows it tells right from wrong, where that is not all of them.

  flag: by which it is not tried.
  """
  scores = _scores(part, [answer for pair in pairs for answer in pair], retries)
  tried = [
    (one, other)
    for one, other in zip(
      zip([p[0] for p in pairs], scores[::2]), zip([p[1] for p in pairs], scores[1::2])
    )
    if one[1].applies or other[1].applies
  ]
  _check_there(part, [given for pair in tried for _, given in pair], len(tried))
  alike = [(one, other) for one, other in tried if not _is_above(one[1], other[1])]
  if not alike:
    return []
  # a row of which both answers have a score says more of what it cannot tell
  example = min(alike, key=lambda pair: sum(_has_none(given) for _, given in pair))
  if len(alike) == len(tried):
    # what failed on every right answer has a fault to be mended first
    is_judging = any(one[1].value is not None for one, _ in tried)
    advice = f"; where it does not ask whether an answer is right, write {flag}"
    raise ConfigError(
      f"reward: {_told(part, *example)} (and so of all {len(tried)} rows that were tried)"
      f"{advice if is_judging else ''}"
    )
  return [
    f"reward: {part.name} tells the right answer from a wrong one in {len(tried) - len(alike)} of the {len(tried)} rows"
    f" that were tried; elsewhere it gives, for one, the {_both(*example)}"
  ]


def _pairs(references: Sequence[Answer]) -> list[tuple[Answer, Answer]]:
  """(the row's own answer, the next different one as an answer to the same row)."""
  pairs = []
  for i, own in enumerate(references[:PAIRS]):
    others = (*references[i + 1 :], *references[:i])
    other = next((a for a in others if a.completion != own.completion), None)
    if other is not None:
      text, tokens = other.completion, other.tokens
      pairs.append((own, dataclasses.replace(own, completion=text, tokens=tokens)))
  return pairs


def _scores(part: Part, answers: Sequence[Answer], retries: int) -> list[Score]:
  answers = [a if a.tokens is not None else dataclasses.replace(a, tokens=()) for a in answers]
  alone = dataclasses.replace(part, weight=1.0, gate=False, range=part.within)
  result = Reward([alone], retries=retries).score(answers)
  return [one.parts[part.name] for one in result.answers]


def _is_above(right: Score, wrong: Score) -> bool:
  """A missing score of a wrong answer does no harm; one of a right answer does."""
  return right.value is not None and (wrong.value is None or right.value > wrong.value)


def _told(part: Part, right: tuple[Answer, Score], wrong: tuple[Answer, Score]) -> str:
  return (
    f"{part.name} cannot tell a right answer from a wrong one: it gives the {_both(right, wrong)}"
  )


def _both(right: tuple[Answer, Score], wrong: tuple[Answer, Score]) -> str:
  return f"right {_shown(*right)} and the wrong {_shown(*wrong)}"


def _shown(answer: Answer, given: Score) -> str:
  reason = f" ({given.reason})" if given.reason else ""
  value = "no score" if given.value is None else f"{given.value:g}"
  is_a_length = answer.tokens and not answer.completion
  text = f"answer of {len(answer.tokens or ())} tokens" if is_a_length else ""
  return f"{text or words.shown(answer.completion, 60)} {value}{reason}"
