"""A process that has imported everything and forks for each command, since importing takes longer than what is tested.

A line of JSON a request: {"command": arguments, "point": where the command waits, "signals": what it gets there}.  The
answer: {"code", "out", "err", "seconds" from the signal to the end}.
"""

import importlib
import json
import logging
import os
import pathlib
import select
import signal
import subprocess
import sys
import time

PATIENCE = 120.0  # seconds for a command to reach its point, and to end


def wait_there(pipe):
  """Says that the point is reached and stays, as a long file would hold it up."""
  os.write(pipe, b"!")
  time.sleep(PATIENCE)


def hold(point, pipe):
  """Patches what a run goes through at `point`."""
  from posttrain_jax.build import data as data_lib
  from posttrain_jax.core import checkpoint
  from posttrain_jax.runs.metrics_log import Journal

  write, save = Journal.write, checkpoint.Checkpoints.save
  if point == "reading":
    vars(data_lib)["read"] = lambda *_: wait_there(pipe)
  elif point == "step 3":

    def written(self, step, values):
      write(self, step, values)
      if step == 3 and "loss" in values:
        os.write(pipe, b"!")
        time.sleep(0.5)

    Journal.write = written
  elif point == "saving":

    def saved(self, step, state, data):
      save(self, step, state, data)
      wait_there(pipe)

    checkpoint.Checkpoints.save = saved
  elif point.startswith("posttrain_jax."):  # a function, by its name
    module, _, name = point.rpartition(".")
    vars(importlib.import_module(module))[name] = lambda *_, **__: wait_there(pipe)
  elif point == "disk full":  # what is written from the first save on finds no room
    import resource

    def full(self, step, state, data):
      signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
      resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, resource.RLIM_INFINITY))
      save(self, step, state, data)

    checkpoint.Checkpoints.save = full


def fork(request):
  out, err = os.pipe(), os.pipe()  # which hold what a command says, and are full with no disk
  told, pipe = os.pipe()
  child = os.fork()
  if not child:
    os.setsid()
    os.dup2(out[1], 1)
    os.dup2(err[1], 2)
    logging.root.handlers.clear()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    hold(request["point"], pipe)
    from posttrain_jax.__main__ import main

    sys.argv = ["posttrain", *request["command"]]
    try:
      code = main()
    except SystemExit as leaving:
      code = leaving.code
    except BaseException:
      import traceback

      traceback.print_exc()
      code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 98)
  os.close(pipe)
  began = time.monotonic()
  if request["signals"]:
    assert select.select([told], [], [], PATIENCE)[0], "the point was not reached"
    began = time.monotonic()
    for name in request["signals"]:
      os.kill(child, signal.Signals[name])
      time.sleep(0.2)
  while time.monotonic() - began < PATIENCE:
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
      break
    time.sleep(0.02)
  else:
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
  os.close(told)

  def read(pipe):
    os.close(pipe[1])
    with os.fdopen(pipe[0], "rb") as file:
      return file.read().decode(errors="replace")

  return {
    "code": os.waitstatus_to_exitcode(status),
    "out": read(out),
    "err": read(err),
    "seconds": time.monotonic() - began,
  }


class Server:
  """The process, from outside."""

  def __init__(self, environment):
    self.process = subprocess.Popen(
      [sys.executable, "-m", "tests.commands.faults"],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      cwd=pathlib.Path(__file__).parents[2],
      env=environment,
    )

  def run(self, command, point="", signals=()):
    request = {"command": command, "point": point, "signals": list(signals)}
    assert self.process.stdin is not None
    assert self.process.stdout is not None
    self.process.stdin.write(json.dumps(request) + "\n")
    self.process.stdin.flush()
    return json.loads(self.process.stdout.readline())

  def close(self):
    assert self.process.stdin is not None
    self.process.stdin.close()
    self.process.wait()


if __name__ == "__main__":
  import posttrain_jax.build.run  # noqa: F401

  answers = os.fdopen(os.dup(1), "w")
  for line in sys.stdin:
    answers.write(json.dumps(fork(json.loads(line))) + "\n")
    answers.flush()
