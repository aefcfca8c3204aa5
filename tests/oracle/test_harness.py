"""lm-evaluation-harness through this library's model: its numbers are those of transformers on the same weights.

Tasks are local YAML over local rows, with the hub switched off.
"""

import json

import pytest
from tokenizers import processors

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
OFFERED = "fewshot_split: train\ngen_prefix: 'Well, '\n"  # rows to show before a question; how an answer begins
TASKS = {
  "begun": HEAD
  + "task: begun\noutput_type: generate_until\ndoc_to_text: 'Q: {{{{q}}}}'\ndoc_to_target: '{{{{choices[0]}}}}'\n"
  + "generation_kwargs:\n  until: ['Q:']\n  max_gen_toks: 9\nmetric_list:\n  - metric: exact_match\n"
  + OFFERED,
  "picked": HEAD
  + "task: picked\noutput_type: multiple_choice\ndoc_to_text: '{{{{q}}}}'\ndoc_to_choice: '{{{{choices}}}}'\n"
  + "doc_to_target: '{{{{answer}}}}'\nmetric_list:\n  - metric: acc\n"
  + OFFERED,
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


def with_bos():
  """The tiny tokenizer as Llama's is: it starts plain text with a BOS, and its template writes one."""
  tokenizer = tiny.tokenizer()
  tokenizer.bos_token = "<|endoftext|>"
  start = processors.TemplateProcessing(
    single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
  )
  tokenizer.backend_tokenizer.post_processor = start
  tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
  return tokenizer


@pytest.fixture(scope="module", params=["plain", "bos"])
def place(tmp_path_factory, request):
  folder = tmp_path_factory.mktemp("harness")
  tiny.tiny_model_folder(folder / "model")
  if request.param == "bos":
    with_bos().save_pretrained(folder / "model")
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


WAYS = {
  "plain": dict(),
  "shots": dict(num_fewshot=1, limit=3),
  "chat": dict(apply_chat_template=True, limit=3, system_instruction="Be brief."),
  "turns": dict(num_fewshot=1, apply_chat_template=True, fewshot_as_multiturn=True, limit=3),
}


@pytest.fixture(scope="module")
def both(place):
  """(ours, theirs): the harness's results of all tasks, each answer with them."""
  from lm_eval.models.huggingface import HFLM
  from lm_eval.tasks import TaskManager

  manager = TaskManager(include_path=str(place / "tasks"), include_defaults=False)
  theirs = HFLM(pretrained=str(place / "model"), device="cpu", dtype="float32", batch_size=1)
  models = (harness.language_model(writer(place / "model"), rows=2), theirs)
  told = []
  for model in models:
    results, samples = {}, {}
    for way, options in WAYS.items():
      made = lm_eval.simple_evaluate(
        model=model,
        tasks=list(TASKS),
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
        **options,
      )
      results |= {(way, task): made["results"][task] for task in TASKS}
      samples |= {(way, task): made["samples"][task] for task in TASKS}
    told.append(dict(results=results, samples=samples))
  return told


def test_every_figure_is_that_of_transformers(both):
  ours, theirs = (one["results"] for one in both)
  for task in theirs:
    numbers = {n: v for n, v in theirs[task].items() if isinstance(v, float)}
    assert numbers, task
    for name, value in numbers.items():
      assert ours[task][name] == pytest.approx(value, rel=1e-4), (task, name)


def test_every_answer_and_log_probability_is_that_of_transformers(both):
  """Among them those of a known item: the rows of `pick` are no chance scores."""
  ours, theirs = (one["samples"] for one in both)
  for task in theirs:
    for one, other in zip(ours[task], theirs[task], strict=True):
      assert json.dumps(one["doc"]) == json.dumps(other["doc"])
      for a, b in zip(_flat(one["resps"]), _flat(other["resps"]), strict=True):
        assert a == (b if isinstance(b, str | bool) else pytest.approx(b, rel=1e-4)), task


def _flat(value):
  if isinstance(value, list | tuple):
    return [leaf for inner in value for leaf in _flat(inner)]
  return [value]


def test_a_key_that_is_not_honoured_is_refused(place):
  asked = harness.Asked(writer(place / "model"))
  with pytest.raises(ValueError, match="generation_kwargs has 'num_beams'"):
    asked.generate([("a", {"num_beams": 4})])
