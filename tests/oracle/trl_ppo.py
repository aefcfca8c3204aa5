"""Runs the lines of TRL's PPO trainer that compute rewards, advantages and losses, and keeps their numbers.

python -m tests.oracle.trl_ppo .../trl/experimental/ppo/ppo_trainer.py      (of TRL 0.27.0; later ones have no PPO)

They are compared with in `tests/losses/test_ppo.py`.  Needs torch, and nothing of TRL but that file.
"""

import ast
import json
import pathlib
import sys
import textwrap
import types
from typing import Any

import numpy as np
import torch

OUT = pathlib.Path(__file__).parents[1] / "losses" / "trl_ppo.json"
FUNCTIONS = ("masked_mean", "masked_var", "masked_whiten")
# the first and the last line of what is run
COLLECTED = ("logprobs = torch.masked_fill(", "advantages = torch.masked_fill(")
LOSSES = ("new_logprobs = torch.masked_fill(", "loss = pg_loss +")
CASES = {  # answers' lengths, of 5 tokens at most
  "whole": ((5, 5, 5, 5), dict(gamma=0.9, lam=0.8, kl_estimator="k1", whiten_rewards=False)),
  "whole, k3": ((5, 5, 5, 5), dict(gamma=1.0, lam=0.95, kl_estimator="k3", whiten_rewards=False)),
  # a score is given one token behind the end, where the value is set to 0 here
  "ragged": ((1, 5, 2, 4), dict(gamma=1.0, lam=1.0, kl_estimator="k1", whiten_rewards=False)),
}


def main() -> None:
  source = pathlib.Path(sys.argv[1]).read_text()
  OUT.write_text(json.dumps({name: run(source, *case) for name, case in CASES.items()}, indent=1))


def run(source: str, lengths: tuple[int, ...], options: dict) -> dict:
  rng = np.random.default_rng(len(options["kl_estimator"]) + lengths[0])
  shape = (len(lengths), 5)
  normal = lambda mean, spread: torch.tensor(rng.normal(mean, spread, shape), dtype=torch.float64)
  given = {
    "logprobs": normal(-2, 0.5),
    "ref_logprobs": normal(-2, 0.5),
    "values": normal(0, 0.6),
    "new_logprobs": normal(-2, 0.3),
    "vpred": normal(0, 0.6),
    "scores": torch.tensor(rng.normal(0, 1, len(lengths)), dtype=torch.float64),
  }
  last = torch.tensor(lengths) - 1
  index = torch.arange(5).repeat(len(lengths), 1)
  given["values"] = torch.where(index > last[:, None], 0.0, given["values"])
  kept = {name: value.numpy().tolist() for name, value in given.items()}
  args = types.SimpleNamespace(
    kl_coef=0.3, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1, **options
  )
  names: dict[str, Any] = dict(
    given, torch=torch, args=args, sequence_lengths=last, INVALID_LOGPROB=1.0
  )
  names |= dict(
    responses=torch.zeros(shape), response_idxs=index, padding_mask=index > last[:, None]
  )
  tree = ast.parse(source)
  for node in tree.body:
    if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS:
      exec(ast.unparse(node), names)
  exec(between(source, *COLLECTED), names | {}, names)
  leaves = {name: given[name].clone().requires_grad_() for name in ("new_logprobs", "vpred")}
  every = slice(None)
  names |= dict(leaves, micro_batch_inds=every, mb_values=names["values"])
  names |= dict(mb_return=names["returns"], mb_advantage=names["advantages"])
  names |= dict(mb_logprobs=names["logprobs"])
  exec(between(source, *LOSSES).replace("vpred = vpred_temp", "pass # "), names)
  names["loss"].backward()
  found = {name: names[name].tolist() for name in ("advantages", "returns")}
  found |= {name: names[name].item() for name in ("pg_loss", "vf_loss", "vf_clipfrac", "loss")}
  found |= {f"d_{name}": leaf.grad.tolist() for name, leaf in leaves.items()}
  return {"lengths": lengths, "options": vars(args), "given": kept, "found": found}


def between(source: str, first: str, last: str) -> str:
  """The lines from one that begins so to the next that begins so, with what belongs to it."""
  lines = source.splitlines()
  is_at = lambda i, text: lines[i].strip().startswith(text)
  start = next(i for i in range(len(lines)) if is_at(i, first))
  end = next(i for i in range(start, len(lines)) if is_at(i, last))
  while lines[end].count("(") > lines[end].count(")"):
    end += 1
  return textwrap.dedent("\n".join(lines[start : end + 1]))


if __name__ == "__main__":
  main()
