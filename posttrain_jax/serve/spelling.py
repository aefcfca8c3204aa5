"""From tokens to text as they come: no character in parts, and nothing that a stop string may yet take back."""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Collection, Sequence
from typing import Any

_HELD = 4  # tokens that may hold one character in parts: UTF-8 has four bytes at most
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@functools.cache
def _byte_of() -> dict[str, int]:
  """{letter: byte} of GPT-2's alphabet, in which a byte that is no printable letter stands as one from 256 on."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in plain]
  return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def is_byte_level(tokenizer: Any) -> bool:
  """Whether a token's text is its bytes, whatever stands beside it: then texts are put together byte by byte."""
  decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder") or {}
  return decoder.get("type") == "ByteLevel"


def token_bytes(tokenizer: Any, token: int, *, byte_level: bool) -> bytes:
  """What a token writes; nothing for an id that the tokenizer does not know."""
  text = tokenizer.backend_tokenizer.id_to_token(int(token))
  if text is None:
    return b""
  if byte_level:
    letters = _byte_of()
    if all(letter in letters for letter in text):
      return bytes(letters[letter] for letter in text)
    return text.encode()
  if found := _BYTE.fullmatch(text):
    return bytes([int(found[1], 16)])
  return text.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


def shown(data: bytes) -> str:
  """A token's bytes as OpenAI names them where they are no text by themselves.

  >>> shown("é".encode()), shown(b"\\xc3")
  ('é', 'bytes:\\\\xc3')
  """
  try:
    return data.decode("utf-8")
  except UnicodeDecodeError:
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class Decoder:
  """Tokens in, whole characters out.

  silent: ids that write nothing, as special tokens do.
  """

  def __init__(self, tokenizer: Any, silent: Collection[int], *, byte_level: bool) -> None:
    self._tokenizer, self._silent, self._byte_level = tokenizer, silent, byte_level
    self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
    self._tokens: list[int] = []  # from the last but one that ended a text
    self._read = 0  # how many of them are told

  def feed(self, token: int) -> str:
    if token in self._silent:
      return ""
    if self._byte_level:
      return self._bytes.decode(token_bytes(self._tokenizer, token, byte_level=True))
    self._tokens.append(token)
    return self._told(is_last=False)

  def close(self) -> str:
    """What is left: a character that never became whole, as U+FFFD."""
    return self._bytes.decode(b"", final=True) if self._byte_level else self._told(is_last=True)

  def _told(self, *, is_last: bool) -> str:
    # A text's beginning may be written otherwise than its middle, so that new tokens are read behind earlier ones.
    before = self._decoded(self._tokens[: self._read])
    text = self._decoded(self._tokens)
    is_whole = not text.endswith("\N{REPLACEMENT CHARACTER}") and len(text) > len(before)
    if not (is_whole or is_last or len(self._tokens) - self._read >= _HELD):
      return ""
    self._tokens, self._read = self._tokens[self._read :], len(self._tokens) - self._read
    return text[len(before) :]

  def _decoded(self, tokens: Sequence[int]) -> str:
    return self._tokenizer.decode(
      list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


class Spelling:
  """An answer's text as it grows, cut in front of the first stop string.

  >>> spelling = Spelling(None, ("STOP",))
  >>> [spelling.add(text) for text in ("a S", "T", "x ST", "OP b")], spelling.matched
  (['a ', '', 'STx ', ''], 'STOP')
  """

  def __init__(self, decoder: Decoder | None, stops: Sequence[str] = ()) -> None:
    self._decoder, self._stops = decoder, tuple(stops)
    self._held = ""  # told to nobody: it may be the beginning of a stop string
    self._exempt = 0  # letters of it in which no stop string may end
    self.matched: str | None = None

  def feed(self, token: int, *, may_end: bool = True) -> str:
    """The text that is certain by now and was not before; may_end: whether a stop string may end with this token."""
    assert self._decoder is not None
    return self.add(self._decoder.feed(token), may_end=may_end)

  def close(self) -> str:
    """The rest, where no more tokens come."""
    if self.matched is not None:
      return ""
    assert self._decoder is not None
    text = self.add(self._decoder.close())
    rest, self._held = self._held, ""
    return text + (rest if self.matched is None else "")

  def add(self, text: str, *, may_end: bool = True) -> str:
    if self.matched is not None or not text:
      return ""
    self._held += text
    if not may_end:
      self._exempt = len(self._held)
    first = lambda stop: self._held.find(stop, max(0, self._exempt - len(stop) + 1))
    places = [(first(stop), stop) for stop in self._stops]
    if there := [(at, -len(stop), stop) for at, stop in places if at >= 0]:
      at, _, self.matched = min(there)
      told, self._held = self._held[:at], ""
      return told
    keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
    told = self._held[: len(self._held) - keep]
    self._held, self._exempt = self._held[len(told) :], max(0, self._exempt - len(told))
    return told


def _overlap(text: str, stop: str) -> int:
  """How many letters at the text's end are the beginning of the stop string."""
  most = min(len(text), len(stop) - 1)
  return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
