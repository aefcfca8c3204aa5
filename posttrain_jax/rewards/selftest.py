"""Known right and wrong answers, tried before a run starts: a verifier that cannot tell them apart teaches nothing.

A time-out that does not work, a package that is too old or a column of another form make every answer wrong, which
looks like a hard task.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from posttrain_jax.core import words
from posttrain_jax.rewards.reward import Part, Reward
from posttrain_jax.rewards.score import Score
from posttrain_jax.rewards.verifier import Answer
from posttrain_jax.settings import ConfigError

PAIRS = 8  # rows whose own answer and another row's are tried


def check(reward: Reward, references: Sequence[Answer] = ()) -> None:
  """Raises ConfigError, with two answers and their scores, where a part cannot tell right from wrong.

  Built-in verifiers are tried on answers of their own.  A verifier of the user's that is no gate is tried on rows: it
  should give the row's own answer more than another row's in at least one of them.  Every part should have a score for
  an answer to at least one row.

  Args:
    references: rows of the data, each with its own right answer as the completion, or with any where that is not known.
  """
  pairs = _pairs(references)
  for part in reward.parts:
    if part.known:
      _on_known(part, reward.retries)
    if part.known or part.gate or part.untested or not pairs:
      _can_read(part, references[:PAIRS], reward.retries)
    else:
      _on_rows(part, pairs, reward.retries)


def _on_known(part: Part, retries: int) -> None:
  answers = [Answer("", k.completion, k.example, k.tokens) for k in part.known]
  scores = _scores(part, answers, retries)
  right = [(a, s) for a, s, k in zip(answers, scores, part.known, strict=True) if k.is_right]
  wrong = [(a, s) for a, s, k in zip(answers, scores, part.known, strict=True) if not k.is_right]
  for one in right:
    for other in wrong:
      if not _is_above(one[1], other[1]):
        raise ConfigError(f"reward: {_told(part, one, other)}")


def _can_read(part: Part, references: Sequence[Answer], retries: int) -> None:
  """Whether the part has a number for any answer to these rows."""
  scores = _scores(part, references, retries)
  if scores and all(given.is_missing and given.applies for given in scores):
    raise ConfigError(
      f"reward: {part.name} has no score for any of the first {len(scores)} rows: {scores[0].reason}"
    )


def _on_rows(part: Part, pairs: Sequence[tuple[Answer, Answer]], retries: int) -> None:
  scores = _scores(part, [answer for pair in pairs for answer in pair], retries)
  tried = [
    (one, other)
    for one, other in zip(
      zip([p[0] for p in pairs], scores[::2]), zip([p[1] for p in pairs], scores[1::2])
    )
    if one[1].applies or other[1].applies
  ]
  if tried and not any(_is_above(one[1], other[1]) for one, other in tried):
    raise ConfigError(
      f"reward: {_told(part, *tried[0])} (and so of all {len(tried)} rows that were tried); where it does not ask"
      f" whether an answer is right, name it in reward.untested"
    )


def _pairs(references: Sequence[Answer]) -> list[tuple[Answer, Answer]]:
  """(the row's own answer, the next different one as an answer to the same row)."""
  pairs = []
  for i, own in enumerate(references[:PAIRS]):
    others = (a.completion for a in (*references[i + 1 :], *references[:i]))
    wrong = next((text for text in others if text != own.completion), None)
    if wrong is not None:
      pairs.append((own, dataclasses.replace(own, completion=wrong, tokens=None)))
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
    f"{part.name} cannot tell a right answer from a wrong one: it gives the right {_shown(*right)} and the wrong "
    f"{_shown(*wrong)}"
  )


def _shown(answer: Answer, given: Score) -> str:
  reason = f" ({given.reason})" if given.reason else ""
  value = "no score" if given.value is None else f"{given.value:g}"
  text = words.shown(answer.completion, 60)
  return (
    f"{text if not answer.tokens else f'answer of {len(answer.tokens)} tokens'} {value}{reason}"
  )
