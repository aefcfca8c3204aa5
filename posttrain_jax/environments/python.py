"""Python in the sandbox as a tool: a program runs, and what it prints comes back."""

from __future__ import annotations

from collections.abc import Callable

from posttrain_jax.rewards import sandbox
from posttrain_jax.rewards.sandbox import Limits

SECONDS, DEADLINE = 3, 20.0  # of a program's own time, and of the clock
MOST = 4000  # characters that come back


def python(unsafe_code: bool = False) -> Callable[[str], str]:
  """The tool.  Raises ValueError where no program can be run here."""
  try:
    sandbox.check(unsafe_code)
  except sandbox.NoSandbox as error:
    raise ValueError(f"python: {error}") from error

  def run(code: str) -> str:
    outcome = sandbox.run(
      code, limits=Limits(seconds=SECONDS), deadline=DEADLINE, unsafe=unsafe_code
    )
    said = outcome.stdout.decode(errors="replace")[:MOST].rstrip()
    wrong = (
      outcome.stderr.decode(errors="replace").strip().splitlines()[-1:]
      if outcome.verdict != "ended"
      else []
    )
    reason = [outcome.reason] if outcome.verdict != "ended" and not wrong else []
    return "\n".join(filter(None, [said, *wrong, *reason])) or "nothing was printed"

  def python(code: str) -> str:
    """
    Runs a Python program.

    Args:
      code: The program; what it prints comes back.

    Returns:
      str: What was printed, and the error where it ended with one.
    """
    return run(code)

  return python


class Python:
  """The tool alone, as an environment."""

  def __init__(self, unsafe_code: bool = False) -> None:
    self._run = python(unsafe_code)

  def reset(self) -> None:
    """Nothing is kept from one program to the next."""

  def python(self, code: str) -> str:
    """
    Runs a Python program.

    Args:
      code: The program; what it prints comes back.

    Returns:
      str: What was printed, and the error where it ended with one.
    """
    return self._run(code)
