"""One of several processes that runs commands one after the other, since joining takes longer than what is tested.

python -m tests.commands.processes COMMANDS, a JSON list of pairs: a command, and the exit code that it is to end with.
"""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = "import sys; from launch import local; sys.exit(local.run(sys.argv[2:], processes=int(sys.argv[1])))"


def launched(commands, count, environment):
  """What `count` processes say that run the commands (or pairs of a command and its exit code) together.

  Raises:
    AssertionError: with what they said, where one fails.
  """
  pairs = [one if isinstance(one, tuple) else (one, 0) for one in commands]
  here = [sys.executable, "-m", "tests.commands.processes", json.dumps(pairs)]
  done = subprocess.run(
    [sys.executable, "-c", LAUNCH, str(count), *here],
    capture_output=True,
    text=True,
    timeout=2400,
    env=environment,
    cwd=ROOT,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def run(commands):
  from posttrain_jax.__main__ import main
  from posttrain_jax.build import decisions
  from posttrain_jax.core import distributed
  from posttrain_jax.rollout import engine

  engine.Engine.is_strict = True  # as in the other tests
  vars(decisions)["processor"] = lambda: None
  distributed.initialize()
  for name in (distributed.COORDINATOR, distributed.PROCESSES, distributed.PROCESS_ID):
    del os.environ[name]  # it has joined
  for command, code in commands:
    if (found := main(command)) != code:
      return found or 1
  return 0


if __name__ == "__main__":
  sys.exit(run(json.loads(sys.argv[1])))
