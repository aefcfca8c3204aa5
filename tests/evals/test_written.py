"""What an online run's page shows of its answers."""

import json

import pytest

from posttrain_jax.evals import report, written
from posttrain_jax.runs import completions
from tests.evals import runs


def rows(batch, prompt, rewards, number):
  asked = json.dumps([{"role": "user", "content": prompt}])
  return [
    dict(batch=batch, prompt=asked, completion=f"<b>{batch}.{i}", number=number, sample=i, reward=r)
    for i, r in enumerate(rewards)
  ]


def test_a_prompt_that_came_again_is_shown_over_the_batches(tmp_path):
  for batch in range(1, 8):
    again = rows(batch, "Say red", [0.0, batch / 10], 2 * batch)
    completions.write(tmp_path, batch, [*rows(batch, f"Say {batch}", [1.0], 2 * batch + 1), *again])
  note, (one,) = written.over_steps(tmp_path)
  assert note.startswith("The best answer")
  assert one["prompt"] == "Say red"
  assert [answer["text"] for answer in one["answers"]] == ["<b>1.1", "<b>3.1", "<b>5.1", "<b>7.1"]
  assert one["answers"][0]["when"] == "batch 1: reward 0.1, 0.05 on average of 2"


def test_where_none_came_again_the_best_and_the_worst_are(tmp_path):
  for batch in (1, 2):
    completions.write(tmp_path, batch, rows(batch, f"Say {batch}", [0.5, None, 1.0], batch))
  note, shown = written.over_steps(tmp_path)
  assert note.startswith("No prompt was asked twice")
  assert [[a["text"] for a in one["answers"]] for one in shown] == [
    ["<b>1.2", "<b>1.1"],
    ["<b>2.2", "<b>2.1"],
  ]
  assert shown[0]["answers"][1]["when"] == "batch 1: no reward, 0.75 on average of 2"


@pytest.mark.parametrize("is_online", [True, False])
def test_the_page_has_them_as_text(tmp_path, is_online):
  folder = runs.write(tmp_path / "run", config=dict(runs.CONFIG, objective=runs.GROUPED))
  if is_online:
    completions.write(folder, 1, rows(1, "Say <i>1", [0.5, 1.0], 1))
  page = report.write(folder).read_text()
  assert ("What the policy wrote" in page) == is_online
  assert ("&lt;b&gt;1.1" in page) == is_online
  assert "<b>1.1" not in page


def test_a_table_that_cannot_be_read_is_left_out_and_said(tmp_path):
  for batch in (1, 2, 3):
    completions.write(tmp_path, batch, rows(batch, f"Say {batch}", [0.5, 1.0], batch))
  for batch, damaged in ((1, b"PAR1"), (3, completions.table(tmp_path, 3).read_bytes()[:-20])):
    completions.table(tmp_path, batch).write_bytes(damaged)
    note, shown = written.over_steps(tmp_path)
    assert f"cannot be read: completions_{1:05d}.parquet" in note
    assert shown[0]["prompt"] == "Say 2"
  completions.table(tmp_path, 2).write_bytes(b"")
  note, shown = written.over_steps(tmp_path)
  assert shown == []
  assert note.startswith("Left out")
  assert note.count(".parquet") == 3
