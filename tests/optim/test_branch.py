"""A branch of the parameters with an optimizer of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from posttrain_jax.optim import branch

PARAMS = {"w": jnp.ones(3), "critic": {"w": jnp.ones(3), "score": jnp.ones(2)}}


def steps(optimizer, count, params=PARAMS):
  """The parameters after each of so many updates."""
  state, every, update = optimizer.init(params), [], jax.jit(optimizer.update)
  for i in range(count):
    gradient = jax.tree.map(lambda x, i=i: jnp.cos(x * (i + 1.0)), params)
    updates, state = update(gradient, state, params, norm=jnp.ones(()), finite=True)
    params = optax.apply_updates(params, updates)
    every.append(params)
  return every


def test_each_part_is_updated_as_if_alone():
  """With its own rate, moments and clipping."""
  one = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1))
  other = optax.chain(optax.clip_by_global_norm(0.2), optax.adamw(0.01))
  found = steps(branch.apart(one, other, name="critic"), 3)[-1]
  rest, apart = {"w": PARAMS["w"]}, PARAMS["critic"]
  np.testing.assert_allclose(found["w"], steps(one, 3, rest)[-1]["w"], rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
    found["critic"],
    steps(other, 3, apart)[-1],
  )


def test_what_waits_begins_afresh():
  """No parameter moves before, decay included, and the first update is one of new moments."""
  adam = optax.adamw(0.1, weight_decay=0.5)
  found = steps(branch.apart(adam, optax.sgd(0.1), name="critic", wait=2), 3)
  for before in found[:2]:
    np.testing.assert_array_equal(before["w"], PARAMS["w"])
    assert (np.asarray(before["critic"]["w"]) != 1).all()
  gradient = {"w": jnp.cos(PARAMS["w"] * 3.0)}
  rest = {"w": PARAMS["w"]}
  updates, _ = adam.update(gradient, adam.init(rest), rest)
  np.testing.assert_allclose(found[2]["w"], PARAMS["w"] + updates["w"], rtol=1e-6)


def test_a_branch_that_is_not_there_is_an_error():
  with pytest.raises(KeyError, match="critic"):
    branch.apart(optax.sgd(1.0), optax.sgd(1.0), name="critic").init({"w": jnp.ones(1)})
