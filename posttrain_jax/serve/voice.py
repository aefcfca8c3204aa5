"""How one model of those that are served is spoken to: its tokenizer, its chat template, what ends its answers.

An adapter that came with a tokenizer or a template of its own is spoken to with those.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Sequence
from typing import Any

from posttrain_jax.data import templates, tool_calls
from posttrain_jax.data.template_sandbox import TemplateError
from posttrain_jax.serve import spelling
from posttrain_jax.serve.errors import Refused, wrong

RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "room", "generates", "self")


@dataclasses.dataclass(frozen=True, eq=False)
class Voice:
  """ends: ids that end an answer; vocab: rows of the model's embedding; system: the message of its training, put before
  a conversation that has none."""

  tokenizer: Any
  template: templates.Template | None
  ends: tuple[int, ...]
  vocab: int
  system: str | None = None
  _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock, repr=False)

  @functools.cached_property
  def byte_level(self) -> bool:
    return spelling.is_byte_level(self.tokenizer)

  @functools.cached_property
  def special(self) -> frozenset[int]:
    """Ids that write nothing in an answer."""
    return frozenset(self.marks.values())

  @functools.cached_property
  def marks(self) -> dict[str, int]:
    """{name: id} of those; a text that is not among them is no such token, whatever the unknown token is."""
    added = self.tokenizer.added_tokens_decoder
    return {token.content: at for at, token in added.items() if token.special}

  @functools.cached_property
  def longest(self) -> int:
    """Characters that a token stands for at most; a text of more than that a token has too many tokens unread."""
    return max(len(token) for token in self.tokenizer.get_vocab())

  @functools.cached_property
  def call_form(self) -> tool_calls.Form | None:
    """How its template writes calls of tools; None where it writes none in JSON, or never tells of tools."""
    if self.template is None:
      return None
    try:
      return tool_calls.form(self.template) if tool_calls.tells(self.template) else None
    except ValueError:  # TemplateError is one
      return None

  def encode(self, text: str, room: int, *, opening: bool = True) -> list[int]:
    """The tokens of a text; opening: behind the token that starts a text, where the tokenizer writes one.

    Raises:
      Refused: it has more tokens than there is room for, and it was not read for that.
    """
    if len(text) > self.longest * room:
      raise too_long(f"{len(text):,} characters, more than {room:,} tokens hold", room)
    with self._lock:
      if opening:
        return templates.opening(self.tokenizer, text)
      return self.tokenizer(text, add_special_tokens=False)["input_ids"]

  def conversation(
    self,
    messages: Sequence[dict],
    tools: Sequence[dict],
    room: int,
    *,
    generates: bool = True,
    **variables: Any,
  ) -> list[int]:
    """The tokens of a conversation, up to where the answer begins.

    Raises:
      Refused: there is no template, it cannot take this conversation, or there is no room.
    """
    text = self.written(messages, tools, generates=generates, **variables)
    return self.encode(text, room, opening=False)

  def written(
    self, messages: Sequence[dict], tools: Sequence[dict], *, generates: bool, **variables: Any
  ) -> str:
    """A conversation as the template writes it.

    Raises:
      Refused: there is no template, or it cannot take this conversation.
    """
    if self.template is None:
      raise wrong(
        "this model has no chat template, so that messages have no form: ask /v1/completions, or start the server with"
        f" --template={'|'.join(templates.NAMED)}",
        "messages",
      )
    told = list(messages)
    if self.system and not any(one["role"] in ("system", "developer") for one in told):
      told = [{"role": "system", "content": self.system}, *told]
    try:
      return self.template.render(
        told, add_generation_prompt=generates, tools=list(tools) or None, **variables
      )
    except TemplateError as error:
      raise wrong(f"the chat template does not take these messages: {error}", "messages") from None

  def decoder(self, keep: frozenset[int] = frozenset()) -> spelling.Decoder:
    """What turns an answer's tokens into text; keep: special ids that are written all the same."""
    return spelling.Decoder(self.tokenizer, self.special - keep, byte_level=self.byte_level)

  def bytes_of(self, token: int) -> bytes:
    """What a token writes, special ones by their names."""
    return spelling.token_bytes(self.tokenizer, token, byte_level=self.byte_level)

  def text(self, tokens: Sequence[int], *, special: bool = True) -> str:
    with self._lock:
      return self.tokenizer.decode(
        list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False
      )


def too_long(found: str, room: int) -> Refused:
  """OpenAI's code for what no context holds."""
  return Refused(
    400,
    f"the prompt has {found}; the model has {room:,} positions for a prompt and its answer",
    "messages",
    code="context_length_exceeded",
  )
