"""What a seed may be: so that no two of them draw the same, each fits the 32 bits that a key of JAX is made of."""

from __future__ import annotations

import operator
from typing import Any

from posttrain_jax.core import words

LARGEST = 2**32 - 1


def check(value: Any, name: str = "seed") -> int:
  """value as an int; raises ValueError where it is none, or another would draw the same.

  >>> check(2**32)
  Traceback (most recent call last):
  ValueError: seed=4294967296: write a whole number from 0 to 4294967295; one beyond would draw what another draws
  """
  if not is_whole(value):
    raise ValueError(f"{name}={words.shown(value)}: write a whole number from 0 to {LARGEST}")
  if not 0 <= value <= LARGEST:
    raise ValueError(
      f"{name}={words.shown(value)}: write a whole number from 0 to {LARGEST}; one beyond would draw what another draws"
    )
  return operator.index(value)


def is_whole(value: Any) -> bool:
  """Whether value is an integer of Python's or numpy's; True and False are no numbers.

  >>> is_whole(3), is_whole(True), is_whole(3.0), is_whole("3")
  (True, False, False, False)
  """
  if isinstance(value, bool):
    return False
  try:
    operator.index(value)
  except TypeError:
    return False
  return True
