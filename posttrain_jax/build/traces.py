"""Who writes what `posttrain sample` keeps: a model that is loaded here, or one behind an address."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, Protocol

from posttrain_jax.build import use
from posttrain_jax.core import tree
from posttrain_jax.evals import samples
from posttrain_jax.evals.samples import Drawn, Plan, Question
from posttrain_jax.rollout.address import Address, Unanswered
from posttrain_jax.settings import ConfigError

Tokenizer = Callable[..., Mapping[str, Any]]


class Source(Protocol):
  """What answers come from.  tokenizer: of the texts that verifiers are given; weights: a name for the model."""

  @property
  def tokenizer(self) -> Any: ...

  @property
  def weights(self) -> str: ...

  def prompts(self, asked: Sequence[Question]) -> list[Any]:
    """What is sent for each question; answers depend on them."""

  def depends(self) -> Any:
    """What else they depend on."""

  def draw(
    self, prompts: Sequence[Any], plan: Plan, done: Collection[tuple[int, int]]
  ) -> Iterator[Drawn]:
    """The answers that are not done, each when it is whole."""

  def text(self, tokens: Sequence[int]) -> str: ...


class Local:
  """A model that is loaded here."""

  def __init__(self, used: use.Used, storage: str) -> None:
    self._used, self._writer = used, use.writer(used, storage)

  @property
  def tokenizer(self) -> Any:
    return self._used.tokenizer

  @property
  def weights(self) -> str:
    return tree.digest((self._used.params, list(self._used.nodes)))[:16]

  def prompts(self, asked: Sequence[Question]) -> list[Any]:
    return self._writer.prompts(asked)

  def depends(self) -> Any:
    return list(self._used.ends)

  def draw(
    self, prompts: Sequence[Any], plan: Plan, done: Collection[tuple[int, int]]
  ) -> Iterator[Drawn]:
    return samples.draw(self._writer, prompts, plan, done=done)

  def text(self, tokens: Sequence[int]) -> str:
    return self._writer.text(tokens)


@dataclasses.dataclass(frozen=True)
class Remote:
  """A model behind an address: its answers are texts, which whoever trains on them tokenises."""

  address: Address

  @property
  def tokenizer(self) -> Tokenizer:
    return lambda text, **_: {"input_ids": []}

  @property
  def weights(self) -> str:
    return self.address.model  # wherever it is: a server that moves is gone on with

  def prompts(self, asked: Sequence[Question]) -> list[Any]:
    """Messages; a text is a user's."""
    turn = lambda text: [{"role": "user", "content": text}]
    return [turn(q["prompt"]) if isinstance(q["prompt"], str) else q["prompt"] for q in asked]

  def depends(self) -> Any:
    return []

  def draw(
    self, prompts: Sequence[Any], plan: Plan, done: Collection[tuple[int, int]]
  ) -> Iterator[Drawn]:
    """At most `at_once` requests are open; what the address does not answer ends it, and what is there is kept.

    Raises:
      ConfigError: the address does not answer.
    """
    left = [
      (number, sample)
      for number in range(len(prompts))
      for sample in range(plan.samples)
      if (number, sample) not in done
    ]
    ask = lambda at: self._answer(prompts[at[0]], *at, plan)
    waiting = iter(left)
    with futures.ThreadPoolExecutor(self.address.at_once) as threads:
      open_ones = {
        threads.submit(ask, at) for at in itertools.islice(waiting, self.address.at_once)
      }
      try:
        while open_ones:
          ready, open_ones = futures.wait(open_ones, return_when=futures.FIRST_COMPLETED)
          for one in ready:
            yield one.result()
            open_ones |= {threads.submit(ask, at) for at in itertools.islice(waiting, 1)}
      except Unanswered as error:
        for one in open_ones:
          one.cancel()
        raise ConfigError(
          f"{error}. What was answered is kept: run the same command again"
        ) from error

  def _answer(self, messages: Sequence[Any], number: int, sample: int, plan: Plan) -> Drawn:
    how, stops = plan.sampling, [*plan.stop_strings]
    given = self.address.answer(
      messages,
      max_tokens=plan.max_new_tokens,
      temperature=how.temperature,
      seed=(plan.seed * 1_000_003 + number * 1_009 + sample) % 2**31,
      **({"top_p": how.top_p} if how.top_p != 1 else {}),
      **({"stop": stops} if stops else {}),
    )
    return Drawn(number, sample, [], given.text, given.finished)

  def text(self, tokens: Sequence[int]) -> str:
    raise ValueError("an answer of an address is kept as its text")

  def check(self, plan: Plan) -> None:
    """Raises ConfigError for what the protocol has no field for, so that it would be dropped in silence."""
    how = plan.sampling
    local = {
      "--top_k": how.top_k,
      "--min_p": how.min_p,
      "--repetition_penalty": how.repetition_penalty != 1 and how.repetition_penalty,
      "--min_new_tokens": plan.min_new_tokens,
      "--storage": plan.storage != "auto" and plan.storage,
    }
    asked = [f"{name}={value}" for name, value in local.items() if value]
    if asked:
      raise ConfigError(
        f"{asked[0]} is of a model that is loaded here; leave it out with --address"
      )
