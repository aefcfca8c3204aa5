"""`posttrain chat` in a terminal of its own: what is typed, pasted and interrupted, and what the next one remembers."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import termios
import time

import pytest

from posttrain_jax.models import hf
from tests.commands import test_train
from tests.data.conftest import make_tokenizer
from tests.models import families

pytestmark = pytest.mark.slow
UP, CTRL_C, CTRL_D, ENTER = b"\x1b[A", b"\x03", b"\x04", b"\r"
COLOURS = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]")


class Terminal:
  """A process in a terminal; what it shows is read without colours and movements."""

  def __init__(self, *command, cache):
    self.controller, self.terminal = pty.openpty()
    self.before = termios.tcgetattr(self.terminal)
    self.process = subprocess.Popen(
      [sys.executable, "-m", "posttrain_jax", *command],
      stdin=self.terminal,
      stdout=self.terminal,
      stderr=self.terminal,
      start_new_session=True,
      preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
      env=test_train.environment() | {"POSTTRAIN_CACHE": str(cache), "TERM": "xterm"},
    )
    self.shown = b""

  def prompt(self):
    """What is shown before the next line can be typed."""
    self.until(lambda: b"\x1b[?2004h" in self.shown)  # from here on pasted blocks are marked
    self.until(lambda: b">" in COLOURS.sub(b"", self.shown.rpartition(b"\x1b[?2004h")[2]))
    text, self.shown = self.text(), b""
    return text

  def text(self):
    return COLOURS.sub(b"", self.shown).decode(errors="replace").replace("\r", "")

  def until(self, holds, seconds=60):
    deadline = time.monotonic() + seconds
    while not holds():
      assert time.monotonic() < deadline, self.text()
      assert holds() or self.process.poll() is None, self.text()
      if select.select([self.controller], [], [], 0.1)[0]:
        self.shown += os.read(self.controller, 65536)

  def types(self, *keys):
    for key in keys:
      os.write(self.controller, key)

  def ends(self):
    """The exit code; a terminal that is full would hold the process up."""
    self.until(lambda: self.process.poll() is not None, 20)
    return self.process.returncode

  def close(self):
    self.process.kill()
    self.process.wait()
    for descriptor in (self.controller, self.terminal):
      os.close(descriptor)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A model that can talk for a long time."""
  path = tmp_path_factory.mktemp("talk") / "model"
  tokenizer = make_tokenizer("chatml")
  config = families.config("llama", vocab_size=len(tokenizer), max_position_embeddings=20_000)
  hf.save(path, families.params(config), config)
  tokenizer.save_pretrained(path)
  return path


@pytest.fixture
def open_chat(folder, tmp_path):
  with contextlib.ExitStack() as stack:

    def opened(*options):
      command = ("chat", f"--model={folder}", "--template=chatml", *options)
      terminal = Terminal(*command, cache=tmp_path / "cache")
      stack.callback(terminal.close)
      return terminal

    yield opened


def test_a_conversation_and_the_next(open_chat, tmp_path):
  kept = tmp_path / "cache" / "chat_history"
  terminal = open_chat("--max_new_tokens=5")
  assert "/help lists" in terminal.prompt()
  terminal.types(b"Helo", b"\x1b[D", b"l", ENTER)  # a letter put in before the last
  assert "cut after 5 tokens" in terminal.prompt()
  terminal.types(b"\x1b[200~What is\nthe capital?\x1b[201~")
  terminal.types(ENTER)
  terminal.prompt()
  assert [line for line in kept.read_text().splitlines() if line.startswith("+")] == [
    "+Hello",
    "+What is",
    "+the capital?",
  ]
  assert stat.S_IMODE(kept.stat().st_mode) == 0o600
  terminal.types(b"/help", ENTER)
  assert str(kept) in terminal.prompt()
  terminal.types(CTRL_D)
  assert terminal.ends() == 0

  again = open_chat("--max_new_tokens=5")
  again.prompt()
  again.types(UP, UP)  # /help, and before it the block
  again.until(lambda: "the capital?" in again.text())
  again.types(UP, UP)
  again.until(lambda: "Hello" in again.text())
  again.types(CTRL_C)  # throws it away
  again.prompt()
  again.types(CTRL_C)
  assert again.ends() == 0


def test_ctrl_c_ends_the_answer_and_sigterm_the_chat(open_chat):
  terminal = open_chat("--max_new_tokens=15000")
  terminal.prompt()
  terminal.types(b"Hello there", ENTER)
  terminal.until(lambda: len(terminal.text()) > 400)
  began = time.monotonic()
  terminal.types(CTRL_C)
  terminal.prompt()
  assert time.monotonic() - began < 5
  terminal.types(b"/undo", ENTER)
  assert "taken back: Hello there" in terminal.prompt()
  terminal.process.send_signal(signal.SIGTERM)
  assert terminal.ends() == 143
  assert "posttrain chat: ended by SIGTERM" in terminal.text()
  assert "Traceback" not in terminal.text()
  # what is typed next is seen again
  assert termios.tcgetattr(terminal.terminal)[3] == terminal.before[3]
