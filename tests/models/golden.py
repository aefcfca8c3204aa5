"""Logits of transformers for every family of `tests.models.families`, in `golden_logits.json`.

Written by   .venv-oracle/bin/python -m tests.models.golden   (torch 2.13.0, transformers 5.23.0, CPU)
"""

import json
import tempfile
from pathlib import Path

from tests.models import families

PATH = Path(__file__).parent / "golden_logits.json"
POSITIONS = (0, 8, 47)  # of LONGEST tokens; the second is where a window starts to matter
ENTRIES = 6


def main():
  import torch
  import transformers

  from posttrain_jax.models import hf

  found = {}
  tokens = torch.tensor(families.tokens(1, families.LONGEST), dtype=torch.long)
  for name in families.FAMILIES:
    config, params = families.make(name)
    with tempfile.TemporaryDirectory() as folder:
      hf.save(f"{folder}/model", params, config)
      model = transformers.AutoModelForCausalLM.from_pretrained(
        f"{folder}/model", attn_implementation="eager"
      )
    with torch.no_grad():
      logits = model.eval()(input_ids=tokens).logits[0, list(POSITIONS), :ENTRIES]
    found[name] = [[round(x, 6) for x in row] for row in logits.tolist()]
  lines = [f"{json.dumps(name)}: {json.dumps(rows)}" for name, rows in found.items()]
  PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
  main()
