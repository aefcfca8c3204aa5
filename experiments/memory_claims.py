"""What playbooks say about memory, beside arithmetic and the compiler: ten claims, each with a verdict.

  make memory-claims         (goes on after the cases that are written; FRESH=1 begins anew)

Steps are compiled by libtpu and by jax's CUDA plugin for devices that are not here; 7B is Llama 2's, 70B Llama 3's.
The figures go to experiments/results/memory_claims.{md,json}.
"""

from __future__ import annotations

import compile_70b  # before jax: it keeps jax from looking for a device

# isort: split
import functools
import json
import math
import sys
from pathlib import Path

import apart

from posttrain_jax import settings
from posttrain_jax.core import files, tree
from posttrain_jax.models import decoder
from posttrain_jax.models.shapes import SHAPES
from posttrain_jax.plan import estimate
from posttrain_jax.quant import nf4

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "experiments" / "results" / "memory_claims"
GB = 1e9
H100, B200, V5P = ("h100:1x1", 1), ("b200:1x1", 1), ("v5p:2x2x1", 1)
H100S = ("h100:1x8", 8)
_QLORA = "sft:model=llama3-70b,adapter=lora,base=nf4"
_HOST = {"model.remat": "host", "optimizer.offload": "params"}
_IN_STEP = {"objective.cache_reference": False, "model.remat": "full"}
_WRITTEN = {"model.remat": "full", "online.samples": 4, "online.max_new_tokens": 256}
_PPO = "rl:model=llama2-7b,reward=number,method=ppo"
# name -> (place, config with its arguments, fields); a row of 2,048 tokens
CASES = {
  "70B QLoRA, remat auto, H100": (H100, _QLORA, {}),
  "70B QLoRA, remat full, H100": (H100, _QLORA, {"model.remat": "full"}),
  "70B QLoRA, base on the host, H100": (H100, _QLORA, {**_HOST, "model.offload": "layers"}),
  "70B QLoRA, adapter and inputs on the host, H100": (H100, _QLORA, _HOST),
  "7B LoRA, remat none": (
    H100, "sft:model=llama2-7b,adapter=lora", {"model.remat": "none"},
  ),
  "7B LoRA, remat full": (
    H100, "sft:model=llama2-7b,adapter=lora", {"model.remat": "full"},
  ),
  "7B DPO, LoRA, adapter off as the reference": (
    H100, "preference:model=llama2-7b,adapter=lora", _IN_STEP,
  ),
  "7B DPO, LoRA on NF4, adapter off as the reference": (
    H100, "preference:model=llama2-7b,adapter=lora,base=nf4", _IN_STEP,
  ),
  "7B DPO, LoRA, NF4 reference": (
    H100, "preference:model=llama2-7b,adapter=lora",
    {**_IN_STEP, "objective.reference": "llama2-7b", "objective.reference_base": "nf4"},
  ),
  "7B full": (B200, "sft:model=llama2-7b,adapter=none", {"model.remat": "full"}),
  "7B DPO, full": (B200, "preference:model=llama2-7b,adapter=none", _IN_STEP),
  "7B GRPO, LoRA": (
    H100, "rl:model=llama2-7b,adapter=lora,reward=number",
    _WRITTEN,
  ),
  "7B PPO, LoRA": (H100, f"{_PPO},adapter=lora", _WRITTEN),
  "7B PPO, LoRA, critic on the policy's trunk": (
    H100, f"{_PPO},adapter=lora", {**_WRITTEN, "critic.trunk": "shared"},
  ),
  "7B PPO, full, 8 devices": (
    H100S, f"{_PPO},adapter=none", {**_WRITTEN, "online.kl_in_reward": 0.05},
  ),
  "7B GRPO, full, 8 devices": (
    H100S, "rl:model=llama2-7b,adapter=none,reward=number", _WRITTEN,
  ),
  "70B QLoRA, adapter and inputs on the host, v5p": (V5P, _QLORA, _HOST),
  "70B QLoRA, base on the host, v5p": (V5P, _QLORA, {**_HOST, "model.offload": "layers"}),
  "70B QLoRA, remat full, v5p": (V5P, _QLORA, {"model.remat": "full"}),
}  # fmt: skip


def main() -> int:
  path = OUT.with_suffix(".json")
  fresh = "--fresh" in sys.argv[1:] or not path.exists()
  compiled = {} if fresh else json.loads(path.read_text())["compiled"]
  for name in CASES:
    if name not in compiled:
      compiled[name] = facts = apart.measured(measure, (name,))
      print(name, facts.get("peak_gib"), facts.get("unfinished"), flush=True)
      write(compiled)
  write(compiled)
  return 0


def measure(name: str) -> dict:
  """What `posttrain plan` says of a case."""
  (topology, devices), config, fields = CASES[name]
  file, _, arguments = config.partition(":")
  given = {"data.length": 2048, "batch.rows": devices, "eval.rows": devices, **fields}
  overrides = [settings.override(field, value) for field, value in given.items()]
  loaded = settings.load(f"{ROOT}/configs/{file}.py:{arguments}", overrides)
  return estimate.figures(loaded, topology=topology, devices=devices)


def write(compiled: dict) -> None:
  OUT.parent.mkdir(exist_ok=True)
  files.write_json(
    OUT.with_suffix(".json"), {"machine": compile_70b.machine(), "compiled": compiled}
  )
  files.write_text(OUT.with_suffix(".md"), page(compiled))


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def total(name: str) -> int:
  return tree.size(decoder.abstract(SHAPES[name]))


def lora(name: str, rank: int) -> int:
  """sum of rank (in + out) over the linear modules of the layers."""
  shapes = [
    leaf.shape
    for path, leaf in tree.items(decoder.abstract(SHAPES[name]))
    if path.startswith("layers/") and path.endswith("_proj/weight")
  ]
  return sum(layers * rank * (rows + columns) for layers, rows, columns in shapes)


def quantised(name: str, *, double: bool) -> tuple[float, float]:
  """(bytes of the layers' NF4 matrices, bits a weight)."""
  matrices = [
    leaf.shape
    for path, leaf in tree.items(decoder.abstract(SHAPES[name]))
    if path.startswith("layers/") and path.endswith("_proj/weight")
  ]
  size = sum(tree.nbytes({"w": nf4.abstract(shape, double_quant=double)}) for shape in matrices)
  return size, 8 * size / sum(map(math.prod, matrices))


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def page(compiled: dict) -> str:
  """The claims as a Markdown page."""
  peak = lambda name: _peak(compiled, name)
  ratio = lambda a, b, kind=None: _ratio(compiled, a, b, kind)
  seven, llama8, seventy = total("llama2-7b"), total("llama3-8b"), total("llama3-70b")
  size, bits = quantised("llama3-70b", double=True)
  single, _ = quantised("llama3-70b", double=False)
  ends = 2 * 2 * SHAPES["llama3-70b"].vocab_size * SHAPES["llama3-70b"].hidden_size
  ten = 4 * 10 * lora("llama3-70b", 16)
  hidden = SHAPES["llama2-7b"].hidden_size
  claims = [
    (
      "1. Rank 16 on 4096 x 4096 trains 131k against 16.8M, 122x fewer; rank 8 260x",
      f"16 x 8,192 = {16 * 8192:,} of {4096**2:,}: {4096**2 / (16 * 8192):.0f}x; rank 8: {4096**2 / (8 * 8192):.0f}x",
      "",
      "the counts are right; the factors are 128 and 256",
    ),
    (
      "2. 41,943,040 of 6,738,415,616 train, 0.62 %, rank 16 on all linear modules",
      f"Llama-2-7B: {lora('llama2-7b', 16):,} of {seven:,}, {lora('llama2-7b', 16) / seven:.2%}; "
      f"Llama-3-8B: {lora('llama3-8b', 16):,} of {llama8:,}, {lora('llama3-8b', 16) / llama8:.2%}",
      "",
      "the two numbers are of two models",
    ),
    (
      "3. LoRA trains 0.1 to 1 % of the parameters; 20-80M of a 70B model",
      f"rank 8 to 64 on all linear modules of 70B: {lora('llama3-70b', 8) / 1e6:.0f}M to "
      f"{lora('llama3-70b', 64) / 1e6:.0f}M, "
      f"{lora('llama3-70b', 8) / seventy:.2%} to {lora('llama3-70b', 64) / seventy:.2%}",
      "",
      f"the share is right; 20-80M is rank 2 to 6, and 16 is {lora('llama3-70b', 16) / 1e6:.0f}M",
    ),
    (
      "4. NF4: 70B in about 35 GB; double quantisation saves about 0.5 GB (0.37 bit a weight by its paper)",
      f"{bits:.3f} bits: {size / GB:.1f} GB of matrices, and {ends / GB:.1f} GB of table and head in bfloat16; "
      f"without double quantisation {(single - size) / GB:.1f} GB more",
      _parameters(compiled, "70B QLoRA, remat full, H100"),
      "35 GB leaves out table and head; double quantisation saves 3 GB, six times what was said",
    ),
    (
      "5. 70B QLoRA on one 80 GB device in 44.5 to 48 GB, Adam (21 GB) on the host; on one of 24 GB with the base on"
      " the host",
      f"base {(size + ends) / GB:.1f}, adapter of rank 16 {4 * lora('llama3-70b', 16) / GB:.2f}, gradients as much, "
      f"Adam {8 * lora('llama3-70b', 16) / GB:.2f}, inputs of 80 layers {80 * 2048 * 8192 * 2 / GB:.2f} GB",
      "; ".join(
        f"{name.removeprefix('70B QLoRA, ')}: {peak(name)}"
        for name in CASES
        if name.startswith("70B")
      ),
      "about 47 GB with every layer recomputed. remat=auto keeps 25 GiB of what lies within layers, which is what a"
      " first trial of 69.3 GiB had. Adam of an adapter is 1.7 GB; 21 GB would be rank 200. With the base on the host"
      " 24 GB are enough",
    ),
    (
      "6. 7B DPO about 80 GB; with LoRA and a 4-bit reference about 25; RLHF with four models 64 GB and more",
      f"full, float32: policy, reference, gradient, Adam {20 * seven / GB:.0f} GB; four models in bfloat16 "
      f"{8 * seven / GB:.0f} GB before anything trains, and with policy and critic trained by Adam in mixed precision "
      f"{(2 * 16 + 2 * 2) * seven / GB:.0f}",
      "; ".join(
        f"{name}: {peak(name)}"
        for name in CASES
        if name.startswith("7B DPO") or "GRPO" in name or "PPO" in name
      ),
      "80 GB is bfloat16 without master weights; a reference that is the base with its adapter off costs no model; "
      "GRPO has no critic, and RLHF that trains two models takes three times what is said; with adapters policy, critic"
      " and reference share one base, and a reward model of 7B in bfloat16 has 13.5 GB beside what is compiled",
    ),
    (
      "7. DPO costs 2x the memory of SFT",
      "full: 20 bytes a parameter against 16; with an adapter the reference is there already",
      f"full: {ratio('7B DPO, full', '7B full')}; LoRA: "
      f"{ratio('7B DPO, LoRA, adapter off as the reference', '7B LoRA, remat full')}",
      "1.25x in full fine-tuning, and about 1x with an adapter, of rows as long",
    ),
    (
      "8. Gradient checkpointing cuts activations 8x",
      f"a layer's input is {hidden} numbers a token of {_kept()}: {_kept() / hidden:.1f}x",
      ratio("7B LoRA, remat none", "7B LoRA, remat full", "activations"),
      "more than 8x of what layers keep; of a step's temporaries less, since logits and one layer stay",
    ),
    (
      "9. Ten adapters against ten full fine-tunes of 70B",
      f"rank 16, float32: {ten / GB:.1f} GB and one base of {2 * seventy / GB:.0f} GB in bfloat16, against "
      f"{20 * seventy / GB:.0f} GB",
      "",
      f"{20 * seventy / (ten + 2 * seventy):.1f}x less with the base, {20 * seventy / ten:.0f}x without",
    ),
    (
      "10. Prompt tuning stores KBs to MBs a task",
      f"20 tokens, float32: {4 * 20 * hidden / 1e6:.2f} MB of 7B, {4 * 20 * 8192 / 1e6:.2f} MB of 70B",
      "",
      "right",
    ),
  ]
  missing = [name for name in CASES if name not in compiled]
  return "\n".join(
    [
      "# What playbooks say about memory",
      "",
      "Written by `make memory-claims`; steps are compiled from shapes, and none was run on an accelerator.",
      f"{compile_70b.machine()}.  A row of 2,048 tokens; GiB in a device's memory as compiled.",
      "The CUDA plugin without a card keeps no arrays of the host apart: what lies there is taken off by arithmetic,",
      "and the gradient is not.",
      "",
      "| quoted | computed | compiled | verdict |",
      "|---|---|---|---|",
      *("| " + " | ".join(claim) + " |" for claim in claims),
      *(["", f"Not compiled yet: {'; '.join(missing)}."] if missing else []),
      "",
    ]
  )


def _kept() -> int:
  """Numbers a token that a layer keeps without recomputing, by the lower bound of `posttrain plan`."""
  model = SHAPES["llama2-7b"]
  heads = model.num_heads * model.head_dim
  return model.hidden_size + 2 * 4 * heads + 4 * model.hidden_size + 4 * model.intermediate_size


def _peak(compiled: dict, name: str) -> str:
  if (facts := compiled.get(name)) is None:
    return "not yet"
  if why := facts.get("unfinished"):
    return why
  if facts["compiled"] is None:
    return "does not fit"
  host = facts["by_kind_gib"]["host"]
  return f"{facts['peak_gib']:.1f} GiB" + (f" ({host:.1f} on the host)" if host > 0.05 else "")


def _parameters(compiled: dict, name: str) -> str:
  if not _has_figures(compiled, name):
    return "not yet"
  return f"{compiled[name]['by_kind_gib']['parameters'] * 2**30 / GB:.1f} GB of parameters"


def _has_figures(compiled: dict, name: str) -> bool:
  return compiled.get(name, {}).get("compiled") is not None


def _ratio(compiled: dict, a: str, b: str, kind: str | None) -> str:
  if not (_has_figures(compiled, a) and _has_figures(compiled, b)):
    return "not yet"
  first, second = (compiled[name]["peak_gib" if kind is None else "by_kind_gib"] for name in (a, b))
  if kind is not None:
    first, second = first[kind], second[kind]
  return f"{first:.1f} / {second:.1f} GiB = {first / second:.2f}x"


if __name__ == "__main__":
  sys.exit(main())
