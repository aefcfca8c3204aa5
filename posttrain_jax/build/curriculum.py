"""online.curriculum: which prompts are asked next, in turn or by how often they were answered right."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from posttrain_jax.build.groups import Group
from posttrain_jax.build.prompts import Prompt
from posttrain_jax.rewards.reward import Reward
from posttrain_jax.settings import ConfigError

BY_RATE = "pass_rate"
COLUMN = "pass_rate"  # of rows that say what share of their answers is right
PRIOR = 0.5  # answers of either kind that are taken to be known of every prompt (Jeffreys)
MEMORY = (
  0.75  # of what was known of a prompt, whenever it is answered again: the policy has changed
)


class InTurn:
  """Every prompt once an epoch, each epoch in an order of its own."""

  def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
    self.count, self.seed = len(prompts), seed

  def choose(self, numbers: range, taken: Collection[int]) -> list[int]:
    """The prompts that are asked in these places; taken: those that this batch has."""
    del taken
    places = [divmod(number, self.count) for number in numbers]
    orders = {epoch: self._order(epoch) for epoch, _ in places}
    return [int(orders[epoch][at]) for epoch, at in places]

  def _order(self, epoch: int) -> np.ndarray:
    return np.random.default_rng((self.seed, epoch)).permutation(self.count)

  def saw(self, groups: Sequence[tuple[int, Group]], outcome: Reward) -> dict[str, float]:
    """(prompt, its answers) of a batch; what is to be told."""
    del groups, outcome
    return {}

  def get_state(self) -> dict[str, Any]:
    return {}

  def set_state(self, state: Mapping[str, Any]) -> None:
    del state


class ByRate(InTurn):
  """Prompts are drawn with weight 1 - p^n - (1 - p)^n, the chance that n answers of pass rate p do not agree.

  Without replacement in a batch.  p = (right + 1/2) / (answers + 1), of which older answers count MEMORY times as much
  with each time that the prompt comes again: a new prompt has the highest weight, and none has weight 0.  A row's
  column `pass_rate` is taken for n answers.
  """

  def __init__(self, prompts: Sequence[Prompt], seed: int, answers: int) -> None:
    super().__init__(prompts, seed)
    self.answers = answers
    self.right, self.asked = np.zeros(self.count), np.zeros(self.count)
    for i, prompt in enumerate(prompts):
      if (rate := prompt.row.get(COLUMN)) is not None:
        self.right[i], self.asked[i] = answers * _checked(rate, prompt), answers
    self._seen: set[int] = set()

  @property
  def rates(self) -> np.ndarray:
    """[prompts]: p."""
    return (self.right + PRIOR) / (self.asked + 2 * PRIOR)

  def choose(self, numbers: range, taken: Collection[int]) -> list[int]:
    random = np.random.default_rng((self.seed, numbers.start))
    p, n = self.rates, max(self.answers, 2)
    # the largest of log w + Gumbel noise are a draw without replacement (Kool et al. 2019, arXiv 1903.06059)
    keys = np.log(-np.expm1(np.log(p**n + (1 - p) ** n))) + random.gumbel(size=self.count)
    order = [int(i) for i in np.argsort(-keys, kind="stable")]
    fresh = [i for i in order if i not in taken]
    again = [i for i in order if i in taken]
    ranked = [*fresh, *again]
    return [ranked[i % len(ranked)] for i in range(len(numbers))]

  def saw(self, groups: Sequence[tuple[int, Group]], outcome: Reward) -> dict[str, float]:
    met = self.rates[[i for i, _ in groups]]
    for i, group in groups:
      known = [one for one in group.scored if not one.total.is_missing]
      if not known:
        continue
      self.right[i] = MEMORY * self.right[i] + sum(map(outcome.is_right, known))
      self.asked[i] = MEMORY * self.asked[i] + len(known)
      self._seen.add(i)
    return {
      "curriculum/pass_rate": float(met.mean()),
      "curriculum/share_seen": len(self._seen) / self.count,
    }

  def get_state(self) -> dict[str, Any]:
    """{prompt: [right, answers]} of those that were asked, bit by bit."""
    return {str(i): [float(self.right[i]), float(self.asked[i])] for i in sorted(self._seen)}

  def set_state(self, state: Mapping[str, Any]) -> None:
    for i, (right, asked) in state.items():
      self.right[int(i)], self.asked[int(i)] = right, asked
      self._seen.add(int(i))


def make(
  how: str, prompts: Sequence[Prompt], *, seed: int, answers: int, outcome: Reward
) -> InTurn:
  """online.curriculum.

  Raises:
    ConfigError: nothing says which answers are right, or a row's pass rate is none.
  """
  if how != BY_RATE:
    return InTurn(prompts, seed)
  if not outcome.has_most:
    raise ConfigError(
      f"online.curriculum={BY_RATE}: right is the highest outcome that there is, and that of {', '.join(outcome.names)}"
      " has no bound; write reward.ranges for it, or name a part that has one in online.outcome"
    )
  return ByRate(prompts, seed, answers)


def _checked(rate: Any, prompt: Prompt) -> float:
  is_number = isinstance(rate, int | float) and not isinstance(rate, bool)
  if not is_number or not 0 <= rate <= 1:
    raise ConfigError(
      f"online.curriculum={BY_RATE}: {prompt.origin} has {COLUMN}={rate!r}; write the share of its answers that is"
      " right, from 0 to 1, or leave the column out"
    )
  return float(rate)
