"""Every method of every config is its formula: built as a run builds it, several answers a row, value and gradient.

The formulas stand here on log-probabilities of one sequence a row in float64 (`bigram`); those of pairs and of labels
are functions of `losses`, which have tests of their own.
"""

import dataclasses
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import settings
from posttrain_jax.build import data as data_build
from posttrain_jax.build import decisions, objective
from posttrain_jax.build.model import Model
from posttrain_jax.core.metrics import read
from posttrain_jax.data import answers, companions
from posttrain_jax.data.packing import pack
from posttrain_jax.losses import preference, reward
from posttrain_jax.objectives import Context, Scorer
from posttrain_jax.objectives.preference import DIVERGENCES, KNOWN
from posttrain_jax.train import step
from tests import tiny
from tests.marks import slow
from tests.objectives import batches, bigram

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
ROWS = [[0], [1], [2, 3], [4, 5, 6], []]  # some alone, some several, none
stop = jax.lax.stop_gradient
# what a formula takes of an objective without the field
NEUTRAL = dict(
  divergence="reverse_kl",
  ld_alpha=1.0,
  weighting=False,
  centering=0.0,
  aggregation="sequence_mean",
  old="policy",
  dual_clip=None,
)


def load(config, fields):
  overrides = [settings.override(name, value) for name, value in fields.items()]
  return settings.load(f"{CONFIGS}/{config}", overrides)


def built(config) -> Scorer:
  model = Model(pathlib.Path(), None, tiny.config(), None, None, jnp.float32)
  return objective.make(config, model, tiny.CHANNELS)


# --- the rows of each kind, and what is known of each answer ---------------------------------------------------------


def examples_of(config):
  """Seven examples of config.data.kind."""
  match config.data.kind:
    case "text":
      return tiny.examples(7)
    case "pairs":
      once = lambda low, high: lambda rng, n: [rng.uniform(low, high)] * n
      values = dict(weight=once(0.5, 2), margin=once(0, 1))
      if {"aot", "aot_unpaired"} & {*losses(config)}:
        del values["weight"]  # which pair's it would be, once sorted, is no formula's to say
      made = batches.pairs(**values)
      if decisions.has_companions(config):
        made = companions.beside(made, batches.LENGTH)
      return made
    case "triples":
      return batches.groups(7, (3,))
    case "labels" | "outcomes":
      made = batches.labels(7)
      if not decisions.has_companions(config):
        made = [dataclasses.replace(one, companion=None) for one in made]
      return made
    case "steps":
      return [with_steps(one, i) for i, one in enumerate(batches.groups(7, (1,)))]
  made = batches.groups(7, (3, 2, 4), score=lambda rng, n: rng.normal(size=n))
  return data_build.with_advantages(config, made)


def losses(config):
  return config.objective.losses if config.objective.name == "preference" else ()


def with_steps(example, i):
  """Every second of its tokens ends a step, and those of every third example are all right."""
  at = np.flatnonzero(example.mask)[::2]
  steps = np.full(len(example.tokens), np.nan, np.float32)
  steps[at] = [float(i % 3 == 0 or (i + j) % 2) for j in range(len(at))]
  return dataclasses.replace(example, steps=steps)


class Known:
  """What the formulas read, in float64: everything of each sequence alone."""

  def __init__(self, config, examples, params, ref_params):
    self.o = types.SimpleNamespace(**NEUTRAL | dict(config.objective.items()))
    self.config, self.params = config, params
    is_text = config.data.kind == "text"
    self.alone = bigram.of_examples(examples) if is_text else bigram.of_answers(examples)
    self.logps, self.ref_logps = self.alone.logps(params), self.alone.logps(ref_params)
    self.mask, self.lengths = self.alone.mask, self.alone.lengths
    if is_text:
      return
    self.prompts = np.repeat(np.arange(len(examples)), [e.count for e in examples])
    each = lambda name: np.concatenate([np.float32(e.values[name]) for e in examples])
    self.values = {name: each(name).astype(float) for name in examples[0].values}
    if examples[0].companion is not None:
      others = bigram.of_answers([e.companion for e in examples])
      ratios = others.logps(params) - others.logps(ref_params)
      self.kl = stop(jnp.maximum(ratios.sum(1).mean(), 0))
    if examples[0].steps is not None:  # one answer to a prompt, none shared
      pad = lambda x: np.pad(x, (0, self.mask.shape[1] - len(x)), constant_values=np.nan)
      self.steps = np.stack([pad(e.steps) for e in examples])

  @property
  def rewards(self):
    """[answers]: a reward model's, at the last token."""
    last = self.alone.inside.sum(1) - 1
    return jnp.take_along_axis(self.alone.rewards(self.params), last[:, None], 1)[:, 0]

  @property
  def log_ratios(self):
    return (self.logps - self.ref_logps).sum(1)


# --- pairs -----------------------------------------------------------------------------------------------------------


class Pairs:
  """The two sides of each pair: log-ratios r, log-probabilities p, their means per token mr and mp."""

  def __init__(self, known):
    o = self.o = known.o
    self.count = 3 if known.config.data.kind == "triples" else 2
    own, ref = (self.sums(known, logps) for logps in (known.logps, known.ref_logps))
    self.p, self.ref = self.sides(own), self.sides(ref)
    self.r = tuple(divergence(o, x) for x in self.sides(own - ref))
    lengths = self.sides(known.lengths)
    self.mr = tuple(x / n for x, n in zip(self.r, lengths))
    self.mp = tuple(x / n for x, n in zip(self.p, lengths))

  def sides(self, x):
    return x[0 :: self.count], x[1 :: self.count]

  def sums(self, known, logps):
    """LD-DPO: tokens past the length of the shorter answer count ld_alpha."""
    shorter = np.repeat(np.minimum(*self.sides(known.lengths)), self.count)
    place = np.cumsum(known.mask, 1)
    return (logps * np.where(place <= shorter[:, None], 1.0, self.o.ld_alpha)).sum(1)


def divergence(o, r):
  match o.divergence:
    case "forward_kl":
      return 1 - jnp.exp(-r)
    case "jensen_shannon":
      return jnp.log(2) + jax.nn.log_sigmoid(r)
    case "alpha_divergence":
      return (jnp.exp((o.divergence_alpha - 1) * r) - 1) / (o.divergence_alpha - 1)
  return r


def smoothed(o):
  return dict(beta=o.beta, label_smoothing=o.label_smoothing)


def with_gamma(o):
  return dict(beta=o.beta, gamma_beta_ratio=o.gamma_beta_ratio)


def shifted(x):
  """BCO, whose shift is the mean of all rewards so far: of this batch, at the first step."""
  shift = stop(x.o.beta * (x.r[0] + x.r[1]).mean() / 2) if x.o.running_shift else 0.0
  return preference.bco(*x.r, beta=x.o.beta, shift=shift)[0]


def ranked(o, ours, theirs):
  """AOT: DPO of the differences of equal rank, on average."""
  d = jnp.sort(ours) - jnp.sort(theirs)
  return preference.dpo(d, 0.0, **smoothed(o))[0]


PAIRWISE = {
  "dpo": lambda x: preference.dpo(*x.r, **smoothed(x.o))[0],
  "dpo_norm": lambda x: preference.dpo(*x.mr, **smoothed(x.o))[0],
  "robust": lambda x: preference.robust(*x.r, **smoothed(x.o))[0],
  "ipo": lambda x: preference.ipo(*x.mr, beta=x.o.beta)[0],
  "hinge": lambda x: preference.hinge(*x.r, beta=x.o.beta)[0],
  "exo": lambda x: preference.exo(*x.r, **smoothed(x.o))[0],
  "discopop": lambda x: preference.discopop(*x.r, beta=x.o.beta)[0],
  "nca": lambda x: preference.nca(*x.r, beta=x.o.beta)[0],
  "bco": shifted,
  "apo_zero": lambda x: preference.apo_zero(*x.r, beta=x.o.beta)[0],
  "apo_down": lambda x: preference.apo_down(*x.r, beta=x.o.beta)[0],
  "sppo": lambda x: preference.sppo(*x.r, beta=x.o.beta)[0],
  "cpo": lambda x: preference.cpo(*x.p, **smoothed(x.o))[0],
  "simpo": lambda x: preference.simpo(*x.mp, **with_gamma(x.o))[0],
  "orpo": lambda x: preference.orpo(*x.mp, beta=x.o.beta)[0],
  "tpo": lambda x: preference.tpo(*x.p, **with_gamma(x.o))[0],
  "tpo_norm": lambda x: preference.tpo(*x.mp, **with_gamma(x.o))[0],
  "aot": lambda x: ranked(x.o, x.p[0] - x.p[1], x.ref[0] - x.ref[1]),
  "aot_unpaired": lambda x: ranked(x.o, *x.r),
}


def likelihood(known, sequences, where=None):
  """-log p, the mean over the tokens of these sequences."""
  where = known.mask if where is None else where
  where = where & sequences[:, None]
  return -known.alone.logps(known.params, where).sum() / where.sum()


def preference_loss(known):
  o, pairs = known.o, Pairs(known)
  side = np.arange(len(known.mask)) % pairs.count
  whole = known.alone.inside & (np.arange(known.mask.shape[1]) > 0)
  weight = known.values["weight"][:: pairs.count] if "weight" in known.values else 1.0
  if o.weighting:  # WPO: mean log p - log sum p^2 of both answers
    collision = jax.nn.logsumexp(2 * known.alone.log_softmax(known.params), axis=-1)
    aligned = known.logps[:, 1:] - jnp.where(known.mask[:, 1:], collision, 0.0)
    weight = weight * stop(jnp.exp(sum(pairs.sides(aligned.sum(1) / known.lengths))))
  total = 0.0
  for name, scale in o.losses.items():
    match name:
      case "sft":
        value = likelihood(known, side == 0)
      case "sft_with_prompt":
        value = likelihood(known, side == 0, whole)
      case "gold":
        value = likelihood(known, side == 2)
      case "kto":
        value = kto_loss(known, known.values["label"] > 0.5)
      case "reward":
        value = reward_of_pairs(known, 0.0)
      case _:
        value = (weight * PAIRWISE[name](pairs)).mean()
    total += scale * value
  return total


# --- labels, reward models, groups, texts ----------------------------------------------------------------------------


def kto_loss(known, desirable, **weights):
  kl = known.kl if decisions.has_companions(known.config) else 0.0
  return preference.kto(known.log_ratios, desirable, kl, beta=known.o.beta, **weights)[0].mean()


def labelled_loss(known):
  o, desirable = known.o, known.values["label"] > 0.5
  weights = dict(desirable_weight=o.desirable_weight, undesirable_weight=o.undesirable_weight)
  return kto_loss(known, desirable, **weights) + o.sft_weight * likelihood(known, desirable)


def reward_of_pairs(known, centering):
  chosen, rejected = known.rewards[::2], known.rewards[1::2]
  options = dict(margin=known.values["margin"][::2], centering=centering)
  return reward.bradley_terry(chosen, rejected, **options)[0].mean()


def reward_loss(known):
  o, kind = known.o, known.config.data.kind
  if kind == "pairs":
    value, good = reward_of_pairs(known, o.centering), np.arange(len(known.mask)) % 2 == 0
  elif kind == "outcomes":
    label = known.values["label"]
    value, good = reward.binary_cross_entropy(known.rewards, label)[0].mean(), label > 0.5
  else:
    at = ~np.isnan(known.steps)
    rewards = known.alone.rewards(known.params)[at]
    value = reward.binary_cross_entropy(rewards, known.steps[at])[0].mean()
    good = ~(known.steps == 0).any(1)
  return value + o.sft_weight * likelihood(known, good)


def grouped_loss(known):
  """On [answers, time]: the loss of each token, and how they add up."""
  o, mask, lengths = known.o, known.mask, known.lengths[:, None]
  gain = known.values["advantage"][:, None]
  old = known.ref_logps if o.old == "reference" else stop(known.logps)
  total = (known.logps - old).sum(1, keepdims=True)
  match o.loss:
    case "gspo":
      ratio = jnp.exp(total / lengths)
    case "rloo":
      ratio = jnp.exp(total)
    case _:
      ratio = jnp.exp(known.logps - old)
  if o.loss == "reinforce":
    each = -gain * known.logps
  elif o.loss == "cispo":
    each = -stop(jnp.minimum(ratio, o.ceiling)) * gain * known.logps
  elif o.loss.startswith("dppo"):
    p, q = stop(jnp.exp(known.logps)), stop(jnp.exp(old))
    far = jnp.abs(p - q)
    if o.loss == "dppo_kl":
      far = q * jnp.log(q / p) + (1 - q) * jnp.log((1 - q) / (1 - p))
    cut = jnp.where(gain > 0, (p > q) & (far > o.epsilon_high), (p < q) & (far > o.epsilon))
    each = -jnp.where(cut, 0.0, stop(jnp.minimum(ratio, o.ceiling))) * gain * known.logps
  else:
    clipped = jnp.clip(ratio, 1 - o.epsilon, 1 + o.epsilon_high)
    each = -jnp.minimum(ratio * gain, clipped * gain)
    if o.dual_clip is not None:
      each = jnp.where(gain < 0, jnp.minimum(each, -o.dual_clip * gain), each)
  u = known.ref_logps - known.logps
  divergence = jnp.exp(u) - 1 - u if o.kl_estimator == "k3" else u**2 / 2
  each = jnp.where(mask, each + o.kl_weight * divergence, 0.0)
  by_answer = each.sum(1)
  match "sequence_mean" if o.loss == "rloo" else o.aggregation:
    case "token_mean":
      value = by_answer.sum() / mask.sum()
    case "sequence_mean":
      value = (by_answer / known.lengths).mean()
    case "constant_length":
      value = (by_answer / known.config.data.length).mean()
    case "sequence_sum":
      value = by_answer.mean()
    case "prompt_mean":
      of = known.prompts
      value = sum(by_answer[of == i].sum() / mask[of == i].sum() for i in {*of}) / len({*of})
  return value + o.sft_weight * likelihood(known, known.values["advantage"] > 0)


def sft_loss(known):
  return likelihood(known, np.ones(len(known.mask), bool))


LOSS = {
  "preference": preference_loss,
  "kto": labelled_loss,
  "reward": reward_loss,
  "grouped": grouped_loss,
  "sft": sft_loss,
}

# --- the methods -----------------------------------------------------------------------------------------------------

SMOOTHED = ("dpo", "dpo_norm", "robust", "exo", "cpo", "aot", "aot_unpaired")
PREFERENCE = {
  **{name: {} for name in KNOWN if name not in ("tpo", "tpo_norm", "gold")},
  "tpo": {"objective.gamma_beta_ratio": 0.3},
  "tpo_norm": {},
  "dpo+gold": {"objective.losses.gold": 0.3},
  "dpo+bco+sft": {"objective.losses.bco": 0.2},
  "dpo+kto": {"objective.losses.kto": 0.7},
  "dpo+reward": {"objective.losses.reward": 0.4},
  "kto": {},
  "reward": {},
}
VARIANTS = [
  *(("dpo", {"objective.divergence": name}) for name in DIVERGENCES),
  *((name, {"objective.label_smoothing": 0.2}) for name in SMOOTHED),
  ("dpo", {"objective.ld_alpha": 0.3}),
  ("aot", {"objective.ld_alpha": 0.3}),
  ("dpo", {"objective.weighting": True}),
  ("bco", {"objective.running_shift": True}),
  ("dpo", {"objective.beta": 0.7}),
  ("simpo", {"objective.gamma_beta_ratio": 1.3}),
]
# every ratio differs from 1, and the KL is there
APART = {"objective.old": "reference", "objective.kl_weight": 0.2}
GROUPED = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "dppo", "dppo_kl", "reinforce")
AGGREGATIONS = ("token_mean", "sequence_mean", "constant_length", "sequence_sum", "prompt_mean")
SFT = {"objective.sft_weight": 0.3}
# of tokens as likely as these, where the policies are this close: DPPO cuts about every third
NEAR = {"objective.epsilon": 7e-5, "objective.epsilon_high": 1.4e-4}
NEAR_KL = {"objective.epsilon": 1e-6, "objective.epsilon_high": 4e-6}
TOGETHER = {  # every loss, as summands of a few objectives
  "dpo+dpo_norm+robust+ipo+hinge+exo+discopop": {
    "objective.label_smoothing": 0.2,
    "objective.divergence": "forward_kl",
    "objective.ld_alpha": 0.3,
  },
  "nca+bco+apo_zero+apo_down+sppo+kto+reward+sft": {
    "objective.losses.bco": 0.2,
    "objective.weighting": True,
    "objective.running_shift": True,
  },
  "cpo+simpo+orpo+sft_with_prompt": {
    "objective.label_smoothing": 0.2,
    "objective.gamma_beta_ratio": 0.3,
  },
  "tpo+tpo_norm+gold": {"objective.gamma_beta_ratio": 0.3, "objective.losses.gold": 0.3},
  "aot+aot_unpaired": {"objective.label_smoothing": 0.2, "objective.ld_alpha": 0.3},
}
FAST = [
  *((f"preference.py:loss={names}", fields) for names, fields in TOGETHER.items()),
  ("preference.py:loss=dpo", {}),
  ("kto.py", {"objective.undesirable_weight": 1.3, **SFT}),
  *((f"reward.py:kind={kind}", SFT) for kind in ("pairs", "outcomes", "steps")),
  ("grouped.py:method=grpo", APART | SFT),
  ("grouped.py:method=dr_grpo", APART),
  ("grouped.py:method=dapo", APART | {"objective.dual_clip": 1.1}),
  ("grouped.py:method=gspo", APART | {"objective.epsilon": 0.3, "objective.epsilon_high": 0.4}),
  ("grouped.py:method=cispo", APART | {"objective.ceiling": 1.1}),
  ("grouped.py:method=rloo", APART),
  ("grouped.py:method=dppo", APART | NEAR | {"objective.aggregation": "prompt_mean"}),
  ("grouped.py:method=dppo_kl", APART | NEAR_KL),
  (
    "grouped.py:method=reinforce",
    {"objective.kl_weight": 0.2, "objective.kl_estimator": "k2"},
  ),  # no ratio
  ("grouped.py:method=grpo", APART | {"objective.aggregation": "sequence_sum"}),
  ("sft.py", {}),
]
METHODS = [
  *((f"preference.py:loss={name}", fields) for name, fields in PREFERENCE.items()),
  *((f"preference.py:loss={name}", fields) for name, fields in VARIANTS),
  ("kto.py", {"objective.undesirable_weight": 1.3}),
  ("kto.py", {"objective.estimate_kl": False, **SFT}),
  *((f"grouped.py:method={name}", APART) for name in GROUPED if name != "reinforce"),
  ("grouped.py:method=grpo", {}),
  *(("grouped.py:method=grpo", APART | {"objective.aggregation": a}) for a in AGGREGATIONS),
  ("grouped.py:method=grpo", SFT),
]


def test_no_loss_is_left_out():
  assert {*PAIRWISE, "sft", "sft_with_prompt", "gold"} == {*KNOWN}
  tried = {name for names in PREFERENCE for name in names.split("+")}
  assert {*KNOWN, "kto", "reward"} == tried
  assert {name for names in TOGETHER for name in names.split("+")} == tried
  assert {*GROUPED} == {*settings.module(f"{CONFIGS}/grouped.py").METHODS}


def ids(value):
  if isinstance(value, str):
    return value.replace(".py", "").replace("=", "-").replace(":", "-")
  return ",".join(f"{name.split('.')[-1]}={x}" for name, x in value.items()) or "paper"


@pytest.mark.parametrize(
  ("config", "fields"), FAST + [slow(*one) for one in METHODS if one not in FAST], ids=ids
)
def test_a_method_is_its_formula(config, fields, monkeypatch):
  monkeypatch.setattr(Scorer, "hidden_and_load", bigram.hidden_and_load)
  config = load(config, fields)
  examples = examples_of(config)
  params, ref_params = bigram.params(0, 0.7), bigram.params(0, 0.72)
  value, gradient = trained(built(config), params, ref_params, examples)
  with jax.enable_x64(True):
    wide = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)
    formula = lambda params: LOSS[config.objective.name](
      Known(config, examples, params, wide(ref_params))
    )
    wanted, slope = jax.jit(jax.value_and_grad(formula))(wide(params))
    assert slope["embed_tokens"]["weight"].dtype == jnp.float64
  assert value == pytest.approx(float(wanted), rel=1e-5, abs=1e-6)
  for path, found in jax.tree_util.tree_leaves_with_path(gradient):
    expected = np.asarray(slope[path[0].key]["weight"])
    error, size = np.linalg.norm(found - expected), np.linalg.norm(expected)
    assert error <= 2e-5 * size, f"{jax.tree_util.keystr(path)}: {error:.1e} of {size:.1e}"
  assert any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def trained(scorer, params, ref_params, examples):
  """(loss, gradient) as a training step computes them."""
  is_text = not isinstance(examples[0], answers.Answers)
  batch = (
    pack(examples, ROWS, 48, tiny.CHANNELS) if is_text else batches.rows_of(examples, ROWS, 96)
  )
  context, memory = Context(reference=ref_params), scorer.start(params)

  @jax.jit
  def run(params, context, batch):
    return step.gradient(scorer, params, context, batch, jax.random.key(0), memory=memory)

  gradient, metrics = run(params, context, batch)
  return read(metrics)["loss"], gradient
