r"""Preference optimisation on pairs: DPO and its relatives, with and without a reference.

posttrain train --config=preference:loss=dpo,data=pairs.jsonl --workdir=runs/dpo

Losses: dpo dpo_norm robust ipo hinge exo discopop nca bco apo_zero apo_down sppo aot aot_unpaired cpo simpo orpo tpo
tpo_norm, the likelihood terms sft sft_with_prompt gold, and kto and reward, which take a pair as two labels and as a
comparison of scores; several with + between are added up with the weights in `objective.losses` (dpo+bco+sft is MPO,
dpo+sft RPO).
"""

import ml_collections

from posttrain_jax.configs import common

LEARNING_RATE = {"simpo": 5e-7, "orpo": 8e-6}  # of full fine-tuning, as the papers have them

# which losses read what
DIFFERENCES = ("dpo", "dpo_norm", "robust", "ipo", "hinge", "exo", "discopop")
SMOOTHED = ("dpo", "dpo_norm", "robust", "exo", "cpo", "aot", "aot_unpaired")
RATIO = ("simpo", "tpo", "tpo_norm")
LIKELIHOOD = ("sft", "sft_with_prompt", "gold")
WITHOUT_REFERENCE = ("cpo", "simpo", "orpo", "tpo", "tpo_norm")


def get_config(arg=None):
  arg = common.parse(
    arg, model="smollm2", data="", adapter="lora", base="dense", loss="dpo", smoke=False
  )
  c = common.run(arg)
  c.objective, names = objective(arg.loss.split("+"))
  c.data = common.answers(arg, "triples" if "gold" in names else "pairs")
  c.data.length = 1024
  c.optimizer.lr = 5e-5 if arg.adapter != "none" else LEARNING_RATE.get(names[0], 5e-7)
  c.optimizer.warmup = 0.1
  if arg.smoke:
    c.steps, c.batch.rows, c.eval.every, c.data.eval_rows = 2, 2, 0, 4
  return c


def objective(names):
  """(config.objective of the losses that are added up, their names with what papers add to them)."""
  # what the paper adds to its loss
  if names == ["orpo"]:
    names += ["sft_with_prompt"]
  elif names == ["cpo"]:
    names += ["sft"]
  elif names in (["tpo"], ["tpo_norm"]):
    names += ["gold"]
  o = ml_collections.ConfigDict({"name": "preference", "losses": dict.fromkeys(names, 1.0)})
  has = lambda *losses: any(name in losses for name in names)
  own = [name for name in names if name not in LIKELIHOOD]
  if own and own != ["reward"]:
    o.beta = 2.0 if names[0] in ("simpo", "tpo_norm") else 0.1  # weight of the KL to the reference
  if has(*SMOOTHED):
    o.label_smoothing = 1e-3 if has("exo") else 0.0  # share of labels held to be wrong
  if has(*RATIO):
    o.gamma_beta_ratio = (
      0.5 if names[0] in ("simpo", "tpo_norm") else 0.0
    )  # target margin over beta
  pairs = [name for name in own if name not in ("kto", "reward")]
  if pairs and all(name in DIFFERENCES for name in pairs):
    o.divergence = "reverse_kl"  # forward_kl, jensen_shannon, alpha_divergence
    o.divergence_alpha = 0.5
  if pairs:
    o.ld_alpha = 1.0  # LD-DPO: weight of tokens past the length that both answers reach
    o.weighting = False  # WPO: pairs count by how likely the policy is to write them
  if has("bco"):
    o.running_shift = False  # running mean of rewards
  if any(name not in (*WITHOUT_REFERENCE, "reward") for name in own):
    common.reference(o)
    common.following(o)
  return o, names


def sweep():
  """Does the best beta depend on the rank?"""
  for rank in (4, 16, 64):
    for beta in (0.03, 0.1, 0.3):
      yield "loss=dpo", {"adapter.r": rank, "objective.beta": beta}
