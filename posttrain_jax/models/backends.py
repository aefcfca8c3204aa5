"""What computes attention while a model trains or is measured: one contract, `attention.attend`'s, by several means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from posttrain_jax.models import attention, cudnn, splash

ATTEND: dict[str, Callable[..., Any]] = {
  "xla": attention.attend,
  "splash": splash.attend,
  "cudnn": cudnn.attend,
}
