"""Evaluation on a task: every question gets its own answer, whatever the batches; counts add up."""

import dataclasses
import json
import types

import jax
import pytest

from posttrain_jax.data import chat, files, templates
from posttrain_jax.evals import tasks
from posttrain_jax.rollout import engine
from tests.data.conftest import make_tokenizer
from tests.models import families


@pytest.fixture(scope="module")
def tokenizer():
  return make_tokenizer("chatml")


@pytest.fixture(scope="module")
def config(tokenizer):
  return families.config(
    "llama",
    vocab_size=len(tokenizer),
    max_position_embeddings=1024,
    num_hidden_layers=1,
    eos_token_id=tokenizer.eos_token_id,
  )


@pytest.fixture
def model(monkeypatch, tokenizer):
  """An engine that answers what `answers` says for a row of the task, and remembers its calls."""
  asked = types.SimpleNamespace(answers=lambda row: row["gold"], calls=[], finished=True)
  template = chat.template(tokenizer, "chatml")
  rows = tasks.TASKS["sql"].examples("test", n=23)

  def generate(params, config, prompts, *, batch_size, stop_tokens, max_new_tokens, **options):
    by_prompt = {template.render(row["prompt"], add_generation_prompt=True): row for row in rows}
    asked.calls.append(dict(prompts=prompts, stops=stop_tokens, max_new_tokens=max_new_tokens))
    asked.calls[-1].update(options, batch_size=batch_size)
    texts = [asked.answers(by_prompt[tokenizer.decode(prompt)]) for prompt in prompts]
    ids = [tokenizer(f"{text}<|im_end|>")["input_ids"] for text in texts]
    return engine.Generation(ids, [None] * len(ids), [asked.finished] * len(ids))

  monkeypatch.setattr(engine, "generate", generate)
  monkeypatch.setattr(engine, "prepare", lambda params, config: params)
  return asked


def run(tokenizer, config, **options):
  return tasks.evaluate({}, config, tokenizer, limit=23, template="chatml", **options)


def test_gold_answers_are_all_right_and_in_the_order_of_the_task(model, tokenizer, config):
  result = run(tokenizer, config, batch_size=4)
  rows = tasks.TASKS["sql"].examples("test", n=23)
  assert (result.correct, result.total, result.accuracy) == (23, 23, 1.0)
  assert [a["question"] for a in result.answers] == [row["question"] for row in rows]
  assert [a["answer"] for a in result.answers] == [row["gold"] for row in rows]
  assert result.reasons == {"ok": 23}


def test_counts_by_channel_and_reason_add_up(model, tokenizer, config):
  model.answers = lambda row: row["gold"] if row["channel"] == "join" else "SELEC 1"
  result = run(tokenizer, config)
  joins = [a for a in result.answers if a["channel"] == "join"]
  assert 0 < len(joins) < 23
  assert result.by_channel["join"] == (len(joins), len(joins))
  assert result.by_channel["lookup"][0] == 0 < result.by_channel["lookup"][1]
  assert sum(total for _, total in result.by_channel.values()) == result.total == 23
  assert result.correct == len(joins)
  # The verdicts are counted by kind, what SQLite said stays with the answer.
  assert result.reasons == {"syntax error": 23 - len(joins), "ok": len(joins)}
  assert any(a["reason"].startswith("syntax error: near") for a in result.answers)


def test_the_engine_is_asked_once_and_tells_how_far_it_is(model, tokenizer, config):
  tell = lambda done, wanted: None
  run(tokenizer, config, batch_size=10, progress=tell)
  (call,) = model.calls
  assert (len(call["prompts"]), call["batch_size"], call["progress"]) == (23, 10, tell)


def test_an_answer_stops_at_the_turns_end_and_at_the_texts(model, tokenizer, config):
  run(tokenizer, config, max_new_tokens=7)
  template = chat.template(tokenizer, "chatml")
  wanted = {templates.end_of_turn(tokenizer, template), tokenizer.eos_token_id}
  assert wanted <= set(model.calls[0]["stops"])
  assert model.calls[0]["max_new_tokens"] == 7
  run(tokenizer, config)
  assert model.calls[-1]["max_new_tokens"] == tasks.TASKS["sql"].max_new_tokens


def test_the_result_survives_json(model, tokenizer, config):
  model.finished = False
  result = run(tokenizer, config)
  written = json.loads(json.dumps(result.to_json()))
  assert written["accuracy"] == 1.0
  assert tasks.TaskResult.from_json(written) == result
  assert not any(a["finished"] for a in result.answers)
  assert result.new_tokens == sum(
    len(tokenizer(f"{a['answer']}<|im_end|>")["input_ids"]) for a in result.answers
  )


@pytest.mark.slow
def test_a_real_model_answers_alike_in_any_batch(tokenizer, config):
  params = families.params(config)
  options = dict(limit=5, template="chatml", max_new_tokens=6)
  with jax.default_matmul_precision("highest"):
    some = tasks.evaluate(params, config, tokenizer, batch_size=2, **options)
    whole = tasks.evaluate(params, config, tokenizer, batch_size=5, **options)
  assert some.total == 5
  assert 0 < some.new_tokens <= 5 * 6
  assert [a["answer"] for a in some.answers] == [a["answer"] for a in whole.answers]
  assert len({a["answer"] for a in some.answers}) > 1


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(task="sqll"), "unknown task 'sqll'; there are: sql"),
    (dict(split="tets"), "no split 'tets'; there are train, eval, test"),
    (dict(limit=0), "limit=0: ask for at least one question"),
    (dict(batch_size=0), "batch_size must be at least 1, found 0"),
    (dict(max_new_tokens=0), "max_new_tokens must be at least 1, found 0"),
    (dict(max_new_tokens=1000), "more than the 1024 positions"),
  ],
)
def test_what_cannot_be_asked(tokenizer, config, options, message):
  with pytest.raises(ValueError, match=message):
    tasks.evaluate(
      families.params(config), config, tokenizer, **{"limit": 3, "template": "chatml", **options}
    )


def test_a_task_is_a_data_set_and_a_data_set_a_task():
  assert set(tasks.TASKS) == set(files.BUILT_IN)


def test_an_answer_that_a_problem_ended_is_wrong_though_its_words_are_right(tokenizer, config):
  def answer(params, rows, **how):
    problems = [f"environment: the {i}th failed" * (i == 1) for i in range(len(rows))]
    return [tasks.Answered(row["gold"], True, 3, p) for row, p in zip(rows, problems)]

  task = dataclasses.replace(tasks.TASKS["sql"], turns=types.SimpleNamespace(answer=answer))
  result = run(tokenizer, config, task=task)
  assert (result.correct, result.total) == (22, 23)
  assert result.reasons == {"ok": 22, "environment": 1}
  assert result.answers[1]["reason"] == "environment: the 1th failed"
  some = dataclasses.replace(task, examples=lambda split: tasks.TASKS["sql"].examples(split, n=23))
  assert tasks.regraded(result, some).to_json() == result.to_json()
