"""Two skills in one model: adapters for text-to-SQL and for JSON extraction merged; and the way back to the base.

  POSTTRAIN_DATA=... .venv/bin/python experiments/merge_learning.py [--workdir=runs/merge_learning] [--report]

SmolLM2-135M-Instruct learns each task by itself (LoRA rank 16, 64 steps); every operator then merges the two models
over their base, and combines the adapters.  Scored: 100 held-out questions of each task, by verifiers (SQL is executed,
JSON parsed and compared), and the loss on 100 instructions of demo_pairs/alpaca_en_demo.json, which neither trained.
Interpolating the SQL model with its base asks what that costs in the task and gives back elsewhere.  Finished points
are skipped.  Results: experiments/results/merge_learning.{md,json,png}.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import yaml
from matplotlib.figure import Figure

from posttrain_jax import adapters, objectives
from posttrain_jax.adapters import combine, peft_format
from posttrain_jax.core import files
from posttrain_jax.data import chat, loader, templates
from posttrain_jax.evals import figures, tasks
from posttrain_jax.models import fetch, hf
from posttrain_jax.rollout import engine
from posttrain_jax.runs import record as runs

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "experiments" / "results" / "merge_learning"
ASKED = 100
GENERAL = "demo_pairs/alpaca_en_demo.json"
FIELDS = {
  "data.length": 256,
  "data.eval_rows": 0,
  "batch.rows": 4,
  "steps": 64,
  "optimizer.lr": 2e-3,
  "optimizer.warmup": 0.1,
  "eval.every": 0,
  "checkpoint.every": 64,
}

# --- the second task -------------------------------------------------------------------------------------------------

NAMES = "Ada Lovelace,Alan Turing,Grace Hopper,Niels Bohr,Marie Curie,Emmy Noether,Carl Gauss,Mary Shelley"
CITIES = "London,Paris,Vienna,Lisbon,Oslo,Prague,Madrid,Dublin,Athens,Warsaw"
JOBS = "engineer,nurse,painter,teacher,baker,pilot,lawyer,gardener,chemist,driver"
TEMPLATES = (
  "{name}, who is {age}, lives in {city} and works there as a {job}.",
  "A {job} by trade, {name} moved to {city} at the age of {age}.",
  "In {city} you may meet {name}, {age} years old, a {job}.",
  "{name} is {age}. Home is {city}; the profession is {job}.",
)


def people(split: str, count: int) -> list[dict[str, Any]]:
  """Rows of prompt, completion and gold; the held-out ones combine names and jobs that training never combined."""
  drawn = random.Random(0 if split == "train" else 1)
  names, jobs = NAMES.split(","), JOBS.split(",")
  made = []
  while len(made) < count:
    i, j = drawn.randrange(len(names)), drawn.randrange(len(jobs))
    if ((i + j) % 3 == 0) != (split == "test"):
      continue
    gold = dict(
      name=names[i], age=drawn.randrange(19, 80), city=drawn.choice(CITIES.split(",")), job=jobs[j]
    )
    text = drawn.choice(TEMPLATES).format(**gold)
    made.append(dict(prompt=f"As JSON: {text}", completion=json.dumps(gold), gold=gold))
  return made


def is_right(answer: str, gold: dict[str, Any]) -> bool:
  try:
    return json.loads(answer) == gold
  except ValueError:
    return False


# --- scores ----------------------------------------------------------------------------------------------------------


def scores(params: Any, config: Any, workdir: Path) -> dict[str, float]:
  folder = fetch.resolve("smollm2")
  tokenizer = chat.load_tokenizer(folder)
  template = chat.template(tokenizer)
  sql = tasks.evaluate(params, config, tokenizer, task="sql", limit=ASKED, template=template)
  rows = people("test", ASKED)
  asked = [templates.job([dict(role="user", content=row["prompt"])], True) for row in rows]
  prompts = [
    tokenizer(text, add_special_tokens=False)["input_ids"] for text in template.render_all(asked)
  ]
  drawn = engine.generate(
    engine.prepare(params, config),
    config,
    prompts,
    max_new_tokens=64,
    stop_tokens=engine.stop_tokens(config, tokenizer),
  )
  texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in drawn.tokens]
  right = sum(is_right(text, row["gold"]) for text, row in zip(texts, rows))
  general = loss(params, config, tokenizer, workdir / "general.jsonl")
  return {"sql": sql.correct / sql.total, "json": right / ASKED, "general": general}


def loss(params, config, tokenizer, source: Path) -> float:
  """The mean negative log-likelihood of the trained tokens of a file."""
  stream = loader.read(source, tokenizer, batch_size=8, length=config.max_length)
  batches = itertools.islice(stream, stream.batches())
  measure = jax.jit(objectives.evaluation(objectives.Sft(config)))
  totals = objectives.measured(measure, batches, params, objectives.Context())
  return objectives.read(totals)["loss"]


def write_data(workdir: Path) -> None:
  lines = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)
  rows = [{k: row[k] for k in ("prompt", "completion")} for row in people("train", 768)]
  files.write_text(workdir / "json.jsonl", lines(rows))
  every = json.loads((Path(os.environ["POSTTRAIN_DATA"]) / GENERAL).read_text())
  join = lambda row: "\n".join(filter(None, (row["instruction"], row.get("input"))))
  some = [
    dict(prompt=join(row), completion=row["output"]) for row in every if row["output"].strip()
  ]
  some = [row for row in some if len(row["prompt"]) + len(row["completion"]) < 1200][:ASKED]
  files.write_text(workdir / "general.jsonl", lines(some))


def train(workdir: Path, name: str) -> Path:
  folder = workdir / name
  if not (folder / runs.DONE).exists():
    data = "sql" if name == "sql" else workdir / "json.jsonl"
    fields = FIELDS | ({"data.chat": True} if name == "json" else {})
    command = [
      sys.executable,
      "-m",
      "posttrain_jax",
      "train",
      f"--config={ROOT / 'configs' / 'sft.py'}:data={data}",
      f"--workdir={folder}",
      *(f"--config.{field}={value}" for field, value in fields.items()),
    ]
    subprocess.run(command, check=True)
  return folder / "adapter"


# --- merges ----------------------------------------------------------------------------------------------------------

EACH = {
  "linear": ({"weight": 0.5}, {}),
  "task_arithmetic": ({"weight": 1.0}, {}),
  "ties": ({"weight": 1.0, "density": 0.5}, {}),
  "dare_linear": ({"weight": 1.0, "density": 0.5}, {}),
  "dare_ties": ({"weight": 1.0, "density": 0.5}, {}),
  "della": ({"weight": 1.0, "density": 0.5}, {}),
  "breadcrumbs": ({"weight": 1.0, "density": 0.9}, {}),
  "model_stock": ({}, {}),
  "sce": ({}, {"select_topk": 0.5}),
  "multislerp": ({"weight": 0.5}, {}),
  "karcher": ({}, {}),
}
NO_BASE = ("linear", "multislerp", "karcher")
COMBINED = {
  "adapters side by side": lambda two: combine.concatenate(two),
  "adapters, halves": lambda two: combine.concatenate(two, weights=[0.5, 0.5]),
  "adapters at rank 16": lambda two: combine.compress(two, rank=16),
}
LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def merged(workdir: Path, method: str) -> Any:
  """(params, config) of a merge by a recipe, made and removed again."""
  each, whole = EACH[method]
  recipe: dict[str, Any] = {
    "merge_method": method,
    "dtype": "float32",
    "parameters": whole,
    "models": [
      {"model": f"smollm2+{workdir / name / 'adapter'}", "parameters": each}
      for name in ("sql", "json")
    ],
  }
  if method not in NO_BASE:
    recipe["base_model"] = "smollm2"
  path, out = workdir / f"{method}.yml", workdir / "merged"
  path.write_text(yaml.safe_dump(recipe))
  command = [sys.executable, "-m", "posttrain_jax", "merge", f"--recipe={path}", f"--out={out}"]
  subprocess.run(["rm", "-rf", str(out)], check=True)
  subprocess.run(command, check=True)
  found = hf.load(out)
  subprocess.run(["rm", "-rf", str(out)], check=True)
  return found


def candidates(workdir: Path) -> dict[str, Any]:
  """{name: a function that makes (params, config)}, parents first."""
  params, config = hf.load("smollm2")
  two = [
    peft_format.load(workdir / name / "adapter", params, config)[0] for name in ("sql", "json")
  ]
  plain = lambda adapter, weight=1.0: (
    adapters.merge(params, combine.concatenate([adapter], weights=[weight])[0]),
    config,
  )
  found = {
    "base": lambda: (params, config),
    "SQL adapter": lambda: plain(two[0]),
    "JSON adapter": lambda: plain(two[1]),
  }
  for name, function in COMBINED.items():
    found[name] = lambda function=function: (adapters.merge(params, function(two)[0]), config)
  for method in EACH:
    found[method] = functools.partial(merged, workdir, method)
  for t in LAMBDAS[1:-1]:
    found[f"lambda {t}"] = lambda t=t: plain(two[0], t)
  return found


def report(found: dict[str, dict[str, float]]) -> None:
  lines = [
    "# Merging two skills",
    "",
    f"Written by `experiments/merge_learning.py`: SmolLM2-135M-Instruct, {ASKED} held-out questions of each task,"
    " the loss on instructions that neither task trained; one seed.",
    "",
    "| model | SQL right | JSON right | general loss |",
    "|---|---|---|---|",
  ]
  for name, own in found.items():
    lines.append(f"| {name} | {own['sql']:.2f} | {own['json']:.2f} | {own['general']:.3f} |")
  OUT.parent.mkdir(exist_ok=True)
  files.write_json(OUT.with_suffix(".json"), {"results": found})
  files.write_text(OUT.with_suffix(".md"), "\n".join(lines) + "\n")
  figures.save_png(figure(found), OUT.with_suffix(".png"))


def figure(found: dict[str, dict[str, float]]) -> Figure:
  with figures.style():
    drawing = Figure(figsize=(10, 4), layout="constrained")
    left, right = drawing.subplots(1, 2)
    names = [name for name in found if not name.startswith("lambda")]
    places = range(len(names))
    left.barh([p - 0.2 for p in places], [found[n]["sql"] for n in names], 0.38, label="SQL")
    left.barh([p + 0.2 for p in places], [found[n]["json"] for n in names], 0.38, label="JSON")
    left.set_yticks(list(places), names)
    left.invert_yaxis()
    left.set(title="held-out questions right")
    left.legend()
    at = {0.0: "base", 1.0: "SQL adapter", **{t: f"lambda {t}" for t in LAMBDAS[1:-1]}}
    points = [(t, found[at[t]]) for t in LAMBDAS if at[t] in found]
    right.plot([t for t, _ in points], [p["sql"] for _, p in points], marker="o", label="SQL right")
    right.set(title="from the base (0) to the SQL model (1)", xlabel="lambda")
    other = right.twinx()
    other.plot(
      [t for t, _ in points],
      [p["general"] for _, p in points],
      marker="s",
      color=figures.ORANGE,
      label="general loss",
    )
    right.legend(loc="upper left")
    other.legend(loc="lower right")
  return drawing


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", type=Path, default=Path("runs/merge_learning"))
  parser.add_argument("--report", action="store_true", help="of what is finished; merges nothing")
  args = parser.parse_args()
  workdir = args.workdir.absolute()
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / "scores.json"
  found = files.read_json(path) if path.exists() else {}
  if not args.report:
    if not os.environ.get("POSTTRAIN_DATA"):
      print("POSTTRAIN_DATA is not set: the loss on general instructions needs its files")
      return 1
    write_data(workdir)
    for name in ("sql", "json"):
      train(workdir, name)
    for name, make in candidates(workdir).items():
      if name not in found:
        params, config = make()
        found[name] = scores(jax.device_put(params), config, workdir)
        files.write_json(path, found)
        print(name, found[name], flush=True)
        report(found)
  report(found)
  return 0


if __name__ == "__main__":
  sys.exit(main())
