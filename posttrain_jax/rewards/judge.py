"""A judge: a model behind an OpenAI-compatible address that is asked how good an answer is.

A reply that cannot be read, an address that does not answer, and a number outside of the range are missing.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any

from posttrain_jax.core import patterns, words
from posttrain_jax.data import questions
from posttrain_jax.rewards import score
from posttrain_jax.rewards.score import Score
from posttrain_jax.rewards.verifier import Answer, Context

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
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}  # statuses that may pass


@dataclasses.dataclass(frozen=True)
class Judge:
  """The last number that `pattern` finds in the judge's reply, within low and high.

  Args:
    url: of the API, as far as `/v1`.
    template: with {prompt}, {completion}, {reference}, {low} and {high}; the text that the judge is sent.
    column: of the row, whose text is the {reference}; "": none.
    key: the environment variable that holds the API's key; "": none is sent.
    seconds: for one answer, with all tries.
    tries: at most; the wait between them doubles.
    at_once: requests that are open at a time.
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

  def __post_init__(self):
    if not self.url.startswith(("http://", "https://")):
      raise ValueError(f"judge: url={self.url!r}; it begins with http:// or https://")
    if not re.search(r"\{completion\}", self.template):
      raise ValueError("judge: the template has no {completion}, so the judge would not see it")
    reason = patterns.wrong(self.pattern)
    if reason or re.compile(self.pattern).groups != 1:
      raise ValueError(
        f"judge: pattern={self.pattern!r} {reason or 'has not one group, for the number'}"
      )
    if self.key and self.key not in os.environ:
      raise ValueError(f"judge: the environment has no {self.key}, which key={self.key} names")

  def scores(self, answers: Sequence[Answer], context: Context) -> list[Score]:
    with futures.ThreadPoolExecutor(self.at_once) as threads:
      return list(threads.map(self.judged, answers))

  def judged(self, answer: Answer) -> Score:
    """What the judge says of one answer."""
    deadline = time.monotonic() + self.seconds
    reason = ""
    for attempt in range(self.tries):
      if attempt:
        pause = self.wait * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
        if time.monotonic() + pause >= deadline:
          break
        time.sleep(pause)
      try:
        return self.read(self._reply(self._asked(answer), deadline))
      except urllib.error.HTTPError as error:
        reason = f"the judge at {self._address} answered {error.code} {error.reason}"
        if error.code not in AGAIN:
          break
      except _Late:
        return score.missing(f"the judge took longer than {self.seconds:g} s")
      except (OSError, http.client.HTTPException) as error:
        reason = f"the judge at {self._address} does not answer: {_why(error)}"
      except (ValueError, KeyError, IndexError, TypeError) as error:
        reason = f"the judge at {self._address} sent what is no chat completion: {type(error).__name__}: {error}"
    return score.missing(reason)

  @property
  def _address(self) -> str:
    """What is said of the url: reasons are stored, and a password in it is not for them."""
    return re.sub(r"//[^/@]*@", "//", self.url)

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

  def _reply(self, asked: Mapping[str, Any], deadline: float) -> str:
    headers = {"Content-Type": "application/json"}
    if self.key:
      headers["Authorization"] = f"Bearer {os.environ[self.key]}"
    request = urllib.request.Request(
      f"{self.url.rstrip('/')}/chat/completions", json.dumps(asked).encode(), headers
    )
    try:
      with urllib.request.urlopen(request, timeout=_left(deadline)) as response:
        body = _within(response, deadline)
    except TimeoutError:
      raise _Late from None
    except urllib.error.URLError as error:
      if isinstance(error.reason, TimeoutError):
        raise _Late from None
      raise
    text = json.loads(body)["choices"][0]["message"]["content"]
    if not isinstance(text, str):
      raise TypeError(f"its content is {words.shown(text, 60)}")
    return text


class _Late(Exception):
  """The deadline has passed."""


def _why(error: BaseException) -> str:
  """What the system says of a connection, in its own words."""
  inner = error.reason if isinstance(error, urllib.error.URLError) else error
  if isinstance(inner, OSError) and inner.strerror:
    return inner.strerror
  return f"{type(inner).__name__}: {inner}" if isinstance(inner, BaseException) else str(inner)


def _left(deadline: float) -> float:
  left = deadline - time.monotonic()
  if left <= 0:
    raise _Late
  return left


def _within(response: Any, deadline: float) -> bytes:
  """The body, which may come in drops: the socket's own time-out counts each of them anew."""
  body = b""
  while some := response.read1(1 << 16):
    body += some
    _left(deadline)
    if len(body) > LARGEST:
      raise ValueError(f"more than {LARGEST:,} bytes")
  return body


def _shown(value: Any) -> str:
  return f"{value:g}" if isinstance(value, float) else str(value)
