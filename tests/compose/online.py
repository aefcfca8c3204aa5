"""A draw of online learning: seed -> a run that writes its own answers, of all that there is to say of one.

What is drawn means something more often than not; what means nothing is to be refused in words.
"""

import pathlib
from typing import Any

import numpy as np

from tests.compose import draws
from tests.compose.draws import Draw

GROUPS = (
  *("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "dppo", "dppo_kl", "reinforce"),
  *("reinforce_pp", "max_rl", "centred"),
)
PAIRS = (*draws.WITH_REFERENCE, *draws.WITHOUT_REFERENCE, "dpo+sft", "simpo+dpo", "kto", "dpo+gold")
DISTILLED = ("forward_kl", "reverse_kl", "jsd", "policy_gradient")
# what scores an answer, in scores.py of the shared folder: of many values, of two, of none where it cannot tell
SCORES = ("early", "rare", "missing", "listed", "empty")
FORMS = ("length", "regex", "is_json")  # which do not ask whether an answer is right
MESHES = ("data2", "fsdp2", "tensor2", "context2")
FILE, PROMPTS = "scores.py", "prompts.jsonl"


def draw(seed: int) -> Draw:
  """The choices of a seed, the same on every machine."""
  rng = np.random.default_rng((2027, seed))
  pick = lambda *values: values[int(rng.integers(len(values)))]
  chance = lambda share: bool(rng.random() < share)
  d: Draw = {"seed": seed, "arguments": {}, "fields": {}}
  f = d["fields"]
  d["family"] = pick(*draws.FAMILIES) if chance(0.9) else pick(*draws.MIXTURES)
  d["kind"] = str(rng.choice(["groups", "ppo", "pairs", "distil"], p=[0.45, 0.2, 0.15, 0.2]))
  d["adapter"] = pick("lora", "lora", "none", *draws.ADAPTERS)
  if d["adapter"] != "none" and chance(0.1):
    d["adapter"] += f"+{pick(*(one for one in draws.ADAPTERS if one != d['adapter']))}"
  d["base"] = pick(*draws.BASES) if d["adapter"] != "none" or chance(0.05) else "dense"
  d["optimizer"] = pick("adamw", "adamw", "adamw", *draws.OPTIMIZERS)
  d["mesh"] = pick("none", *MESHES) if chance(0.15) else "none"
  d["score"] = "rare" if chance(0.3) else pick(*SCORES)
  d["turns"] = pick("environment", "tools") if chance(0.2) else "no"
  d["storage"] = "auto" if chance(0.7) else pick("bfloat16", "int8")
  d["arguments"] |= _method(d, pick, chance)
  d["method"] = d["arguments"].get("method") or f"distil:{d['arguments']['loss']}"
  f |= _sizes(d, pick, chance) | _writing(d, pick, chance) | _scored(d, pick, chance)
  f |= _learned(d, pick, chance) | draws._adapter(d["adapter"], pick, chance)
  f |= draws._optimizer(d, pick, chance) | _around(d, pick, chance)
  return d


def _method(d: Draw, pick, chance) -> dict[str, Any]:
  if d["kind"] == "distil":
    loss = pick(*DISTILLED)
    share = 1.0 if loss == "policy_gradient" else pick(0.5, 1.0)
    given = dict(teacher=pick("MODEL", "SAME", "ADAPTER"), loss=loss, on_policy=share)
    scored = loss == "policy_gradient" and chance(0.5)
    return given | ({"reward": "SCORES"} if scored else {})
  method = {"groups": lambda: pick(*GROUPS), "ppo": lambda: "ppo", "pairs": lambda: "online_dpo"}
  given = {"method": method[d["kind"]](), "reward": "SCORES"}
  if d["kind"] == "pairs":
    given["loss"] = pick("dpo", *PAIRS)
  if chance(0.15 if d["kind"] == "groups" else 0.03):
    given["teacher"] = pick("MODEL", "SAME", "ADAPTER")
  if chance(0.1):
    given["holdout"] = pick("SCORES", "length", "is_json")
  return given


def _sizes(d: Draw, pick, chance) -> dict[str, Any]:
  few = d["kind"] in ("ppo", "distil") and chance(0.5)
  fields = {
    "batch.rows": pick(1, 2, 2, 3) if d["mesh"] == "none" else 2,
    "online.samples": 1 if few or chance(0.05) else pick(2, 2, 3, 4),
    "online.minibatches": pick(1, 1, 1, 2, 3),
    "online.passes": pick(1, 1, 1, 2),
    "online.rows": pick(1, 2, 5, 16),
  }
  if chance(0.25):
    fields["batch.accumulate"] = fields["batch.rows"] if chance(0.9) else pick(2, 3)
  if d["method"] in ("reinforce", "centred", "distil:policy_gradient") and chance(0.9):
    fields |= {"online.minibatches": 1, "online.passes": 1}  # which have no ratio
  if chance(0.2):
    fields["data.share_prompt"] = False
  return fields


def _writing(d: Draw, pick, chance) -> dict[str, Any]:
  fields: dict[str, Any] = {}
  if chance(0.2):
    fields["online.temperature"] = pick(0.001, 0.7, 1.5)
  for name, value in (("top_k", pick(2, 40)), ("top_p", 0.8), ("min_p", 0.02)):
    if chance(0.12):
      fields[f"online.{name}"] = value
  if d["turns"] == "environment":
    fields |= {"online.environment": "FILE:Echo", "online.tool_tokens": 8}
  elif d["turns"] == "tools":
    fields |= {"online.tools": "('FILE:double',)", "online.tool_tokens": 8}
  if d["turns"] != "no":
    fields |= {"model.template": "chatml", "online.unparsed": pick(0.0, -1.0)}
    fields["online.max_turns"] = pick(1, 2, 4)
  return fields


def _scored(d: Draw, pick, chance) -> dict[str, Any]:
  if "reward" not in d["arguments"]:
    return {}
  parts, fields = ["SCORES"], {}
  if chance(0.25):
    parts.append(pick(*FORMS))
  if d["turns"] == "environment" and chance(0.5):
    parts.append("environment")
  gates = [pick("regex", "is_json")] if chance(0.1) else []
  gates = [name for name in gates if name not in parts]
  options = {"length": "{'longest': 6, 'soft': 2}", "regex": "{'pattern': '[a-z]'}"}
  fields["reward.parts"] = f"({', '.join(map(repr, parts))},)"
  fields["reward.gates"] = f"({', '.join(map(repr, gates))}{',' if gates else ''})"
  given = [f"'{name}': {options[name]}" for name in (*parts, *gates) if name in options]
  fields["reward.options"] = "{" + ", ".join(given) + "}"
  fields["reward.untested"] = "('SCORES',)" if chance(0.1) else "()"
  if chance(0.6):
    fields["reward.ranges"] = "{'SCORES': (0, 1)}"
  if len(parts) > 1 and chance(0.5):
    fields["reward.weights"] = f"({', '.join(['0.5'] * len(parts))},)"
  if chance(0.15):
    fields["online.outcome"] = pick("total", parts[-1])
  return fields


def _learned(d: Draw, pick, chance) -> dict[str, Any]:
  fields: dict[str, Any] = {}
  kind, method = d["kind"], d["method"]
  if chance(0.2) or method == "dapo":
    fields["online.dynamic"] = chance(0.9)
    if fields["online.dynamic"]:
      fields["online.most_rounds"] = pick(1, 2, 3)
  if chance(0.2):
    fields["online.curriculum"] = "pass_rate"
  if chance(0.15):
    fields["online.mask_cut"] = True
  if chance(0.15):
    fields["online.cut_penalty"] = 0.5
  if chance(0.2 if kind in ("groups", "ppo") else 0.03):
    fields["online.kl_in_reward"] = 0.1
    if chance(0.4):
      fields["online.kl_in_reward_estimator"] = pick("k1", "k3")
    if chance(0.4):
      fields["online.kl_target"] = 1.0
  if kind == "ppo":
    fields |= _critic(pick, chance)
  if kind == "distil":
    if d["arguments"]["on_policy"] == 0.5:
      fields["online.gold_rows"] = pick(0, 1)
      if chance(0.4):
        fields["objective.sft_weight"] = 0.5
    if d["arguments"]["loss"] != "policy_gradient":
      if chance(0.3):
        fields["objective.temperature"] = 2.0
      return fields
  if kind == "pairs":
    if chance(0.3):
      fields["objective.reference"] = pick("MODEL", "ADAPTER")
    return fields
  if chance(0.15):
    fields |= {"online.gold_rows": 1, "objective.sft_weight": 0.5}
  if chance(0.3):
    fields["objective.kl_weight"] = 0.1
    if chance(0.5):
      fields["objective.kl_estimator"] = pick("k2", "k3")
  if ("objective.kl_weight" in fields or "online.kl_in_reward" in fields) and chance(0.4):
    fields["objective.reference"] = pick("MODEL", "ADAPTER")
    if fields["objective.reference"] == "MODEL":
      fields["objective.reference_base"] = pick(*draws.BASES)
  if chance(0.3):
    fields["objective.importance"] = pick("token", "sequence", "geometric")
    if chance(0.4):
      fields |= {"objective.importance_outside": "mask", "objective.importance_low": 0.5}
  if kind == "groups" and chance(0.1):
    fields["objective.advantage"] = pick("group", "batch", "none", "leave_one_out", "whitened")
  if chance(0.1) and method != "rloo":
    fields["objective.aggregation"] = pick(
      *("token_mean", "sequence_mean", "constant_length", "sequence_sum", "prompt_mean")
    )
  return fields


def _critic(pick, chance) -> dict[str, Any]:
  fields: dict[str, Any] = {"critic.trunk": pick("own", "shared")}
  if chance(0.3):
    fields["critic.warmup"] = 1
  if chance(0.3):
    fields |= {"critic.gamma": 0.9, "critic.lam": pick(0.0, 0.9)}
  if chance(0.2):
    fields["critic.returns_lam"] = 1.0
  if chance(0.2):
    fields["critic.whiten"] = False
  if chance(0.2):
    fields["critic.epsilon"] = None
  return fields


def _around(d: Draw, pick, chance) -> dict[str, Any]:
  fields: dict[str, Any] = {}
  if chance(0.2):
    fields["model.adapter"] = "ADAPTER"
    goes_on = d["adapter"] == "lora" or chance(0.1)
    fields["model.adapter_use"] = pick("trained", "frozen") if goes_on else "frozen"
  if chance(0.15):
    fields["model.remat"] = pick("names", "dots", "full")
  if chance(0.08):
    fields["optimizer.offload"] = pick("state", "params")
  if chance(0.05):
    fields["model.offload"] = "layers"
  if chance(0.15):
    fields |= {"eval.task": "ROWS", "eval.metric": "contained", "eval.task_limit": 2}
    fields["eval.every"] = pick(0, 1)
  if chance(0.2):
    fields["model.attention"] = "xla"
  return fields


def command(d: Draw, shared: pathlib.Path) -> tuple[str, list[str]]:
  """(config file with its arguments, overrides) of a draw over the folders that `shared` holds."""
  model = shared / "models" / d["family"]
  file, rows = shared / FILE, shared / PROMPTS
  places = dict(MODEL=f"{model}-other", SAME=model, ADAPTER=f"{model}-adapter", ROWS=rows)
  places |= {"SCORES": f"{file}:{d['score']}"}
  name = "distil" if d["kind"] == "distil" else "rl"
  arguments = dict(model=model, data=rows, adapter=d["adapter"], base=d["base"])
  arguments |= d["arguments"]
  if d["storage"] != "auto" and name == "rl":
    arguments["storage"] = d["storage"]
  if d["optimizer"] != "adamw":
    arguments["optimizer"] = d["optimizer"]
  fields: dict[str, Any] = {
    "steps": draws.STEPS,
    "checkpoint.every": 1,
    "checkpoint.keep": draws.STEPS,
    "online.max_new_tokens": 40 if d["turns"] != "no" else 7,
    "data.length": 420 if d["turns"] != "no" else 300,
    **{f"mesh.{axis}": size for axis, size in draws.EVERY_MESH[d["mesh"]].items()},
    **d["fields"],
  }
  if d["storage"] != "auto" and name == "distil":
    fields["online.storage"] = d["storage"]

  def filled(value):
    text = str(places.get(str(value), value)).replace("FILE", str(file))
    return text.replace("SCORES", str(places["SCORES"]))

  stated = ",".join(f"{argument}={filled(value)}" for argument, value in arguments.items())
  return f"{name}.py:{stated}", [f"--config.{field}={filled(v)}" for field, v in fields.items()]
