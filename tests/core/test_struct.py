"""Pytree dataclasses whose structures differ with their classes."""

import ast
import pathlib

import jax
import jax.numpy as jnp
import pytest

from posttrain_jax.core import struct

PACKAGE = pathlib.Path(__file__).parents[2] / "posttrain_jax"


@struct.dataclass
class One:
  x: jax.Array
  scale: float = struct.field(pytree_node=False, default=2.0)


@struct.dataclass
class Other:
  x: jax.Array
  scale: float = struct.field(pytree_node=False, default=2.0)


@struct.dataclass
class Longer(One):
  y: jax.Array | None = None


def test_classes_with_equal_fields_have_unequal_structures():
  one, other = (jax.tree.structure(kind(jnp.ones(2))) for kind in (One, Other))
  assert one != other
  assert one == jax.tree.structure(One(jnp.zeros(2)))
  assert one != jax.tree.structure(One(jnp.zeros(2), scale=3.0))


def test_a_jitted_function_is_traced_anew_for_another_class():
  traced = []

  @jax.jit
  def f(node):
    traced.append(type(node))
    return node.x

  f(One(jnp.ones(2)))
  f(Other(jnp.ones(2)))
  f(One(jnp.ones(2)))
  assert traced == [One, Other]


def test_subclasses_add_fields_and_are_frozen():
  node = Longer(jnp.ones(2), y=jnp.zeros(3))
  assert [leaf.shape for leaf in jax.tree.leaves(node)] == [(2,), (3,)]
  assert node.replace(scale=5.0).scale == 5.0
  assert type(jax.tree.map(lambda x: x + 1, node)) is Longer
  with pytest.raises(AttributeError):
    node.x = 1  # ty: ignore[invalid-assignment]


@pytest.mark.parametrize(
  "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_no_class_is_registered_past_it(path):
  if path == PACKAGE / "core" / "struct.py":
    return
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module == "flax":
      pytest.fail(f"{path} imports {node.names[0].name} from flax: use posttrain_jax.core.struct")
