"""What a run asks before and after training: of its held-out rows, or of others, and how long answers may be."""

import re

import pytest

from posttrain_jax import settings
from posttrain_jax.build import checks, data, model, questions
from posttrain_jax.evals import tasks
from posttrain_jax.settings import ConfigError
from tests import tiny

ROWS = [
  {"prompt": f"say {i}", "completion": str(i) * (1 + i % 30), "tag": f"t{i}"} for i in range(20)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  made = tmp_path_factory.mktemp("questions")
  tiny.tiny_model_folder(made / "model")
  tiny.write_jsonl(made / "rows.jsonl", ROWS)
  tiny.write_jsonl(made / "rows2.jsonl", [{**row, "completion": "{"} for row in ROWS])
  tiny.write_jsonl(made / "text.jsonl", [{"text": "once upon"}] * 9)
  twice = [
    {"prompt": f"say {i // 2}", "completion": f"{i}", "label": i % 2 == 0} for i in range(20)
  ]
  tiny.write_jsonl(made / "kto.jsonl", twice)
  (made / "mine.py").write_text("def tagged(answer, row):\n  return answer == row['tag']\n")
  return made


def config(folder, file="sft", source="rows", **fields):
  changes = (
    dict(model__name=folder / "model", data__eval_rows=8, data__length=512, batch__rows=4) | fields
  )
  flags = [f"--config.{k.replace('__', '.')}={v}" for k, v in changes.items()]
  return settings.load(f"{file}:data={folder / source}.jsonl", flags)


def asked(folder, *args, **fields):
  """(task, its questions) of a run with these fields."""
  c = config(folder, *args, **fields)
  checks.check(c)
  base = model.load(c)
  task = questions.make(c, base, data.read(c, base))
  return task, task and task.examples("test")


def test_nothing_is_asked_unless_somebody_wants_it(folder):
  assert asked(folder) == (None, None)


def test_the_questions_are_the_rows_that_are_held_out(folder):
  task, rows = asked(folder, eval__metric="exact")
  c = config(folder)
  held_out = data.read(c, model.load(c)).eval
  assert [row["origin"] for row in rows] == [example.origin for example in held_out]
  assert all(row["row"] in ROWS and row["gold"] == row["row"]["completion"] for row in rows)
  assert (task.name, len(rows)) == (questions.HELD_OUT, 8)
  longest = max(len(row["gold"]) for row in rows)  # a token a byte
  assert task.max_new_tokens == max(32, -(-5 * longest // 4))


def test_samples_are_few_and_their_prompts_differ(folder):
  _, rows = asked(folder, eval__samples=3)
  assert len(rows) == 3
  fields = dict(data__eval_rows=10, eval__samples=9)
  _, rows = asked(folder, "kto", "kto", **fields)
  prompts = [row["question"] for row in rows]
  assert len(set(prompts)) == len(prompts) == 5


def test_of_labelled_answers_the_desirable_ones_are_expected(folder):
  _, rows = asked(folder, "kto", "kto", data__eval_rows=10, eval__metric="exact")
  assert len(rows) == 5
  assert all(row["row"]["label"] for row in rows)


def test_limits(folder):
  task, rows = asked(folder, eval__metric="exact", eval__task_limit=2, eval__max_new_tokens=7)
  assert (len(rows), task.max_new_tokens) == (2, 7)
  metric = f"{folder / 'mine.py'}:tagged"
  task, rows = asked(folder, eval__task=folder / "rows.jsonl", eval__metric=metric)
  assert len(rows) == 20
  assert [row["best"] for row in rows] == [{"mine.py:tagged": 0.0}] * 20
  (grader,) = task.graders
  assert grader.score("t3", rows[3])[0] == 1


def test_a_built_in_task_takes_more_metrics(folder):
  task, rows = asked(folder, eval__task="sql", eval__task_limit=3, eval__metric="exact")
  assert [grader.name for grader in task.graders] == ["sql", "exact"]
  assert (len(rows), task.max_new_tokens) == (3, tasks.TASKS["sql"].max_new_tokens)
  assert [grader.score(rows[0]["gold"], rows[0])[0] for grader in task.graders] == [1, 1]


@pytest.mark.parametrize(
  ("source", "fields", "message"),
  [
    ("text", dict(eval__samples=2, data__eval_rows=2), "eval.samples: .*text.jsonl:.*plain text"),
    ("rows", dict(eval__samples=2, data__eval_rows=0), "no rows are held out"),
    ("rows", dict(eval__metric="exat"), "did you mean exact"),
    ("rows", dict(eval__task="rows.jsonl"), "nothing says how answers to such rows are graded"),
    ("rows2", dict(eval__metric="json"), "eval.metric: .*rows2.jsonl:.*not JSON"),
    ("rows", dict(eval__metric="exact", eval__max_new_tokens=4000), "lower eval.max_new_tokens"),
    ("rows", dict(eval__metric="exact", eval__task="no.jsonl"), "eval.task: no.jsonl does not"),
  ],
)
def test_what_cannot_be_asked(folder, source, fields, message):
  with pytest.raises((ConfigError, ValueError, OSError)) as error:
    asked(folder, "sft", source, **fields)
  assert re.search(message, str(error.value))


def test_a_reward_model_writes_no_answers(folder):
  with pytest.raises(ConfigError, match="trains scores of answers, and writes none"):
    checks.check(config(folder, "reward", eval__samples=2))
