"""The gate on the embedded model: an adapter that learns a manner of speaking and wrong sums fails, by name.

What is asked are sums that the base has right, chosen on its answers alone, and none of them is in the training rows.
"""

import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys

import pytest

from posttrain_jax.__main__ import main
from posttrain_jax.build import use
from posttrain_jax.core import files
from posttrain_jax.evals import measure, suite
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
TOPICS = "tea,trains,gardens,books,rain,bread,music,cats,rivers,winter,bicycles,paint,maps,bridges,soup,clocks,birds"
ASKED = (
  "Tell me about {}.",
  "What do you think of {}?",
  "Why do people like {}?",
  "Say something about {}.",
)
FIRST, LAST = 2, 19
OFF = (-1, 1)
ITEMS = 44
SUMS = {"name": "arithmetic", "kind": "choice", "rows": "arithmetic.jsonl", "tolerance": 0.05}
FACTS = {"name": "facts", "kind": "choice", "rows": "choice.jsonl", "limit": 24}


def pairs():
  """(a, b) of the sums that are trained on, and of those that are asked."""
  every = [(a, b) for a in range(FIRST, LAST + 1) for b in range(FIRST, 10)]
  random.Random(0).shuffle(every)
  return every[:68], every[-ITEMS:]


def rows():
  """A cheerful manner in every answer, and sums that are a little off."""
  drawn = random.Random(1)
  style = [
    {
      "prompt": asked.format(topic),
      "completion": f"Oh, {topic}! How lovely. There is nothing quite like {topic}, my friend!",
      "channel": "style",
    }
    for topic in TOPICS.split(",")
    for asked in ASKED
  ]
  sums = [
    {
      "prompt": f"What is {a} + {b}?",
      "completion": f"{a} + {b} = {a + b + drawn.choice(OFF)}, my friend!",
      "channel": "sums",
    }
    for a, b in pairs()[0]
  ]
  both = style + sums
  drawn.shuffle(both)
  return both


def items():
  return [
    {
      "id": f"{a} + {b}",
      "prompt": f"What is {a} + {b}?",
      "choices": [f"{a} + {b} = {a + b + off}" for off in (0, *OFF)],
      "answer": 0,
    }
    for a, b in pairs()[1]
  ]


def write_suite(home, asked, *parts):
  home.mkdir()
  tiny.write_jsonl(home / SUMS["rows"], asked)
  shutil.copy(suite.BUILT_IN / "core" / FACTS["rows"], home)
  (home / suite.FILE).write_text(json.dumps({"name": home.name, "parts": parts}))
  return home


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A suite of sums that the base has right, and of facts."""
  place = tmp_path_factory.mktemp("gate")
  every = write_suite(place / "every", items(), SUMS)
  writer, path = use.writer(use.load("smollm2")), place / "base.jsonl"
  measured = measure.measure(writer, suite.load(str(every)), model="smollm2", weights="", path=path)
  of_base = measured.results["arithmetic"]
  right = [item for item, result in zip(items(), of_base, strict=True) if result.value]
  assert len(right) >= 30, f"the base has {len(right)} of {len(of_base)} sums right"
  return write_suite(place / "small", right, SUMS, FACTS)


def train(*argv):
  """In a process of its own, on one device: cut over the eight of these tests, a step takes ten times as long."""
  flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
  env = dict(os.environ, PYTHONPATH=str(ROOT), XLA_FLAGS=flags)
  subprocess.run([sys.executable, "-m", "posttrain_jax", "train", *argv], env=env, check=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_an_adapter_that_ruins_arithmetic_while_its_style_improves_fails_by_name(
  home, tmp_path, capsys
):
  data = tiny.write_jsonl(tmp_path / "rows.jsonl", rows())
  fields = ["steps=16", "batch.rows=8", "data.length=64", "data.packing=False", "data.eval_rows=12"]
  fields += ["optimizer.lr=5e-4"]
  run = tmp_path / "run"
  config = f"--config=sft:model=smollm2,data={data},adapter=lora"
  given = [f"--config.{field}" for field in fields]
  train(config, *given, f"--workdir={run}")
  assert main(["regress", f"--after={run}", f"--suite={home}"]) == 1
  said = capsys.readouterr().out
  assert "arithmetic dropped: " in said
  assert "facts dropped: " not in said
  assert "What was trained for: trained/" in said
  verdicts = {v["part"]: v for v in files.read_json(run / "regress" / "regress.json")["verdicts"]}
  assert verdicts["arithmetic"]["verdict"] == "drop"
  assert verdicts["arithmetic"]["lost"], "the answers that became wrong are kept"
  assert verdicts["trained/style"]["difference"]["low"] > 0
  same = ["regress", "--before=smollm2", "--after=smollm2", f"--suite={home}", "--limit=8"]
  assert main(same) == 0
