"""/v1/completions: prompts as text or tokens, and the log-probabilities of what they hold.

lm-evaluation-harness scores a continuation by `echo` with `logprobs`: it takes the sum over the prompt's last tokens,
and calls it greedy where each of them has the highest log-probability told beside it, the same number.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from posttrain_jax.serve import spelling, wire
from posttrain_jax.serve.answering import Choice, News, Token
from posttrain_jax.serve.errors import wrong
from posttrain_jax.serve.fields import Fields, whole_text
from posttrain_jax.serve.limits import Limits
from posttrain_jax.serve.voice import Voice
from posttrain_jax.serve.wire_chat import finite

DEFAULT_NEW = 16  # OpenAI's


@dataclasses.dataclass(frozen=True)
class Completion:
  """Prompts to be continued, each text or tokens; answers are numbered prompt * n + sample."""

  wanted: wire.Wanted
  prompts: list[str | list[int]]
  echo: bool
  ids: bool  # answers are told as ids, too, with the token that ended each


def read(body: Fields, limits: Limits, voice: Voice) -> Completion:
  """What a body asks for.

  Raises:
    Refused: there is no prompt, or what is asked is not honoured here.
  """
  echo = body.flag("echo")
  top = body.whole("logprobs", None, 0, limits.top)
  least = 0 if echo and top is not None else 1
  new = body.whole("max_tokens", DEFAULT_NEW, least, 2**31 - 1)
  wanted = wire.wanted(body, limits, vocab=voice.vocab, max_new=new, top=top)
  body.only("suffix", "", why="a text is continued at its end alone")
  body.only("best_of", wanted.n, why="every answer is given: write n")
  prompts = _prompts(body, voice)
  if len(prompts) * wanted.n > limits.n:
    raise wrong(
      f"{len(prompts)} prompts with n={wanted.n} are more than {limits.n} answers", "prompt"
    )
  ids = body.flag("return_token_ids")
  if ids and (wanted.stream or echo):
    raise wrong("return_token_ids is for whole answers without their prompts", "return_token_ids")
  body.close()
  return Completion(wanted, prompts, echo, ids)


def _prompts(body: Fields, voice: Voice) -> list[str | list[int]]:
  given = body.take("prompt")
  if isinstance(given, str) or (
    isinstance(given, list) and given and not isinstance(given[0], str | list)
  ):
    given = [given]
  if not isinstance(given, list) or not given:
    raise body.error("prompt", "a text, a list of texts, tokens' ids, or a list of those")
  return [_prompt(one, voice, body) for one in given]


def _prompt(one: Any, voice: Voice, body: Fields) -> str | list[int]:
  if isinstance(one, str):
    return whole_text(one, "prompt")
  if not isinstance(one, list) or not all(type(token) is int for token in one):
    raise body.error("prompt", "a text, a list of texts, tokens' ids, or a list of those")
  outside = next((token for token in one if not 0 <= token < voice.vocab), None)
  if outside is not None:
    raise wrong(f"the prompt holds token {outside}, ids are 0 to {voice.vocab - 1}", "prompt")
  return one


def tokens(prompt: str | list[int], voice: Voice, room: int) -> list[int]:
  """The prompt's tokens.

  Raises:
    Refused: it has none: even an empty text needs the token that starts one.
  """
  ids = voice.encode(prompt, room) if isinstance(prompt, str) else list(prompt)
  if not ids:
    raise wrong(
      "the prompt is empty, and this model has no token that starts a text: write at least one",
      "prompt",
    )
  return ids


class Texts:
  """The texts of one answer: with `echo` behind its prompt."""

  def __init__(self, one: Choice, asked: Completion, prompt: str, voice: Voice) -> None:
    self._one, self._asked, self._prompt, self._voice = one, asked, prompt, voice
    self._began = False
    self._letters = 0  # of the text before the next piece
    self._decoder = voice.decoder(voice.special)  # special tokens of a prompt have a place in it

  def whole(self) -> dict[str, Any]:
    return self._choice(self._one.text, self._one.told, self._one.reason)

  def of(self, news: News) -> list[dict[str, Any]]:
    """What a client is told of it."""
    waits = news.tokens and self._asked.wanted.top is not None
    if not (news.text or waits or news.is_over):
      return []
    return [self._choice(news.text, news.tokens, news.choice.reason if news.is_over else None)]

  def _choice(self, text: str, told: list[Token], reason: str | None) -> dict[str, Any]:
    if self._asked.echo and not self._began:
      text, told = self._prompt + text, [*self._one.prompt, *told]
    self._began = True
    given = self._one.every if self._asked.ids else told
    choice = dict(
      index=self._one.index, text=text, logprobs=self._logprobs(given), finish_reason=reason
    )
    return {**choice, "token_ids": [token.id for token in given]} if self._asked.ids else choice

  def _logprobs(self, told: list[Token]) -> dict[str, Any] | None:
    top = self._asked.wanted.top
    if top is None:
      return None
    offsets = []
    for token in told:
      offsets.append(self._letters)
      self._letters += len(self._decoder.feed(token.id))
    return dict(
      tokens=[self._name(token.id) for token in told],
      token_logprobs=[finite(token.logp) for token in told],
      top_logprobs=[self._top(token, top) for token in told],
      text_offset=offsets,
    )

  def _top(self, token: Token, top: int) -> dict[str, float | None] | None:
    """{text: log-probability} of the likeliest and of the token itself; of two with one text the likelier."""
    if token.logp is None:
      return None
    found: dict[str, float | None] = {}
    for at, logp in [*token.top[:top], (token.id, token.logp)]:
      found.setdefault(self._name(at), finite(logp))
    return found

  def _name(self, token: int) -> str:
    return spelling.shown(self._voice.bytes_of(token))
