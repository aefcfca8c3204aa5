"""As many programs at once as there are cores; each has a slot, and with root an unprivileged uid of its own."""

import contextlib
import os
import queue
import socket
import threading
from collections.abc import Generator

# Between the uids that people (below 30000) and packages and systemd (above 60000) are given.
FIRST_UID, UIDS = 47_000, 4_000


class Slots:
  """Free slots of this process; a uid is kept from other processes by an abstract socket, which ends with us."""

  def __init__(self, count: int, *, with_uids: bool) -> None:
    self._free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    self._claims: list[socket.socket] = []
    self.uids = [self._uid() if with_uids else None for _ in range(count)]
    for uid in self.uids:
      self._free.put(uid)

  @contextlib.contextmanager
  def one(self) -> Generator[int | None]:
    """Waits for a free slot; its uid, or None where all run as who we are."""
    uid = self._free.get()
    try:
      yield uid
    finally:
      self._free.put(uid)

  def _uid(self) -> int:
    for uid in range(FIRST_UID, FIRST_UID + UIDS):
      claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
      try:
        claim.bind(f"\0posttrain-sandbox-{uid}")
      except OSError:
        claim.close()
        continue
      self._claims.append(claim)
      return uid
    raise RuntimeError(f"all of {UIDS} uids for sandboxes are in use on this machine")


_lock = threading.Lock()
_slots: dict[int, Slots] = {}


def shared() -> Slots:
  """This process's; made anew in a forked child, whose parent goes on with its own."""
  with _lock:
    if os.getpid() not in _slots:
      _slots[os.getpid()] = Slots(len(os.sched_getaffinity(0)), with_uids=os.geteuid() == 0)
    return _slots[os.getpid()]
