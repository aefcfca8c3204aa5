"""A worker of the real one's shape that needs no device: what it writes is decided by the test."""

import dataclasses
import pathlib
import threading
import time

import numpy as np

from posttrain_jax.serve import asked as asking
from posttrain_jax.serve.asked import Ended, Prompt, Started, Tokens, UnknownAdapter
from posttrain_jax.serve.numbers import Numbers


@dataclasses.dataclass
class Version:
  bound: int = 0


class Adapters:
  """Names and folders; `bad` are refused when they are asked for."""

  def __init__(self):
    self.folders, self.bad, self.root = {}, {}, None
    self.load_seconds = []

  def names(self):
    return list(self.folders)

  def is_at_hand(self, name):
    return name in self.folders

  def acquire(self, name):
    if name in self.bad:
      raise asking.BadAdapter(self.bad[name])
    if name not in self.folders:
      raise UnknownAdapter(f"no adapter is called {name!r}")
    return Version()

  def release(self, version):
    pass

  def folder(self, name):
    return pathlib.Path(self.folders[name])

  def load(self, name, path):
    if not (pathlib.Path(path) / "adapter_config.json").exists():
      raise asking.BadAdapter(f"{path} has no adapter_config.json")
    self.folders[name] = path

  def unload(self, name):
    if name not in self.folders:
      raise UnknownAdapter(name)
    del self.folders[name]


class Worker:
  """Writes `script(asked)` token by token on a thread of each answer; waits for `go` before each `window`."""

  def __init__(self, script, *, window=4, most=64, vocab=261, pause=0.0):
    self.script, self.window, self.most, self.vocab, self.pause = script, window, most, vocab, pause
    self.state = "ready"
    self.adapters = Adapters()
    self.asked, self.cancelled = [], []
    self.go = threading.Event()
    self.go.set()
    self.under_way = 0

  def numbers(self):
    zeros = {field.name: 0 for field in dataclasses.fields(Numbers)}
    return Numbers(**{**zeros, "running": self.under_way, "compiled_programs": 7})

  def submit(self, asked, deliver):
    if self.state != "ready":
      raise asking.Closed("the server is ending")
    if self.under_way >= self.most:
      raise asking.Full(self.under_way, 2.0)
    self.under_way += 1
    self.asked.append(asked)
    ticket = threading.Event()
    threading.Thread(target=self._write, args=(asked, deliver, ticket), daemon=True).start()
    return ticket

  def cancel(self, ticket):
    self.cancelled.append(ticket)
    ticket.set()

  def drain(self, seconds):
    self.state = "draining"

  def close(self):
    self.state = "closed"

  def _write(self, asked, deliver, ticket):
    try:
      deliver(self._told(asked, deliver, ticket))
    finally:
      self.under_way -= 1

  def _told(self, asked, deliver, ticket):
    deliver(Started(0.0, 0))
    if asked.echo_logprobs:
      deliver(Prompt(*self._logps(asked, asked.prompt[1:])))
    ids = list(self.script(asked))[: asked.max_new]
    for at in range(0, len(ids), self.window):
      while not self.go.wait(0.01):
        if ticket.is_set():
          return Ended(asking.CANCELLED)
      if self.pause:
        time.sleep(self.pause)
      if ticket.is_set():
        return Ended(asking.CANCELLED)
      some = ids[at : at + self.window]
      deliver(Tokens(some, *self._logps(asked, some)))
    ended = ids and ids[-1] in asked.stop_ids
    return Ended(asking.STOP if ended else asking.LENGTH)

  def _logps(self, asked, ids):
    """-id / 100 for each token, and the likeliest are 0, 1, ... with their own."""
    top = np.tile(np.arange(asked.top), (len(ids), 1))
    each = np.array(ids, np.float32)
    return -each / 100, (top, (-top / 100).astype(np.float32)) if asked.top else None
