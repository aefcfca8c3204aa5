"""A row of 32,768 tokens, as sixteen documents and as one: seconds of CPU and bytes of a layer, both ways.

  python experiments/long_rows.py [--name=now] [--tokens=32768] [--cases=012]

The attention of a layer of SmolLM2-135M's sizes, its projections among it and an MLP of 8 beside it, on random weights
in float32, forward and backward; sixteen rows of 2,048 tokens are what documents cost that have a row each.  Figures go
to experiments/results/long_rows.{json,md}, under the name that is given: with PYTHONPATH at another checkout, what that
one needs.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.core import files
from posttrain_jax.models import decoder
from posttrain_jax.models.config import from_hf

OUT = Path(__file__).resolve().parent / "results" / "long_rows"
DOCUMENTS = 16
LAYER = dict(
  model_type="llama",
  vocab_size=512,
  hidden_size=576,
  intermediate_size=8,
  num_hidden_layers=1,
  num_attention_heads=9,
  num_key_value_heads=3,
  max_position_embeddings=65536,
  rms_norm_eps=1e-5,
  rope_theta=100000,
  bos_token_id=None,
  eos_token_id=1,
  pad_token_id=2,
  tie_word_embeddings=True,
)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--name", default="now")
  parser.add_argument("--tokens", type=int, default=32768)
  parser.add_argument("--cases", default="012")
  asked = parser.parse_args()
  path = OUT.with_suffix(".json")
  results = json.loads(path.read_text()) if path.exists() else {}
  each = asked.tokens // DOCUMENTS
  every = (
    (f"{DOCUMENTS} rows of one document of {each:,}", DOCUMENTS, 1),
    (f"a row of {DOCUMENTS} documents of {each:,}", 1, DOCUMENTS),
    (f"a row of one document of {asked.tokens:,}", 1, 1),
  )
  for case, rows, documents in (every[int(number)] for number in asked.cases):
    figures = measured(asked.tokens // rows, rows, documents)
    results.setdefault(case, {})[asked.name] = figures
    print(f"{case}, {asked.name}: {figures}", flush=True)
    files.write_json(path, results)
    files.write_text(OUT.with_suffix(".md"), page(results))
  return 0


def measured(length: int, rows: int, documents: int) -> dict[str, float]:
  """CPU seconds and seconds of a run, and the MiB that the program takes for itself."""
  model = from_hf(LAYER)
  params = decoder.init(jax.random.key(0), model)
  each = length // documents
  given = dict(
    positions=np.tile(np.arange(each, dtype=np.int32), (rows, documents)),
    segment_ids=np.tile(np.repeat(np.arange(1, documents + 1, dtype=np.int32), each), (rows, 1)),
  )
  tokens = np.random.default_rng(0).integers(3, 512, (rows, length)).astype(np.int32)

  def loss(params: Any, tokens: Any, given: Any) -> Any:
    return jnp.mean(jnp.square(decoder.hidden(params, tokens, model, **given)))

  program = jax.jit(jax.value_and_grad(loss)).lower(params, tokens, given).compile()
  memory: Any = program.memory_analysis()
  temporaries = memory.temp_size_in_bytes
  before, began = _cpu(), time.monotonic()
  jax.block_until_ready(program(params, tokens, given))
  return {
    "cpu_seconds": round(_cpu() - before, 2),
    "seconds": round(time.monotonic() - began, 2),
    "temporaries_mib": round(temporaries / 2**20, 1),
  }


def _cpu() -> float:
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return usage.ru_utime + usage.ru_stime


def page(results: dict[str, dict[str, dict[str, float]]]) -> str:
  names = list(dict.fromkeys(name for each in results.values() for name in each))
  lines = [
    "# Attention of a layer of SmolLM2-135M on 32,768 tokens, forward and backward, float32",
    "",
    f"Written by `python experiments/long_rows.py`; jax {jax.__version__}, {platform.machine()}, two cores that others"
    " use as well. Seconds of CPU, and MiB that the program takes beside its arguments.",
    "",
    f"| | {' | '.join(f'{name}: CPU s | MiB' for name in names)} |",
    "|---|" + "---|---|" * len(names),
  ]
  for case, by_name in results.items():
    cells = [
      f"{by_name[name]['cpu_seconds']:g} | {by_name[name]['temporaries_mib']:,.0f}"
      if name in by_name
      else "- | -"
      for name in names
    ]
    lines.append(f"| {case} | {' | '.join(cells)} |")
  if "before" in names:
    lines += [
      "",
      "Before, a block of queries was compared with every key up to its end: the two rows were one program, run once.",
    ]
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  raise SystemExit(main())
