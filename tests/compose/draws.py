"""A draw: seed -> one combination out of all that a run can be made of, as a plain dict.

Every axis is drawn for itself, so that what was never thought of together comes together.  Only where most values of an
axis mean nothing without another (offloaded parameters without full fine-tuning) are they drawn more rarely then.
"""

import math
import pathlib
from typing import Any

import numpy as np

Draw = dict[str, Any]

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral")
MIXTURES = ("mixtral", "qwen3_moe")
WITH_REFERENCE = (
  *("dpo", "dpo_norm", "robust", "ipo", "hinge", "exo", "discopop", "nca", "bco", "apo_zero"),
  *("apo_down", "sppo", "aot", "aot_unpaired"),
)
WITHOUT_REFERENCE = ("cpo", "simpo", "orpo", "tpo", "tpo_norm")
SUMS = (
  *("dpo+sft", "dpo+bco+sft", "ipo+sft_with_prompt", "aot+sft", "simpo+dpo", "dpo+gold", "nca+cpo"),
  *("sft", "orpo+sft", "dpo+kto", "dpo+reward"),
)
DIFFERENCES = ("dpo", "dpo_norm", "robust", "ipo", "hinge", "exo", "discopop")
LIKELIHOOD = ("sft", "sft_with_prompt", "gold")  # which compare nothing
GROUPED = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "dppo", "dppo_kl", "reinforce")
ADAPTERS = (
  *("lora", "dora", "pissa", "olora", "loftq", "vera", "adalora", "ia3", "longlora"),
  *("prompt", "prefix"),
)
BASES = ("dense", "nf4", "fp4", "int8")
OPTIMIZERS = (
  *("adamw", "adafactor", "lion", "sgd", "adamw8bit", "adam_mini", "galore", "galore8bit"),
)
STANDING = ("prompt", "prefix")  # which stand before the text
NO_MATRICES = ("vera", "ia3", "prompt", "prefix")  # in whose layers GaLore has nothing to project
MESHES: dict[str, dict[str, int]] = {
  "none": {},
  "data2": dict(data=2),
  "fsdp2": dict(fsdp=2),
  "tensor2": dict(tensor=2),
  "fsdp2tensor2": dict(fsdp=2, tensor=2),
  "data2fsdp2tensor2": dict(data=2, fsdp=2, tensor=2),
}
OF_ROWS: dict[str, dict[str, int]] = {  # devices that share a row
  "context2": dict(context=2),
  "context4": dict(context=4),
  "fsdp2context2": dict(fsdp=2, context=2),
  "data2context2tensor2": dict(data=2, context=2, tensor=2),
}
OF_EXPERTS: dict[str, dict[str, int]] = {
  "expert2": dict(expert=2),
  "expert4": dict(expert=4),
  "fsdp2expert2": dict(fsdp=2, expert=2),
  "data2expert2tensor2": dict(data=2, expert=2, tensor=2),
  "expert2context2": dict(expert=2, context=2),
}
EVERY_MESH = {**MESHES, **OF_ROWS, **OF_EXPERTS}
STEPS = 2
ROWS = 8  # of a batch: all the data, so that each step sees the same
# tokens in a row: room for the answers to one prompt, or for as many prompts with an answer each
LENGTH, LONGER = 64, 128
ONE_ANSWER = ("text", "labels", "outcomes", "steps")
RATES = dict(adafactor=0.01, sgd=0.05, lion=3e-4)  # of the others 1e-3


def draw(seed: int) -> Draw:
  """The choices of a seed, the same on every machine."""
  rng = np.random.default_rng((2024, seed))
  pick = lambda *values: values[int(rng.integers(len(values)))]
  chance = lambda share: bool(rng.random() < share)
  d: Draw = {"seed": seed, "family": pick(*FAMILIES), "fields": {}}
  d["method"] = _method(rng, pick)
  d["adapter"] = "none" if chance(0.2) else pick(*ADAPTERS)
  if d["adapter"] != "none" and chance(0.15):
    d["adapter"] += f"+{pick(*(other for other in ADAPTERS if other != d['adapter']))}"
  d["base"] = pick(*BASES) if d["adapter"] != "none" or chance(0.1) else "dense"
  d["optimizer"] = pick(*OPTIMIZERS)
  if set(d["adapter"].split("+")) <= set(NO_MATRICES) and chance(0.8):
    d["optimizer"] = pick(*OPTIMIZERS[:6])
  d["offload"] = _offload(d, pick, chance)
  d["remat"] = pick("auto", "none", "names", "dots", "full")
  if d["offload"] == "params" and chance(0.8):
    d["remat"] = pick("auto", "names", "dots", "full")
  d["accumulate"] = pick(1, 1, 2, 4)
  d["packing"] = chance(0.5)
  d["mesh"] = pick(*MESHES) if chance(0.6) else "none"
  d["mixture"] = pick("none", "none", "none", "replay", "mixture")
  d["truncate"] = "error"
  d["evaluated"] = pick("each step", "at the end") if chance(0.2) else "no"
  kind = kind_of(d["method"])
  if kind == "text":
    d["truncate"] = pick("error", "error", "drop", "keep_start")
  else:
    d["truncate"] = pick("error", "error", "drop", "prompt")
    d["share_prompt"] = chance(0.1 if "longlora" in d["adapter"] else 0.6)
  d["fields"] |= _objective(d["method"], pick, chance)
  d["fields"] |= _adapter(d["adapter"], pick, chance)
  d["fields"] |= _optimizer(d, pick, chance)
  if d["method"].partition(":")[0] in ("kto", "reward", "grouped") and chance(0.25):
    d["fields"]["objective.sft_weight"] = 0.5
  return d | _later(d, seed)


def _later(d: Draw, seed: int) -> Draw:
  """Axes that came after draws had been written down: from a generator of their own, so that the others stay."""
  rng = np.random.default_rng((2026, seed))
  pick = lambda *values: values[int(rng.integers(len(values)))]
  chance = lambda share: bool(rng.random() < share)
  new: Draw = {"held": "none", "attention": pick("auto", "auto", "xla")}
  if chance(0.25):
    new["family"] = pick(*MIXTURES)
    new["balance"] = pick(0.0, 0.01)
  if chance(0.3):
    new["mesh"] = pick(*OF_ROWS)
  if "family" in new and chance(0.5):
    new["mesh"] = pick(*OF_EXPERTS)
  if chance(0.15 if d["adapter"] != "none" else 0.03):
    new["held"] = "layers"
  if chance(0.15):
    new["remat"] = "host"
  return new


def _method(rng, pick) -> str:
  group = rng.choice(
    ["sft", "preference", "sum", "kto", "reward", "grouped"], p=[0.18, 0.32, 0.14, 0.08, 0.1, 0.18]
  )
  return {
    "sft": lambda: "sft",
    "preference": lambda: f"preference:{pick(*WITH_REFERENCE, *WITHOUT_REFERENCE)}",
    "sum": lambda: f"preference:{pick(*SUMS)}",
    "kto": lambda: "kto",
    "reward": lambda: f"reward:{pick('pairs', 'outcomes', 'steps')}",
    "grouped": lambda: f"grouped:{pick(*GROUPED)}",
  }[str(group)]()


def kind_of(method: str) -> str:
  """The kind of rows that a method reads, as data files here are named."""
  name, _, which = method.partition(":")
  if name == "preference":
    return "triples" if which in ("tpo", "tpo_norm") or "gold" in which else "pairs"
  return {"sft": "text", "kto": "labels", "grouped": "scored", "reward": which}[name]


def _offload(d: Draw, pick, chance) -> str:
  if not chance(0.05 if d["optimizer"] == "adafactor" else 0.3):
    return "none"
  return "params" if chance(0.5 if d["adapter"] == "none" else 0.05) else "state"


def _objective(method: str, pick, chance) -> dict[str, Any]:
  """Fields of the objective that are away from their defaults."""
  name, _, which = method.partition(":")
  fields: dict[str, Any] = {}
  if name in ("sft", "reward"):
    if method == "reward:pairs" and chance(0.5):
      fields["objective.centering"] = 0.0
    return fields
  names = which.split("+")
  referenced = name == "kto" or any(each in (*WITH_REFERENCE, "kto") for each in names)
  if name == "preference":
    if "bco" in names and chance(0.5):
      fields["objective.running_shift"] = True
    if all(each in DIFFERENCES for each in names) and chance(0.3):
      fields["objective.divergence"] = pick("forward_kl", "jensen_shannon", "alpha_divergence")
    compared = any(each not in LIKELIHOOD for each in names)
    if chance(0.15) and compared:
      fields["objective.weighting"] = True
    if chance(0.15) and compared:
      fields["objective.ld_alpha"] = 0.5
    if names[0] in ("dpo", "robust", "cpo") and chance(0.3):
      fields["objective.label_smoothing"] = 0.1
  if name == "kto":
    fields["objective.estimate_kl"] = chance(0.6)
    if chance(0.3):
      fields["objective.undesirable_weight"] = 1.5
  if name == "grouped":
    if chance(0.4):
      fields["objective.kl_weight"] = 0.1
    if chance(0.4) and which != "reinforce":  # which has no ratio
      fields["objective.old"] = "reference"
    referenced = "objective.kl_weight" in fields or "objective.old" in fields
  if not referenced:
    return fields
  fields["objective.cache_reference"] = chance(0.5)
  if chance(0.3):
    fields["objective.reference"] = pick("MODEL", "ADAPTER")
    if fields["objective.reference"] == "MODEL":
      fields["objective.reference_base"] = pick(*BASES)
  elif name != "grouped" and chance(0.2):
    fields["objective.sync_every"] = 1
    fields["objective.cache_reference"] = chance(0.05)
  return fields


def _adapter(name: str, pick, chance) -> dict[str, Any]:
  """The fields of config.adapter, of two methods in a section each and at modules apart."""
  methods = name.split("+")
  if len(methods) == 1:
    fields = _options(name, pick, chance)
    return {f"adapter.{field}": value for field, value in fields.items()}
  fields = {}
  for method, modules in zip(methods, ("('q_proj','v_proj')", "('k_proj','down_proj')")):
    own = _options(method, pick, chance) | {"modules_to_save": "()"}
    own.pop("rank_pattern", None)
    if method not in STANDING:
      own["target_modules"] = modules
    if method == "ia3":
      own["feedforward_modules"] = "()" if "q_proj" in modules else "('down_proj',)"
    fields |= {f"adapter.{method}.{field}": value for field, value in own.items()}
  return fields


def _options(method: str, pick, chance) -> dict[str, Any]:
  """Sizes that suit a tiny model, and options that are away from their defaults."""
  fields: dict[str, Any] = {}
  if method == "none":
    return fields
  if chance(0.15) and method != "longlora":
    fields["modules_to_save"] = pick("('embed_tokens',)", "('lm_head',)", "('norm',)")
  if method in STANDING:
    fields["num_virtual_tokens"] = 4
    if method == "prompt":
      fields["prompt_tuning_init"] = pick("RANDOM", "SAMPLE_VOCAB", "TEXT")
      if fields["prompt_tuning_init"] == "TEXT":
        fields["prompt_tuning_init_text"] = "be brief"
    return fields
  if chance(0.15):
    fields["layers_to_transform"] = "(1,)"
  if method == "ia3":
    return fields
  fields["target_modules"] = pick(
    "all-linear", "('q_proj','v_proj','down_proj')", "('o_proj','up_proj')", ".*(k|gate)_proj"
  )
  if chance(0.15):
    fields["lora_dropout"] = 0.1
  if method == "vera":
    return fields | {"r": 8}
  if method == "adalora":
    return fields | {"init_r": 4, "target_r": 2, "lora_alpha": 4.0}
  fields |= {"r": 4, "lora_alpha": 4.0}
  if chance(0.2):
    fields["use_rslora"] = True
  if chance(0.2):
    fields["depth_ranks"] = "(2,4)"
  if chance(0.2) and ("all" in fields["target_modules"] or "v_proj" in fields["target_modules"]):
    fields["rank_pattern"] = "{'v_proj':2}"
  if method in ("lora", "dora") and chance(0.3):
    fields["init_lora_weights"] = pick("gaussian", "zero_a", "pissa")
  if method == "longlora":
    fields["attention_group"] = 16
  return fields


def _optimizer(d: Draw, pick, chance) -> dict[str, Any]:
  fields: dict[str, Any] = {"optimizer.lr": RATES.get(d["optimizer"], 1e-3)}
  if d["optimizer"].startswith("galore"):
    fields |= {"optimizer.rank": 4, "optimizer.update_gap": pick(1, 200)}
  if chance(0.3):
    fields["optimizer.weight_decay"] = 0.01
  if chance(0.2):
    fields["optimizer.clip"] = 0.0
  if d["adapter"] in ("lora", "dora", "pissa", "olora", "loftq", "longlora") and chance(0.2):
    fields["optimizer.loraplus_lr_ratio"] = 4.0
  return fields


def command(d: Draw, shared: pathlib.Path) -> tuple[str, list[str]]:
  """(config file with its arguments, overrides) of a draw over the folders that `shared` holds."""
  name, _, which = d["method"].partition(":")
  kind = kind_of(d["method"])
  model = shared / "models" / d["family"]
  long = "-long" if d["truncate"] != "error" else ""
  rows, others = (str(shared / f"{kind}{more}.jsonl") for more in (long, "-other"))
  source = rows if d["mixture"] != "mixture" else f"{rows}*0.7+{others}*0.3"
  arguments = dict(model=model, data=source, adapter=d["adapter"], base=d["base"])
  if which:
    arguments[dict(preference="loss", reward="kind", grouped="method")[name]] = which
  sizes = EVERY_MESH[d["mesh"]]
  shares = math.prod(sizes.get(axis, 1) for axis in ("data", "fsdp", "expert"))
  fields: dict[str, Any] = {
    "steps": STEPS,
    "batch.rows": max(ROWS, shares * d["accumulate"]),
    "batch.accumulate": d["accumulate"],
    "checkpoint.every": 1,
    "checkpoint.keep": STEPS,
    "data.length": LENGTH if kind in ONE_ANSWER or d.get("share_prompt") else LONGER,
    "data.packing": d["packing"],
    "data.truncate": d["truncate"],
    "data.eval": others if d["evaluated"] != "no" else "",
    "data.eval_rows": 4 if d["evaluated"] != "no" else 0,
    "eval.every": int(d["evaluated"] == "each step"),
    **{f"mesh.{axis}": size for axis, size in sizes.items()},
    "model.remat": d["remat"],
    "model.offload": d["held"],
    "model.attention": d["attention"],
    "optimizer.name": d["optimizer"],
    "optimizer.offload": d["offload"],
  }
  if "share_prompt" in d:
    fields["data.share_prompt"] = d["share_prompt"]
  if d["mixture"] == "replay":
    fields |= {"data.replay": others, "data.replay_fraction": 0.25}
  if "balance" in d:
    fields["model.router_aux_loss_coef"] = d["balance"]
  fields |= d["fields"]
  places = dict(MODEL=f"{model}-other", ADAPTER=f"{model}-adapter")
  given = [f"--config.{field}={places.get(str(v), v)}" for field, v in fields.items()]
  stated = ",".join(f"{argument}={value}" for argument, value in arguments.items())
  return f"{name}.py:{stated}", given


def devices(d: Draw) -> int:
  return math.prod(EVERY_MESH[d["mesh"]].values())


def shown(d: Draw) -> str:
  """A draw in a line."""
  fields = " ".join(f"{name}={value}" for name, value in d["fields"].items())
  return (
    " ".join(f"{name}={value}" for name, value in d.items() if name != "fields") + f" | {fields}"
  )
