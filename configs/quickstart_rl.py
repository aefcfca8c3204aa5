r"""The quickstart's other second stage: GRPO on the SFT model's own answers, which are executed.

make quickstart STAGE=rl

What there is to learn are the answers that are wrong at temperature 1: prompts whose eight answers all agree teach
nothing, and the run says how many they are.
"""

from posttrain_jax.configs import common, rl


def get_config(arg=None):
  arg = common.parse(
    arg, model="smollm2", adapter="lora", base="dense", start="runs/quickstart", smoke=False
  )
  c = rl.get_config(
    f"model={arg.model},adapter={arg.adapter},base={arg.base},data=sql,method=grpo,reward=sql"
    f",optimizer={arg.optimizer}"
  )
  c.model.adapter = arg.start
  c.online.max_new_tokens = 48
  c.online.rows = 32
  c.steps = 8
  c.optimizer.lr = 1e-4
  c.eval.task = "sql"
  c.checkpoint.every = 4
  if arg.smoke:
    c.steps, c.eval.task_limit, c.batch.rows, c.online.samples = 2, 4, 2, 2
  return c
