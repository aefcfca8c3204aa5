"""The length of an answer, in tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from posttrain_jax.rewards import score
from posttrain_jax.rewards.score import Score
from posttrain_jax.rewards.verifier import IDS, Known, Prompt, Tried


@dataclasses.dataclass(frozen=True)
class SoftOverlong(Tried):
  """0 for n <= L - C;  ((L - C) - n) / C up to n = L;  -1 beyond.  DAPO (Yu et al. 2025), eq. 13.

  n: tokens of the answer.  L: `longest`.  C: `soft`, the tokens over which the penalty grows.

  >>> SoftOverlong(100, 20)("", "", {"completion_ids": [1] * 90}).value
  -0.5
  """

  longest: int
  soft: int

  def __post_init__(self):
    if not 0 <= self.soft <= self.longest:
      raise ValueError(
        f"length: longest={self.longest}, soft={self.soft}; the penalty grows over the last `soft` tokens of `longest`"
      )

  def __call__(self, prompt: Prompt, completion: str, example: Mapping[str, Any]) -> Score:
    if IDS not in example:
      return score.missing("the answer's token ids are not known, and a length is one in tokens")
    n = len(example[IDS])
    if n > self.longest:
      return Score(-1.0, f"{n} tokens")
    over = n - (self.longest - self.soft)
    return Score(-over / self.soft if over > 0 else 0.0, f"{n} tokens")

  def known(self) -> list[Known]:
    return [
      Known("", {}, True, tokens=[0] * (self.longest - self.soft)),
      Known("", {}, False, tokens=[0] * (self.longest + 1)),
    ]
