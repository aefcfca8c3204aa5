"""One conversation: what its next prompt has in common with what was read is not read again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from posttrain_jax.models import before
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.rollout import engine
from posttrain_jax.rollout.requests import Request
from posttrain_jax.rollout.sampling import GREEDY, Sampling

Params = Any
LENGTH = 1024  # tokens of a conversation that there is room for at first; it doubles


class Dialogue:
  """An engine of one row that remembers.  Few programs serve every length, since room doubles from LENGTH on."""

  def __init__(
    self,
    params: Params | engine.Ready,
    config: ModelConfig,
    *,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    min_new_tokens: int = 0,
    tokenizer: Any = None,
    dtype: Any = None,
  ) -> None:
    self.config, self.sampling, self.stop_tokens = config, sampling, tuple(stop_tokens)
    self.stop_strings, self.min_new_tokens = tuple(stop_strings), min_new_tokens
    self.ended = True  # whether the last text came to an end of its own
    self._ready = engine.prepare(params, config)
    self._bound = before.slots(self._ready.stacked)
    length = min(LENGTH, config.max_length)
    self._engine = engine.Engine(
      self._ready,
      config,
      rows=1,
      length=length,
      dtype=dtype,
      tokenizer=tokenizer,
      reuses_written=True,
    )

  def stream(
    self, prompt: Sequence[int], *, max_new_tokens: int, seed: int = 0, number: int = 0
  ) -> Iterator[int]:
    """The tokens of `engine.generate`, each as soon as it is drawn, the stop token included."""
    self._make_room(self._bound + len(prompt) + max_new_tokens)
    ticket = self._engine.submit(
      Request(
        list(prompt),
        max_new_tokens,
        min(self.min_new_tokens, max_new_tokens),
        sampling=self.sampling,
        stop_tokens=self.stop_tokens,
        stop_strings=self.stop_strings,
        seed=seed,
        number=number,
      )
    )
    try:
      while not self._engine.is_idle:
        for progress in self._engine.advance(1):
          self.ended = progress.answer is not None and progress.answer.finished
          yield from progress.tokens
    finally:
      self._engine.drop(ticket)  # cut short by who reads

  def _make_room(self, wanted: int) -> None:
    length = self._engine.length
    while length < min(wanted, self.config.max_length):
      length *= 2
    self._engine.grow(min(length, self.config.max_length))


def stream(
  params: Params | engine.Ready,
  config: ModelConfig,
  prompt: Sequence[int],
  *,
  max_new_tokens: int,
  seed: int = 0,
  **options: Any,
) -> Iterator[int]:
  """The tokens of `engine.generate` for one prompt, each as soon as it is drawn, the stop token included."""
  return Dialogue(params, config, **options).stream(
    prompt, max_new_tokens=max_new_tokens, seed=seed
  )
