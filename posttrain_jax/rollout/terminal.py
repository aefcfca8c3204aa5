"""Questions typed in a terminal: lines edited, earlier ones brought back, a pasted block taken as one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import prompt_toolkit
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from posttrain_jax.core import ending
from posttrain_jax.rollout.conversation import Interrupted

PROMPT, CONTINUED = "> ", "  "


def asker(history: Path | None) -> Callable[[], str]:
  """A function that gives the next question; EOFError at Ctrl-D, Interrupted at Ctrl-C.

  Args:
    history: the file of earlier questions; None: they are forgotten.
  """
  kept: History = InMemoryHistory() if history is None else FileHistory(str(history))
  session = prompt_toolkit.PromptSession(
    PROMPT,
    history=kept,
    key_bindings=_keys(),
    prompt_continuation=CONTINUED,
    multiline=True,  # Enter sends all the same
    # answers that go into a file have no prompts between them
    output=create_output(stdout=None if sys.stdout.isatty() else sys.stderr),
  )

  def receive(number: int, frame: FrameType | None) -> None:
    app = session.app
    if not app.is_running or app.loop is None:
      raise ending.Ended(number)
    # what is raised inside its event loop would be one task's trouble
    app.loop.call_soon_threadsafe(lambda: app.exit(exception=ending.Ended(number)))

  def ask() -> str:
    with ending.handling(receive, *ending.ENDING):
      return session.prompt()

  return ask


def history(folder: Path) -> Path | None:
  """The file of earlier questions in a folder, for its owner alone; None where it cannot be written."""
  path = folder / "chat_history"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    path.chmod(0o600)  # one of before
  except OSError:
    return None
  return path


def _keys() -> KeyBindings:
  keys = KeyBindings()

  @keys.add("enter")
  def _(event: KeyPressEvent) -> None:
    event.current_buffer.validate_and_handle()

  @keys.add("escape", "enter")
  def _(event: KeyPressEvent) -> None:
    event.current_buffer.insert_text("\n")

  @keys.add("c-c")
  def _(event: KeyPressEvent) -> None:
    event.app.exit(exception=Interrupted(event.current_buffer.text), style="class:aborting")

  return keys
