"""How a request is refused: a status, and OpenAI's shape of an error, which its clients turn into exceptions."""

from __future__ import annotations

import dataclasses
from typing import Any

from posttrain_jax.core import words

INVALID, MISSING, AUTHENTICATION = (
  "invalid_request_error",
  "not_found_error",
  "authentication_error",
)
BUSY, ENDING, OURS = "rate_limit_error", "service_unavailable_error", "server_error"
UNKNOWN_MODEL = "model_not_found"


@dataclasses.dataclass
class Refused(Exception):
  """A request that is not answered, and why.

  param: the field of the body that is wrong.
  retry_after: seconds after which the same request may be answered; None: it never will.
  """

  status: int
  message: str
  param: str | None = None
  kind: str = INVALID
  code: str | None = None
  retry_after: float | None = None

  def __str__(self) -> str:
    return self.message

  @property
  def body(self) -> dict[str, Any]:
    """As it travels.

    >>> Refused(400, "n is 0", "n").body
    {'error': {'message': 'n is 0', 'type': 'invalid_request_error', 'param': 'n', 'code': None}}
    """
    shape = dict(message=self.message, type=self.kind, param=self.param, code=self.code)
    return {"error": shape}

  @property
  def headers(self) -> dict[str, str]:
    """Whether and when a client is to ask again: OpenAI's own retry whatever is 408, 409, 429 or 5xx otherwise."""
    if self.retry_after is None:
      return {"x-should-retry": "false"}
    return {"retry-after": str(max(1, round(self.retry_after)))}


def wrong(message: str, param: str | None = None, status: int = 400) -> Refused:
  """A request that can never be answered."""
  return Refused(status, message, param)


def unknown_model(name: str, known: list[str]) -> Refused:
  """As OpenAI says it: 404 and a code, never another model's answer."""
  listed = ", ".join(known[:8]) + (f" and {len(known) - 8} more" if len(known) > 8 else "")
  return Refused(
    404,
    f"the model {words.shown(name, 80)} does not exist here; there are {listed}",
    "model",
    MISSING,
    UNKNOWN_MODEL,
  )


def failed() -> Refused:
  """A fault of ours: what it was stands in the server's log, and not on the wire."""
  return Refused(500, "the server failed at this request; its log says how", None, OURS)
