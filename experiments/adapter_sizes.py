"""What each adapter trains of Llama-3-8B and 70B: parameters counted from shapes, no weight read.

  .venv/bin/python experiments/adapter_sizes.py

Prints the table and writes it to experiments/results/adapter_sizes.md; `make oracle` holds each count against PEFT's.
"""

from __future__ import annotations

from pathlib import Path

import jax

from posttrain_jax import adapters
from posttrain_jax.adapters import AdapterConfig
from posttrain_jax.core import tree
from posttrain_jax.models import decoder
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.models.shapes import SHAPES

OUT = Path(__file__).resolve().parent / "results" / "adapter_sizes.md"
MODELS = {"llama3-8b": "Llama-3-8B", "llama3-70b": "Llama-3-70B"}
ADAPTERS = {
  "LoRA, rank 16": AdapterConfig(r=16),
  "DoRA, rank 16": AdapterConfig(method="dora", r=16),
  "AdaLoRA, at the start (rank 12)": AdapterConfig(method="adalora", init_r=12),
  "VeRA, rank 256": AdapterConfig(method="vera", r=256),
  "(IA)³, keys, values, down": AdapterConfig(
    method="ia3", target_modules=("k_proj", "v_proj", "down_proj")
  ),
  "prompt tuning, 20 tokens": AdapterConfig(method="prompt", num_virtual_tokens=20),
  "prefix tuning, 20 tokens": AdapterConfig(method="prefix", num_virtual_tokens=20),
}


def trained(model: ModelConfig, config: AdapterConfig) -> int:
  """Parameters that the adapter trains."""
  make = lambda params: adapters.init(jax.random.key(0), params, config)[1]
  return adapters.count(jax.eval_shape(make, decoder.abstract(model)))


def table() -> str:
  """Markdown: a row a method, its parameters and their share of the model's."""
  sizes = {name: tree.size(decoder.abstract(SHAPES[name])) for name in MODELS}
  titles = [f"{title} ({sizes[name]:,})" for name, title in MODELS.items()]
  lines = [f"| trained parameters | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
  for title, config in ADAPTERS.items():
    counts = {name: trained(SHAPES[name], config) for name in MODELS}
    cells = [f"{n:,} ({100 * n / sizes[name]:.4f} %)" for name, n in counts.items()]
    lines.append(f"| {title} | {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def main() -> None:
  made = table()
  OUT.parent.mkdir(exist_ok=True)
  OUT.write_text(made)
  print(made, end="")


if __name__ == "__main__":
  main()
