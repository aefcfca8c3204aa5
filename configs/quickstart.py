r"""The quickstart: LoRA on SmolLM2-135M-Instruct, from questions in English to SQL that runs.

  make quickstart
  posttrain train --config=configs/quickstart.py --workdir=runs/quickstart
"""

import common
import sft


def get_config(arg=None):
  arg = common.parse(arg, model="smollm2", data="sql", adapter="lora", base="dense", smoke=False)
  c = sft.get_config(f"model={arg.model},data={arg.data},adapter={arg.adapter},base={arg.base}")
  c.data.length = 256  # tokens in a row: three examples
  c.batch.rows = 4
  c.steps = 96
  c.optimizer.lr = 2e-3
  c.optimizer.warmup = 0.1
  c.eval.every = 24
  c.eval.task = "sql"
  c.checkpoint.every = 48
  if arg.smoke:
    c.steps, c.eval.task_limit, c.eval.every = 2, 4, 0
  return c
