"""Parameters and adapters laid out over devices: each leaf as the rules say for its path, an adapter as its base.

Without a mesh everything lies on one device.  `place` and `laid_out` are of real arrays, `abstract` is of shapes, for
programs that are compiled without a weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from posttrain_jax.adapters.bind import SHARED_PATH
from posttrain_jax.core import distributed, memory, sharding, tree, weight
from posttrain_jax.core.leaf import Leaf
from posttrain_jax.models import partition

# what stands at a base's path inherits its axes
RULES: sharding.Rules = (*partition.RULES, (rf"{SHARED_PATH}.*", PartitionSpec()))
LAYERS = "layers/"  # what is kept on the host where parameters are offloaded


def frozen(path: str, leaf: Any, platform: str | None = None) -> Any:
  """A leaf of a base as the platform computes with it: a CPU has the layers' bfloat16 matrices as bits.

  Args:
    platform: None for the default one.
  """
  is_cpu = (platform or jax.default_backend()) == "cpu"
  is_kept = isinstance(leaf, Leaf) and not isinstance(leaf, weight.Bfloat16)
  if not is_cpu or is_kept or not path.startswith(LAYERS) or not tree.turned(path):
    return leaf
  if leaf.dtype != jnp.bfloat16:
    return leaf
  is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
  return weight.Bfloat16(leaf.update(dtype=weight.BITS)) if is_shape else weight.bits(leaf)


def shardings(path: str, leaf: Any, mesh: Mesh | None, *, device: Any = None) -> Any:
  """leaf with the sharding of each of its arrays in its place; shapes will do.

  Args:
    path: of the leaf in its tree, which the rules are of.
    leaf: an array, a weight of any type or an adapter's node.
    mesh: None for a single device.
    device: that device; None: the first of this process.
  """
  if mesh is None:
    where = _single(device)
    return jax.tree.map(lambda _: where, leaf)
  specs = sharding.specs(leaf, sharding.spec_for(path, RULES))
  return jax.tree.map(lambda x, spec: sharding.named(mesh, spec, np.shape(x)), leaf, specs)


def place(path: str, leaf: Any, *, mesh: Mesh | None = None, on_host: bool = False) -> Any:
  """A leaf on its devices, `frozen`; each process gives the shards that are its own, of an array that it has whole.

  Args:
    on_host: a leaf of the layers stays in the host's pinned memory, in the same layout.

  Raises:
    KeyError: when no rule covers the path.
  """
  leaf = frozen(path, leaf)
  where = shardings(path, leaf, mesh)
  if on_host and path.startswith(LAYERS):
    where = jax.tree.map(memory.host, where)
  return jax.tree.map(_put, leaf, where)


def _put(x: Any, where: jax.sharding.Sharding) -> jax.Array:
  if isinstance(x, jax.Array) and not x.is_fully_addressable:  # made of what all processes have
    return jax.jit(lambda x: x, out_shardings=where)(x)
  if isinstance(where, SingleDeviceSharding):
    # what is there already is not copied, nor on a CPU what `files.room` made
    return jax.device_put(x)
  host = np.asarray(x)
  return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def laid_out(params: Any, mesh: Mesh | None = None, *, on_host: bool = False) -> Any:
  """A tree of parameters, or of an adapter's nodes, with every leaf on its devices."""
  put = lambda path, leaf: place(path, leaf, mesh=mesh, on_host=on_host)
  return tree.unflatten((path, put(path, leaf)) for path, leaf in tree.items(params))


def abstract(
  params: Any, mesh: Mesh | None = None, *, device: Any = None, on_host: bool = False
) -> Any:
  """The `jax.ShapeDtypeStruct`s of what `laid_out` gives, from shapes.

  Args:
    device: without a mesh, the device that the program is for; None: the first of this process.
  """

  some = device if mesh is None else mesh.devices.flat[0]
  platform = None if some is None else some.platform

  def one(path, leaf):
    leaf = frozen(path, leaf, platform)
    where = shardings(path, leaf, mesh, device=device)
    if on_host and path.startswith(LAYERS):
      where = jax.tree.map(memory.host, where)
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), leaf, where
    )

  return tree.unflatten((path, one(path, leaf)) for path, leaf in tree.items(params))


def gathered(make: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
  """make, whose parameters each of several processes is given as arrays of its own: whole along the axes of rows.

  Along `tensor` and `expert` they are cut, where the axis lies within a process.
  """

  program: Any = None

  def made(*trees: Any) -> Any:
    nonlocal program
    if program is None:
      shapes = jax.eval_shape(make, *trees)
      where = tree.unflatten(
        (path, shardings(path, leaf, mesh)) for path, leaf in tree.items(shapes)
      )
      kept = jax.tree.map(functools.partial(distributed.kept_here, mesh), where)
      program = jax.jit(make, out_shardings=kept)
    return distributed.here(mesh, program(*trees))

  return made


def hosted(params: Any) -> Any:
  """params, or their shapes, with what belongs to the layers in the host's memory, in the layout that it has."""

  def one(x):
    where = memory.host(x.sharding)
    is_shape = isinstance(x, jax.ShapeDtypeStruct)
    return x.update(sharding=where) if is_shape else jax.device_put(x, where)

  return tree.unflatten(
    (path, jax.tree.map(one, leaf) if path.startswith(LAYERS) else leaf)
    for path, leaf in tree.items(params)
  )


def replicated(mesh: Mesh | None, *, device: Any = None) -> jax.sharding.Sharding:
  """Whole on every device: counts, metrics, keys."""
  if mesh is None:
    return _single(device)
  return NamedSharding(mesh, PartitionSpec())


def _single(device):
  return SingleDeviceSharding(jax.local_devices()[0] if device is None else device)
