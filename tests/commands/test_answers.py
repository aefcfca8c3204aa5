"""Answers before and after training, graded: `train`, `eval` and `pairs` on rows of one's own."""

import itertools
import json

import pytest

from posttrain_jax.__main__ import main
from posttrain_jax.evals import samples
from posttrain_jax.rollout import engine
from tests import tiny
from tests.commands.test_train import train
from tests.evals.test_report import page

FIELDS = dict(steps=2, eval__every=0, checkpoint__every=0, data__eval_rows=5)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  folder = tmp_path_factory.mktemp("answers")
  tiny.tiny_model_folder(folder / "model")
  items = [{"prompt": f"say {i % 4}", "completion": "ab"[i % 2], "id": i} for i in range(30)]
  tiny.write_jsonl(folder / "rows.jsonl", items)
  return folder


@pytest.fixture(autouse=True)
def answers(monkeypatch):
  """The model's words: `a` to every prompt, or what the list says."""
  said = ["a"]
  tokenizer = tiny.tokenizer()

  def generate(params, config, prompts, **options):
    ids = [tokenizer(f"{said[i % len(said)]}<|im_end|>")["input_ids"] for i in range(len(prompts))]
    return engine.Generation(ids, [None] * len(ids), [True] * len(ids))

  def draw(writer, prompts, plan, done=()):
    for number, sample in itertools.product(range(len(prompts)), range(plan.samples)):
      text = said[(number * plan.samples + sample) % len(said)]
      yield samples.Drawn(number, sample, tokenizer(text)["input_ids"], text, True)

  monkeypatch.setattr(samples, "draw", draw)
  monkeypatch.setattr(engine, "generate", generate)
  monkeypatch.setattr(engine, "prepare", lambda params, config: params)
  return said


def read(folder, name):
  return json.loads((folder / name).read_text())


def metric(folder, factor):
  path = folder / "mine.py"
  path.write_text(f"def f(answer, row):\n  return {factor} * (answer == row['completion'])\n")
  return f"exact,{path}:f"


def test_a_run_grades_its_held_out_rows(rows, tmp_path, capsys):
  fields = FIELDS | dict(eval__metric=metric(tmp_path, 0.5), eval__samples=2)
  run = tmp_path / "run"
  assert train(rows, run, **fields) == 0
  told = capsys.readouterr().out
  before, after = (read(run, f"evaluation-{when}.json") for when in ("before", "after"))
  right = sum(a["gold"] == "a" for a in after["answers"])
  assert before["answers"] == after["answers"]
  assert (after["correct"], after["total"]) == (right, 5)
  assert f"exact after training: {right}/5 correct" in told
  assert after["scores"]["mine.py:f"]["mean"] == pytest.approx(right / 10)
  final = read(run, "done.json")["final"]
  assert final["eval_score/exact"] == pytest.approx(right / 5)
  text = page(run).text
  for words in ("Scores of answers: 5 questions", "higher is better", "mine.py:f"):
    assert words in text


@pytest.mark.slow
def test_eval_repeats_the_runs_number_and_another_metric_is_told(rows, tmp_path, capsys):
  fields = FIELDS | dict(eval__metric=metric(tmp_path, 0.5))
  run = tmp_path / "run"
  assert train(rows, run, **fields) == 0
  after = read(run, "evaluation-after.json")
  right = after["correct"]
  assert main(["eval", f"--workdir={run}", f"--out={tmp_path / 'out.jsonl'}"]) == 0
  evaluated = read(run, "eval.json")
  assert evaluated["scores"] == after["scores"]
  lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
  assert lines == after["answers"]

  # the same run with another metric of that name says so, and compares like with like
  (run / "done.json").unlink()
  metric(tmp_path, 0.25)
  capsys.readouterr()
  assert train(rows, run, **fields) == 0
  assert "mine.py:f has changed since this run began: the answers before" in capsys.readouterr().out
  for when in ("before", "after"):
    again = read(run, f"evaluation-{when}.json")
    assert again["scores"]["mine.py:f"]["mean"] == pytest.approx(right / 20)

  # and with the first one again, by which the answers before are no longer graded
  (run / "done.json").unlink()
  metric(tmp_path, 0.5)
  assert train(rows, run, **fields) == 0
  for when in ("before", "after"):
    again = read(run, f"evaluation-{when}.json")
    assert again["scores"]["mine.py:f"]["mean"] == pytest.approx(right / 10)


@pytest.mark.slow
def test_samples_alone_are_shown_beside_what_was_expected(rows, tmp_path, answers, capsys):
  answers[:] = ["what the model wrote"]
  run = tmp_path / "run"
  assert train(rows, run, **FIELDS, eval__samples=2) == 0
  assert "answers after training: 2 written" in capsys.readouterr().out
  found = page(run)
  assert "Held-out prompts: 2" in found.text
  answered = found.text[found.text.index("Held-out prompts: 2") :]
  assert answered.count("before what the model wrote") == 2
  assert answered.count("after what the model wrote") == 2
  assert "Scores of answers" not in found.text
  assert "accuracy" not in read(run, "evaluation-after.json")


def test_pairs_of_ones_own_rows(rows, tmp_path, answers, capsys):
  answers[:] = ["a", "c"]
  out = tmp_path / "pairs.jsonl"
  flags = ["pairs", f"--model={rows / 'model'}", f"--out={out}", "--n=2", "--max_new_tokens=8"]
  assert main([*flags, f"--data={rows / 'rows.jsonl'}"]) == 1
  assert "--data needs --reward" in capsys.readouterr().err
  assert main([*flags, f"--data={rows / 'rows.jsonl'}", "--reward=exact"]) == 0
  made = [json.loads(line) for line in out.read_text().splitlines()]
  assert len(made) == 30
  assert {row["rejected"][0]["content"] for row in made} <= {"a", "c"}
  assert {row["chosen"][0]["content"] for row in made} == {"a", "b"}
  assert all(row["chosen"] != row["rejected"] and "channel" not in row for row in made)


def test_columns_of_any_name_are_named_by_the_commands_own_flag(rows, tmp_path, answers, capsys):
  """What `pairs`, `eval --metric` and `eval --reward` tell to write is what they take."""
  answers[:] = ["c"]
  asked = [{"ask": f"say {i}", "tell": "ab"[i % 2]} for i in range(4)]
  tiny.write_jsonl(tmp_path / "rows.jsonl", asked)
  model, data = f"--model={rows / 'model'}", f"--data={tmp_path / 'rows.jsonl'}"
  columns = ["--columns=prompt=ask", "--columns=completion=tell"]
  pairs = ["pairs", model, data, "--reward=exact", f"--out={tmp_path / 'pairs.jsonl'}"]
  graded = ["eval", model, data, "--metric=exact", f"--out={tmp_path / 'graded.jsonl'}"]
  for command in (pairs, graded):
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "--columns=prompt=question --columns=completion=answer" in error
    assert "--config" not in error
    assert main([*command, *columns]) == 0
  made = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
  assert {row["prompt"][0]["content"] for row in made} == {row["ask"] for row in asked}
  lines = [json.loads(line) for line in (tmp_path / "graded.jsonl").read_text().splitlines()]
  assert [line["gold"] for line in lines] == [row["tell"] for row in asked]
  assert main(["eval", model, *columns]) == 1
  assert "--columns=prompt=ask names a column of --data" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_that_learns_its_rows_scores_higher(rows, tmp_path, monkeypatch):
  """The real engine, on rows with one answer."""
  monkeypatch.undo()
  tiny.write_jsonl(
    rows / "one.jsonl", [{"prompt": f"say {i}", "completion": "aaa"} for i in range(30)]
  )
  fields = FIELDS | dict(steps=60, optimizer__lr=0.02, eval__metric="exact")
  assert train(rows, tmp_path / "run", data="one.jsonl", **fields) == 0
  before, after = (read(tmp_path / "run", f"evaluation-{w}.json") for w in ("before", "after"))
  assert before["correct"] == 0
  assert after["correct"] == 5
  assert main(["eval", f"--workdir={tmp_path / 'run'}"]) == 0
  assert read(tmp_path / "run", "eval.json")["scores"] == after["scores"]
