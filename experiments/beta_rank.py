"""What beta does, at three ranks: DPO on the SQL task through `posttrain sweep`, then the policies' own answers.

  .venv/bin/python experiments/beta_rank.py [--workdir=runs/beta_rank] [--report]

Pairs: a query that returns what was asked for over SmolLM2-135M-Instruct's own wrong one, 128 of them.  After each run
the policy answers held-out questions at temperature 1, and its answers tell the KL to the reference, which no data of
others can: the sum over an answer's tokens of the exact KL of the next-token distributions, its mean over answers (the
same in expectation as that of log pi - log pi_ref, with less noise).  Finished points are skipped; every one renews
experiments/results/beta_rank.{md,json,png}.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from posttrain_jax import adapters, objectives
from posttrain_jax.adapters import peft_format
from posttrain_jax.core import files
from posttrain_jax.data import answers, chat, packing, templates
from posttrain_jax.data.chat import Example
from posttrain_jax.data.tasks import sql
from posttrain_jax.evals import figures
from posttrain_jax.losses import logprob
from posttrain_jax.models import decoder, fetch, hf
from posttrain_jax.objectives.rows import spans
from posttrain_jax.rewards import sql as sql_reward
from posttrain_jax.rollout import engine
from posttrain_jax.rollout.sampling import Sampling
from posttrain_jax.runs import record as runs

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "experiments" / "results" / "beta_rank"
CONFIG = ROOT / "configs" / "beta_rank.py"
RANKS, BETAS = (4, 16, 64), (0.01, 0.03, 0.1, 0.3, 1.0)
ASKED, LONGEST = 48, 64  # questions, tokens of an answer


def posttrain(*arguments: str) -> None:
  subprocess.run([sys.executable, "-m", "posttrain_jax", *arguments], check=True)


@functools.cache
def base() -> tuple[Any, Any, Any, list[list[int]], list[dict]]:
  """(params, config, tokenizer, prompts, questions)."""
  folder = fetch.resolve("smollm2")
  params, config = hf.load(folder)
  tokenizer = chat.load_tokenizer(folder)
  template = chat.template(tokenizer)
  questions = sql.examples("test", n=ASKED)
  texts = template.render_all([templates.job(row["prompt"], True) for row in questions])
  prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
  return params, config, tokenizer, prompts, questions


def measured(folder: Path) -> dict[str, float]:
  """Of the policy's own answers: KL to the reference, length, and how many return what was asked for."""
  params, config, tokenizer, prompts, questions = base()
  adapter, _ = peft_format.load(folder / "adapter", params, config)
  policy = adapters.merge(params, adapter)
  drawn = engine.generate(
    policy,
    config,
    prompts,
    max_new_tokens=LONGEST,
    sampling=Sampling(temperature=1.0),
    stop_tokens=engine.stop_tokens(config, tokenizer),
    seed=0,
  )
  made = []
  for prompt, tokens in zip(prompts, drawn.tokens):
    whole = np.asarray([*prompt, *tokens], np.int32)
    made.append(answers.join([Example(whole, np.arange(len(whole)) >= len(prompt))]))
  length = -(-max(map(len, made)) // 64) * 64
  scorer = objectives.Labelled(config)

  @jax.jit
  def divergences(policy, params, batch):
    at = spans(batch)
    own, other = (scorer.hidden(p, batch) for p in (policy, params))
    heads = decoder.head(policy), decoder.head(params)
    return at.per_answer(logprob.kl_divergence(own, heads[0], other, heads[1], mask=at.mask))

  found = []
  for start in range(0, len(made), 8):
    batch = packing.pack_answers(made[start : start + 8], [[i] for i in range(8)], length, 1)
    found.append(np.asarray(divergences(policy, params, batch))[:, 0])
  kl = np.concatenate(found)
  texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in drawn.tokens]
  return {
    "kl": float(np.mean(kl)),
    "kl_error": float(np.std(kl, ddof=1) / len(kl) ** 0.5),
    "length": float(np.mean([len(tokens) for tokens in drawn.tokens])),
    "correct": sum(
      sql_reward.score(text, row["gold"]).value == 1 for text, row in zip(texts, questions)
    ),
  }


def point(folder: Path) -> dict[str, Any] | None:
  if not (folder / runs.DONE).exists():
    return None
  path = folder / "own_answers.json"
  if not path.exists():
    files.write_json(path, measured(folder))
  found = runs.read(folder)
  final = found.final()
  config = found.record["config"]
  return {
    "rank": config["adapter"]["r"],
    "beta": config["objective"]["beta"],
    "accuracy": final["eval_rewards/accuracies"],
    "margin": final["eval_rewards/margins"],
    # beta takes part in the margin: this is the same in nats, apart from it
    "margin_nats": final["eval_rewards/margins"] / config["objective"]["beta"],
    "chosen_drift": final["eval_logps/chosen_drift"],
    "rejected_drift": final["eval_logps/rejected_drift"],
    "loss": final["eval_loss"],
    **json.loads(path.read_text()),
  }


PANELS = {
  "accuracy": "reward accuracy, held-out pairs",
  "margin": "margin, held-out pairs",
  "kl": "KL to the reference, nats an answer",
  "length": "tokens an answer",
}


def figure(results: list[dict[str, Any]]) -> Figure:
  with figures.style():
    drawing = Figure(figsize=(11, 2.8), layout="constrained")
    for axis, (name, title) in zip(drawing.subplots(1, len(PANELS)), PANELS.items()):
      for rank in RANKS:
        own = sorted((r["beta"], r[name]) for r in results if r["rank"] == rank)
        if own:
          axis.plot(*zip(*own), marker="o", markersize=3, label=f"rank {rank}")
      axis.set(title=title, xlabel="beta", xscale="log")
    if axis.lines:
      axis.legend()
  return drawing


def report(results: list[dict[str, Any]]) -> None:
  results = sorted(results, key=lambda r: (r["rank"], r["beta"]))
  lines = [
    "# What beta does",
    "",
    f"Written by `experiments/beta_rank.py`: {len(results)} of {len(RANKS) * len(BETAS)} points; DPO, 24 steps of 4"
    " rows of 512 tokens, one seed, the same rate for all.",
    "",
    "| rank | beta | reward accuracy | margin | margin / beta, nats | chosen, nats | rejected, nats |"
    f" KL, nats an answer | tokens an answer | right of {ASKED} |",
    "|---" * 10 + "|",
  ]
  for r in results:
    lines.append(
      f"| {r['rank']} | {r['beta']} | {r['accuracy']:.2f} | {r['margin']:.3f} | {r['margin_nats']:.1f} |"
      f" {r['chosen_drift']:+.1f} | {r['rejected_drift']:+.1f} | {r['kl']:.2f} ± {r['kl_error']:.2f} |"
      f" {r['length']:.1f} | {r['correct']} |"
    )
  lines += ["", *verdict(results)]
  OUT.parent.mkdir(exist_ok=True)
  files.write_json(OUT.with_suffix(".json"), {"results": results})
  files.write_text(OUT.with_suffix(".md"), "\n".join(lines) + "\n")
  figures.save_png(figure(results), OUT.with_suffix(".png"))


def verdict(results: list[dict[str, Any]]) -> list[str]:
  """What playbooks claim of beta, and what these numbers say: does the KL fall as beta rises, at each rank?"""
  said = [
    "Playbooks say both that a higher beta pushes the policy away from its reference and that it holds it there. Here:",
    "",
  ]
  falls = steps = 0
  for rank in RANKS:
    own = sorted((r["beta"], r["kl"]) for r in results if r["rank"] == rank)
    if len(own) < 2:
      continue
    down = sum(b[1] < a[1] for a, b in itertools.pairwise(own))
    falls, steps = falls + down, steps + len(own) - 1
    said.append(
      f"- rank {rank}: from beta {own[0][0]} to {own[-1][0]} the KL to the reference goes from {own[0][1]:.2f} to"
      f" {own[-1][1]:.2f} nats an answer; it falls in {down} of {len(own) - 1} steps."
    )
  if falls == steps:
    said += [
      "",
      "A higher beta holds the policy to its reference, at every rank and in every step.",
    ]
  elif falls > steps / 2:
    said += [
      "",
      f"A higher beta holds the policy to its reference: the KL falls in {falls} of {steps} steps.",
    ]
  else:
    said += [
      "",
      f"The KL falls in {falls} of {steps} steps: so short a run does not show what beta does.",
    ]
  wide = [r for r in results if r["margin"] > 5]
  said += [
    "",
    "The margin is beta times a difference in nats, so it is no measure of how far a policy went: beside a margin of"
    f" {max(r['margin'] for r in results):.1f} at beta {max(results, key=lambda r: r['margin'])['beta']} stands"
    f" {max(results, key=lambda r: r['margin'])['margin_nats']:.0f} nats, and the widest gap in nats,"
    f" {max(r['margin_nats'] for r in results):.0f}, is at beta {max(results, key=lambda r: r['margin_nats'])['beta']}."
    " Playbooks take very large margins for a sign of over-optimisation; the mean margin is above 5 at"
    f" {len(wide)} of {len(results)} points.",
  ]
  return said


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", type=Path, default=Path("runs/beta_rank"))
  parser.add_argument("--report", action="store_true", help="of what is finished; trains nothing")
  args = parser.parse_args()
  pairs = args.workdir / "pairs.jsonl"
  if not args.report:
    if not pairs.exists():
      posttrain(
        "pairs",
        "--model=smollm2",
        "--limit=128",
        "--samples=1",
        "--temperature=0.7",
        f"--out={pairs}",
      )
    posttrain(
      "sweep", f"--config={CONFIG}", f"--workdir={args.workdir}", f"--config.data.train={pairs}"
    )
  # points measured on another machine stay
  path = OUT.with_suffix(".json")
  known = files.read_json(path)["results"] if path.exists() else []
  here = [found for folder in sorted(args.workdir.glob("*/")) if (found := point(folder))]
  report([*{(r["rank"], r["beta"]): r for r in (*known, *here)}.values()])
  return 0


if __name__ == "__main__":
  sys.exit(main())
