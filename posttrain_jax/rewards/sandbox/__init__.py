"""A sandbox: a stranger's program runs, is tested, and leaves nothing behind.

  outcome = sandbox.run(code, stdin=b"3 4", deadline=10)
  outcome = sandbox.run(code, tests=sandbox.Checks(cases=("assert add(3, 4) == 7",)))

`docs/sandbox.md` says what it keeps from the host, and what not.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence

from posttrain_jax.rewards.sandbox import start
from posttrain_jax.rewards.sandbox.isolation import INSTALL, Probe, probe
from posttrain_jax.rewards.sandbox.outcome import Limits, NoSandbox, Outcome

__all__ = ["INSTALL", "Checks", "Limits", "NoSandbox", "Outcome", "Probe", "probe", "run"]


@dataclasses.dataclass(frozen=True)
class Checks:
  """What is asked of a program's functions.

  cases: statements, one test each; the program passes when none raises.
  setup: code that runs before them, and is not the model's: imports and helpers.
  names: what the cases take from the program; () for every name that nobody else defines.
  """

  cases: Sequence[str]
  setup: str = ""
  names: Sequence[str] = ()


def run(
  program: str | Sequence[str],
  *,
  tests: Checks | None = None,
  stdin: bytes = b"",
  files: Mapping[str, bytes] | None = None,
  limits: Limits = Limits(),  # noqa: B008 (frozen)
  deadline: float = 30.0,
  unsafe: bool = False,
  isolation: str = "",
) -> Outcome:
  """Runs Python code, or a command (a list of arguments), and says what became of it.

  Args:
    tests: asked of the code's functions; without them the code is the main program.
    files: written beside it, in its working directory.
    deadline: seconds of the clock from its start, not from its place in the queue.  Beyond it the outcome is missing:
      a program that has not used `limits.seconds` of its own time was kept waiting by others.
    unsafe: run it where nothing isolates it, with limits alone.
    isolation: "bubblewrap", "landlock" or "none" instead of the best that works; "none" asks for `unsafe`.

  Raises:
    NoSandbox: nothing here isolates it.
    ValueError: files, or a command, under Landlock.
  """
  isolation = _isolation(isolation, unsafe)
  if isolation == "landlock" and (files or not isinstance(program, str)):
    raise ValueError(
      f"without namespaces a program is Python code and has no files: {INSTALL}, or leave them out"
    )
  if tests is not None and not isinstance(program, str):
    raise ValueError("tests are asked of Python code, not of a command")
  order: dict = {"code": program} if isinstance(program, str) else {"argv": list(program)}
  if tests is not None:
    order["tests"] = dict(cases=list(tests.cases), setup=tests.setup, names=list(tests.names))
  return start.once(isolation, order, stdin=stdin, files=files, limits=limits, deadline=deadline)


def _isolation(asked: str, unsafe: bool) -> str:
  if sys.platform != "linux":
    raise NoSandbox(f"programs that a model writes run on Linux alone, and this is {sys.platform}")
  if asked == "none" and not unsafe:
    raise NoSandbox('isolation="none" runs a stranger\'s program as yourself: say unsafe=True, too')
  if asked:
    return asked
  found = probe()
  if found.isolation or unsafe:
    return found.isolation or "none"
  raise NoSandbox(
    f"{found.sentence}  Do this: {INSTALL}; or say unsafe=True (reward.unsafe_code=true in a run) "
    "to run them as yourself, with limits alone."
  )
