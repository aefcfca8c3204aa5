"""What a request may cost before it is refused."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
  """Bounds of what anybody may send, each checked before anything large is made of it.

  requests: under way at once, before their bodies are read; the next is told to come again (429).
  body: bytes of a request's body.
  header: bytes of a request's line and headers together.
  n: answers of a request, and prompts times answers.
  stops: stop strings, as OpenAI has them; lm-evaluation-harness sends as many.
  stop: characters of a stop string.
  ends: ids that end an answer beside the model's own.
  text: characters that /tokenize takes apart at once, while others wait for their prompts to be.
  top: alternatives that are told with each token.
  schema: bytes of a JSON schema.
  connections: open at once.
  head_seconds: until a connection's first byte has become a whole head.
  body_seconds: until the body has come.
  idle_seconds: of a connection between two requests.
  unread_seconds: that the rest of a body which is refused is taken and dropped, so that its sender hears why.
  write_seconds: that a reader may take none of what waits for it before its connection is closed.
  """

  requests: int = 512
  body: int = 2 << 20
  header: int = 32 << 10
  n: int = 64
  stops: int = 16
  stop: int = 256
  ends: int = 32
  text: int = 256 << 10
  top: int = 20
  schema: int = 64 << 10
  connections: int = 1024
  head_seconds: float = 15.0
  body_seconds: float = 60.0
  idle_seconds: float = 30.0
  unread_seconds: float = 5.0
  write_seconds: float = 60.0
