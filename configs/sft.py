r"""Supervised fine-tuning; continued pretraining where the rows are plain text.

posttrain train --config=sft:model=smollm2,data=sql,adapter=lora --workdir=runs/sft
"""

from posttrain_jax.configs import common


def get_config(arg=None):
  arg = common.parse(arg, model="smollm2", data="sql", adapter="lora", base="dense", smoke=False)
  c = common.run(arg)
  c.objective = {"name": "sft"}
  c.data = common.text(arg)
  if arg.adapter == "none":
    c.optimizer.lr = 2e-5
  if arg.smoke:
    c.steps, c.batch.rows, c.data.length, c.data.limit = 2, 2, 256, 64
    c.eval.every, c.data.eval_rows = 0, 4
  return c


def sweep():
  """Does the best learning rate depend on the rank?"""
  for rank in (4, 16, 64):
    for lr in (1e-4, 4e-4, 1.6e-3):
      yield "adapter=lora", {"adapter.r": rank, "optimizer.lr": lr}
