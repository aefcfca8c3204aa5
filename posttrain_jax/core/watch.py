"""Processes look after each other, and each after itself: who is gone, who failed and who hangs is said, and all end.

Every process writes a sign of life, and what it does, to the store of JAX's coordinator.  The first one reads them all
and gives a verdict, upon which each leaves: with 75 where a process is gone or hangs, as the run goes on from its last
checkpoint, and with 1 where one has failed, as it would fail again.  A collective that breaks as another process died
is an error in this one; it waits for the verdict, and a loss elsewhere is not taken for a mistake here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, NoReturn, Protocol

import jax
from jax._src import distributed as jax_distributed  # its store has no public name

from posttrain_jax.core import ending, progress

DEADLINE = "POSTTRAIN_DEADLINE"  # in the environment: seconds without a step, 0 for any number
PATIENCE = 1800.0  # that deadline, of several processes where nobody says another
PULSE = 1.0  # seconds between signs of life; more of many processes
MANY = 100  # of which the first reads so many in a second
SILENCE = (
  12.0  # seconds without a sign, after which a process is gone where a collective has broken
)
MORE = (
  60.0  # seconds after the deadline: what no Python thread can tell, as the interpreter is held
)
# how errors of a collective begin; which type they have depends on where they are noticed
BROKEN = re.compile(
  r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|DATA_LOSS): "
)
SIGNS, FAILED, VERDICT = "posttrain/sign", "posttrain/failed", "posttrain/verdict"
NO_SIGN = {"number": 0, "beats": 0, "doing": "its start", "idle": 0.0, "broken": False}
GONE, FAILURE, HUNG = "gone", "failed", "hung"


class Store(Protocol):
  """Words that all processes see; raises RuntimeError once the coordinator is gone."""

  def put(self, folder: str, name: str, value: str) -> None: ...

  def all(self, folder: str) -> dict[str, str]: ...


class Coordinator:
  """The store that JAX's coordinator keeps, in process 0."""

  def __init__(self) -> None:
    self._client: Any = jax_distributed.global_state.client

  def put(self, folder: str, name: str, value: str) -> None:
    self._client.key_value_set(f"{folder}/{name}", value, allow_overwrite=True)

  def all(self, folder: str) -> dict[str, str]:
    return {key.rpartition("/")[2]: value for key, value in self._client.key_value_dir_get(folder)}


@dataclasses.dataclass(frozen=True)
class Verdict:
  kind: str
  process: int
  said: str

  def sentence(self, count: int) -> str:
    who = f"process {self.process} of {count}"
    return {
      GONE: f"{who} is gone: {self.said}; run the same command again",
      FAILURE: f"{who} failed: {self.said}",
      HUNG: f"{who} hangs: {self.said}; run the same command again",
    }[self.kind]

  @property
  def code(self) -> int:
    return 1 if self.kind == FAILURE else ending.PREEMPTED


def _leave(code: int) -> NoReturn:
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):
      stream.flush()
  os._exit(code)


class Watch:
  """One process's part.

  Args:
    store: None of a single process, which has its deadline alone.
    deadline: seconds; None for none.
    leave: ends the process, from a thread.
  """

  def __init__(
    self,
    index: int,
    count: int,
    store: Store | None,
    deadline: float | None,
    *,
    pulse: float = PULSE,
    silence: float = SILENCE,
    leave: Callable[[int], Any] = _leave,
  ) -> None:
    self.index, self.count, self._store, self._deadline = index, count, store, deadline
    self._pulse, self._silence, self._leave = pulse * max(1, count / MANY), silence, leave
    self._doing, self._since, self._armed = "starting", time.monotonic(), 0.0
    self._number = self._beats = 0
    self._is_broken = False  # a collective failed here
    self._is_lost = False  # the store does not answer any more
    # {process: its last sign, when it came}
    self._seen = dict.fromkeys(range(count), (0, self._since))
    self._over = threading.Event()
    self.verdict: Verdict | None = None
    self._thread = threading.Thread(target=self._run, daemon=True)

  def start(self) -> None:
    self._arm()
    self._thread.start()

  def beat(self, doing: str) -> None:
    """This process gets on; `doing` is what it does from here on."""
    self._doing, self._since, self._beats = doing, time.monotonic(), self._beats + 1
    if self._since - self._armed > MORE / 2:
      self._arm()

  def close(self) -> None:
    """It is done, and waits for nothing."""
    self._over.set()
    if self._deadline:
      faulthandler.cancel_dump_traceback_later()
    if self._store and self._thread.is_alive():
      self._thread.join(timeout=5 * self._pulse)

  def settle(self, error: Exception) -> None:
    """Returns where the error is this process's own, and the others have been told; else it leaves."""
    if self._store is None:
      return
    if BROKEN.match(str(error)):
      self._is_broken = True
      self._wait(self._silence + 4 * self._pulse)
      if self._is_lost:
        self._follow(Verdict(GONE, 0, "it was the coordinator, and does not answer"))
    if self.verdict is None:
      line = str(error).strip().partition("\n")[0] or type(error).__name__
      with contextlib.suppress(RuntimeError):
        self._store.put(FAILED, str(self.index), line[:500])
      self._wait(4 * self._pulse)
      if self.index == 0:  # with which the others' store ends
        time.sleep(3 * self._pulse)

  def _wait(self, seconds: float) -> None:
    until = time.monotonic() + seconds
    while self.verdict is None and self._thread.is_alive() and time.monotonic() < until:
      time.sleep(self._pulse / 10)

  def _arm(self) -> None:
    self._armed = time.monotonic()
    if self._deadline:
      # the others end, and a scheduler ends this one; alone it would stay for ever
      faulthandler.dump_traceback_later(self._deadline + MORE, exit=self.count == 1)

  # in its thread

  def _run(self) -> None:
    while not self._over.wait(self._pulse):
      try:
        self._look()
      except (
        RuntimeError
      ):  # the coordinator is gone, and JAX ends this process; or it is at its end
        self._is_lost = True
        return
    if self._store:
      with contextlib.suppress(RuntimeError):
        self._store.put(SIGNS, str(self.index), json.dumps({"done": True}))

  def _look(self) -> None:
    idle = time.monotonic() - self._since
    if self._store is None:
      if self._deadline and idle > self._deadline:
        self._follow(Verdict(HUNG, 0, self._hanging(self._doing, idle)))
      return
    self._number += 1
    sign = {"number": self._number, "beats": self._beats, "doing": self._doing, "idle": idle}
    sign["broken"] = self._is_broken
    self._store.put(SIGNS, str(self.index), json.dumps(sign))
    if self.index == 0 and self.verdict is None:
      verdict = self._judged()
      if verdict:
        self._store.put(VERDICT, "0", json.dumps(dataclasses.asdict(verdict)))
    for text in self._store.all(VERDICT).values():
      self._follow(Verdict(**json.loads(text)))

  def _judged(self) -> Verdict | None:
    """What the first process makes of all signs; None where they are well."""
    assert self._store is not None
    for name, said in self._store.all(FAILED).items():
      return Verdict(FAILURE, int(name), said)
    now = time.monotonic()
    # one that was lost before its first sign is silent from the start
    signs: dict[int, dict[str, Any]] = {index: dict(NO_SIGN) for index in range(self.count)}
    signs |= {int(name): json.loads(text) for name, text in self._store.all(SIGNS).items()}
    signs = {index: sign for index, sign in signs.items() if "done" not in sign}
    silent, idle = {}, {}
    for index, sign in signs.items():
      if self._seen[index][0] != sign["number"]:
        self._seen[index] = (sign["number"], now)
      silent[index] = now - self._seen[index][1]
      idle[index] = sign["idle"] + silent[index]
    if not signs:
      return None
    mute = max(silent, key=lambda index: silent[index])
    if silent[mute] > self._silence and any(sign["broken"] for sign in signs.values()):
      doing = signs[mute]["doing"]
      return Verdict(GONE, mute, f"no sign of it for {silent[mute]:.0f} s, at {doing}")
    # those that wait for one that hangs do nothing either; one that works is waited for as long as it takes
    if self._deadline and min(idle.values()) > self._deadline:
      # signs are as old as a pulse: of those that are idle about as long, the one that got less far
      least = max(idle.values()) - 3 * self._pulse
      behind = min((i for i in idle if idle[i] > least), key=lambda index: signs[index]["beats"])
      return Verdict(HUNG, behind, self._hanging(signs[behind]["doing"], idle[behind]))
    return None

  def _hanging(self, doing: str, idle: float) -> str:
    return f"at {doing} for {idle:.0f} s, longer than {DEADLINE}={self._deadline:g}"

  def _follow(self, verdict: Verdict) -> None:
    if self.verdict is not None:
      return
    self.verdict = verdict
    if verdict.kind == FAILURE and verdict.process == self.index:
      return  # which it says itself
    ending.say(f"posttrain: {verdict.sentence(self.count)}")
    if verdict.kind == HUNG:
      ending.say(f"what process {self.index} does:")
      with contextlib.suppress(OSError):
        faulthandler.dump_traceback(file=2, all_threads=True)
    if self.index == 0 and self.count > 1:
      time.sleep(3 * self._pulse)  # in which the others read it
    self._leave(verdict.code)


def deadline(environment: Mapping[str, str], count: int) -> float | None:
  """Seconds without a step; None: as long as it takes.

  >>> deadline({}, 1), deadline({}, 2), deadline({DEADLINE: "600"}, 1), deadline({DEADLINE: "0"}, 2)
  (None, 1800.0, 600.0, None)
  """
  text = environment.get(DEADLINE, "")
  if not text:
    return PATIENCE if count > 1 else None
  try:
    seconds = float(text)
  except ValueError:
    seconds = -1.0
  if not 0 <= seconds < float("inf"):
    raise ValueError(f"{DEADLINE}={text}: write seconds, or 0 for as long as it takes")
  return seconds or None


@contextlib.contextmanager
def kept() -> Generator[None]:
  """Inside, this process is watched, by itself and by the others; nothing where it is alone and has no deadline."""
  count = jax.process_count() if jax.distributed.is_initialized() else 1
  seconds = deadline(os.environ, count)
  if count == 1 and seconds is None:
    yield
    return
  index = jax.process_index() if count > 1 else 0
  watch = Watch(index, count, Coordinator() if count > 1 else None, seconds)
  progress.heard.append(watch.beat)
  watch.start()
  try:
    yield
  except Exception as error:
    watch.settle(error)
    raise
  finally:
    progress.heard.remove(watch.beat)
    watch.close()
