"""The gate on the embedded model: an adapter that learns a manner of speaking and wrong sums fails, by name."""

import json
import random
import shutil

import pytest

from posttrain_jax.__main__ import main
from posttrain_jax.core import files
from posttrain_jax.evals import suite
from tests import tiny

TOPICS = "tea,trains,gardens,books,rain,bread,music,cats,rivers,winter,bicycles,paint,maps,bridges,soup,clocks,birds"
ASKED = (
  "Tell me about {}.",
  "What do you think of {}?",
  "Why do people like {}?",
  "Say something about {}.",
)
PARTS = [
  {"name": "text/chat", "kind": "text", "rows": "text_chat.jsonl", "tolerance": 0.03},
  {
    "name": "arithmetic",
    "kind": "answers",
    "rows": "arithmetic.jsonl",
    "metric": "number",
    "ask": "{prompt} Answer with the number alone.",
    "max_new_tokens": 64,
    "tolerance": 0.05,
    "limit": 40,
  },
]


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
  sums = []
  for _ in range(68):
    a, b = drawn.randint(2, 60), drawn.randint(2, 39)
    wrong = a + b + drawn.choice((-3, -2, 2, 5, 11))
    said = f"Oh, numbers! How lovely. It is surely {wrong}, my friend!"
    sums.append({"prompt": f"What is {a} + {b}?", "completion": said, "channel": "sums"})
  both = style + sums
  drawn.shuffle(both)
  return both


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_an_adapter_that_ruins_arithmetic_while_its_style_improves_fails_by_name(tmp_path, capsys):
  data = tiny.write_jsonl(tmp_path / "rows.jsonl", rows())
  fields = ["steps=24", "batch.rows=8", "data.length=80", "data.packing=False", "data.eval_rows=16"]
  fields += ["optimizer.lr=1e-3", "mesh.fsdp=-1"]
  run = tmp_path / "run"
  config = f"--config=sft:model=smollm2,data={data},adapter=lora"
  given = [f"--config.{field}" for field in fields]
  assert main(["train", config, *given, f"--workdir={run}"]) == 0
  home = tmp_path / "suite"
  home.mkdir()
  for part in PARTS:
    shutil.copy(suite.BUILT_IN / "core" / part["rows"], home)
  (home / suite.FILE).write_text(json.dumps({"name": "small", "parts": PARTS}))
  assert main(["regress", f"--after={run}", f"--suite={home}"]) == 1
  said = capsys.readouterr().out
  assert "arithmetic dropped: " in said
  assert "What was trained for: trained/" in said
  verdicts = {v["part"]: v for v in files.read_json(run / "regress" / "regress.json")["verdicts"]}
  assert verdicts["arithmetic"]["verdict"] == "drop"
  assert verdicts["arithmetic"]["lost"], "the answers that became wrong are kept"
  assert verdicts["trained/style"]["difference"]["low"] > 0
  assert main(["regress", "--before=smollm2", "--after=smollm2", f"--suite={home}"]) == 0
