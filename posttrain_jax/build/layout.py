"""Where parameters lie: laid out over a mesh by the rules of their paths."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax import adapters
from posttrain_jax.core import memory, sharding, tree
from posttrain_jax.models import decoder


def place(path: str, leaf: Any, *, mesh: jax.sharding.Mesh | None, on_host: bool = False) -> Any:
  if on_host and path.startswith("layers/"):
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    where = device if mesh is None else sharding.named(mesh, *_spec(path, leaf))
    return jax.make_array_from_callback(leaf.shape, memory.host(where), lambda at: leaf[at])
  return jax.tree.map(jnp.asarray, leaf) if mesh is None else placed(path, leaf, mesh)


def _spec(path, leaf):
  return sharding.spec_for(path, decoder.RULES), leaf.shape


def placed(path: str, leaf: Any, mesh: jax.sharding.Mesh) -> Any:
  """A parameter, plain or any weight, laid out as `decoder.RULES` say for its path."""
  spec = sharding.spec_for(path, decoder.RULES)
  return _laid_out(leaf, spec, mesh)


def placed_adapter(adapter: Any, mesh: jax.sharding.Mesh | None) -> Any:
  """An adapter laid out by its base's axes."""
  if mesh is None:
    return adapter
  rules = [*decoder.RULES, *adapters.RULES]
  return tree.unflatten(
    (path, _laid_out(node, sharding.spec_for(path, rules), mesh))
    for path, node in tree.items(adapter)
  )


def _laid_out(leaf, spec, mesh):
  specs = leaf.partition_specs(spec) if hasattr(leaf, "partition_specs") else spec

  def put(x, spec):
    host = np.asarray(x)
    where = sharding.named(mesh, spec, host.shape)
    # each process holds the whole array on its host and gives the shards that are its own
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

  return jax.tree.map(put, leaf, specs)
