"""lm-evaluation-harness through this library's model: its numbers are those of transformers on the same weights.

Tasks are local YAML over local rows, with the hub switched off.
"""

import json

import pytest

from posttrain_jax.data import chat
from posttrain_jax.evals import harness
from posttrain_jax.evals.samples import Writer
from posttrain_jax.models import hf
from posttrain_jax.rollout import engine
from tests import tiny

pytestmark = pytest.mark.oracle
lm_eval = pytest.importorskip("lm_eval", reason="pip install 'posttrain-jax[harness]'")

ROWS = [
  {"q": f"{i} and {i} make", "choices": [str(2 * i), "a tree ", "nothing at all"], "answer": i % 3}
  for i in range(1, 6)
]
HEAD = "dataset_path: json\ndataset_kwargs:\n  data_files: {rows}\ntest_split: train\n"
TASKS = {
  "pick": HEAD
  + "task: pick\noutput_type: multiple_choice\ndoc_to_text: '{{{{q}}}}'\ndoc_to_choice: '{{{{choices}}}}'\n"
  + "doc_to_target: '{{{{answer}}}}'\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n",
  "roll": HEAD
  + "task: roll\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{{{q}}}} '\n"
  + "metric_list:\n  - metric: bits_per_byte\n  - metric: word_perplexity\n",
  "write": HEAD
  + "task: write\noutput_type: generate_until\ndoc_to_text: 'Q: {{{{q}}}}'\ndoc_to_target: '{{{{choices[0]}}}}'\n"
  + "generation_kwargs:\n  until: ['\\n', 'Q:', '<|endoftext|>']\n  max_gen_toks: 12\n"
  + "metric_list:\n  - metric: exact_match\n",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  folder = tmp_path_factory.mktemp("harness")
  tiny.tiny_model_folder(folder / "model")
  rows = tiny.write_jsonl(folder / "rows.jsonl", ROWS)
  (folder / "tasks").mkdir()
  for name, text in TASKS.items():
    (folder / "tasks" / f"{name}.yaml").write_text(text.format(rows=rows))
  return folder


def writer(folder):
  params, config = hf.load(folder)
  tokenizer = chat.load_tokenizer(folder)
  ends = engine.stop_tokens(config, tokenizer, folder)
  return Writer(params, config, tokenizer, chat.template(tokenizer), ends)


@pytest.fixture(scope="module")
def both(place):
  """(ours, theirs): the harness's results of all tasks, each answer with them."""
  from lm_eval.models.huggingface import HFLM
  from lm_eval.tasks import TaskManager

  manager = TaskManager(include_path=str(place / "tasks"), include_defaults=False)
  theirs = HFLM(pretrained=str(place / "model"), device="cpu", dtype="float32", batch_size=1)
  models = (harness.language_model(writer(place / "model"), rows=2), theirs)
  run = lambda model: lm_eval.simple_evaluate(
    model=model, tasks=list(TASKS), task_manager=manager, log_samples=True, bootstrap_iters=0
  )
  return [run(model) for model in models]


def test_every_figure_is_that_of_transformers(both):
  ours, theirs = (one["results"] for one in both)
  for task in TASKS:
    numbers = {n: v for n, v in theirs[task].items() if isinstance(v, float)}
    assert numbers, task
    for name, value in numbers.items():
      assert ours[task][name] == pytest.approx(value, rel=1e-4), (task, name)


def test_every_answer_and_log_probability_is_that_of_transformers(both):
  """Among them those of a known item: the rows of `pick` are no chance scores."""
  ours, theirs = (one["samples"] for one in both)
  for task in TASKS:
    for one, other in zip(ours[task], theirs[task], strict=True):
      assert json.dumps(one["doc"]) == json.dumps(other["doc"])
      for a, b in zip(_flat(one["resps"]), _flat(other["resps"]), strict=True):
        assert a == (b if isinstance(b, str | bool) else pytest.approx(b, rel=1e-4))


def _flat(value):
  if isinstance(value, list | tuple):
    return [leaf for inner in value for leaf in _flat(inner)]
  return [value]


def test_a_key_that_is_not_honoured_is_refused(place):
  asked = harness.Asked(writer(place / "model"))
  with pytest.raises(ValueError, match="generation_kwargs has 'num_beams'"):
    asked.generate([("a", {"num_beams": 4})])
