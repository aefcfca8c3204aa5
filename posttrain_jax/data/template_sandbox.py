"""Chat templates rendered in a process of their own, because a template is a stranger's program.

A template comes with a downloaded tokenizer, and a sandboxed Jinja environment stops it from
reaching Python but not from looping for hours or from building a string that fills the memory.  So
this file is also the program that renders: it gets no secrets (an empty environment), a limit on
its memory, and a limit on the CPU time of each rendering, held by the kernel.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from datetime import datetime

CPU_SECONDS = 5.0  # for one conversation; they take well under a millisecond
MEMORY_BYTES = 1 << 30
MAX_CHARACTERS = 4_000_000  # of one rendered conversation, about a million tokens
MAX_JOB = (
  8 * MAX_CHARACTERS
)  # of conversations as JSON that are sent together; a character takes up to six


class TemplateError(ValueError):
  """A chat template that is wrong, refuses a conversation, or uses more than it may."""


class Renderer:
  """A chat template, ready to render; the process behind it starts with the first use."""

  def __init__(self, text: str, variables: dict, *, cpu_seconds: float = CPU_SECONDS):
    self._opening = {"template": text, "variables": variables, "cpu_seconds": cpu_seconds}
    self._cpu_seconds = cpu_seconds
    self._lock = threading.Lock()
    self._process = None
    self._reads = frozenset()

  @property
  def variables(self) -> frozenset[str]:
    """The names that the template reads of what it is given, as `messages` and `enable_thinking`."""
    with self._lock:
      if self._process is None:
        self._start()
      return self._reads

  def render(self, jobs: list[dict]) -> list["str | TemplateError"]:
    """The text of each job (the template's variables), or the error it ran into, in order."""
    with self._lock:
      results: list[str | TemplateError] = []
      try:
        for some in _portions(json.dumps(job) for job in jobs):
          results += self._rendered(some)
      except (
        BaseException
      ):  # a Ctrl-C: what the process answers now is of jobs that nobody asks for
        self._end()
        raise
      return results

  def _rendered(self, jobs):
    if len(jobs[0]) > MAX_JOB:
      return [TemplateError(f"a conversation of more than {MAX_CHARACTERS:,} characters")]
    results = []
    while len(results) < len(jobs):
      process = self._process or self._start()
      results += self._exchange(process, jobs[len(results) :])
    return results

  def _start(self):
    # Run by path and with -P: only jinja2 is imported, which takes a tenth of a second.
    process = subprocess.Popen(
      [sys.executable, "-P", __file__],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      start_new_session=True,  # a terminal's Ctrl-C is for who asks, not for the renderer
      env={"PYTHONPATH": os.pathsep.join(_libraries()), "PYTHONIOENCODING": "utf-8"},
    )
    stop = weakref.finalize(self, _stop, process)
    _send(process, json.dumps(self._opening))
    reply = _receive(process)
    error = f"the renderer ended ({process.wait()})" if reply is None else reply.get("error")
    if error:
      stop()
      raise TemplateError(f"the chat template cannot be used: {error}")
    self._process, self._stop = process, stop
    self._reads = frozenset(reply["reads"])
    return process

  def _exchange(self, process, jobs):
    """Results until the last job, or until one that ended the process."""
    _send(process, f"[{','.join(jobs)}]")
    results = []
    for _ in jobs:
      reply = _receive(process)
      if reply is None:
        return [*results, self._ended(process.wait())]
      results.append(reply["text"] if "text" in reply else TemplateError(reply["error"]))
    return results

  def _end(self):
    if self._process is not None:
      self._process = None
      self._stop()

  def _ended(self, status):
    self._end()
    if status == -signal.SIGPROF:
      return TemplateError(f"the chat template ran for more than {self._cpu_seconds:g} s, stopped")
    return TemplateError(f"the chat template's process ended with status {status}")


def _libraries():
  """Where jinja2 and what it imports lie: a file of the user's that is called types.py is not looked at."""
  found = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
  return {os.path.dirname(os.path.dirname(spec.origin)) for spec in found if spec and spec.origin}


def _portions(jobs):
  """The jobs in lists that the renderer's memory has room for; one that is too large is alone."""
  some, size = [], 0
  for job in jobs:
    if some and size + len(job) > MAX_JOB:
      yield some
      some, size = [], 0
    some.append(job)
    size += len(job)
  if some:
    yield some


def _send(process, text):
  process.stdin.write(text.encode() + b"\n")
  process.stdin.flush()


def _receive(process):
  """The next reply, or None if the process has ended."""
  line = process.stdout.readline()
  return json.loads(line) if line.endswith(b"\n") else None


def _stop(process):
  process.kill()
  process.wait()
  process.stdin.close()
  process.stdout.close()


def _compiled(text):
  import jinja2
  from jinja2.ext import Extension, loopcontrols
  from jinja2.sandbox import ImmutableSandboxedEnvironment

  class Generation(Extension):
    """`{% generation %}` marks the assistant's words; masks come from prefixes, so it only nests."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own way to declare a tag)

    def parse(self, parser):
      next(parser.stream)
      return parser.parse_statements(["name:endgeneration"], drop_needle=True)

  class Namespace(jinja2.utils.Namespace):
    """Refuses names like `__class__`, which the sandbox guards elsewhere."""

    def __setitem__(self, name, value):
      if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")
      super().__setitem__(name, value)

  def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)

  def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
      value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

  now = datetime.now()  # one moment for the whole run: midnight must not part prefix and text
  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
  )
  environment.filters["tojson"] = tojson
  functions = {
    "raise_exception": raise_exception,
    "strftime_now": now.strftime,
    "namespace": Namespace,
  }
  return environment.from_string(text, globals=functions)


def _reads(environment, text):
  from jinja2 import meta

  return sorted(meta.find_undeclared_variables(environment.parse(text)))


def _render(template, variables, job):
  try:
    text = template.render(**variables, **job)
    if len(text) > MAX_CHARACTERS:
      raise ValueError(f"rendered {len(text):,} characters, more than {MAX_CHARACTERS:,}")
    return {"text": text}
  except MemoryError:
    return {"error": f"the chat template used more than {MEMORY_BYTES >> 20} MiB"}
  except Exception as error:  # whatever a stranger's program does wrong belongs to its row
    return {"error": f"{type(error).__name__}: {error}"}


def _serve():
  opening = json.loads(sys.stdin.readline())
  if sys.platform == "linux":  # elsewhere the address space cannot be limited
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
  seconds = opening["cpu_seconds"]
  # SIGPROF unhandled ends the process, whatever it does
  signal.setitimer(signal.ITIMER_PROF, seconds)
  try:
    template = _compiled(opening["template"])
  except Exception as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
    return
  print(json.dumps({"reads": _reads(template.environment, opening["template"])}), flush=True)
  for line in sys.stdin:
    for job in json.loads(line):
      signal.setitimer(signal.ITIMER_PROF, seconds)
      result = _render(template, opening["variables"], job)
      signal.setitimer(signal.ITIMER_PROF, 0)
      # A reply is a whole line or none: the row that ends the process must not take others with it.
      sys.stdout.write(json.dumps(result) + "\n")
      sys.stdout.flush()


if __name__ == "__main__":
  _serve()
