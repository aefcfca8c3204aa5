"""The engine of a run that writes its own answers: the trained weights, settled, and what is asked of them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from posttrain_jax import adapters
from posttrain_jax.build import tools
from posttrain_jax.build.adapter import Trees
from posttrain_jax.build.model import Model
from posttrain_jax.build.prompts import Prompt
from posttrain_jax.core import progress, tree
from posttrain_jax.environments.episodes import InEngine, Sampler
from posttrain_jax.models import before, decoder
from posttrain_jax.objectives import of_policy
from posttrain_jax.rollout import engine as engine_lib
from posttrain_jax.rollout import storage as stores
from posttrain_jax.rollout.requests import Answer, Request
from posttrain_jax.rollout.sampling import Sampling
from posttrain_jax.train.state import State

log = logging.getLogger(__name__)


def sampling(config: ml_collections.ConfigDict) -> Sampling:
  """How tokens of answers are drawn."""
  o = config.online
  return Sampling(o.temperature, top_k=o.top_k, top_p=o.top_p, min_p=o.min_p)


class Writer:
  """Writes answers with the weights that were loaded last."""

  def __init__(
    self, config: ml_collections.ConfigDict, model: Model, prompts: Sequence[Prompt]
  ) -> None:
    self.config, self.model, self.prompts = config, model, prompts
    self.sampling = sampling(config)
    self._engine: engine_lib.Engine | None = None

  def bind(self, trees: Trees) -> None:
    """What is trained, and what stays."""
    self._base, self._is_full = trees.context.base, trees.adapter_config is None

  def load(self, trainable: Any, carried: Any) -> None:
    ready = self._ready(self._base, of_policy(trainable), of_policy(carried))
    if self._engine is not None:
      self._engine.load(ready)
      return
    o = self.config.online
    answers = self.config.batch.rows * o.minibatches * o.samples
    self._engine = engine_lib.Engine(
      ready,
      self.model.config,
      rows=min(o.rows, answers),
      length=before.slots(ready.stacked) + self._longest + o.max_new_tokens,
      dtype=self.model.dtype,
      records_kept=not self.sampling.is_whole,
    )
    with progress.phase("compiling what writes"):
      compiled = self._engine.warm_up(self._lengths)
    log.info("the engine has %d programs", len(compiled))
    log.debug("they are: %s", "; ".join(compiled))

  @property
  def _longest(self) -> int:
    """Tokens of a prompt, what an environment says behind it included."""
    return max(map(len, self.prompts)) + tools.room(self.config)

  @property
  def _lengths(self) -> Iterable[int] | None:
    """Of all that will be read before something is written; None: any, as the turns of a conversation."""
    return None if tools.is_on(self.config) else [len(prompt) for prompt in self.prompts]

  @property
  def sampler(self) -> Sampler:
    """What writes the turns of episodes."""
    assert self._engine is not None
    return InEngine(self._engine)

  def request(self, prompt: Prompt, number: int, sample: int) -> Request:
    """number: of the prompt among all that were asked."""
    return Request(
      prompt.tokens.tolist(),
      self.config.online.max_new_tokens,
      sampling=self.sampling,
      stop_tokens=self._stops,
      seed=self.config.seed,
      number=number,
      sample=sample,
    )

  def run(
    self, requests: Iterable[Request], before_window: Callable[[], None] | None = None
  ) -> Iterator[tuple[int, Answer]]:
    """(place of the request, answer) as they finish."""
    assert self._engine is not None
    return self._engine.run(requests, before_window)

  def check(self, state: State) -> None:
    """Raises ValueError where a changed adapter does not reach what writes."""
    if self._is_full:
      return
    moved = jax.tree.map(lambda x: x + jnp.asarray(0.02, x.dtype), state.trainable)
    probe = self.prompts[0].tokens.tolist()
    read = []
    for trainable in (state.trainable, moved):
      self.load(trainable, state.carried)
      ((_, answer),) = self.run([Request(probe, 1, stop_tokens=())])
      read.append(float(answer.logps[0]))
    if read[0] == read[1]:
      raise ValueError(
        "a changed adapter leaves the sampler's log-probabilities as they were: what writes does not have the weights"
        " that are trained"
      )

  @functools.cached_property
  def _stops(self) -> tuple[int, ...]:
    return self.model.ends

  @functools.cached_property
  def _ready(self) -> Any:
    """(base, trainable, carried) -> what the engine reads, one program."""
    storage = self.config.online.storage

    def ready(base: Any, trainable: Any, carried: Any) -> engine_lib.Ready:
      params = (
        decoder.multiplied_in(trainable, self.model.products)
        if self._is_full
        else adapters.settled(
          base, tree.combine(trainable, carried), rounded=storage != stores.AUTO
        )
      )
      return engine_lib.prepare(params, self.model.config, storage)

    return jax.jit(ready)
