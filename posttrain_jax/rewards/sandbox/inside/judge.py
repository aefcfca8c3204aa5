"""The judge of a sandbox: it starts the model's program as a child, asks it, and alone says the verdict.

In this order, for the sake of which there are two processes: limits and the unprivileged uid; the child is made; the
judge hides its memory from it; only then it reads the order with the tests and the nonce, and sends the child its code.
"""

import _thread
import json
import os
import resource
import select
import signal
import sys

from posttrain_jax.rewards.sandbox.inside import child as children
from posttrain_jax.rewards.sandbox.inside import kernel, program, seccomp


def main() -> None:
  setup = json.loads(sys.argv[1])
  _enter(setup)
  child = _started(setup)
  os.close(0)
  os.open("/dev/null", os.O_RDWR)
  if setup["isolation"] == "landlock":
    seccomp.install(seccomp.base(alone=child.pid))
  kernel.hide()
  _thread.start_new_thread(_end_with, (setup["verdict"],))
  resource.setrlimit(resource.RLIMIT_CPU, (2 * setup["seconds"] + 10,) * 2)  # tests may hang, too
  order = json.loads(_all_of(setup["order"]))
  try:
    verdict, reason = _judged(order, child)
  except MemoryError:
    verdict, reason = "failed", "the judge ran out of memory over an answer"
  said = dict(nonce=order["nonce"], verdict=verdict, reason=reason[:2000])
  os.write(setup["verdict"], json.dumps(said).encode() + b"\n")
  child.kill()
  os._exit(0)


def _enter(setup):
  """Limits, the uid, and where there are no namespaces what stands for them."""
  for name, value in setup["limits"].items():
    resource.setrlimit(getattr(resource, name), (value, value))
  sys.path += setup["libraries"]
  folders = []
  if setup["uid"] is not None:
    # this folder may be root's alone
    from posttrain_jax.rewards.sandbox.inside import landlock, tests  # noqa: F401

    # what only root reaches is reached through descriptors; namespaces have it bound where all can read it
    folders = _held(setup["folders"]) if setup["isolation"] == "landlock" else []
    os.setgroups([])
    os.setresgid(*[setup["uid"]] * 3)
    os.setresuid(*[setup["uid"]] * 3)
  os.chdir(setup["home"])
  if setup["isolation"] == "landlock":
    from posttrain_jax.rewards.sandbox.inside import landlock

    landlock.restrict(folders or setup["folders"], ["/dev/null", "/dev/zero", "/dev/urandom"])


def _end_with(pipe):
  """When nobody is left to read the verdict the judge ends, and everything with it.

  A parent's death could say so, too, but the kernel forgets that wish with a change of uid.
  """
  poll = select.poll()
  poll.register(pipe, 0)
  poll.poll()
  os._exit(1)


def _held(folders):
  """Descriptors of folders; sys.path leads through them from now on."""
  opened = {folder: os.open(folder, os.O_PATH) for folder in folders if os.path.isdir(folder)}

  def through(path):
    for folder, descriptor in opened.items():
      if path == folder or path.startswith(folder + "/"):
        return f"/proc/self/fd/{descriptor}{path[len(folder) :]}"
    return path

  sys.path[:] = [through(path) for path in sys.path]
  sys.path_importer_cache.clear()
  for module in list(sys.modules.values()):
    if hasattr(module, "__path__"):
      module.__path__ = [through(path) for path in module.__path__]
  return list(opened.values())


def _started(setup):
  asked, asks = os.pipe()
  replies, says = os.pipe()
  judge = os.getpid()
  pid = os.fork()
  if not pid:
    for descriptor in (asks, replies, setup["order"], setup["verdict"]):
      os.close(descriptor)
    _become_program(setup, judge, asked, says)
  os.close(asked)
  os.close(says)
  # process 1 takes no signal from within but those it has a handler for, and Python has one for this
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGPIPE, signal.SIG_IGN)
  return children.Child(pid, asks, replies, setup["seconds"])


def _become_program(setup, judge, asked, says):
  code = 1
  try:
    kernel.prctl(kernel.SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    program.limited(setup)
    if setup["isolation"] == "landlock":
      seccomp.install(seccomp.base(alone=os.getpid()))
    if setup["isolation"] != "none":
      seccomp.install(seccomp.answering(judge))
    with open(asked, "rb") as orders, open(says, "wb") as replies:
      program.run(json.loads(orders.readline()), orders, replies)
    code = 0
  except SystemExit as error:
    code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
  except BaseException:
    import traceback

    traceback.print_exc()
  finally:
    try:
      sys.stdout.flush()
      sys.stderr.flush()
    finally:
      os._exit(code & 0xFF)


def _all_of(descriptor):
  with open(descriptor, "rb") as file:
    return file.read()


def _judged(order, child):
  """(verdict, reason) after the last test."""
  told = dict(files=order["files"], answers=order["tests"] is not None)
  told |= {"argv": order["argv"]} if "argv" in order else {"code": order["code"]}
  try:
    if order["tests"] is None:
      child.send(json.dumps(told).encode() + b"\n")
      return child.end()
    from posttrain_jax.rewards.sandbox.inside import tests

    return tests.run(order["tests"], child, told)
  except children.Ended:
    verdict, reason = child.end()
    early = ("failed", "the program ended before the last test")
    return early if verdict == "ended" else (verdict, reason)
  except children.Wrong as error:
    return "failed", str(error)
