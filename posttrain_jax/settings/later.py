"""Fields that came after 0.1.0, with the value by which a run does what it did before them.

A begun run whose record lacks one goes on where the config has that value.  A field without such a value has no line.
"""

from typing import Any

LATER: dict[str, Any] = {
  "epochs": None,
  "model.adapter": "",
  "model.adapter_use": "trained",
  "model.attention": "auto",
  "model.offload": "none",
  "model.router_aux_loss_coef": 0.0,
  "data.train_on": "assistant",
  "objective.dual_clip": None,
  "objective.kl_estimator": "k3",
  "mesh.context": 1,
  "mesh.expert": 1,
  "online.engine_wire": "openai",
  "eval.best": "",
  "eval.max_new_tokens": 0,
  "eval.metric": "",
  "eval.samples": 0,
  "eval.stop_after": 0,
  "eval.suite": "",
  "eval.suite_limit": 0,
  "log.mlflow": "",
  "log.trackio": "",
  "log.wandb": "",
}
