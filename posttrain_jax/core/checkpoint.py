"""Checkpoints of a run: a folder per step, whole or not there, the newest few kept."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from posttrain_jax.core import memory, tree

Tree = Any
SHOWN = 8  # leaves that an error lists
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a step being written, or deleted


class Checkpoints:
  """The checkpoints under one directory.

  A step is written under a temporary name and renamed when complete; what a killed save leaves behind is ignored, and
  removed by the next run's first save.  Opening and restoring change nothing, so a run under way can be read.
  With several processes, each calls every method and writes its own shards.

  Args:
    directory: seen by every process; made if it is not there.
    keep: how many of the newest steps stay.
    keep_steps: steps that stay whatever follows; `stay` names others.
  """

  def __init__(
    self, directory: str | Path, *, keep: int = 2, keep_steps: Iterable[int] = ()
  ) -> None:
    if keep < 1:
      raise ValueError(f"keep={keep}: at least the newest checkpoint must stay")
    self.directory = Path(directory).absolute()
    self._keep, self._keep_steps = keep, frozenset(keep_steps)
    self._writing = False
    options = ocp.CheckpointManagerOptions(
      # made in the background, a folder that cannot be made leaves threads that hang the exit for 20 minutes
      async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )
    # named here, or a fresh process could not tell what an item in the files is
    items = ocp.handlers.DefaultCheckpointHandlerRegistry()
    arrays, text = ocp.PyTreeCheckpointHandler(), ocp.JsonCheckpointHandler()
    for kind in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
      items.add("state", kind, arrays)
    for kind in (ocp.args.JsonSave, ocp.args.JsonRestore):
      items.add("data", kind, text)
    with self._explained("open"):
      self.directory.mkdir(parents=True, exist_ok=True)
      self._orbax = ocp.CheckpointManager(self.directory, options=options, handler_registry=items)

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    self.close()

  def save(self, step: int, state: Tree, data: Mapping[str, Any]) -> None:
    """Writes step; the state's buffers may be donated as soon as this returns.

    On accelerators the files are written in the background, and an error there is raised by whichever call comes next.

    Args:
      state: any tree of arrays; None is no leaf.
      data: what JSON can hold: data position, seed, ...

    Raises:
      OSError: when this save, or the one before it, could not be written.
      ValueError: when the step is not newer than the newest there is.
    """
    newest = self.latest()
    if newest is not None and step <= newest:
      raise ValueError(
        f"checkpoint {step} is not newer than {newest}, the newest in {self.directory}; "
        f"delete the folders after {step - 1} there to write it again"
      )
    if json.loads(json.dumps(data)) != data:
      raise ValueError("data would not come back from JSON as it is; use lists and string keys")
    leaves = _leaves(state)
    _check_global(leaves)
    sums = {"data": _text_sum(data), "state": _sums(leaves)}
    with self._explained(f"save step {step} to"):
      if not self._writing and jax.process_index() == 0:
        self._clean()
      self._writing = True
      self._orbax.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(tree.unflatten(leaves)),
          data=ocp.args.JsonSave({"data": dict(data), "sums": sums}),
        ),
        force=True,  # orbax's own schedule would skip steps silently
      )
    # Orbax copies from the device before it returns.  Memory that the host can address it does not copy, so the next
    # donating step would write into what is being saved.
    if any(_on_host(leaf) for leaf in leaves.values()):
      self.wait()

  def stay(self, steps: Iterable[int]) -> None:
    """From the next save on these steps stay, and no longer those named before."""
    self._keep_steps = frozenset(steps)

  def steps(self) -> list[int]:
    """The complete steps on disk, oldest first; waits for a save under way."""
    self.wait()
    return self._complete()

  def latest(self) -> int | None:
    """The newest complete step, or None; waits for a save under way."""
    return max(self.steps(), default=None)

  def restore(
    self, abstract_state: Tree, *, step: int | None = None
  ) -> tuple[Tree, dict[str, Any], int]:
    """(state, data, step): the newest step, or the one asked for, placed as abstract_state says.

    Args:
      abstract_state: the structure, with the shape, dtype and sharding of each leaf: arrays or ShapeDtypeStructs.

    Raises:
      FileNotFoundError: when there is no checkpoint, or not this one.
      ValueError: when the state saved has other leaves, shapes or dtypes; names them.
      OSError: when files are missing or damaged; nothing older is used in their place.
    """
    steps = self.steps()
    if not steps:
      raise FileNotFoundError(f"no checkpoint in {self.directory}")
    step = steps[-1] if step is None else step
    if step not in steps:
      raise FileNotFoundError(f"no checkpoint of step {step} in {self.directory}; found {steps}")
    wanted = _leaves(abstract_state)
    with self._readable(step):
      metadata = self._orbax.item_metadata(step)["state"]
      if metadata is None:
        raise ValueError("there is no state/_METADATA in it")
      saved = tree.flatten(metadata.tree)
    _check_same(saved, wanted, self.directory / str(step))
    abstract = tree.unflatten({path: _abstract(path, leaf) for path, leaf in wanted.items()})
    with self._readable(step):
      restored = self._orbax.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeRestore(
            abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
          ),
          data=ocp.args.JsonRestore(),
        ),
      )
      arrays = tree.flatten(restored["state"])
      data, sums = restored["data"]["data"], restored["data"]["sums"]
      computed = {"data": _text_sum(data), "state": _sums({path: arrays[path] for path in wanted})}
      _check_sums(sums, computed)
    structure = jax.tree.structure(abstract_state)
    return structure.unflatten([arrays[path] for path in wanted]), data, step

  def wait(self) -> None:
    """Returns when nothing is being written.

    Raises:
      OSError: when what was being written could not be.
    """
    with self._explained("finish a save to"):
      self._orbax.wait_until_finished()
    if self._writing and jax.process_index() == 0:
      with self._explained("remove an old step from"):
        self._prune()

  def close(self) -> None:
    """Waits, and ends the background threads."""
    try:
      self.wait()
    finally:
      self._orbax.close()

  def _complete(self) -> list[int]:
    folders = self.directory.iterdir() if self.directory.is_dir() else ()
    return sorted(int(folder.name) for folder in folders if folder.name.isdecimal())

  def _prune(self) -> None:
    """Old steps are renamed before they are deleted: a kill half-way must not leave half a step that looks complete."""
    for step in self._complete()[: -self._keep]:
      if step not in self._keep_steps:
        leftover = self.directory / f"{step}.deleted{UNFINISHED}"
        (self.directory / str(step)).rename(leftover)
        shutil.rmtree(leftover)

  def _clean(self) -> None:
    for folder in self.directory.iterdir():
      if UNFINISHED in folder.name:
        shutil.rmtree(folder)

  @contextmanager
  def _explained(self, what: str) -> Generator[None]:
    try:
      yield
    except Exception as error:
      raise OSError(
        f"could not {what} {self.directory}: {_first(error)}\n"
        f"complete checkpoints there: {self._complete() or 'none'}; with the cause gone, run the same command again"
      ) from error

  @contextmanager
  def _readable(self, step: int) -> Generator[None]:
    folder = self.directory / str(step)
    try:
      yield
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
      raise  # not the files' fault
    except Exception as error:
      older = [s for s in self._complete() if s < step]
      then = f"go on from step {older[-1]}" if older else "start anew, there being no older one"
      raise OSError(
        f"checkpoint {folder} could not be read: {_first(error)}\n"
        f"if its files are damaged or missing, delete this folder to {then}"
      ) from error


def _first(error: Exception) -> str:
  """What happened, without the page of JSON that tensorstore adds."""
  return str(error).partition("[tensorstore_spec=")[0].strip() or type(error).__name__


def _leaves(state: Tree) -> dict[str, Any]:
  """{path: array} in the tree's order."""
  leaves = {}
  for keys, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
    path = jax.tree_util.keystr(keys, simple=True, separator="/")
    if not hasattr(leaf, "shape"):
      raise TypeError(f"{path}: {leaf!r} is no array; a checkpoint's state holds arrays only")
    if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
      raise TypeError(f"{path}: {leaf.dtype} would not come back whole; JAX holds 32 bits here")
    leaves[path] = np.asarray(leaf) if isinstance(leaf, np.generic) else leaf
  return leaves


def _sums(leaves: Mapping[str, Any]) -> dict[str, int]:
  # one after the other: of dozens under way at once, eight virtual devices on two cores waited for each other until
  # XLA gave up
  return {path: int(tree.checksum(leaf)) for path, leaf in leaves.items()}


def _text_sum(data: Mapping[str, Any]) -> int:
  return zlib.crc32(json.dumps(data, sort_keys=True).encode())


def _check_sums(saved: Mapping[str, Any], computed: Mapping[str, Any]) -> None:
  wrong = [path for path, value in computed["state"].items() if saved["state"].get(path) != value]
  wrong += ["data"] if saved["data"] != computed["data"] else []
  if wrong:
    rest = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    raise ValueError(f"the content of {', '.join(wrong[:SHOWN])}{rest} is not what was written")


def _check_global(leaves: Mapping[str, Any]) -> None:
  for path, leaf in leaves.items():
    if jax.process_count() > 1 and getattr(leaf, "is_fully_addressable", False):
      raise ValueError(
        f"{path} belongs to one of {jax.process_count()} processes ({leaf.sharding}); "
        "place it on the mesh that all of them share"
      )


def _on_host(leaf: Any) -> bool:
  if not isinstance(leaf, jax.Array):
    return False  # numpy: orbax copies
  platforms = {device.platform for device in leaf.sharding.device_set}
  return platforms == {"cpu"} or leaf.sharding.memory_kind not in (None, "device")


def _abstract(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
  place = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
  # Orbax makes arrays whose type names the host only under this kind of sharding
  place = memory.host(place) if place.memory_kind == memory.KIND else place
  try:
    place.shard_shape(tuple(leaf.shape))
  except ValueError as error:
    raise ValueError(f"{path}: {_kind(leaf)} cannot be placed as {place}: {error}") from error
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _kind(leaf: Any) -> str:
  return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _check_same(saved: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
  """Orbax alone would cast another dtype, and says of another shape or structure what it means to Orbax."""
  wrong = []
  for path in [*wanted, *(path for path in saved if path not in wanted)]:
    saved_kind, asked_kind = (
      _kind(leaves[path]) if path in leaves else "nothing" for leaves in (saved, wanted)
    )
    if saved_kind != asked_kind:
      wrong.append(f"  {path}: found {saved_kind}, expected {asked_kind}")
  if wrong:
    rest = [f"  and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
    raise ValueError(
      "\n".join(
        [f"checkpoint {folder} is of another model, adapter or optimizer:", *wrong[:SHOWN], *rest]
        + ["use the config that wrote it, or another directory"]
      )
    )
