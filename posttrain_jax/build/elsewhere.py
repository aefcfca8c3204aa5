"""config.online.engine: answers are written by a server, which is given the adapter by name whenever it has learned.

Several processes ask it for the answers to their own prompts each; the main one gives it the adapters.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import logging
import shutil
import statistics
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import ml_collections

from posttrain_jax.adapters import over
from posttrain_jax.build.adapter import Trees
from posttrain_jax.build.model import Model
from posttrain_jax.build.prompts import Prompt
from posttrain_jax.build.writer import Writer
from posttrain_jax.core import distributed, progress, tree
from posttrain_jax.core.waiters import Waiters
from posttrain_jax.environments.episodes import Sampler
from posttrain_jax.objectives import of_policy
from posttrain_jax.rollout import wires
from posttrain_jax.rollout.remote import Address, Once, Refused
from posttrain_jax.rollout.requests import Answer, Request
from posttrain_jax.rollout.sampling import Sampling
from posttrain_jax.settings import ConfigError
from posttrain_jax.train.state import State

log = logging.getLogger(__name__)
LOOKS = 0.2  # seconds after which whoever waits for an answer looks whether it goes on
KEPT = 2  # adapters that the server knows: the last, and that of answers under way
UNMOVED = 3  # changed adapters in a row that leave the probe's log-probabilities as they were
PROBE = 16  # tokens of the probe
FOLDER = "engine"  # of adapters for the server, in the run's


def check(config: ml_collections.ConfigDict) -> None:
  """Raises ConfigError for what a server does not do, or nobody can tell whether it does."""
  o = config.online
  if not o.engine:
    return
  if config.adapter.method == "none":
    raise ConfigError(
      "online.engine: a server is given an adapter, and this run trains all parameters; write adapter=lora"
    )
  if o.storage != "auto":
    raise ConfigError(
      f"online.storage={o.storage} is how this program's own engine keeps weights: leave it out"
    )
  if o.temperature != 1:
    raise ConfigError(
      f"online.temperature={o.temperature:g} with online.engine: servers give log-probabilities before the temperature"
      " or after it, as they were started; write 1, where both are one"
    )
  filters = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
  if cut := [name for name, off in filters.items() if o[name] != off]:
    raise ConfigError(
      f"online.{cut[0]} with online.engine: no server says which tokens one was drawn among, and without that the loss"
      " would be biased; leave it out"
    )
  if config.objective.get("importance") == "none":
    raise ConfigError(
      "online.engine: a server computes otherwise than what trains, and may be a batch behind; write"
      " --config.objective.importance=token, which weighs each token by the ratio of the two"
    )
  if o.ahead and o.curriculum != "none":
    raise ConfigError(
      f"online.ahead with online.curriculum={o.curriculum}: which prompts come next is known when this batch is scored;"
      " write --config.online.ahead=0"
    )
  if o.ahead and (o.environment or o.tools):
    raise ConfigError(
      "online.ahead with several turns: what tools say is not asked ahead; write --config.online.ahead=0"
    )


@dataclasses.dataclass(frozen=True)
class _Version:
  """An adapter that the server was given."""

  name: str
  folder: Path
  number: int
  once: Once  # gives it to the server anew


class Elsewhere(Writer):
  """Writes answers at an address with the weights that were loaded last."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    model: Model,
    prompts: Sequence[Prompt],
    home: Callable[[], Path | None],
    stopping: Callable[[], bool],
    mesh: jax.sharding.Mesh | None = None,
  ) -> None:
    """home: the run's folder, once there is one."""
    super().__init__(config, model, prompts, mesh)
    o = config.online
    self.rows = -(-o.rows // jax.process_count())
    self._home = home
    try:
      self.address = Address(
        o.engine,
        vocab=model.config.vocab_size,
        wire=wires.WIRES[o.engine_wire],
        key=o.engine_key,
        patience=o.engine_patience,
        stopping=stopping,
      )
    except ValueError as error:
      raise ConfigError(f"online.engine: {error}") from error
    self._threads = Waiters(self.rows, "engine")
    self._versions: collections.deque[_Version] = collections.deque()
    self._tickets = itertools.count()
    self._under_way: dict[int, futures.Future[Answer]] = {}
    self._ahead: dict[tuple[int, int], tuple[futures.Future[Answer], int]] = {}
    self._behind: list[int] = []  # loads between the beginning and the end of each answer
    self._probed: tuple[float, ...] = ()
    self._unmoved = 0
    self._lock = threading.Lock()

  def bind(self, trees: Trees) -> None:
    super().bind(trees)
    assert trees.adapter_config is not None
    self._adapter_config = trees.adapter_config

  @property
  def sampler(self) -> Sampler:
    return self

  def load(self, trainable: Any, carried: Any) -> None:
    """Writes the adapter for the server and gives it to it, unless it has these weights."""
    trainable, carried = of_policy(trainable), of_policy(carried)
    name = f"posttrain-{tree.digest(trainable)[:16]}"
    number = self._versions[-1].number + 1 if self._versions else 0
    if (known := next((one for one in self._versions if one.name == name), None)) is not None:
      if known is not self._versions[-1]:  # as before a check by other weights
        self._versions.remove(known)
        self._versions.append(dataclasses.replace(known, number=number))
      return
    folder = self._folder() / name
    nodes = jax.device_get(distributed.whole(tree.combine(trainable, carried), self.mesh))
    give = functools.partial(self._give, name, folder)
    with progress.phase("giving the engine its adapter"):
      if distributed.is_main():
        self._save(folder, nodes)
        give()
      self._versions.append(_Version(name, folder, number, Once(give)))
      if distributed.is_main():
        self._check_moved()
      distributed.exchanged(None)  # nobody asks for it before it is there
    while len(self._versions) > KEPT:
      old = self._versions.popleft()
      if distributed.is_main():
        self.address.unload(old.name)
        shutil.rmtree(old.folder, ignore_errors=True)

  def _save(self, folder: Path, nodes: Any) -> None:
    base = self.model
    under = () if base.earlier is None else base.earlier.under
    shutil.rmtree(folder, ignore_errors=True)
    over.save(
      folder,
      [*under, (nodes, self._adapter_config)],
      base.config,
      base_name=self.config.model.name,
    )

  def _give(self, name: str, folder: Path) -> None:
    """The adapter to the server, unless another process was quicker."""
    try:
      self.address.load(name, str(folder.absolute()))
    except Refused:
      if jax.process_count() == 1 or name not in self.address.models():
        raise

  def _folder(self) -> Path:
    """Where the server reads adapters."""
    if self.config.online.engine_folder:
      return Path(self.config.online.engine_folder).expanduser()
    home = self._home()
    assert home is not None
    return home / FOLDER

  def _check_moved(self) -> None:
    """Raises Refused where several adapters in a row have left what the server computes as it was."""
    stops: tuple[int, ...] = ()
    probe = Request(
      self.prompts[0].tokens.tolist(), PROBE, sampling=Sampling(1.0), stop_tokens=stops
    )
    read = tuple(self._answer(probe, self._versions[-1]).logps.tolist())
    self._unmoved = self._unmoved + 1 if read == self._probed else 0
    self._probed = read
    if self._unmoved >= UNMOVED:
      raise Refused(
        f"{UNMOVED} adapters that differ were given to the engine at {self.address.name} in a row, and it computes as"
        " before: it does not use them. Is it this base, with adapters enabled?"
      )

  def check(self, state: State) -> None:
    """Raises ValueError where a changed adapter does not reach what writes, ConfigError where no one writes."""
    names = self.address.models()
    log.info("the engine at %s has %s", self.address.name, ", ".join(names))
    super().check(state)
    self._unmoved = 0

  def submit(self, request: Request) -> int:
    ticket = next(self._tickets)
    begun, number = self._ahead.pop((request.number, request.sample), (None, 0))
    if begun is not None and not begun.cancelled():
      self._behind.append(self._versions[-1].number - number)
      self._under_way[ticket] = begun
    else:
      self._behind.append(0)
      self._under_way[ticket] = self._begun(request)
    return ticket

  def _begun(self, request: Request) -> futures.Future[Answer]:
    return self._threads.submit(self._answer, request, self._versions[-1])

  def _answer(self, request: Request, version: _Version) -> Answer:
    """By an adapter that a server that was started anew is given again."""
    seen = version.once.done
    return self.address.answer(request, version.name, lambda: version.once.of(seen))

  def advance(self) -> list[tuple[int, Answer]]:
    done, _ = futures.wait(self._under_way.values(), LOOKS, futures.FIRST_COMPLETED)
    ready = [ticket for ticket, future in self._under_way.items() if future in done]
    return [(ticket, self._under_way.pop(ticket).result()) for ticket in ready]

  def drop(self, ticket: int) -> None:
    if (future := self._under_way.pop(ticket, None)) is not None:
      future.cancel()

  def run(
    self, requests: Iterable[Request], before_window: Callable[[], None] | None = None
  ) -> Iterator[tuple[int, Answer]]:
    left, places = enumerate(requests), {}
    try:
      while True:
        while len(places) < 2 * self.rows and (more := next(left, None)) is not None:
          places[self.submit(more[1])] = more[0]
        if not places:
          return
        if before_window is not None:
          before_window()
        for ticket, answer in self.advance():
          yield places.pop(ticket), answer
    finally:
      for ticket in places:
        self.drop(ticket)

  def ahead(self, requests: Iterable[Request]) -> None:
    """Begins answers of the next batch, while this one is learned from; each ends with the adapter it began with."""
    number = self._versions[-1].number
    for request in requests:
      self._ahead[request.number, request.sample] = (self._begun(request), number)

  def told(self) -> dict[str, float]:
    """How many adapters old answers were since the last time that somebody asked."""
    behind, self._behind = self._behind, []
    return {"sampling/staleness": statistics.fmean(behind)} if behind else {}
