"""What a worker's process does: it loads tasks and calls them, and says which message a reply answers.

A task is a picklable function whose result is JSON.  A call that is stuck in C after whoever asked is gone is ended by
the kernel's clock.
"""

from __future__ import annotations

import pickle
import signal
from collections.abc import Callable
from typing import Any, BinaryIO

from posttrain_jax.core import apart_program

PATIENCE = (
  5.0  # seconds after its deadline at which a call ends even though nobody is left to end it
)


def serve(asked: BinaryIO, answer: Callable[[Any], None]) -> None:
  tasks: dict[int, Callable[..., Any]] = {}
  for number, kind, key, body, seconds in apart_program.messages(asked):
    if kind == "load":
      reply: dict[str, Any] = _loaded(tasks, key, body)
    else:
      # only from here does time count, and is a death one of the call
      answer({"to": number, "began": True})
      reply = _called(tasks[key], body, seconds)
    answer({"to": number, **reply})


def _loaded(tasks: dict[int, Callable[..., Any]], key: int, body: bytes) -> dict[str, str]:
  try:
    tasks[key] = pickle.loads(body)
  except Exception as error:
    return {"error": f"{type(error).__name__}: {error}"}
  return {}


def _called(task: Callable[..., Any], body: bytes, seconds: float) -> dict[str, Any]:
  try:
    return {"result": _timed(task, pickle.loads(body), seconds)}
  except (Exception, SystemExit) as error:
    return {"failed": f"raised {type(error).__name__}: {error}"}


def _timed(task: Callable[..., Any], arguments: tuple[Any, ...], seconds: float) -> Any:
  signal.setitimer(signal.ITIMER_REAL, seconds + PATIENCE)
  try:
    return task(*arguments)
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # as it was, whatever the task made of it
