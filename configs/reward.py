r"""Reward models: Bradley-Terry on pairs, labelled outcomes, or labelled steps of a process.

posttrain train --config=reward:data=pairs.jsonl,kind=pairs --workdir=runs/reward
"""

import ml_collections

from posttrain_jax.configs import common


def get_config(arg=None):
  arg = common.parse(
    arg, model="smollm2", data="", adapter="lora", base="dense", kind="pairs", smoke=False
  )
  c = common.run(arg)
  o = c.objective = ml_collections.ConfigDict({"name": "reward"})
  if arg.kind == "pairs":
    o.centering = 0.01  # weight of (r_w + r_l)^2
  # of the likelihood of the better answers, beside the loss: the model goes on writing while it learns to judge
  o.sft_weight = 0.0
  c.data = common.answers(arg, common.chosen("kind", arg.kind, ("pairs", "outcomes", "steps")))
  c.data.length = 1024
  c.optimizer.lr = 1e-4 if arg.adapter != "none" else 1e-5
  c.optimizer.warmup = 0.1
  if arg.smoke:
    c.steps, c.batch.rows, c.eval.every, c.data.eval_rows = 2, 2, 0, 4
  return c
