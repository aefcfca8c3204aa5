r"""Distillation: a student learns what a teacher of the same tokenizer would say next, token by token.

posttrain train --config=distil:teacher=smollm2,model=smollm2,data=sql --workdir=runs/distil

teacher=NAME_OR_FOLDER may be a model of any size, a run or an adapter.  on_policy=0.5 (GKD): of that share of the rows
the student writes the answers itself, the others are the data's.  top_k=32 asks the teacher once for its 32 likeliest
tokens, before training.
loss: forward_kl, reverse_kl, jsd; policy_gradient (all on policy), where the reverse KL of the tokens that were drawn
is an advantage, to which reward=NAME adds verifiers' scores.
"""

import ml_collections

from posttrain_jax.configs import common, rl

LOSSES = ("forward_kl", "reverse_kl", "jsd")
BY_GRADIENT = "policy_gradient"


def get_config(arg=None):
  arg = common.parse(
    arg,
    teacher="",
    model="smollm2",
    data="sql",
    adapter="lora",
    base="dense",
    loss="forward_kl",
    on_policy=0.0,
    top_k=0,
    reward="",
    smoke=False,
  )
  common.chosen("loss", arg.loss, (*LOSSES, BY_GRADIENT))
  if not 0 <= arg.on_policy <= 1:
    raise ValueError(
      f"config argument on_policy={arg.on_policy}: a share of the rows, from 0 (the data's) to 1 (the student's)"
    )
  if arg.loss == BY_GRADIENT:
    return _by_gradient(arg)
  if arg.reward:
    raise ValueError(
      f"config argument reward={arg.reward!r}: scores are learned from by the policy gradient; write"
      f" loss={BY_GRADIENT} beside it"
    )
  c = _online(arg, reward="") if arg.on_policy else common.run(arg)
  o = c.objective = ml_collections.ConfigDict({"name": "distil", "loss": arg.loss})
  o.teacher = arg.teacher  # a name or a folder, a run's or an adapter's too
  o.teacher_base = "dense"  # how its matrices are stored: dense, nf4, fp4, int8
  if arg.loss == "jsd":
    o.mixture = 0.5  # share of the teacher in what both are compared with
  o.temperature = 1.0  # of the softmax of both
  o.top_k = (
    arg.top_k
  )  # likeliest tokens of the teacher that are kept with the data; 0: all, anew in each step
  o.sft_weight = 0.0  # of the likelihood of the data's own answers, beside the loss
  if arg.on_policy:
    n = c.online
    n.samples = 1  # answers to a prompt
    # rows of an update that are the data's answers; the student writes the others, `on_policy` of batch.rows
    rows = c.batch.get_ref("rows")
    n.gold_rows = rows - (rows * arg.on_policy + 0.5).to_int()
  else:
    c.data = common.text(arg)
  if arg.adapter == "none":
    c.optimizer.lr = 2e-5
  if arg.smoke:
    c.steps, c.batch.rows, c.eval.every = 2, 2, 0
    if not arg.on_policy:
      c.data.length, c.data.limit, c.data.eval_rows = 256, 64, 4
  return c


def _online(arg, reward, method="centred"):
  """What a run that writes its own answers has, as configs/rl.py describes it."""
  c = rl.get_config(
    f"model={arg.model},data={arg.data},adapter={arg.adapter},base={arg.base},optimizer={arg.optimizer}"
    f",method={method},reward={reward},teacher={arg.teacher},smoke={arg.smoke}"
  )
  c.batch.rows = 2 if arg.smoke else 8
  c.optimizer.lr = 2e-4 if arg.adapter != "none" else 1e-6
  return c


def _by_gradient(arg):
  if arg.top_k:
    raise ValueError(
      f"config argument top_k={arg.top_k}: loss={BY_GRADIENT} asks the teacher for the token that was drawn alone"
    )
  if arg.on_policy not in (0, 1):
    raise ValueError(
      f"config argument on_policy={arg.on_policy}: loss={BY_GRADIENT} is of the student's own answers; write 1, and for"
      " rows of the data beside them --config.online.gold_rows=N --config.objective.sft_weight=W"
    )
  c = _online(arg, arg.reward)
  if not arg.reward:
    c.online.samples = 1
  return c
