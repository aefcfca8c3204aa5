r"""The quickstart: LoRA on SmolLM2-135M-Instruct, from questions in English to SQL that runs.

  make quickstart

measured in a fresh clone: 0 of 200 held-out questions right before, 175 after (87.5 %); two CPU cores, jax 0.10.2,
4.4 minutes in all after installation, training at 280 to 410 tokens/s.
"""

from posttrain_jax.configs import common, sft


def get_config(arg=None):
  arg = common.parse(arg, model="smollm2", data="sql", adapter="lora", base="dense", smoke=False)
  c = sft.get_config(
    f"model={arg.model},data={arg.data},adapter={arg.adapter},base={arg.base}"
    f",optimizer={arg.optimizer}"
  )
  c.data.length = 256  # tokens in a row: three examples
  c.batch.rows = 4
  c.steps = 64
  c.optimizer.lr = 2e-3
  c.optimizer.warmup = 0.1
  c.eval.every = 32
  c.eval.task = "sql"
  c.checkpoint.every = 32
  if arg.smoke:
    c.steps, c.eval.task_limit, c.eval.every = 2, 4, 0
  return c
