"""A judge: a model behind an OpenAI-compatible address that is asked how good an answer is.

A reply that cannot be read, an address that does not answer, and a number outside of the range are missing.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

from posttrain_jax.core import api, patterns, words
from posttrain_jax.core.api import Api, Patience
from posttrain_jax.core.waiters import Waiters
from posttrain_jax.data import questions
from posttrain_jax.rewards import score
from posttrain_jax.rewards.score import Score
from posttrain_jax.rewards.verifier import Answer, Context
from posttrain_jax.rewards.workers import Interrupted

TEMPLATE = """Judge an answer to a question.

Question:
{prompt}
{reference}
Answer:
{completion}

How good is the answer, from {low:g} (useless) to {high:g} (perfect)? Give your reasons in two sentences. Then write a
last line of this form, with a number and nothing else:
Score: NUMBER"""
PATTERN = r"(?i)score[\s:=*_]{0,8}(-?\d+(?:\.\d+)?)(?![\d.]*/)"
LARGEST = 1 << 20  # bytes of a reply


@dataclasses.dataclass(frozen=True)
class Judge:
  """The last number that `pattern` finds in the judge's reply, within low and high.

  Args:
    url: of the API, as far as `/v1`.
    template: with {prompt}, {completion}, {reference}, {low} and {high}; the text that the judge is sent.
    column: of the row, whose text is the {reference}; "": none.
    key: the environment variable that holds the API's key; "": none is sent.
    seconds: for one answer, with all tries.
    tries: at most; the wait between them doubles, or is what the server asks for.
    at_once: requests that are open at a time.
    stopping: asked while replies are waited for; once it says so, nobody waits for them.
  """

  url: str
  model: str
  template: str = TEMPLATE
  pattern: str = PATTERN
  low: float = 1.0
  high: float = 10.0
  column: str = ""
  key: str = ""
  seconds: float = 60.0
  tries: int = 3
  wait: float = 1.0
  at_once: int = 8
  max_tokens: int = 512
  stopping: Callable[[], bool] = lambda: False

  def __post_init__(self):
    try:
      _ = self.api
    except ValueError as error:
      raise ValueError(f"judge: {error}") from None
    if not re.search(r"\{completion\}", self.template):
      raise ValueError("judge: the template has no {completion}, so the judge would not see it")
    reason = patterns.wrong(self.pattern)
    if reason or re.compile(self.pattern).groups != 1:
      raise ValueError(
        f"judge: pattern={self.pattern!r} {reason or 'has not one group, for the number'}"
      )

  @functools.cached_property
  def api(self) -> Api:
    return Api(self.url, self.key, self.seconds, LARGEST)

  def scores(self, answers: Sequence[Answer], context: Context) -> list[Score]:
    """Raises Interrupted where `stopping` says so; a run is saved before the replies under way are there."""
    threads = Waiters(self.at_once, "judge")
    try:
      asked = [threads.submit(self.judged, answer) for answer in answers]
      while futures.wait(asked, timeout=api.LOOKS).not_done:
        if self.stopping():
          raise Interrupted("ended while a judge was asked")
      return [one.result() for one in asked]
    finally:
      threads.close()

  def judged(self, answer: Answer) -> Score:
    """What the judge says of one answer."""
    patience = Patience(self.tries, self.seconds, cuts=True, wait=self.wait, stopping=self.stopping)
    body = self._asked(answer)
    try:
      return self.api.asked("/chat/completions", body, self._score, patience, "chat completion")
    except api.Failed as error:
      if error.ended == api.LATE:
        return score.missing(f"the judge took longer than {self.seconds:g} s")
      return score.missing(f"the judge at {self.api.name} {error.why}")

  def _score(self, reply: bytes) -> Score:
    return self.read(api.completion(reply)[0])

  def read(self, reply: str) -> Score:
    """The score that a reply says.

    >>> judge = Judge("http://localhost/v1", "m")
    >>> judge.read("Good. Score: 7").value, judge.read("Seven!").reason
    (7.0, "the judge's reply has no score: 'Seven!'")
    """
    numbers = re.findall(self.pattern, reply)
    if not numbers:
      return score.missing(f"the judge's reply has no score: {words.shown(reply[-80:])}")
    try:
      value = float(numbers[-1])
    except ValueError:
      return score.missing(f"the judge's score {words.shown(numbers[-1])} is no number")
    given = score.of(value, (self.low, self.high))
    return Score(given.value, words.shown(reply, 300)) if given.value is not None else given

  def _asked(self, answer: Answer) -> dict[str, Any]:
    reference = answer.example.get(self.column) if self.column else None
    fields = {
      "prompt": questions.shown(answer.prompt),
      "completion": answer.completion,
      "reference": "" if reference is None else f"\nA right answer:\n{reference}\n",
      "low": self.low,
      "high": self.high,
    }
    # a replacement a field, in one pass: what an answer holds in braces stays as it is
    text = re.sub(
      r"\{(prompt|completion|reference|low|high)(:g)?\}",
      lambda match: _shown(fields[match[1]]),
      self.template,
    )
    return {
      "model": self.model,
      "messages": [{"role": "user", "content": text}],
      "temperature": 0.0,
      "max_tokens": self.max_tokens,
    }


def _shown(value: Any) -> str:
  return f"{value:g}" if isinstance(value, float) else str(value)
