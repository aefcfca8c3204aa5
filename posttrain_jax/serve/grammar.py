"""Answers held to a form by masks of tokens: JSON, a JSON schema, a call of a tool.  It needs llguidance.

A schema is compiled once and off the thread that owns the device; a mask takes tens of microseconds.
"""

from __future__ import annotations

import collections
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from posttrain_jax.core import words
from posttrain_jax.data.tool_calls import Form
from posttrain_jax.serve.errors import wrong
from posttrain_jax.serve.voice import Voice

Allowed = Callable[[Sequence[int]], np.ndarray]
KEPT = 64  # compiled grammars
VOICES = 8  # whose tokenizers are kept in llguidance's form


class Grammars:
  """Compiled grammars, the latest of them kept; used from several threads."""

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._tokenizers: collections.OrderedDict[int, Any] = collections.OrderedDict()
    self._kept: collections.OrderedDict[tuple[int, str], Any] = collections.OrderedDict()

  def json_object(self, voice: Voice) -> Allowed:
    """Any JSON object."""
    return self.schema(voice, {"type": "object"}, "response_format")

  def schema(self, voice: Voice, schema: dict[str, Any], param: str) -> Allowed:
    """JSON that a schema describes.

    Raises:
      Refused: it is no schema, asks for what cannot be held to, or llguidance is not installed.
    """
    lark = f"start: %json {json.dumps(schema)}"
    return self._of(voice, lark, param)

  def tool_calls(self, voice: Voice, form: Form, tools: Sequence[dict]) -> Allowed:
    """A call of one of the tools, in the form of the voice's template."""
    each = [_call_schema(tool.get("function", tool), form) for tool in tools]
    one = each[0] if len(each) == 1 else {"anyOf": each}
    whole = {"type": "array", "items": one, "minItems": 1, "maxItems": 8} if form.is_list else one
    parts = [
      _literal(voice, form.begin),
      '"\\n"?',
      "call",
      '"\\n"?',
      _literal(voice, form.end),
    ]
    lark = f"start: {' '.join(part for part in parts if part)}\ncall: %json {json.dumps(whole)}"
    return self._of(voice, lark, "tools")

  def _of(self, voice: Voice, lark: str, param: str) -> Allowed:
    llguidance = _library(param)
    if not voice.ends:
      raise wrong(f"{param}: this model has no token that ends an answer", param)
    with self._lock:
      key = (id(voice), lark)
      matcher = self._kept.get(key)
      if matcher is None:
        tokenizer = self._tokenizer(voice)
        matcher = llguidance.LLMatcher(
          tokenizer, llguidance.LLMatcher.grammar_from_lark(lark), log_level=0
        )
        if matcher.is_error():
          why = words.cut(" ".join(matcher.get_error().split()), 300)
          raise wrong(f"{param} cannot be held to: {why}", param)
        self._kept[key] = (voice, matcher)
        while len(self._kept) > KEPT:
          self._kept.popitem(last=False)
      else:
        self._kept.move_to_end(key)
        _, matcher = matcher
      return Masks(matcher.deep_copy(), voice.vocab)

  def _tokenizer(self, voice: Voice) -> Any:
    if id(voice) not in self._tokenizers:
      from llguidance import hf

      made = hf.from_tokenizer(voice.tokenizer, n_vocab=voice.vocab, eos_token=list(voice.ends))
      self._tokenizers[id(voice)] = (voice, made)  # an id belongs to one voice while that is alive
      while len(self._tokenizers) > VOICES:
        self._tokenizers.popitem(last=False)
    self._tokenizers.move_to_end(id(voice))
    return self._tokenizers[id(voice)][1]


class Masks:
  """Which tokens may come next of one answer, as the worker asks for it: bits of the vocabulary, uint32."""

  def __init__(self, matcher: Any, vocab: int) -> None:
    self._matcher, self._vocab, self._read = matcher, vocab, 0

  def __call__(self, drawn: Sequence[int]) -> np.ndarray:
    new = [int(token) for token in drawn[self._read :]]
    if new and not self._matcher.consume_tokens(new):
      raise RuntimeError(f"the grammar does not take what was drawn: {self._matcher.get_error()}")
    self._read = len(drawn)
    words_ = -(-self._vocab // 32)
    bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
    return np.pad(bits[:words_], (0, max(0, words_ - len(bits))))


def _library(param: str) -> Any:
  try:
    import llguidance
  except ImportError:
    raise wrong(
      f"{param} needs llguidance on the server: pip install 'posttrain-jax[serve]'", param, 501
    ) from None
  return llguidance


def _call_schema(function: dict[str, Any], form: Form) -> dict[str, Any]:
  arguments = function.get("parameters") or {"type": "object"}
  properties = {form.name: {"const": function["name"]}, form.arguments: arguments}
  return dict(
    type="object",
    properties=properties,
    required=list(properties),
    additionalProperties=False,
  )


def _literal(voice: Voice, text: str) -> str:
  """A text in Lark's syntax: a special token by its id, since no text makes it."""
  if not text:
    return ""
  token = voice.marks.get(text)
  return json.dumps(text) if token is None else f"<[{token}]>"
