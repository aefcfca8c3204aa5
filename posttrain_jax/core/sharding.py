"""Sharding is data: a mesh with axes `AXES`, and (pattern, PartitionSpec) rules that cover every path.

Models name logical axes (`constrain(x, "batch time embed")`), never meshes; without an ambient mesh that does nothing.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from posttrain_jax.core.leaf import Leaf

AXES = ("data", "fsdp", "expert", "context", "tensor")
Rules = Sequence[tuple[str, PartitionSpec]]
WEIGHTS = (
  ("fsdp",),
  ("tensor", "fsdp"),
)  # entries of a spec that a dimension of a weight, or of a factor, lies along

# Where the logical axes of an activation live: entries of a PartitionSpec.
ACTIVATIONS: dict[str, Any] = {
  "batch": ("data", "fsdp", "expert"),
  "time": "context",
  "embed": None,
  "heads": "tensor",
  "mlp": "tensor",
  "vocab": "tensor",
  "head_dim": None,
  "-": None,  # whole on every device
}
# of rows whose tokens are looked up in a table cut along fsdp, and of what is found there
ACTIVATIONS |= {"readers": ("data", "expert"), "columns": "fsdp"}
# of rows that are cut along time, their parts below one another (`zigzag.parts`)
ACTIVATIONS["parts"] = ("context", *ACTIVATIONS["batch"])


def mesh(
  *,
  data: int = 1,
  fsdp: int = 1,
  expert: int = 1,
  context: int = 1,
  tensor: int = 1,
  devices: Any = None,
  slices: int = 1,
) -> jax.sharding.Mesh:
  """A mesh with `AXES` of these sizes; one axis may be -1: all the devices that are left.

  Args:
    slices: groups of devices with a slow network between them, one after the other in devices; only data crosses it.

  Raises:
    ValueError: for sizes below 1, and when the product is not the number of devices.
  """
  devices = np.asarray(jax.devices() if devices is None else devices)
  sizes = [data, fsdp, expert, context, tensor]
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise ValueError(
      f"mesh {dict(zip(AXES, sizes))}: sizes must be 1 or more, and one axis may be -1"
    )
  if -1 in sizes:
    known = -math.prod(sizes)
    if devices.size % known:
      raise ValueError(f"mesh {dict(zip(AXES, sizes))} does not divide {devices.size} devices")
    sizes[sizes.index(-1)] = devices.size // known
  if math.prod(sizes) != devices.size:
    raise ValueError(
      f"mesh {' x '.join(f'{axis}={size}' for axis, size in zip(AXES, sizes))} needs {math.prod(sizes)} devices, "
      f"found {devices.size}; write -1 for one axis to take all that are left"
    )
  if sizes[0] % slices:
    raise ValueError(
      f"mesh.data={sizes[0]} on {slices} slices: between slices only gradients should travel; write mesh.data={slices}"
      " or a multiple of it"
    )
  shape = (sizes[0] // slices, *sizes[1:])
  parts = devices.ravel().reshape(slices, -1)
  whole = np.concatenate([_arranged(part, shape) for part in parts])
  return jax.sharding.Mesh(whole, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(devices: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """The devices of a slice in a mesh's shape, neighbours of its axes close to each other.

  Cores of a v4 are arranged in their order: jax wants its chips as one device each, as which libtpu describes none.
  """
  if devices[0].device_kind == "TPU v4" and any(device.core_on_chip for device in devices):
    return devices.reshape(shape)
  types = (AxisType.Auto,) * len(AXES)
  try:
    return jax.make_mesh(shape, AXES, axis_types=types, devices=list(devices)).devices
  except NotImplementedError:  # an axis that is no product of the torus's own: 8 x 8 on 4 x 4 x 4
    arranged = mesh_utils.create_device_mesh
    return arranged(shape, devices=list(devices), allow_split_physical_axes=True)


def row_shares(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
  """Over how many devices the rows of a batch are spread."""
  return math.prod(mesh.shape[axis] for axis in ACTIVATIONS["batch"])


def active() -> bool:
  """True inside `jax.set_mesh` of a mesh with more than one device; what `by_device` runs sees its own alone."""
  ambient = jax.sharding.get_abstract_mesh()
  return not ambient.empty and ambient.size > 1 and not ambient.manual_axes


def by_device(
  function: Callable[..., Any], inputs: tuple[Any, ...], outputs: Any
) -> Callable[..., Any]:
  """function on each device's own parts, with collectives of its own; inputs, outputs: PartitionSpecs."""
  return jax.shard_map(function, in_specs=inputs, out_specs=outputs, check_vma=False)


def size(axes: Any) -> int:
  """Devices of the ambient mesh along an entry of a PartitionSpec; 1 without a mesh; by one device too."""
  sizes = dict(jax.sharding.get_abstract_mesh().shape)
  return math.prod(sizes.get(name, 1) for name in (axes if isinstance(axes, tuple) else (axes,)))


def constrain(x: jax.Array, axes: str) -> jax.Array:
  """x with its logical axes pinned to the ambient mesh; x itself where there is none.

  Without it eight-way fsdp was seen to all-reduce full activations.  A time that the context axis does not divide, as
  the one token of a decoding step, lies whole on every device.
  """
  if not active():
    return x
  whole = x.shape[axes.split().index("time")] % size("context") if "time" in axes.split() else 0
  spec = [None if whole and axis == "context" else axis for axis in logical(axes)]
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def pinned(x: jax.Array, axes: str) -> jax.Array:
  """As `constrain`, by the axes of the mesh that divide x: for what one program leaves to the next."""
  if not active():
    return x
  ambient = jax.sharding.get_abstract_mesh()
  return jax.lax.with_sharding_constraint(x, fitted(logical(axes), x.shape, ambient))


def told_alike(tree: Any) -> Any:
  """The same arrays, whose shardings name no axis of one device and end with no None.

  What a program leaves lies where `pinned` says, and is told with such an axis or without, as it comes: to the next
  program, which is compiled for what it is told, two tellings are two programs.
  """

  def one(x: Any) -> Any:
    if not isinstance(x, jax.Array) or not isinstance(where := x.sharding, NamedSharding):
      return x
    spec = _wide(where)
    if spec == where.spec:
      return x
    parts = [part.data for part in x.addressable_shards]
    alike = NamedSharding(where.mesh, spec, memory_kind=where.memory_kind)
    return jax.make_array_from_single_device_arrays(x.shape, alike, parts)

  return jax.tree.map(one, tree) if active() else tree


def _wide(where: NamedSharding) -> PartitionSpec:
  kept: list[Any] = []
  for axis in where.spec:
    names = axis if isinstance(axis, tuple) else () if axis is None else (axis,)
    wide = tuple(name for name in names if where.mesh.shape[name] > 1)
    kept.append(wide if len(wide) > 1 else next(iter(wide), None))
  while kept and kept[-1] is None:
    kept.pop()
  return PartitionSpec(*kept)


def logical(axes: str) -> PartitionSpec:
  """Of an activation with those axes, `-` for one that lies whole on every device."""
  return PartitionSpec(*[ACTIVATIONS[name] for name in axes.split()])


def gather(tree: Any, spec: PartitionSpec, *, in_parts: bool = True) -> Any:
  """The arrays of a parameter pinned to spec without its fsdp axes: whole on every device that computes with them.

  A quantised weight travels as it is stored: left to itself the compiler gathers the matrix that it decodes to.

  Args:
    in_parts: the gradient is pinned to spec, a part on each device: pinned as the array is, whole, a TPU's compiler
      sums it whole, in twice the bytes.  False for what a loop reads at every turn, whose gradient is added up first.
  """
  if not active():
    return tree
  whole = PartitionSpec(*[None if axis == "fsdp" else axis for axis in spec])
  ambient = jax.sharding.get_abstract_mesh()

  def pin(x: Any, whole: PartitionSpec, part: PartitionSpec) -> jax.Array:
    place = lambda spec: fitted(spec, x.shape, ambient)
    x = _movable(x, ambient)
    if in_parts and jnp.issubdtype(x.dtype, jnp.floating):
      return _spread(x, place(whole), place(part))
    return jax.lax.with_sharding_constraint(x, place(whole))

  return jax.tree.map(pin, tree, specs(tree, whole), specs(tree, spec))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _spread(x: jax.Array, whole: PartitionSpec, part: PartitionSpec) -> jax.Array:
  """x pinned to whole, and its gradient to part."""
  return jax.lax.with_sharding_constraint(x, whole)


_spread.defvjp(
  lambda x, whole, part: (jax.lax.with_sharding_constraint(x, whole), None),
  lambda whole, part, _, g: (jax.lax.with_sharding_constraint(g, part),),
)


def _movable(x: Any, mesh: jax.sharding.AbstractMesh) -> Any:
  """x, from the host where it lies on other devices than the mesh's or in another way: a constraint takes no such."""
  if not isinstance(x, jax.Array) or isinstance(x, Tracer) or not x.is_fully_addressable:
    return x
  where = x.sharding
  lies_there = isinstance(where, NamedSharding) and where.mesh.abstract_mesh == mesh
  return x if lies_there else np.asarray(x)


def specs(leaf: Any, spec: PartitionSpec) -> Any:
  """The PartitionSpecs of a leaf's arrays, given that of the dense array: spec itself for a plain one."""
  return leaf.partition_specs(spec) if isinstance(leaf, Leaf) else spec


def factors(spec: PartitionSpec) -> tuple[Any, Any]:
  """The entries of [in, rank] and [rank, out] that change a matrix which lies as spec: fsdp cuts both of them.

  Of a matrix it cuts one side alone; a factor of the other side would lie whole on every device, with its moments.

  >>> factors(PartitionSpec("fsdp", "tensor"))
  ('fsdp', ('tensor', 'fsdp'))
  """
  rows, columns = [None, None, *spec][-2:]
  is_cut = "fsdp" in (rows, columns)
  also = lambda entry: (
    {None: "fsdp", "tensor": ("tensor", "fsdp")}.get(entry, entry) if is_cut else entry
  )
  return also(rows), also(columns)


def spec_for(path: str, rules: Rules) -> PartitionSpec:
  """The PartitionSpec of the first rule whose pattern matches the whole path.

  Raises:
    KeyError: when no rule covers the path.
  """
  for pattern, spec in rules:
    if re.fullmatch(pattern, path):
      return spec
  raise KeyError(f"no sharding rule covers {path!r}; add a (pattern, PartitionSpec) pair for it")


def fitted(
  spec: PartitionSpec, shape: Sequence[int], mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
) -> PartitionSpec:
  """spec with the axes dropped that do not divide the dimension (a 9-head model on tensor=2, say).

  What a spec has along fsdp, weights and what is of their shape, lies along context too: the devices that share a
  row would hold it as often otherwise.  What has tensor before it keeps tensor where the product does not divide.
  """
  sizes = dict(mesh.shape)
  has_rows = sizes.get("context", 1) > 1 and "context" not in spec
  kept = []
  for dim, axis in zip(shape, [*spec, *[None] * (len(shape) - len(spec))]):
    names = axis if isinstance(axis, tuple) else () if axis is None else (axis,)
    choices = [names]
    if names in WEIGHTS:
      choices += [names[:-1]]
      choices[:0] = [(*names, "context")] if has_rows else []
    divides = lambda names, dim=dim: dim % math.prod([sizes[n] for n in names]) == 0
    names = next(filter(divides, choices), ())
    kept.append(names if len(names) > 1 else next(iter(names), None))
  return PartitionSpec(*kept)


def named(mesh: jax.sharding.Mesh, spec: PartitionSpec, shape: Sequence[int]) -> NamedSharding:
  return NamedSharding(mesh, fitted(spec, shape, mesh))
