"""lm-evaluation-harness over its own client: what it measures through the server is what it measures with transformers.

Tasks are local files, and no hub is asked.  A server that scored the token that it draws, and not the prompt, would
choose by chance.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from tests import tiny

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(1200)]
ROOT = pathlib.Path(__file__).parents[2]
ITEMS = [
  {"question": "ab", "choices": ["cd", "xyz", "q"], "label": 0},
  {"question": "What is it?", "choices": ["one", "two words", "3"], "label": 1},
  {"question": "é 漢", "choices": ["字", "a", "b"], "label": 2},
  {"question": "Say", "choices": ["aaaa", "b", "cc c"], "label": 1},
]
TASKS = {
  "choice": {
    "output_type": "multiple_choice",
    "fewshot_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{label}}",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc"}],
  },
  "written": {
    "output_type": "generate_until",
    "fewshot_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
  },
  "bits": {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}} {{choices[label]}}",
    "metric_list": [{"metric": "bits_per_byte"}],
  },
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with the tiny model and the tasks."""
  path = tmp_path_factory.mktemp("lm_eval")
  rows = path / "items.jsonl"
  rows.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
  for name, fields in TASKS.items():
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}}
    (path / f"{name}.yaml").write_text(
      json.dumps({"task": name, "test_split": "test", **data, **fields})
    )
  (path / "model").mkdir()
  tiny.tiny_model_folder(path / "model")
  return path


@pytest.fixture(scope="module")
def address(place):
  argv = [sys.executable, "-m", "posttrain_jax", "serve", f"--model={place / 'model'}", "--port=0"]
  env = {
    **os.environ,
    "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    "JAX_PLATFORMS": "cpu",
  }
  with open(place / "log", "w") as log:
    server = subprocess.Popen(
      [*argv, "--dtype=float32", "--length=128", "--slots=1", "--rows=4"],
      stdout=log,
      stderr=subprocess.STDOUT,
      env=env,
    )
    try:
      end, said = time.monotonic() + 600, ""
      while "serving at" not in said and time.monotonic() < end and server.poll() is None:
        time.sleep(0.2)
        said = (place / "log").read_text()
      found = re.search(r"serving at (\S+)/v1", said)
      assert found, said
      yield found[1]
    finally:
      server.send_signal(signal.SIGTERM)
      assert server.wait(60) == 0


def measured(place, kind, how=None, tasks=TASKS, **options):
  """{task: what was answered to each item} by one of the harness's models; how: of `simple_evaluate`."""
  lm_eval = pytest.importorskip("lm_eval", reason="pip install 'lm-eval[api]' beside the others")
  os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
  from lm_eval.tasks import TaskManager

  told = lm_eval.simple_evaluate(
    model=kind,
    model_args=options,
    tasks=[*tasks],
    task_manager=TaskManager(include_path=str(place), include_defaults=False),
    log_samples=True,
    bootstrap_iters=0,
    **(how or {}),
  )
  return {
    name: [sample["filtered_resps"] for sample in sorted(samples, key=lambda one: one["doc_id"])]
    for name, samples in told["samples"].items()
  }


def test_the_harness_measures_through_the_server_what_it_measures_with_transformers(place, address):
  folder = str(place / "model")
  theirs = measured(place, "hf", pretrained=folder, dtype="float32", device="cpu", max_length=128)
  ours = measured(
    place,
    "local-completions",
    base_url=f"{address}/v1/completions",
    model="model",
    tokenizer_backend="huggingface",
    tokenizer=folder,
    max_length=128,
    num_concurrent=2,
  )
  assert ours["written"] == theirs["written"]
  for name in ("choice", "bits"):
    for mine, reference in zip(_numbers(ours[name]), _numbers(theirs[name]), strict=True):
      assert mine == pytest.approx(reference, rel=1e-4)
  chosen = lambda told: [
    max(range(len(one)), key=lambda at: float(one[at][0])) for one in told["choice"]
  ]
  assert chosen(ours) == chosen(theirs)


SHOTS = dict(num_fewshot=2, limit=3)
CHAT = dict(apply_chat_template=True, system_instruction="Be brief.")
WAYS = {
  "shots": SHOTS,
  "chat": {**SHOTS, **CHAT},
  "turns": {**SHOTS, **CHAT, "fewshot_as_multiturn": True},
  "longer": dict(gen_kwargs="max_gen_toks=14,until=a"),
}


@pytest.mark.parametrize("way", WAYS)
def test_options_of_the_harness_change_no_number_of_the_server(way, place, address):
  folder, how = str(place / "model"), WAYS[way]
  local = dict(model="model", tokenizer_backend="huggingface", tokenizer=folder, max_length=128)
  theirs = measured(
    place, "hf", how, pretrained=folder, dtype="float32", device="cpu", max_length=128
  )
  ours = measured(
    place, "local-completions", how, base_url=f"{address}/v1/completions", batch_size=3, **local
  )
  assert ours["written"] == theirs["written"]
  for name in ("choice", "bits"):
    assert _numbers(ours[name]) == pytest.approx(_numbers(theirs[name]), rel=1e-4)
  if (
    "apply_chat_template" in how
  ):  # its other client, which sends messages and has the server render them
    url = f"{address}/v1/chat/completions"
    said = measured(place, "local-chat-completions", how, ["written"], base_url=url, model="model")
    assert said["written"] == theirs["written"]


def _numbers(answers):
  """Every number of nested answers, which the harness writes as texts in places."""
  if isinstance(answers, list | tuple):
    return [number for answer in answers for number in _numbers(answer)]
  if isinstance(answers, str):
    return [
      {"True": 1.0, "False": 0.0}[answers] if answers in ("True", "False") else float(answers)
    ]
  return [float(answers)]
