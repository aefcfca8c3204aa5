"""What an objective is: totals that the whole optimizer batch decides, and contributions that sum.

One batch of 8, eight micro-batches of 1 and eight devices give the same gradient, unequal lengths included.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from posttrain_jax import adapters
from posttrain_jax.core import metrics as metrics_lib
from posttrain_jax.core import struct, tree, zigzag
from posttrain_jax.losses import balance, logprob
from posttrain_jax.models import decoder, experts
from posttrain_jax.models.config import ModelConfig

Array = jax.Array
Batch = Mapping[str, Any]  # arrays [rows, time] or [rows, slots] by name, and batches of companions
Totals = dict[str, Any]
Metrics = dict[str, Any]  # what adds up over micro-batches: `core.metrics`
Memory = Any  # what an objective carries from step to step: a tree of arrays, or None


@struct.dataclass
class Context:
  """What a step reads and never differentiates."""

  base: Any = None  # the parameters under the adapter; None in full fine-tuning, where they train
  fixed: Any = None  # the part of the adapter that does not train; None without an adapter
  reference: Any = None  # parameters of a reference policy; None: the base without its adapter
  reference_adapter: Any = (
    None  # what the base has as the reference, where the run goes on with an adapter
  )
  teacher: Any = None  # parameters of a model of any size that says what is to be learned


class Objective(Protocol):
  """What the step needs to know of a method.

  training: whether this is a training step, or a measurement, which has no dropout and may cost more.
  key: of the randomness of training (dropout); None where there is none.
  """

  def start(self, trainable: Any) -> Memory:
    """What the objective carries from step to step, at the start; None for nothing.  Buffers of its own."""

  def context(self, context: Context, memory: Memory) -> Context:
    """The context with what the memory holds of it: a reference that follows the policy."""

  def totals(
    self,
    trainable: Any,
    context: Context,
    batch: Batch,
    key: Array | None,
    *,
    memory: Memory,
    training: bool,
  ) -> Totals:
    """What the WHOLE optimizer batch decides: `count`, of what the loss is the mean over, and whatever else."""

  def loss(
    self,
    trainable: Any,
    context: Context,
    batch: Batch,
    totals: Totals,
    key: Array | None,
    *,
    training: bool,
  ) -> tuple[Array, Metrics]:
    """(contribution to the loss, metrics) of one micro-batch; both sum over micro-batches."""

  def teaches(self, batch: Batch) -> Array | None:
    """Whether a micro-batch can have a gradient that is not 0; None where every one may."""

  def after_update(self, trainable: Any, memory: Memory, totals: Totals) -> Memory:
    """The memory after an optimizer update, whose parameters are given and whose totals were these."""

  def check_start(self, metrics: Mapping[str, float]) -> None:
    """Raises ValueError where the first step's metrics, of the parameters before it, are not what they must be."""


CRITIC = (
  "critic"  # the branch of a trainable tree that is no part of the policy (`objectives.critic`)
)


def of_policy(parameters: Any) -> Any:
  """A tree of what trains, or of what is fixed beside it, without its critic's branch."""
  return tree.without(parameters, CRITIC)


def policy(trainable: Any, context: Context, key: Array | None = None) -> Any:
  """The parameters that are being trained, bound: the base with the adapter, or the trainable tree itself."""
  trainable, fixed = of_policy(trainable), of_policy(context.fixed)
  if fixed is None:
    return trainable
  return adapters.bind(context.base, tree.combine(trainable, fixed), key=key)


@struct.dataclass
class Forward:
  """The policy on a batch: its bound parameters, and the hidden states before the head."""

  params: Any
  # [rows, time, embed] as `zigzag.cut` has rows; all else of a batch is in its own order
  hidden: Array
  load: Any = None  # of a mixture of experts: what its routers did, a layer each
  values: Any = None  # [rows, time] of a critic, where there is one (`objectives.critic`)


@dataclasses.dataclass(frozen=True)
class Scorer(abc.ABC):
  """How a batch becomes scores of its tokens, for every objective alike.

  An objective says what one forward pass contributes (`contribution`), so that several share it in a sum.
  """

  model: ModelConfig
  dtype: Any = None  # of what lies between products; None: the embedding's
  products: Any = None  # the dtype that they are computed in; None: dtype
  remat: str = "none"
  attention_group: int = 0  # of shifted attention, in training only; 0: full attention
  attention_by: str = "xla"  # what computes it: `models.backends`

  @property
  def needs_reference(self) -> bool:
    """Whether the loss compares the policy with a reference policy."""
    return False

  def start(self, trainable: Any) -> Memory:
    del trainable

  def context(self, context: Context, memory: Memory) -> Context:
    del memory
    return context

  def teaches(self, batch: Batch) -> Array | None:
    del batch
    return None

  def after_update(self, trainable: Any, memory: Memory, totals: Totals) -> Memory:
    del trainable, totals
    return memory

  def check_start(self, metrics: Mapping[str, float]) -> None:
    del metrics

  def loss(
    self,
    trainable: Any,
    context: Context,
    batch: Batch,
    totals: Totals,
    key: Array | None,
    *,
    training: bool,
  ) -> tuple[Array, Metrics]:
    forward = self.forward(trainable, context, batch, key, training=training)
    loss, metrics = self.contribution(forward, context, batch, totals, training=training)
    return loss, metrics if forward.load is None else {**metrics, **measured_load(forward.load)}

  @abc.abstractmethod
  def totals(
    self,
    trainable: Any,
    context: Context,
    batch: Batch,
    key: Array | None,
    *,
    memory: Memory,
    training: bool,
  ) -> Totals: ...

  @abc.abstractmethod
  def contribution(
    self, forward: Forward, context: Context, batch: Batch, totals: Totals, *, training: bool
  ) -> tuple[Array, Metrics]:
    """`loss` of a forward pass that is done."""

  def forward(
    self, trainable: Any, context: Context, batch: Batch, key: Array | None, *, training: bool
  ) -> Forward:
    params = policy(trainable, context, key if training else None)
    return Forward(params, *self.hidden_and_load(params, batch, training=training))

  def hidden(self, params: Any, batch: Batch, *, training: bool = False) -> Array:
    return self.hidden_and_load(params, batch, training=training)[0]

  def hidden_and_load(
    self, params: Any, batch: Batch, *, training: bool = False
  ) -> tuple[Array, experts.Load | None]:
    prefix_ids = batch.get("prefix_ids")
    return decoder.hidden_and_load(
      decoder.multiplied_in(params, self.products),
      zigzag.cut(batch["tokens"]),
      self.model,
      positions=zigzag.cut(batch["positions"]),
      segment_ids=zigzag.cut(batch["segment_ids"]),
      prefix_ids=None if prefix_ids is None else zigzag.cut(prefix_ids),
      dtype=self.dtype,
      remat=self.remat,
      attention_group=self.attention_group if training else 0,
      attention_by=self.attention_by,
    )

  def head(self, forward: Forward) -> Any:
    """The weight that gives logits, whole on every device."""
    return decoder.whole_head(decoder.multiplied_in(forward.params, self.products))

  def scores(self, forward: Forward, batch: Batch, mask: Array, **options: Any) -> logprob.Scores:
    """The scores of the token after each position, where the mask says so; [rows, time]."""
    labels, _ = targets(batch)
    scores = logprob.score(
      forward.hidden,
      self.head(forward),
      zigzag.cut(labels),
      mask=zigzag.cut(mask),
      softcap=self.model.final_softcap,
      kept=zigzag.cut(following(batch["kept"])) if "kept" in batch else None,
      **options,
    )
    return jax.tree.map(lambda x: zigzag.whole(x, mask.shape[1]), scores)


def measured_load(load: experts.Load) -> Metrics:
  """What runs record of the routers, over the tokens of a micro-batch; 1 is even."""
  load = jax.lax.stop_gradient(load)
  count = jnp.maximum(load.tokens, 1)
  share = load.chosen / count[:, None]
  each = jnp.maximum(jnp.sum(share, axis=-1), 1e-9)  # experts a token
  even = load.chosen.shape[-1] / each
  mean = lambda values: metrics_lib.Mean(jnp.mean(values) * load.tokens[0], load.tokens[0])
  imbalance = balance.load_balance(load.chosen, load.probability, load.tokens)
  return {
    "router/imbalance": mean(imbalance / each),
    "router/busiest": mean(jnp.max(share, axis=-1) * even),
    "router/idle": mean(load.chosen == 0),
  }


def following(values: Array) -> Array:
  """What is known of the token after each position, [rows, time]; after the last one stands the first."""
  return jnp.roll(values, -1, axis=1)


def targets(batch: Batch) -> tuple[Array, Array]:
  """(labels, mask): the token after each position, and whether it is one to be learned.

  `loss_mask` marks trained tokens where they stand; the hidden state one position earlier predicts them.
  """
  mask = following(batch["loss_mask"].astype(bool)).at[:, -1].set(False)
  return following(batch["tokens"]), mask


def evaluation(objective: Objective) -> Callable[[Any, Context, Memory, Batch], Metrics]:
  """(trainable, context, memory, batch) -> metrics; jit it.  No gradient, no dropout."""

  def measure(trainable: Any, context: Context, memory: Memory, batch: Batch) -> Metrics:
    context = objective.context(context, memory)
    totals = objective.totals(trainable, context, batch, None, memory=memory, training=False)
    return objective.loss(trainable, context, batch, totals, None, training=False)[1]

  return measure


def measured(
  measure: Callable[[Any, Context, Memory, Batch], Metrics],
  batches: Iterable[Batch],
  trainable: Any,
  context: Context,
  memory: Memory = None,
) -> Metrics:
  """The metrics of all batches together, to be read by `core.metrics`; {} for none.

  measure: `evaluation` of an objective, jitted by who calls this more than once.
  """
  total: Metrics = {}
  for batch in batches:
    metrics = measure(trainable, context, memory, batch)
    total = jax.tree.map(lambda a, b: a + b, total, metrics) if total else metrics
  return total
