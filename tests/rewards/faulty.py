"""Verifiers with every fault, imported by workers."""

import os
import pathlib
import signal
import subprocess
import time


def length(prompt, completion, example):
  return len(completion)


def told(prompt, completion, example):
  """What the answer asks for."""
  if completion == "hang":
    time.sleep(600)
  if completion == "slow":
    time.sleep(0.5)
  if completion == "loop":
    while True:
      pass
  if completion == "crash":
    os.kill(os.getpid(), signal.SIGKILL)
  if completion == "leave":
    os._exit(0)
  if completion == "raise":
    return {}["gold"]
  if completion == "print":
    print('{"result": [1.0, "", true]}', flush=True)
  return float(completion) if completion.isdigit() else 0.5


def keeps_a_child(prompt, completion, example):
  """Starts a program that sleeps, and writes its number to the file that the answer names."""
  child = subprocess.Popen(["sleep", "600"])
  pathlib.Path(completion).write_text(f"{os.getpid()} {child.pid}")
  return 1.0


def leaves_a_child(prompt, completion, example):
  """The same, and hangs."""
  keeps_a_child(prompt, completion, example)
  time.sleep(600)


def forks(prompt, completion, example):
  """The child comes back with a score of its own, now or while the next answer is judged."""
  if os.fork() == 0:
    time.sleep(float(completion) % 2 / 10)
    return -1.0
  time.sleep(0.05)
  return float(completion)
