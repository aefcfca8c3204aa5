"""The commands of the pages run as printed, one page after the other in one folder, as a reader would type them.

The model has the embedded one's tokenizer and two layers of random weights. Runs take two steps, and tasks ask two
questions.  Files of rows begin with the rows that the pages show.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from posttrain_jax.models import decoder, fetch, hf
from posttrain_jax.models.config import from_hf
from tests import tiny
from tests.docs import printed

ORDER = (
  "first_run",
  "own_data",
  "preferences",
  "adapters",
  "rl",
  "turns",
  "distillation",
  "chain",
  "reports",
  "evaluation",
  "export",
  "regress",
  "merging",
  "sharding",
  "launch",
)
PAGES = [printed.ROOT / "README.md", *(printed.ROOT / "docs" / f"{name}.md" for name in ORDER)]
ELSEWHERE = {  # what is not run here -> why
  "make ": "minutes, and another folder; CI runs it",
  "--topology=": "libtpu is not a part of the test environment",
  "posttrain fetch": "the network",
  "humaneval:": "data of others; tests/evals/test_suite_data.py",
  "--jobs=0": "points that ran elsewhere; tests/build/test_sweep.py",
  "--search": "Optuna asks for points for minutes; tests/build/test_search.py",
  "beta_rank": "the pairs of an experiment, and hours",
  "posttrain pairs": "two steps teach no right answer, and so there is no pair",
  "posttrain student": "half of thirty layers, of a model that has two here; tests/commands/test_distil.py",
  "model=small": "the same",
  "posttrain chain": "minutes; tests/build/test_chain.py",
  "engine=http": "a server; tests/commands/test_elsewhere.py",
  "traces.jsonl": "two steps teach no right answer, and so nothing is kept",
}
LAYERS = dict(
  hidden_size=64,
  head_dim=16,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=4,
  intermediate_size=128,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with the files that the pages show, a cache with the model, and a function that runs a line in it."""
  folder, cache = tmp_path_factory.mktemp("reader"), tmp_path_factory.mktemp("cache")
  _small(fetch.resolve("smollm2"), cache / "models" / "smollm2")
  for page in PAGES:
    for name, text in printed.files(page).items():
      (folder / name).write_text(_more(text) if name.endswith(".jsonl") else text)
  (folder / "launch").symlink_to(printed.ROOT / "launch")
  _public(folder)
  ours = {"POSTTRAIN_CACHE": str(cache), "PYTHONPATH": str(printed.ROOT), "JAX_PLATFORMS": "cpu"}
  ours["JAX_COMPILATION_CACHE_DIR"] = str(printed.ROOT / ".cache" / "jax-commands")
  ours["PATH"] = f"{_bin(tmp_path_factory.mktemp('bin'))}:{os.environ['PATH']}"
  flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))

  def run(line, devices=1):
    wanted = f"{flags} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, **ours, "XLA_FLAGS": wanted}
    return subprocess.run(
      ["bash", "-c", line],
      check=False,
      cwd=folder,
      env=environment,
      capture_output=True,
      text=True,
      timeout=250,
    )

  return run


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", [*(path.name for path in PAGES), "--help", "configs"])
def test_the_commands_of_a_page_run(page, place):
  of_pages = [command for path in PAGES for command in printed.commands(path)]
  every = [*of_pages, *printed.of_help(), *printed.of_configs()]
  lines = [command.text for command in every if command.place.partition("/")[0] == page]
  assert lines
  for line in lines:
    if not any(part in line for part in ELSEWHERE):
      _runs(place, _few(line))


def _runs(place, line):
  done = place(line, devices=2 if "mesh.tensor=2" in line else 1)
  assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
  for told in re.findall(r"use it: (posttrain .*)", done.stdout):
    _runs(place, f"echo Hello | {told}")


def _few(line):
  """The same with few steps: what is asked for by hand stays."""
  added = []
  if re.search(r"posttrain (train|sweep)|local\.py", line) and "--dry_run" not in line:
    best = ".eval." in line  # which asks for evaluations, in steps or after the last
    added += [] if "epochs" in line else ["--config.steps=2"]
    added += ["--config.eval.every=1"] if best else ["--config.eval.every=0"]
    added += ["--config.eval.task_limit=2"] if "--config=quickstart" in line else []
  if "posttrain eval" in line and "--limit" not in line:
    added += ["--limit=2"] if "=sql" in line else []
  if "posttrain regress" in line and "--limit" not in line:
    added += ["--limit=2"]
  if "posttrain merge" in line:
    added += ["--limit=2"]
  if "posttrain chat" in line and "|" not in line:
    line = f"echo Hello | {line}"
  return " ".join([line, *added])


def _small(source, folder):
  config = from_hf({**json.loads((source / "config.json").read_text()), **LAYERS})
  hf.save(folder, decoder.init(jax.random.key(0), config), config, tokenizer_from=source)


def _more(text):
  """The rows that a page shows, and twelve times the same of other questions."""
  asked = re.compile(r'("(?:prompt|content|text)": "[^"]*)')
  return text + "".join(asked.sub(rf"\1 ({i})", text) for i in range(12))


def _public(folder):
  """The public data that pages name; rows of the same form where they are not on this machine."""
  rows = range(40)
  pair = lambda i: {
    "conversations": [{"from": "human", "value": f"How much is {i} and {i}?"}],
    "chosen": {"from": "gpt", "value": f"{2 * i}."},
    "rejected": {"from": "gpt", "value": f"{2 * i + 1}."},
  }
  label = lambda i: {
    "messages": [
      {"role": "user", "content": f"How much is {i} and {i}?"},
      {"role": "assistant", "content": f"{2 * i + i % 2}."},
    ],
    "label": i % 2 == 0,
  }
  question = lambda i: {"question": f"How much is {i} and {i}?", "answer": f"#### {2 * i}"}
  forms = {"gsm8k/train.jsonl": question, "gsm8k/test.jsonl": question}
  forms |= {"dpo_en_demo.json": pair, "kto_en_demo.json": label}
  held = pathlib.Path(os.environ.get("POSTTRAIN_DATA", "/nowhere"))
  (folder / "gsm8k").mkdir()
  for name, form in forms.items():
    real = held / name if "/" in name else held / "demo_pairs" / name
    if real.is_file():
      (folder / name).symlink_to(real)
    elif name.endswith(".jsonl"):
      tiny.write_jsonl(folder / name, [form(i) for i in rows])
    else:
      (folder / name).write_text(json.dumps([form(i) for i in rows]))


def _bin(folder):
  """A folder of programs: those that a reader finds in the environment of the Makefile."""
  for name, module in (("posttrain", "-m posttrain_jax"), ("python", "")):
    script = folder / name
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
    script.chmod(0o755)
  return folder
