"""Checkpoints of a run: a folder per step, whole or not there, the newest few kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import checkpoint_managers as policies

from posttrain_jax.core import tree

Tree = Any
SHOWN = 8  # leaves that an error lists


class Checkpoints:
  """The checkpoints under one directory.

  A step is written under a temporary name and renamed when complete; what a killed save leaves behind is ignored, and
  removed when the directory is next opened.  With several processes, each calls every method and writes its own shards.

  Args:
    directory: seen by every process; made if it is not there.
    keep: how many of the newest steps stay.
    keep_steps: steps that stay for good.
  """

  def __init__(
    self, directory: str | Path, *, keep: int = 2, keep_steps: Iterable[int] = ()
  ) -> None:
    if keep < 1:
      raise ValueError(f"keep={keep}: at least the newest checkpoint must stay")
    self.directory = Path(directory).absolute()
    # zarr3 is the layout with a checksum for each chunk: a flipped bit is found, not trained on
    arrays = ocp.PyTreeCheckpointHandler(use_zarr3=True)
    items = ocp.handlers.DefaultCheckpointHandlerRegistry()
    items.add("state", ocp.args.PyTreeSave, arrays)
    items.add("state", ocp.args.PyTreeRestore, arrays)
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy(
        [policies.LatestN(keep), policies.CustomSteps(list(keep_steps))]
      ),
      cleanup_tmp_directories=True,
    )
    with self._explained("open"):
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
    with self._explained(f"save step {step} to"):
      self._orbax.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(tree.unflatten(leaves)), data=ocp.args.JsonSave(dict(data))
        ),
        force=True,  # orbax's own schedule would skip steps silently
      )
    # Orbax copies from the device before it returns.  Memory that the host can address it does not copy, so the next
    # donating step would write into what is being saved.
    if any(_on_host(leaf) for leaf in leaves.values()):
      self.wait()

  def latest(self) -> int | None:
    """The newest complete step, or None; waits for a save under way."""
    self.wait()
    return self._orbax.latest_step()

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
    newest, steps = self.latest(), self.steps()
    step = newest if step is None else step
    if step is None:
      raise FileNotFoundError(f"no checkpoint in {self.directory}")
    if step not in steps:
      raise FileNotFoundError(f"no checkpoint of step {step} in {self.directory}; found {steps}")
    wanted = _leaves(abstract_state)
    with self._readable(step):
      saved = dict(tree.items(self._orbax.item_metadata(step)["state"].tree))
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
    structure = jax.tree.structure(abstract_state)
    return structure.unflatten([arrays[path] for path in wanted]), restored["data"], step

  def steps(self) -> list[int]:
    """The complete steps, oldest first."""
    return sorted(self._orbax.all_steps())

  def wait(self) -> None:
    """Returns when nothing is being written.

    Raises:
      OSError: when what was being written could not be.
    """
    with self._explained("finish a save to"):
      try:
        self._orbax.wait_until_finished()
      except BaseException:
        self._orbax.reload()  # it has struck off what this save would have replaced
        raise

  def close(self) -> None:
    """Waits, and ends the background threads."""
    try:
      self.wait()
    finally:
      self._orbax.close()

  @contextmanager
  def _explained(self, what: str) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      found = self.directory.glob("*") if self.directory.is_dir() else ()
      whole = sorted(int(folder.name) for folder in found if folder.name.isdecimal())
      raise OSError(
        f"could not {what} {self.directory}: {error}\n"
        f"complete checkpoints there: {whole or 'none'}; with the cause gone, run the same command again"
      ) from error

  @contextmanager
  def _readable(self, step: int) -> Iterator[None]:
    folder = self.directory / str(step)
    try:
      yield
    except Exception as error:
      older = [s for s in self.steps() if s < step]
      then = f"go on from step {older[-1]}" if older else "start anew, there being no older one"
      raise OSError(
        f"checkpoint {folder} could not be read: {error}\n"
        f"if its files are damaged or missing, delete this folder to {then}"
      ) from error


def _leaves(state: Tree) -> dict[str, Any]:
  """{path: array} in the tree's order."""
  leaves = {}
  for keys, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
    path = jax.tree_util.keystr(keys, simple=True, separator="/")
    if not hasattr(leaf, "shape"):
      raise TypeError(f"{path}: {leaf!r} is no array; a checkpoint's state holds arrays only")
    leaves[path] = np.asarray(leaf) if isinstance(leaf, np.generic) else leaf
  return leaves


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
    found, asked = (
      _kind(leaves[path]) if path in leaves else "nothing" for leaves in (saved, wanted)
    )
    if found != asked:
      wrong.append(f"  {path}: found {found}, expected {asked}")
  if wrong:
    more = [f"  and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
    raise ValueError(
      "\n".join(
        [f"checkpoint {folder} is of another model, adapter or optimizer:", *wrong[:SHOWN], *more]
        + ["use the config that wrote it, or another directory"]
      )
    )
