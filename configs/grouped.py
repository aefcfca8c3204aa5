r"""A policy-gradient step on groups of answers that are scored already.

posttrain train --config=grouped:method=grpo,data=scored.jsonl --workdir=runs/grouped

Rows: {"prompt": ..., "completions": [...], "scores": [...]}.
"""

from posttrain_jax.configs import common

# loss, aggregation, advantage, epsilon_high
METHODS = {
  "grpo": ("ppo", "sequence_mean", "group", 0.2),
  "dr_grpo": ("ppo", "constant_length", "none", 0.2),
  "dapo": ("ppo", "token_mean", "group", 0.28),
  "gspo": ("gspo", "sequence_mean", "group", 4e-4),
  "cispo": ("cispo", "token_mean", "group", 0.2),
  "rloo": ("rloo", "sequence_sum", "leave_one_out", 0.2),
  "dppo": ("dppo_tv", "token_mean", "group", 0.15),
  "dppo_kl": ("dppo_kl", "token_mean", "group", 0.05),
  "reinforce": ("reinforce", "token_mean", "batch", 0.2),
}


def get_config(arg=None):
  arg = common.parse(
    arg, model="smollm2", data="", adapter="lora", base="dense", method="grpo", smoke=False
  )
  c = common.run(arg)
  method = METHODS[common.chosen("method", arg.method, METHODS)]
  o = c.objective = common.policy_loss(*method)
  if o.loss != "reinforce":  # which has no ratio
    o.old = "policy"  # who wrote the answers: policy (every ratio is 1 at first) or reference
  o.kl_weight = 0.0  # of the KL to the reference
  o.kl_estimator = "k3"  # k2 has the gradient of the reverse KL, k3 of the forward KL
  o.sft_weight = 0.0  # of the likelihood of answers with a positive advantage, beside the loss
  common.reference(o)
  c.data = common.answers(arg, "scored")
  c.data.length = 1024
  c.optimizer.lr = 5e-5 if arg.adapter != "none" else 1e-6
  if arg.smoke:
    c.steps, c.batch.rows, c.eval.every, c.data.eval_rows = 2, 2, 0, 4
  return c
