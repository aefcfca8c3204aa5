"""The page on serving works as printed: its first command, its request, OpenAI's client."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from posttrain_jax.models import fetch
from tests.docs import printed
from tests.docs.test_commands_run import _small

PAGE = printed.ROOT / "docs" / "serving.md"


@pytest.mark.slow
def test_the_first_command_its_request_and_the_client_run_as_printed(tmp_path):
  _small(fetch.resolve("smollm2"), tmp_path / "cache" / "models" / "smollm2")
  command = next(c for c in printed.commands(PAGE) if c.argv is not None)
  assert command.argv == ["serve", "--model=smollm2"]
  ours = {"POSTTRAIN_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(printed.ROOT)}
  ours |= {"JAX_COMPILATION_CACHE_DIR": str(printed.ROOT / ".cache" / "jax-commands")}
  argv = [sys.executable, "-m", "posttrain_jax", *command.argv, "--port=0"]
  log = open(tmp_path / "log", "w+")  # noqa: SIM115
  server = subprocess.Popen(
    argv, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **ours, "JAX_PLATFORMS": "cpu"}
  )
  try:
    address = _address(server, tmp_path / "log")
    there = lambda text: text.replace("http://127.0.0.1:8000", address)
    asked = next(c for c in printed.commands(PAGE) if c.text.startswith("curl"))
    told = subprocess.run(["bash", "-c", there(asked.text)], capture_output=True, text=True)
    assert json.loads(told.stdout)["choices"][0]["finish_reason"] in ("stop", "length")
    block = next(iter(printed.fences(PAGE, "python")))
    exec(
      compile(there(block).replace("stream=True", "stream=True, max_tokens=4"), PAGE.name, "exec"),
      {},
    )
  finally:
    server.send_signal(signal.SIGTERM)
    code = server.wait(60)
    log.close()
  assert code == 0


def _address(server, path):
  end = time.monotonic() + 240
  while time.monotonic() < end and server.poll() is None:
    if found := re.search(r"serving at (\S+)/v1", path.read_text()):
      return found[1]
    time.sleep(0.1)
  raise AssertionError(path.read_text())
