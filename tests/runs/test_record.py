"""A run's folder is read as far as it has come."""

import pytest

from posttrain_jax.runs import record as run
from tests.evals import runs


def test_a_finished_run(tmp_path):
  after = runs.result([runs.answer("q")])
  done = dict(steps=40, final={"loss": 0.25})
  found = run.read(runs.write(tmp_path / "a", lines=runs.rows(), after=after, done=done))
  assert (found.steps, found.final(), found.before, found.after) == (
    40,
    {"loss": 0.25},
    None,
    after,
  )
  assert found.field("optimizer.lr") == 2e-4
  assert found.field("optimizer.rate") is None
  assert found.series("eval_loss")[0] == [10, 20, 30, 40]
  assert found.names()[:2] == ["loss", "loss/join"]


def test_a_run_under_way_gives_its_last_values(tmp_path):
  lines = [{"step": 1, "loss": 3.0, "grad_norm": 1.0}, {"step": 1, "eval_loss": 5.0}]
  lines += [{"step": 2, "loss": 2.0}]
  found = run.read(runs.write(tmp_path / "a", lines=lines))
  assert (found.steps, found.done) == (2, None)
  assert found.final() == {"loss": 2.0, "grad_norm": 1.0, "eval_loss": 5.0}


def test_a_line_under_way_is_left_out(tmp_path):
  folder = runs.write(tmp_path / "a", lines=runs.rows(steps=3))
  with (folder / "metrics.jsonl").open("a") as f:
    f.write('{"step": 4, "lo')
  assert run.read(folder).steps == 3


def test_what_is_no_run(tmp_path):
  with pytest.raises(FileNotFoundError, match="holds nothing, expected config"):
    run.read(tmp_path)
  with pytest.raises(FileNotFoundError, match="is no folder"):
    run.read(tmp_path / "absent")
  folder = runs.write(tmp_path / "a")
  (folder / "evaluation-after.json").write_text('{"task": "sql"}')
  with pytest.raises(
    ValueError, match=r"evaluation-after\.json is no evaluation: it has no 'split'"
  ):
    run.read(folder)
  (folder / "evaluation-after.json").write_text("[]")
  with pytest.raises(ValueError, match="holds a list, expected an object"):
    run.read(folder)


@pytest.mark.parametrize("damage", [b"7", b"{", b'{"loss": 1}', b'{"step": "five"}', b"\xff\xfe"])
def test_a_damaged_line_of_the_metrics_is_named_and_the_one_under_way_is_left_out(damage, tmp_path):
  path, good = tmp_path / run.METRICS, b'{"step": 3, "loss": 1.5}'
  path.write_bytes(good + b"\n" + damage)
  assert run.read_rows(path) == [{"step": 3, "loss": 1.5}]
  assert run.last_step(tmp_path) == 3
  path.write_bytes(good + b"\n" + damage + b"\n" + good + b"\n")
  with pytest.raises(ValueError, match=r"metrics.jsonl:2 is damaged: .*take the line out"):
    run.read_rows(path)
