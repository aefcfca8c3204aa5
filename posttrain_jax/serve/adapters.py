"""Which adapters there are: names, each of some content, loaded off the worker's thread and held on the host.

Registered (a name is known), on the host, in a slot, in use are four states.  What counts is the content: its digest is
what the prefix cache and the slots know an adapter by, so that two names of one content share a slot, and a name may be
given new content while requests go on with the old.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from posttrain_jax.adapters import over, peft_format
from posttrain_jax.adapters.combination import parts_of
from posttrain_jax.adapters.replaced import Replaced
from posttrain_jax.core import files, tree, words
from posttrain_jax.models import before
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.serve.asked import BadAdapter, UnknownAdapter

log = logging.getLogger(__name__)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+-]{0,127}")
OF_RUN = "adapter"  # where a run has its own
WATCHED = (peft_format.CONFIG, peft_format.TENSORS)
Entry = dict[str, Any]


@dataclasses.dataclass(eq=False)
class Version:
  """What an adapter does, whatever it is called; the arrays are on the host, in the form that a slot takes."""

  digest: str
  entry: Entry
  bound: int  # slots before the first token of a text
  methods: tuple[str, ...]
  rank: int
  size_bytes: int
  users: int = 0  # requests that wait with it or are under way
  names: int = 0  # that stand for it now


@dataclasses.dataclass
class Registered:
  """A name."""

  path: Path
  stamp: Any  # of the files that were read
  version: Version | None  # None: not on the host, and read again when it is asked for
  loaded: float
  seconds: float  # that reading took
  is_own: bool  # found under the root, not named by the operator


class Registry:
  """The names.  Every method may be called on any thread; `load` and the first use of a name read files."""

  def __init__(
    self,
    entry: Callable[[Any], Entry],
    params: Any,
    config: ModelConfig,
    *,
    root: Path | None = None,
    reserved: tuple[str, ...] = (),
    most: int = 1024,
    most_bytes: int = 8 * 2**30,
    entry_context: Callable[[], Any] = contextlib.nullcontext,
  ) -> None:
    """No name yet.

    Args:
      entry: an adapter's tree -> what a slot takes; raises ValueError for what has no place in one.
      params: the base's, as it is served: what an adapter is read against is kept once.
      root: the one folder whose folders, adapters or runs, may be used by their names.
      reserved: the base's own names.
      entry_context: what a thread enters to compute an entry: the mesh.
      most: names there may be; of those under the root the one unused for longest is forgotten for a new one.
      most_bytes: on the host; beyond that the contents unused for longest are dropped, and read again when asked for.
    """
    self._entry, self.params, self._config = entry, params, config
    self._entry_context = entry_context
    self.root = None if root is None else Path(root).resolve(strict=True)
    self._reserved, self._most, self._most_bytes = reserved, most, most_bytes
    self._names: dict[str, Registered] = {}
    self._versions: dict[str, Version] = {}
    self._used: dict[str, float] = {}
    self._failed: dict[str, Any] = {}  # name -> stamp of files that were no adapter
    self._lock = threading.RLock()
    self._reading: dict[str, threading.Lock] = {}
    self.gone: list[str] = []  # digests that nobody can ask for any more, for the worker
    self.load_seconds: list[float] = []

  def names(self) -> list[str]:
    """Every registered name, and the folders under the root that look like adapters."""
    with self._lock:
      known = list(self._names)
    return sorted({*known, *self._under_root()})

  def load(
    self, name: str, path: str | Path, *, replace: bool = True, confined: bool = False
  ) -> Version:
    """Registers the adapter of a folder under a name, which requests from now on have.

    Args:
      replace: what the name stands for already may be replaced.
      confined: who asks may name folders under the root alone, by a path or by one from the root.

    Raises:
      BadAdapter: it cannot be served; what was served under the name still is.  Or it is taken and not to be replaced.
    """
    self._check_name(name)
    if not replace and name in self._names:
      raise BadAdapter(f"{name!r} is loaded already: unload it first, or ask for it to be replaced")
    path = Path(path)
    if confined:
      if self.root is None:
        raise BadAdapter("there is no folder of adapters that one may be loaded from")
      path = self.root / path  # an absolute one stays as it is
      if not self._inside(path):
        raise BadAdapter(f"{name!r} leads out of the folder of adapters")
    path = path if confined else path.expanduser()
    return self._read(name, _home(path) or path, is_own=confined)

  def unload(self, name: str) -> None:
    """Forgets a name; requests that have it go on with it.

    Raises:
      UnknownAdapter: nothing has that name.
    """
    with self._lock:
      registered = self._names.pop(name, None)
      if registered is None:
        raise UnknownAdapter(f"no adapter is called {name!r}")
      self._used.pop(name, None)
      self._leave(registered)

  def is_at_hand(self, name: str) -> bool:
    """Whether `acquire` reads nothing from the disk."""
    with self._lock:
      registered = self._names.get(name)
    if registered is None or registered.version is None:
      return False
    return not registered.is_own or _stamp(registered.path) in (
      registered.stamp,
      self._failed.get(name),
    )

  def acquire(self, name: str) -> Version:
    """What the name stands for now, kept until `release`; one under the root is read, or read again where it changed.

    Raises:
      UnknownAdapter, BadAdapter: there is none, or none that can be served.
    """
    while True:  # another's load may drop what was read a moment ago
      if not self.is_at_hand(name):
        self._look(name)
      with self._lock:
        registered = self._names.get(name)
        if registered is None:
          raise UnknownAdapter(f"no adapter is called {name!r}")
        self._used[name] = time.monotonic()
        if registered.version is not None:
          registered.version.users += 1
          return registered.version

  def release(self, version: Version) -> None:
    with self._lock:
      version.users -= 1
      self._settle(version)

  def describe(self, name: str) -> dict[str, Any]:
    """State (registered, host or in use), path, and of what is on the host digest, methods, rank, bytes and users."""
    with self._lock:
      registered = self._names.get(name)
    if registered is None:
      if name in self._under_root():
        assert self.root is not None
        return dict(name=name, path=str(_home(self.root / name)), state="registered")
      raise UnknownAdapter(f"no adapter is called {name!r}")
    of = registered.version
    if of is None:
      return dict(name=name, path=str(registered.path), state="registered")
    return dict(
      name=name,
      path=str(registered.path),
      state="in use" if of.users else "host",
      digest=of.digest,
      methods=list(of.methods),
      rank=of.rank,
      bytes=of.size_bytes,
      users=of.users,
      loaded=registered.loaded,
      seconds=registered.seconds,
    )

  def folder(self, name: str) -> Path:
    """Where an adapter's own template and tokenizer may be."""
    return Path(self.describe(name)["path"])

  @property
  def registered(self) -> int:
    """Names that were used or loaded."""
    return len(self._names)

  @property
  def on_host(self) -> int:
    with self._lock:
      return len(self._versions)

  @property
  def host_bytes(self) -> int:
    with self._lock:
      return sum(version.size_bytes for version in self._versions.values())

  def take_gone(self) -> list[str]:
    with self._lock:
      gone, self.gone = self.gone, []
    return gone

  def _check_name(self, name: str) -> None:
    if not NAME.fullmatch(name):
      raise BadAdapter(f"{name!r} is no name of an adapter: letters, digits and . _ : + - within")
    if name in self._reserved:
      raise BadAdapter(f"{name!r} is the base's own name: give the adapter another")

  def _under_root(self) -> list[str]:
    if self.root is None:
      return []
    return [name for name, home in folders(self.root).items() if self._inside(home)]

  def _inside(self, path: Path) -> bool:
    """Whether a path under the root stays there once every link is followed; one to itself leads nowhere."""
    assert self.root is not None
    return Path(os.path.realpath(path)).is_relative_to(self.root)  # `resolve` raises at the latter

  def _look(self, name: str) -> None:
    """The name's folder under the root, read where it is new or has changed."""
    known = self._names.get(name)
    if known is not None:
      try:
        self._read(name, known.path, is_own=known.is_own)
      except BadAdapter as error:
        if known.version is None:
          raise
        log.warning("%s: goes on with what it was: %s", name, error)
        self._failed[name] = _stamp(known.path)
      return
    if self.root is None or not NAME.fullmatch(name) or name in self._reserved:
      return
    if (home := _home(self.root / name)) is not None:
      self._read(name, home, is_own=True)

  def _read(self, name: str, path: Path, *, is_own: bool) -> Version:
    with self._lock:
      alone = self._reading.setdefault(name, threading.Lock())
    with alone:  # two loads of one name are one after the other
      stamp, began = _stamp(path), time.monotonic()
      with self._lock:
        known = self._names.get(name)
      is_same = (
        known is not None and stamp is not None and (known.path, known.stamp) == (path, stamp)
      )
      if known is not None and known.version is not None and is_same:
        return known.version
      if is_own and not all(self._inside(part) for part in (path, *path.rglob("*"))):
        raise BadAdapter(f"{name!r} leads out of the folder of adapters")
      version = self._version(name, path)
      seconds = time.monotonic() - began
      with self._lock:
        version = self._versions.setdefault(version.digest, version)
        before_it = self._names.get(name)
        version.names += 1
        self._names[name] = Registered(path, stamp, version, time.time(), seconds, is_own)
        self._used[name] = time.monotonic()
        self._failed.pop(name, None)
        self.load_seconds.append(seconds)
        if before_it is not None:
          self._leave(before_it)
        self._forget_some(name)
    return version

  def _version(self, name: str, path: Path) -> Version:
    try:
      with self._entry_context():
        levels = over.load(path, self.params, self._config)
      level = levels[0] if len(levels) == 1 else over.combined(levels)
      if level is None:
        raise ValueError("it stands on another adapter, and both together are no LoRA of the base")
      adapter, configs = level[0], parts_of(level[1])
      if any(part.context_length or part.attention_group for part in configs):
        raise ValueError("it is made for another context length (LongLoRA): serve it alone, merged")
      nodes = tree.flatten(adapter)
      if whole := [at for at, node in nodes.items() if isinstance(node, Replaced)]:
        raise ValueError(
          f"it trained {', '.join(whole)} whole (modules_to_save), which rows of a batch do not mix: serve it alone,"
          " merged (posttrain export --merge)"
        )
      self._check_tokens(path)
      with self._entry_context():
        entry = self._entry(adapter)
    except (ValueError, OSError, KeyError) as error:
      raise BadAdapter(f"adapter {name!r}: {error}") from error
    ranks = [node.a.shape[-1] for node in nodes.values() if hasattr(node, "a")]
    standing = [nodes[at].slots for at in (before.PROMPT, before.PREFIX) if at in nodes]
    return Version(
      digest=_digest(entry),
      entry=entry,
      bound=sum(standing),
      methods=tuple(part.method for part in configs),
      rank=max(ranks, default=0),
      size_bytes=sum(x.nbytes for x in jax.tree.leaves(entry)),
    )

  def _check_tokens(self, path: Path) -> None:
    """Raises where the folder's own tokenizer has tokens that the base has no rows for."""
    file = peft_format.locate(path) / "tokenizer.json"
    if not file.exists():
      return
    added = files.read_json(file).get("added_tokens", [])
    is_token = lambda one: isinstance(one, dict) and type(one.get("id")) is int and "content" in one
    if not isinstance(added, list) or not all(map(is_token, added)):
      raise ValueError(f"its {file.name} has added_tokens={words.shown(added, 60)}, which are none")
    beyond = [token["content"] for token in added if token["id"] >= self._config.vocab_size]
    if beyond:
      raise ValueError(
        f"its tokenizer has {len(beyond)} tokens that the base has no rows for, such as {beyond[0]!r}: serve it alone,"
        " merged (posttrain export --merge)"
      )

  def _settle(self, version: Version) -> None:
    """A version that no name stands for and no request has is gone."""
    if version.users == 0 and version.names == 0:
      self._versions.pop(version.digest, None)
      self.gone.append(version.digest)

  def _leave(self, registered: Registered) -> None:
    """A name stands for what it stood for no more."""
    version, registered.version = registered.version, None
    if version is not None:
      version.names -= 1
      self._settle(version)

  def _forget_some(self, newest: str) -> None:
    """Names under the root, and contents on the host, beyond what there may be: those unused for longest first."""
    unused = [
      name
      for name, of in self._names.items()
      if name != newest and (of.version is None or of.version.users == 0)
    ]
    for name in sorted(unused, key=lambda name: self._used[name]):
      registered = self._names[name]
      if len(self._names) > self._most and registered.is_own:
        self.unload(name)
      elif self.host_bytes > self._most_bytes:
        self._leave(registered)


def folders(root: Path) -> dict[str, Path]:
  """{name: folder} of the adapters under a root: its folders that are adapters, and its runs that have exported one."""
  homes = {path.name: _home(path) for path in sorted(root.iterdir()) if path.is_dir()}
  return {name: home for name, home in homes.items() if home is not None}


def _home(path: Path) -> Path | None:
  """The folder of an adapter: that one, or in a run's folder its adapter's; None where there is neither."""
  return next((at for at in (path, path / OF_RUN) if (at / peft_format.CONFIG).is_file()), None)


def _stamp(path: Path) -> Any:
  """What changes when a file of the adapter does; None where one is missing."""
  try:
    home = peft_format.locate(path)
    stats = [(home / name).stat() for name in WATCHED]
  except (OSError, ValueError):
    return None
  return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)


def _digest(entry: Entry) -> str:
  """Of what a slot holds: names and arrays."""
  digest = hashlib.blake2b(digest_size=16)
  for path in sorted(entry):
    for name in sorted(entry[path]):
      array = np.ascontiguousarray(entry[path][name])
      digest.update(f"{path} {name} {array.dtype} {array.shape}".encode())
      digest.update(array.tobytes())
  return digest.hexdigest()
