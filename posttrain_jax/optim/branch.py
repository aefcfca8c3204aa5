"""A branch of the parameters that learns by an optimizer of its own: a critic beside its policy."""

from __future__ import annotations

from typing import Any

import optax

from posttrain_jax.core import tree

REST = "rest"


def apart(
  optimizer: optax.GradientTransformation,
  other: optax.GradientTransformation,
  *,
  name: str,
  wait: int = 0,
) -> optax.GradientTransformation:
  """`optimizer` of all parameters but the branch `name`, which `other` updates; each clips its own gradient.

  wait: so many updates go by before the first parameter outside of the branch moves; moments and counts begin then.
  """
  if wait:
    rest = optax.transforms.conditionally_mask(optimizer, lambda step, **_: step >= wait)
  else:
    rest = optimizer
  parts = {
    REST: optax.with_extra_args_support(rest),
    name: optax.with_extra_args_support(other),
  }
  split = lambda params: {REST: tree.without(params, name), name: params[name]}

  def init(params: Any) -> Any:
    return {key: parts[key].init(part) for key, part in split(params).items()}

  def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
    given = split(updates)
    at = dict.fromkeys(given) if params is None else split(params)
    both: dict[str, tuple[Any, Any]] = {
      key: parts[key].update(given[key], state[key], at[key], **extra) for key in given
    }
    moved = {**both[REST][0], name: both[name][0]}
    return moved, {key: state for key, (_, state) in both.items()}

  return optax.GradientTransformationExtraArgs(init, update)
