r"""A chain of stages, each of which starts from what others made, as reasoning models are made, but small.

posttrain chain --config=chain:model=smollm2 --workdir=runs/chain

cold start -> reinforcement -> its right answers -> fine-tuning on them -> reinforcement -> a student of half the
layers, which learns from the last.  {cold} is what the stage of that name made.  Copy the file to change a stage.
"""

from posttrain_jax.configs import common


def stages(arg=None):
  arg = common.parse(arg, model="smollm2", task="sql", layers=15, steps=100, questions=200)
  asked = {"eval.task": arg.task, "eval.task_limit": arg.questions}
  again = {**asked, "eval.before": False}
  start = f"model={arg.model},data={arg.task}"
  rewarded = f"rl:{start},reward={arg.task}"
  few = max(arg.steps // 4, 1)
  written = {"online.max_new_tokens": 48, "online.rows": 32, "optimizer.lr": 1e-4}
  yield {
    "name": "cold",
    "train": f"sft:{start}",
    "fields": {**asked, "steps": few, "data.length": 256, "batch.rows": 4, "optimizer.lr": 2e-3},
  }
  yield {
    "name": "rl",
    "train": rewarded,
    "fields": {**again, **written, "steps": few, "model.adapter": "{cold}"},
  }
  yield {
    "name": "answers",
    "sample": {"model": "{rl}", "task": arg.task, "n": 4, "limit": 4 * arg.steps, "per_prompt": 2},
  }
  yield {
    "name": "again",
    "train": f"sft:model={arg.model},data={{answers}}",
    "fields": {**again, "steps": few, "data.length": 256, "batch.rows": 4, "model.adapter": "{rl}"},
  }
  yield {
    "name": "rl_again",
    "train": rewarded,
    "fields": {**again, **written, "steps": few, "model.adapter": "{again}"},
  }
  yield {"name": "small", "student": {"model": "{rl_again}", "layers": arg.layers}}
  yield {
    "name": "student",
    "train": f"distil:model={{small}},teacher={{rl_again}},data={arg.task},adapter=none",
    "fields": {**again, "steps": arg.steps, "data.length": 256, "optimizer.lr": 5e-4},
  }
