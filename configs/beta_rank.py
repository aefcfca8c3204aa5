r"""Does beta hold the policy to its reference or push it away, and does the rank matter?  DPO on 128 text-to-SQL pairs.

  .venv/bin/python experiments/beta_rank.py          (which runs posttrain sweep --config=configs/beta_rank.py)

measured: experiments/results/beta_rank.md
"""

from posttrain_jax.configs import common, preference


def get_config(arg=None):
  arg = common.parse(
    arg,
    model="smollm2",
    data="runs/beta_rank/pairs.jsonl",
    adapter="lora",
    base="dense",
    rank=16,
    beta=0.1,
    smoke=False,
  )
  c = preference.get_config(
    f"model={arg.model},data={arg.data},loss=dpo,adapter={arg.adapter},base={arg.base}"
    f",optimizer={arg.optimizer}"
  )
  if "r" in c.adapter:
    c.adapter.r = arg.rank
    c.adapter.lora_alpha = 2.0 * arg.rank
  c.objective.beta = arg.beta
  c.data.length = 512
  c.data.eval_rows = 24
  c.batch.rows = 4
  c.steps = 2 if arg.smoke else 24
  c.optimizer.lr = 1e-4
  c.eval.every = 12
  c.checkpoint.every = 24
  c.checkpoint.keep = 1
  return c


def sweep():
  for rank in (4, 16, 64):
    for beta in (0.01, 0.03, 0.1, 0.3, 1.0):
      yield f"rank={rank},beta={beta}", {}
