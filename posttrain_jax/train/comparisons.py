"""Objectives on answers: pairs, labels, scored groups.  Each adds up exactly over micro-batches and devices.

Rows hold several answers (`data.answers`), each in a slot of its row: [rows, slots] is the shape of all that is known
of an answer, [rows, time] that of tokens.  Log-probabilities are sums over its tokens, end of turn included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from posttrain_jax.core import struct
from posttrain_jax.core.weight import linear32
from posttrain_jax.losses import kl, logprob, policy, preference, reward
from posttrain_jax.models import decoder
from posttrain_jax.train import metrics as metrics_lib
from posttrain_jax.train.metrics import Mean
from posttrain_jax.train.objectives import Batch, Frozen, Scorer, reference, targets
from posttrain_jax.train.objectives import policy as bound

Array = jax.Array
stop = jax.lax.stop_gradient


@struct.dataclass
class Tokens:
  """Of the token after each position, [rows, time], but for `present`."""

  mask: Array  # whether it is scored
  answer: Array  # its slot in the row, or the number of slots where it is no answer's
  present: Array  # [rows, slots] whether there is an answer

  def per_answer(self, values: Array) -> Array:
    """[rows, time] -> [rows, slots]: sums over the scored tokens of each answer."""
    slots = self.present.shape[1]
    values = jnp.where(self.mask, values, 0.0)
    add = lambda row, where: jnp.zeros(slots + 1, values.dtype).at[where].add(row)
    return jax.vmap(add)(values, self.answer)[:, :slots]

  def per_token(self, values: Array) -> Array:
    """[rows, slots] -> [rows, time]: each token that of its answer, 0 where it is none's."""
    padded = jnp.pad(values, ((0, 0), (0, 1)))
    return jnp.take_along_axis(padded, self.answer, axis=1)


def tokens(batch: Batch) -> Tokens:
  _, mask = targets(batch)
  return Tokens(mask, jnp.roll(batch["answer"], -1, axis=1), batch["present"])


def reference_logps(
  scorer: Scorer, trainable: Any, frozen: Frozen, batch: Batch, mask: Array
) -> Array:
  """[rows, time] log-probabilities of the tokens after each position: cached with the batch, or computed."""
  if "reference" in batch:
    return jnp.where(mask, jnp.roll(batch["reference"], -1, axis=1), 0.0)
  return stop(scorer.scores(reference(trainable, frozen), batch, mask, None).logp)


# --- pairs -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Loss:
  """How a loss of `losses.preference` is called: what it reads and which options it has."""

  function: Callable[..., Any]
  options: tuple[str, ...] = ("beta",)
  means: bool = False  # log-probabilities per token in place of sums
  reference: bool = True
  differences: bool = (
    False  # reads r_w and r_l through their difference alone: other divergences apply
  )


LOSSES: Mapping[str, Loss] = {
  "dpo": Loss(preference.dpo, ("beta", "label_smoothing"), differences=True),
  "dpo_norm": Loss(preference.dpo, ("beta", "label_smoothing"), means=True, differences=True),
  "robust": Loss(preference.robust, ("beta", "label_smoothing"), differences=True),
  "ipo": Loss(preference.ipo, means=True, differences=True),
  "hinge": Loss(preference.hinge, differences=True),
  "exo": Loss(preference.exo, ("beta", "label_smoothing"), differences=True),
  "discopop": Loss(preference.discopop, differences=True),
  "nca": Loss(preference.nca),
  "bco": Loss(preference.bco),
  "apo_zero": Loss(preference.apo_zero),
  "apo_down": Loss(preference.apo_down),
  "sppo": Loss(preference.sppo),
  "cpo": Loss(preference.cpo, ("beta", "label_smoothing"), reference=False),
  "simpo": Loss(preference.simpo, ("beta", "gamma_beta_ratio"), means=True, reference=False),
  "orpo": Loss(preference.orpo, means=True, reference=False),
  "tpo": Loss(preference.tpo, ("beta", "gamma_beta_ratio"), reference=False),
  "tpo_norm": Loss(preference.tpo, ("beta", "gamma_beta_ratio"), means=True, reference=False),
}
# what compares a batch's sorted differences, and what is a mean over tokens of answers and not over pairs
SORTED = ("aot", "aot_unpaired")
NLL = ("sft", "sft_with_prompt", "gold")
DIVERGENCES = ("reverse_kl", "forward_kl", "jensen_shannon", "alpha_divergence")
KNOWN = (*LOSSES, *SORTED, *NLL)


@struct.dataclass
class Shift:
  """BCO's running mean of rewards over all pairs seen, with how many values it is of."""

  mean: Array
  count: Array


@struct.dataclass
class Synchronised:
  """TR-DPO's reference: a copy of the policy that follows it."""

  params: Any
  count: Array  # optimizer updates so far

  def after(self, trainable: Any, every: int, mix: float) -> Synchronised:
    """One update later: every `every` of them mix * policy + (1 - mix) * reference.

    Gorbatovski et al. 2024 (TR-DPO, arXiv 2404.09656), eq. 6; mix 1 is the hard update.
    """
    due = (self.count > 0) & (self.count % every == 0)
    move = lambda new, old: jnp.where(due, (mix * new + (1 - mix) * old).astype(old.dtype), old)
    return Synchronised(jax.tree.map(move, stop(trainable), self.params), self.count + 1)


# nats a token by which a policy may differ from its own start: two programs round differently, the more so in bfloat16
ROUNDING = {"float32": 2e-3, "bfloat16": 0.05}


@dataclasses.dataclass(frozen=True)
class Compared(Scorer):
  """What objectives with a reference share: beta, and whether the reference follows the policy (full fine-tuning)."""

  beta: float = 0.1  # weight of the KL to the reference
  own_base: bool = False  # the reference is the base that the policy is bound to
  starts_there: bool = False  # and the first step is taken where the two are equal
  sync_every: int = (
    0  # updates from one step of the reference towards the policy to the next; 0: it stays
  )
  sync_mix: float = 0.6

  def start(self, trainable: Any) -> dict[str, Any] | None:
    if not self.sync_every or trainable is None:
      return None
    copy = jax.tree.map(jnp.copy, trainable)
    return {"reference": Synchronised(copy, jnp.zeros((), jnp.int32))}

  def remembered(self, trainable: Any, frozen: Frozen, key: Array | None) -> Frozen:
    """frozen with the reference that this step compares with, and with what is to be remembered of it."""
    memory = frozen.memory or {}
    if "reference" not in memory:
      return frozen
    now = memory["reference"]
    if key is not None:
      now = now.after(trainable, self.sync_every, self.sync_mix)
    return dataclasses.replace(frozen, reference=now.params, memory={**memory, "reference": now})

  def at_hand(self, frozen: Frozen) -> bool:
    """Whether the reference's parameters are there, be its log-probabilities cached or not."""
    return frozen.reference is not None or (self.own_base and frozen.params is not None)

  def check_start(self, metrics: Mapping[str, float]) -> None:
    """The policy is its reference: every log-ratio is 0, DPO's loss is log 2, and there is no KL."""
    if not (self.starts_there and self.needs_reference and self.beta):
      return
    sides = [side for side in ("chosen", "rejected") if f"rewards/{side}" in metrics]
    each = [abs(metrics[f"rewards/{s}"]) / self.beta / metrics[f"lengths/{s}"] for s in sides]
    drift = max(each, default=0.0)
    allowed = ROUNDING.get(jnp.dtype(self.dtype or jnp.float32).name, ROUNDING["bfloat16"])
    if not drift <= allowed:
      raise ValueError(
        f"before any training the policy's log-probabilities differ from the reference's by {drift:.3g} nats a token,"
        f" where rounding explains {allowed:g}: they are not of the same model. Were cached ones made by other"
        " parameters? Delete the folder `reference` in the cache, or write --config.objective.cache_reference=false"
      )


@dataclasses.dataclass(frozen=True)
class Preference(Compared):
  """A weighted sum of losses of `losses.preference`, each the mean over the pairs of the whole optimizer batch.

  `sft` is the negative log-likelihood of chosen answers, the mean over their tokens; `sft_with_prompt` that of whole
  chosen sequences (ORPO's in TRL); `gold` that of third answers (TPO).  Metrics carry TRL's names.
  """

  losses: tuple[tuple[str, float], ...] = (("dpo", 1.0),)
  label_smoothing: float = 0.0
  gamma_beta_ratio: float = 0.0
  divergence: str = "reverse_kl"
  divergence_alpha: float = 0.5
  ld_alpha: float = 1.0  # weight of tokens past the length that both answers reach
  weighting: bool = False  # WPO: pairs count by how likely the policy is to write them
  running_shift: bool = False  # BCO's
  answers: int = 2  # in an example: chosen, rejected, and a gold one

  def __post_init__(self):
    unknown = [name for name, _ in self.losses if name not in KNOWN]
    if unknown:
      raise ValueError(f"objective.losses has {unknown[0]!r}: known are {', '.join(KNOWN)}")
    if not self.losses or not any(weight for _, weight in self.losses):
      raise ValueError("objective.losses is empty, or all its weights are 0")
    if self.divergence not in DIVERGENCES:
      raise ValueError(
        f"objective.divergence={self.divergence!r}: known are {', '.join(DIVERGENCES)}"
      )
    names = [name for name, _ in self.losses]
    if self.divergence != "reverse_kl":
      refused = [n for n in names if n not in NLL and not (n in LOSSES and LOSSES[n].differences)]
      if refused:
        raise ValueError(
          f"objective.divergence={self.divergence}: {refused[0]} reads more than the difference of log-ratios;"
          " write reverse_kl"
        )
    if self.running_shift and "bco" not in names:
      raise ValueError("objective.running_shift is BCO's: add bco to objective.losses")
    if "gold" in names and self.answers < 3:
      raise ValueError("the loss 'gold' reads a third answer: rows need a 'reference' column")

  @property
  def needs_reference(self) -> bool:
    return any(
      name in SORTED or (name in LOSSES and LOSSES[name].reference) for name, _ in self.losses
    )

  def start(self, trainable: Any) -> dict[str, Any] | None:
    parts = super().start(trainable) or {}
    if self.running_shift:
      parts["shift"] = Shift(jnp.zeros(()), jnp.zeros(()))
    return parts or None

  def totals(self, trainable, frozen, batch, key):
    at, frozen = tokens(batch), self.remembered(trainable, frozen, key)
    totals: dict[str, Any] = {"pairs": jnp.sum(batch["present"][:, :: self.answers])}
    for name, _ in self.losses:
      if name in NLL:
        totals[name] = jnp.sum(self._nll_mask(name, batch, at))
    whole = self.running_shift or any(name in SORTED for name, _ in self.losses)
    if whole:
      pairs = self._pairs(trainable, frozen, batch, key, at)
      totals |= stop(self._of_the_whole(pairs, frozen, key))
    if key is not None and frozen.memory is not None:
      totals["memory"] = frozen.memory | totals.get("memory", {})
    return totals

  def _of_the_whole(self, pairs: _Pairs, frozen, key):
    """What sorting and the running shift take from all pairs of the optimizer batch."""
    found: dict[str, Any] = {}
    where = lambda x: jnp.sort(jnp.where(pairs.present, x, jnp.inf).ravel())
    r_chosen, r_rejected = pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected
    names = [name for name, _ in self.losses]
    if "aot" in names:
      found["aot"] = (
        where(pairs.chosen - pairs.rejected),
        where(pairs.ref_chosen - pairs.ref_rejected),
      )
    if "aot_unpaired" in names:
      found["aot_unpaired"] = (where(r_chosen), where(r_rejected))
    if self.running_shift and key is not None:
      memory = frozen.memory["shift"]
      rewards = self.beta * jnp.where(pairs.present, r_chosen + r_rejected, 0.0)
      count = memory.count + 2 * jnp.sum(pairs.present)
      new = (memory.mean * memory.count + jnp.sum(rewards)) / jnp.maximum(count, 1)
      found["memory"] = {"shift": Shift(new, count)}
    return found

  def loss(self, trainable, frozen, batch, totals, key):
    at, frozen = tokens(batch), _with_memory(frozen, totals)
    pairs = self._pairs(trainable, frozen, batch, key, at)
    weight = pairs.present * pairs.weight / jnp.maximum(totals["pairs"], 1)
    metrics: dict[str, Any] = {}
    total = 0.0
    for name, scale in self.losses:
      if name in NLL:
        mask = self._nll_mask(name, batch, at)
        value = -jnp.sum(jnp.where(mask, pairs.logps, 0.0)) / jnp.maximum(totals[name], 1)
        shown = "nll_loss" if name != "gold" else "nll_loss/gold"
        metrics[shown] = metrics_lib.mean(stop(-pairs.logps), mask)
      else:
        value = jnp.sum(
          weight * jnp.where(pairs.present, self._each(name, pairs, frozen, totals), 0.0)
        )
      total = total + scale * value
    # a mean over pairs whose contributions are already divided: the sum is the loss
    metrics["loss"] = Mean(
      stop(total) * totals["pairs"], jnp.sum(pairs.present).astype(jnp.float32)
    )
    return total, metrics | self._metrics(pairs, batch, at, key)

  def compare(self, trainable: Any, frozen: Frozen, batch: Batch) -> dict[str, Array]:
    """Of each pair, [rows, pairs]: implicit rewards, log-ratios to the reference (drifts), lengths, presence."""
    pairs = self._pairs(trainable, frozen, batch, None, tokens(batch))
    found = {
      "present": pairs.present,
      "chosen_length": pairs.lengths[0],
      "rejected_length": pairs.lengths[1],
    }
    found["chosen"], found["rejected"] = self._rewards(pairs)
    if self.needs_reference:
      found["chosen_drift"] = pairs.chosen - pairs.ref_chosen
      found["rejected_drift"] = pairs.rejected - pairs.ref_rejected
    return found

  def _rewards(self, pairs: _Pairs) -> tuple[Array, Array]:
    """beta r, or beta log pi where there is no reference, per token where the loss has means."""
    if self.needs_reference:
      return (
        self.beta * (pairs.chosen - pairs.ref_chosen),
        self.beta * (pairs.rejected - pairs.ref_rejected),
      )
    means = any(name in LOSSES and LOSSES[name].means for name, _ in self.losses)
    by = pairs.lengths if means else (1.0, 1.0)
    return self.beta * pairs.chosen / by[0], self.beta * pairs.rejected / by[1]

  def _each(self, name: str, pairs: _Pairs, frozen: Frozen, totals) -> Array:
    """The loss of each pair, [rows, pairs]."""
    if name in SORTED:
      return self._sorted(name, pairs, totals[name])
    loss = LOSSES[name]
    chosen, rejected = pairs.chosen, pairs.rejected
    if not loss.reference:
      ratios = (chosen, rejected)
    else:
      ratios = (self._score(chosen - pairs.ref_chosen), self._score(rejected - pairs.ref_rejected))
    if loss.means:
      ratios = (ratios[0] / pairs.lengths[0], ratios[1] / pairs.lengths[1])
    options = {option: getattr(self, option) for option in loss.options}
    if name == "bco" and self.running_shift:
      options["shift"] = frozen.memory["shift"].mean
    given = (*ratios, 0.0, 0.0) if loss.reference else ratios
    return loss.function(*given, **options)[0]

  def _score(self, ratio: Array) -> Array:
    if self.divergence == "alpha_divergence":
      return preference.alpha_divergence(ratio, alpha=self.divergence_alpha)
    return getattr(preference, self.divergence)(ratio)

  def _sorted(self, name: str, pairs: _Pairs, whole) -> Array:
    """AOT: each pair against the one of its rank among all of the optimizer batch, found by its value."""
    dpo = lambda d: preference.dpo(
      d, 0.0, 0.0, 0.0, beta=self.beta, label_smoothing=self.label_smoothing
    )[0]
    if name == "aot":
      own, other = whole
      d = pairs.chosen - pairs.rejected
      return dpo(d - other[_rank(stop(d), own)])
    chosen, rejected = pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected
    first = dpo(chosen - whole[1][_rank(stop(chosen), whole[0])])
    second = dpo(whole[0][_rank(stop(rejected), whole[1])] - rejected)
    return first + second - stop(second)  # the value once, the gradient of both

  def _pairs(self, trainable, frozen, batch, key, at: Tokens) -> _Pairs:
    params = bound(trainable, frozen, key)
    mask = at.mask
    if any(name == "sft_with_prompt" for name, _ in self.losses):
      mask = mask | self._nll_mask("sft_with_prompt", batch, at)
    hidden = self.hidden(params, batch, key)
    found = self.scores(
      params, batch, mask, key, hidden=hidden, entropy=key is None, collision=self.weighting
    )
    lengths = jnp.maximum(at.per_answer(jnp.ones_like(found.logp)), 1)
    own = self._sums(found.logp, at, lengths)
    ref, divergence = jnp.zeros_like(own), None
    if self.needs_reference:
      logps, divergence = self._reference(trainable, frozen, batch, at.mask, key, params, hidden)
      ref = self._sums(logps, at, lengths)
    side = lambda x, i: x[:, i :: self.answers]
    weight = (
      side(batch["weight"], 0) if "weight" in batch else jnp.ones_like(own[:, :: self.answers])
    )
    if self.weighting:
      aligned = at.per_answer(found.logp - found.log_collision) / lengths
      weight = weight * stop(jnp.exp(side(aligned, 0) + side(aligned, 1)))
    return _Pairs(
      chosen=side(own, 0),
      rejected=side(own, 1),
      ref_chosen=side(ref, 0),
      ref_rejected=side(ref, 1),
      present=side(batch["present"], 0),
      weight=weight,
      lengths=(side(lengths, 0), side(lengths, 1)),
      logps=found.logp,
      entropy=found.entropy,
      correct=found.correct,
      kl=divergence,
      logits=None if key is not None else self._mean_logits(params, hidden, at, lengths),
    )

  def _reference(self, trainable, frozen, batch, mask, key, params, hidden):
    """(log-probabilities, KL of the policy's next-token distributions to the reference's or None), [rows, time].

    The KL is for evaluation, where the reference is at hand: its logits are needed, and a cache holds none.
    """
    cached = "reference" in batch
    if key is not None or not self.at_hand(frozen):
      return reference_logps(self, trainable, frozen, batch, mask), None
    other = reference(trainable, frozen)
    theirs = self.hidden(other, batch, None)
    if cached:
      logps = reference_logps(self, trainable, frozen, batch, mask)
    else:
      logps = self.scores(other, batch, mask, None, hidden=theirs).logp
    divergence = logprob.kl_divergence(
      hidden,
      decoder.head(params),
      theirs,
      decoder.head(other),
      mask=mask,
      softcap=self.model.final_softcap,
    )
    return logps, divergence

  def _mean_logits(self, params, hidden, at: Tokens, lengths: Array) -> Array | None:
    """[rows, slots]: over the vocabulary and an answer's scored tokens, which a linear head gives of their mean."""
    if self.model.final_softcap is not None:
      return None
    where = jax.nn.one_hot(at.answer, at.present.shape[1], dtype=hidden.dtype)
    where = where * at.mask[..., None] / lengths[:, None, :]
    means = jnp.einsum("rts,rte->rse", where, hidden)
    return jnp.mean(linear32(means, decoder.head(params)), axis=-1)

  def _sums(self, logps: Array, at: Tokens, lengths: Array) -> Array:
    total = at.per_answer(logps)
    if self.ld_alpha == 1:
      return total
    shorter = jnp.minimum(lengths[:, 0 :: self.answers], lengths[:, 1 :: self.answers])
    limit = at.per_token(jnp.repeat(shorter, self.answers, axis=1))
    before = jnp.cumsum(lengths * at.present, axis=1) - lengths * at.present
    place = jnp.cumsum(at.mask, axis=1) - at.per_token(before)
    head = at.per_answer(jnp.where(place <= limit, logps, 0.0))
    return preference.length_desensitised(total, head, alpha=self.ld_alpha)

  def _nll_mask(self, name: str, batch: Batch, at: Tokens) -> Array:
    slots = batch["present"].shape[1]
    side = at.answer % self.answers
    is_answer = at.answer < slots
    if name == "gold":
      return at.mask & is_answer & (side == 2)
    if name == "sft":
      return at.mask & is_answer & (side == 0)
    following = lambda x: jnp.roll(x, -1, axis=1)
    inside = (following(batch["segment_ids"]) > 0) & (following(batch["positions"]) > 0)
    return (inside & ((is_answer & (side == 0)) | ~is_answer)).at[:, -1].set(False)

  def _metrics(self, pairs: _Pairs, batch: Batch, at: Tokens, key) -> dict[str, Any]:
    pairs = stop(pairs)
    here = pairs.present
    chosen, rejected = self._rewards(pairs)
    mean = lambda x, where=here: metrics_lib.mean(x, where)
    correct = (chosen > rejected).astype(jnp.float32)
    longer = pairs.lengths[0] > pairs.lengths[1]
    shorter = pairs.lengths[0] < pairs.lengths[1]
    metrics = {
      "rewards/chosen": mean(chosen),
      "rewards/rejected": mean(rejected),
      "rewards/margins": mean(chosen - rejected),
      "rewards/margins_histogram": metrics_lib.histogram(chosen - rejected, here),
      "rewards/accuracies": mean(correct),
      "rewards/accuracies/chosen_longer": mean(correct, here & longer),
      "rewards/accuracies/chosen_shorter": mean(correct, here & shorter),
      "logps/chosen": mean(pairs.chosen),
      "logps/rejected": mean(pairs.rejected),
      "lengths/chosen": mean(pairs.lengths[0]),
      "lengths/rejected": mean(pairs.lengths[1]),
      "mean_token_accuracy": metrics_lib.mean(pairs.correct, self._nll_mask("sft", batch, at)),
      "tokens": jnp.sum(batch["segment_ids"] > 0),
    }
    if self.needs_reference:
      metrics["logps/chosen_drift"] = mean(pairs.chosen - pairs.ref_chosen)
      metrics["logps/rejected_drift"] = mean(pairs.rejected - pairs.ref_rejected)
    if pairs.kl is not None:
      metrics["kl"] = metrics_lib.mean(pairs.kl, at.mask)
    if pairs.logits is not None:
      metrics["logits/chosen"] = mean(pairs.logits[:, 0 :: self.answers])
      metrics["logits/rejected"] = mean(pairs.logits[:, 1 :: self.answers])
    if any(name == "orpo" for name, _ in self.losses):
      odds = preference.log_odds_ratio(
        pairs.chosen / pairs.lengths[0], pairs.rejected / pairs.lengths[1]
      )
      metrics["log_odds_chosen"] = mean(odds)
      metrics["log_odds_ratio"] = mean(jax.nn.log_sigmoid(odds))
    if key is None:
      metrics["entropy"] = metrics_lib.mean(pairs.entropy, at.mask)
    return metrics


@struct.dataclass
class _Pairs:
  """[rows, pairs] each; from `logps` on [rows, time], and `logits` [rows, slots]."""

  chosen: Array  # log-probabilities of answers
  rejected: Array
  ref_chosen: Array
  ref_rejected: Array
  present: Array
  weight: Array
  lengths: tuple[Array, Array]
  logps: Array
  entropy: Array
  correct: Array
  kl: Array | None  # to the reference, over the vocabulary
  logits: Array | None  # their mean


def _with_memory(frozen: Frozen, totals: Mapping[str, Any]) -> Frozen:
  """frozen with what `totals` has remembered for this step, a reference that follows the policy with it."""
  memory = totals.get("memory", frozen.memory)
  if memory is None:
    return frozen
  given = memory["reference"].params if "reference" in memory else frozen.reference
  return dataclasses.replace(frozen, memory=memory, reference=given)


def _rank(values: Array, ordered: Array) -> Array:
  """The place in `ordered` of each value, which is there but for a rounding."""
  between = (ordered[1:] + ordered[:-1]) / 2
  return jnp.minimum(jnp.searchsorted(between, values), len(ordered) - 1)


# --- labels ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Labelled(Compared):
  """KTO: labelled answers, and the KL estimated from each prompt with another prompt's answer.

  The estimate is that of the whole optimizer batch.  Which answer stands behind which prompt is fixed with the
  data (that of the example before), so neither order nor division changes it.  estimate_kl=False is APO-zero on labels.
  """

  desirable_weight: float = 1.0
  undesirable_weight: float = 1.0
  estimate_kl: bool = True

  @property
  def needs_reference(self) -> bool:
    return True

  def totals(self, trainable, frozen, batch, key):
    totals = {"answers": jnp.sum(batch["present"])}
    frozen = self.remembered(trainable, frozen, key)
    if key is not None and frozen.memory is not None:
      totals["memory"] = frozen.memory
    if self.estimate_kl:
      own, ref, at = self._sums(trainable, frozen, batch["companion"], None)
      totals["kl"] = preference.mismatched_kl(own, ref, at.present)
    return totals

  def _sums(self, trainable, frozen, batch, key):
    at = tokens(batch)
    found = self.scores(bound(trainable, frozen, key), batch, at.mask, key)
    ref = reference_logps(self, trainable, frozen, batch, at.mask)
    return at.per_answer(found.logp), at.per_answer(ref), at

  def loss(self, trainable, frozen, batch, totals, key):
    own, ref, at = self._sums(trainable, _with_memory(frozen, totals), batch, key)
    desirable = batch["label"] > 0.5
    each, stats = preference.kto(
      own,
      ref,
      desirable,
      totals.get("kl", 0.0),
      beta=self.beta,
      desirable_weight=self.desirable_weight,
      undesirable_weight=self.undesirable_weight,
    )
    here = batch["present"]
    loss = jnp.sum(jnp.where(here, each, 0.0)) / jnp.maximum(totals["answers"], 1)
    mean = lambda x, where=here: metrics_lib.mean(stop(x), where)
    chosen, rejected = here & desirable, here & ~desirable
    lengths = at.per_answer(jnp.ones_like(at.mask, jnp.float32))
    metrics = {
      "loss": mean(each),
      "rewards/chosen": mean(stats.reward, chosen),
      "rewards/rejected": mean(stats.reward, rejected),
      "logps/chosen": mean(own, chosen),
      "logps/rejected": mean(own, rejected),
      "lengths/chosen": mean(lengths, chosen),
      "lengths/rejected": mean(lengths, rejected),
      "tokens": jnp.sum(batch["segment_ids"] > 0),
    }
    if self.estimate_kl:
      metrics["kl"] = Mean(totals["kl"] * jnp.sum(here), jnp.sum(here).astype(jnp.float32))
    return loss, metrics


# --- reward models ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reward(Scorer):
  """A scalar a token, read where an answer ends (pairs: Bradley-Terry; outcomes) or where a step does (process).

  Each loss is the mean over the pairs, answers or steps of the whole optimizer batch.
  """

  kind: str = "pairs"  # pairs, outcomes, steps
  centering: float = 0.0  # weight of (r_w + r_l)^2

  def __post_init__(self):
    if self.kind not in ("pairs", "outcomes", "steps"):
      raise ValueError(
        f"data.kind={self.kind!r}: a reward model learns from pairs, outcomes or steps"
      )

  def rewards(self, params: Any, batch: Batch, key: Array | None = None) -> Array:
    """[rows, slots]: of each answer, read at its last token."""
    each = self.of_tokens(params, batch, key)
    own = jnp.where(batch["loss_mask"], batch["answer"], -1)
    last = (own >= 0) & (jnp.roll(own, -1, axis=1).at[:, -1].set(-1) != own)
    at = Tokens(last, batch["answer"], batch["present"])
    return at.per_answer(each)

  def of_tokens(self, params: Any, batch: Batch, key: Array | None = None) -> Array:
    """[rows, time]: of the text up to each token; where a step ends, the step's."""
    return decoder.scores(params, self.hidden(params, batch, key))[..., 0]

  def totals(self, trainable, frozen, batch, key):
    if self.kind == "steps":
      return {"count": jnp.sum(~jnp.isnan(batch["steps"]))}
    return {"count": jnp.sum(batch["present"]) / (2 if self.kind == "pairs" else 1)}

  def loss(self, trainable, frozen, batch, totals, key):
    params = bound(trainable, frozen, key)
    if self.kind == "pairs":
      each, here, metrics = self._paired(self.rewards(params, batch, key), batch)
    elif self.kind == "outcomes":
      found, here = self.rewards(params, batch, key), batch["present"]
      each, metrics = self._judged(found, batch["label"], here)
    else:
      here = ~jnp.isnan(batch["steps"])
      labels = jnp.where(here, batch["steps"], 0.0)
      each, metrics = self._judged(self.of_tokens(params, batch, key), labels, here)
    loss = jnp.sum(jnp.where(here, each, 0.0)) / jnp.maximum(totals["count"], 1)
    metrics["loss"] = metrics_lib.mean(stop(each), here)
    metrics["tokens"] = jnp.sum(batch["segment_ids"] > 0)
    return loss, metrics

  def _paired(self, found, batch):
    chosen, rejected = found[:, ::2], found[:, 1::2]
    margin = batch["margin"][:, ::2] if "margin" in batch else 0.0
    each, stats = reward.bradley_terry(chosen, rejected, margin=margin, centering=self.centering)
    here = batch["present"][:, ::2]
    mean = lambda x: metrics_lib.mean(stop(x), here)
    metrics = {
      "accuracy": mean(stats.correct),
      "margin": mean(stats.margin),
      "mean_reward": mean((chosen + rejected) / 2),
      "rewards/chosen": mean(chosen),
      "rewards/rejected": mean(rejected),
    }
    return each, here, metrics

  def _judged(self, found, labels, here):
    each, right = reward.binary_cross_entropy(found, labels)
    return each, {
      "accuracy": metrics_lib.mean(stop(right), here),
      "mean_reward": metrics_lib.mean(stop(found), here),
    }


# --- scored groups ---------------------------------------------------------------------------------------------------

POLICY_LOSSES = ("reinforce", "ppo", "gspo", "rloo", "cispo")
AGGREGATIONS = ("token_mean", "sequence_mean", "constant_length", "sequence_sum")


@dataclasses.dataclass(frozen=True)
class Grouped(Scorer):
  """A policy-gradient loss on answers whose advantages are known (`losses.policy`, `losses.advantage`).

  Who wrote the answers is the reference (`old`="reference"), or the policy itself, so that every ratio is 1.
  """

  loss_name: str = "ppo"
  aggregation: str = "token_mean"
  epsilon: float = 0.2
  epsilon_high: float = 0.2
  dual_clip: float | None = None
  ceiling: float = 5.0  # CISPO's bound on the ratio
  kl_weight: float = 0.0  # of k3 to the reference
  max_length: int = 512  # of constant_length
  old: str = "policy"

  def __post_init__(self):
    for field, value, known in (
      ("loss", self.loss_name, POLICY_LOSSES),
      ("aggregation", self.aggregation, AGGREGATIONS),
      ("old", self.old, ("policy", "reference")),
    ):
      if value not in known:
        raise ValueError(f"objective.{field}={value!r}: known are {', '.join(known)}")

  @property
  def needs_reference(self) -> bool:
    return self.kl_weight > 0 or self.old == "reference"

  def totals(self, trainable, frozen, batch, key):
    at = tokens(batch)
    return {"tokens": jnp.sum(at.mask), "answers": jnp.sum(batch["present"])}

  def loss(self, trainable, frozen, batch, totals, key):
    at = tokens(batch)
    found = self.scores(bound(trainable, frozen, key), batch, at.mask, key, entropy=key is None)
    logps, mask = found.logp, at.mask
    ref = stop(logps)
    if self.needs_reference:
      ref = reference_logps(self, trainable, frozen, batch, mask)
    old = ref if self.old == "reference" else stop(logps)
    advantages = at.per_token(batch["advantage"])
    each, stats = self._surrogate(logps, old, advantages, at)
    metrics: dict[str, Any] = {}
    if self.kl_weight:
      divergence = kl.k3(logps, ref)
      each = each + self.kl_weight * divergence
      metrics["kl"] = metrics_lib.mean(stop(divergence), mask)
    weights = self._weights(at, totals)
    loss = jnp.sum(jnp.where(mask, each * weights, 0.0))
    here = batch["present"]
    count = jnp.sum(here).astype(jnp.float32)
    lengths = at.per_answer(jnp.ones_like(logps))
    metrics |= {
      "loss": Mean(stop(loss) * totals["answers"], count),
      "reward": metrics_lib.mean(jnp.nan_to_num(batch["score"]), here & ~jnp.isnan(batch["score"])),
      "advantage": metrics_lib.mean(batch["advantage"], here),
      "reward_std": metrics_lib.mean(batch["deviation"], here),
      "frac_reward_zero_std": metrics_lib.mean(batch["deviation"] == 0, here),
      "completions/mean_length": metrics_lib.mean(lengths, here),
      "clip_ratio/low_mean": metrics_lib.mean(stats.clipped_low, mask),
      "clip_ratio/high_mean": metrics_lib.mean(stats.clipped_high, mask),
      "tokens": jnp.sum(batch["segment_ids"] > 0),
    }
    if key is None:
      metrics["entropy"] = metrics_lib.mean(found.entropy, mask)
    return loss, metrics

  def _surrogate(self, logps, old, advantages, at: Tokens):
    clip = dict(epsilon=self.epsilon, epsilon_high=self.epsilon_high)
    match self.loss_name:
      case "reinforce":
        none = jnp.zeros_like(at.mask)
        return policy.reinforce(logps, advantages), policy.PolicyStats(
          jnp.ones_like(logps), none, none
        )
      case "ppo":
        return policy.clipped_surrogate(logps, old, advantages, dual_clip=self.dual_clip, **clip)
      case "cispo":
        return policy.cispo(logps, old, advantages, ceiling=self.ceiling)
    # one ratio an answer, the same for each of its tokens
    total = at.per_answer(logps - old)
    if self.loss_name == "gspo":
      total = total / jnp.maximum(at.per_answer(jnp.ones_like(logps)), 1)
    ratio = at.per_token(total)
    return policy.clipped_surrogate(ratio, jnp.zeros_like(ratio), advantages, **clip)

  def _weights(self, at: Tokens, totals) -> Array:
    """Per token, [rows, time]: `losses.policy`'s aggregations, for several answers a row."""
    answers = jnp.maximum(totals["answers"], 1)
    lengths = at.per_token(jnp.maximum(at.per_answer(jnp.ones(at.mask.shape)), 1))
    if self.loss_name == "rloo":  # one loss an answer, not one a token
      return 1 / jnp.maximum(lengths, 1) / answers
    return {
      "token_mean": lambda: 1 / jnp.maximum(totals["tokens"], 1),
      "sequence_mean": lambda: 1 / jnp.maximum(lengths, 1) / answers,
      "constant_length": lambda: 1 / self.max_length / answers,
      "sequence_sum": lambda: 1 / answers,
    }[self.aggregation]()
