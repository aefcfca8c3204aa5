r"""A student with half the layers, recovered in four ways from one teacher: what is it worth to see its probabilities?

  posttrain chain --config=experiments/half_layers.py --workdir=runs/half_layers

The teacher is the quickstart's (SmolLM2-135M, text to SQL), the student 15 of its 30 layers, which answer nothing yet.
Each arm trains all of the student for as many updates of as many rows:

  gold        fine-tuning on the data's answers
  traces      fine-tuning on the teacher's answers that a verifier finds right
  off_policy  the teacher's probabilities on the data's answers (forward KL)
  on_policy   half of the rows are the student's own answers (GKD, generalised JSD)

`runs/half_layers/report.html` has the held-out accuracy of each.
"""

from posttrain_jax.configs import common


def stages(arg=None):
  arg = common.parse(arg, model="smollm2", steps=150, questions=200, layers=15)
  asked = {"eval.task": "sql", "eval.task_limit": arg.questions, "eval.before": False}
  trained = {**asked, "steps": arg.steps, "batch.rows": 8, "optimizer.lr": 5e-4, "eval.every": 0}
  rows = {**trained, "data.length": 256, "data.packing": False}
  student = "model={student},adapter=none"
  yield {
    "name": "teacher",
    "train": f"sft:model={arg.model},data=sql",
    "fields": {
      **asked,
      "steps": 64,
      "batch.rows": 4,
      "data.length": 256,
      "optimizer.lr": 2e-3,
      "eval.before": True,
    },
  }
  yield {"name": "student", "student": {"model": "{teacher}", "layers": arg.layers}}
  yield {"name": "right", "sample": {"model": "{teacher}", "task": "sql", "n": 2, "limit": 600}}
  yield {"name": "gold", "train": f"sft:{student},data=sql", "fields": rows}
  yield {"name": "traces", "train": f"sft:{student},data={{right}}", "fields": rows}
  taught = f"{student},teacher={{teacher}},data=sql"
  yield {"name": "off_policy", "train": f"distil:{taught}", "fields": rows}
  yield {
    "name": "on_policy",
    "train": f"distil:{taught},on_policy=0.5,loss=jsd",
    "fields": {**trained, "online.max_new_tokens": 48},
  }
