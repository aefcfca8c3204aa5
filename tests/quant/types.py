"""Every type that a frozen matrix is stored in: a new one joins `TYPES` and inherits the tests of test_types.py."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from posttrain_jax.quant import fp4, int8, nf4


@dataclasses.dataclass(frozen=True)
class Type:
  name: str
  quantize: Callable[..., Any]
  abstract: Callable[..., Any]
  bits: float  # a weight, for columns of 4096
  norm: float  # ||w - q|| / ||w|| for standard normal values, at most

  def __str__(self):
    return self.name


def four(module, double_quant, bits, norm):
  name = f"{module.__name__.rpartition('.')[2]}_{'double' if double_quant else 'single'}"
  made = [
    functools.partial(f, double_quant=double_quant) for f in (module.quantize, module.abstract)
  ]
  return Type(name, *made, bits, norm)


TYPES = [
  four(nf4, True, 4.127, 0.093),
  four(nf4, False, 4.5, 0.092),
  four(fp4, True, 4.127, 0.1225),
  four(fp4, False, 4.5, 0.1225),
  Type("int8", int8.quantize, int8.abstract, 8.0078, 0.0088),
]
