r"""KTO: answers labelled desirable or not; pairs count as two.

posttrain train --config=kto:data=labels.jsonl --workdir=runs/kto
"""

import ml_collections

from posttrain_jax.configs import common


def get_config(arg=None):
  arg = common.parse(arg, model="smollm2", data="", adapter="lora", base="dense", smoke=False)
  c = common.run(arg)
  o = c.objective = ml_collections.ConfigDict({"name": "kto"})
  o.beta = 0.1  # weight of the KL to the reference
  # desirable_weight n_desirable / (undesirable_weight n_undesirable) is best between 1 and 4/3
  o.desirable_weight = 1.0
  o.undesirable_weight = 1.0
  o.estimate_kl = True  # False: APO-zero on labels
  o.sft_weight = 0.0  # of the likelihood of the desirable answers, beside the loss
  common.reference(o)
  common.following(o)
  c.data = common.answers(arg, "labels")
  c.data.length = 1024
  c.optimizer.lr = 5e-5 if arg.adapter != "none" else 5e-7
  c.optimizer.warmup = 0.1
  if arg.smoke:
    c.steps, c.batch.rows, c.eval.every, c.data.eval_rows = 2, 2, 0, 4
  return c
