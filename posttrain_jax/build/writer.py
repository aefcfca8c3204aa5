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
from posttrain_jax.adapters import layout
from posttrain_jax.build import tools
from posttrain_jax.build.adapter import Trees
from posttrain_jax.build.model import Model
from posttrain_jax.build.prompts import Prompt
from posttrain_jax.core import distributed, progress, tree
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
    self,
    config: ml_collections.ConfigDict,
    model: Model,
    prompts: Sequence[Prompt],
    mesh: jax.sharding.Mesh | None = None,
  ) -> None:
    """mesh: of the run; each of several processes writes on the part of it that it has."""
    self.config, self.model, self.prompts, self.mesh = config, model, prompts, mesh
    self.sampling = sampling(config)
    self._engine: engine_lib.Engine | None = None

  def bind(self, trees: Trees) -> None:
    """What is trained, and what stays."""
    self._base, self._is_full = trees.context.base, trees.adapter_config is None

  def load(self, trainable: Any, carried: Any) -> None:
    """Other weights; each of several processes calls it, and has all of them then."""
    ready = self._ready(self._base, of_policy(trainable), of_policy(carried))
    with distributed.alone(self.mesh):
      if self._engine is None:
        self._begin(ready)
      else:
        self._engine.load(ready)

  def _begin(self, ready: engine_lib.Ready) -> None:
    o = self.config.online
    answers = self.config.batch.rows * o.minibatches * o.samples
    self._engine = engine_lib.Engine(
      ready,
      self.model.config,
      rows=-(-min(o.rows, answers) // jax.process_count()),
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
      with distributed.alone(self.mesh):
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

    def settled(base: Any, trainable: Any, carried: Any) -> Any:
      if self._is_full:
        return decoder.multiplied_in(trainable, self.model.products)
      nodes = tree.combine(trainable, carried)
      return adapters.settled(base, nodes, rounded=storage != stores.AUTO)

    def ready(params: Any) -> engine_lib.Ready:
      return engine_lib.prepare(params, self.model.config, storage)

    if self.mesh is None or jax.process_count() == 1:
      return jax.jit(lambda *trees: ready(settled(*trees)))
    gathered, own = layout.gathered(settled, self.mesh), jax.jit(ready)

    def ready_here(*trees: Any) -> engine_lib.Ready:
      params = gathered(*trees)
      with distributed.alone(self.mesh):
        return own(params)

    return ready_here
