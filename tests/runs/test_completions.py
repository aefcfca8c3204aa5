"""Files of what a policy wrote that a disk or a hand has damaged."""

import numpy as np
import pytest

from posttrain_jax.runs import completions


@pytest.mark.parametrize(
  ("damage", "said"),
  [
    (lambda path: path.unlink(), "batches_00003.npz is not there"),
    (lambda path: path.write_bytes(path.read_bytes()[:100]), "batches_00003.npz cannot be read"),
    (lambda path: path.write_bytes(b""), "batches_00003.npz cannot be read"),
    (lambda path: np.savez(path, other=np.zeros(2)), "batches_00003.npz cannot be read"),
  ],
  ids=["gone", "cut", "empty", "another"],
)
def test_a_batch_that_cannot_be_read_is_told_with_what_helps(tmp_path, damage, said):
  completions.keep(tmp_path, 3, [{"tokens": np.arange(9)}] * 2, last=None)
  damage(tmp_path / "completions" / "batches_00003.npz")
  with pytest.raises(ValueError, match=f"{said}.*remove the last folder in .*checkpoints"):
    completions.arrays(tmp_path, 3)


@pytest.mark.parametrize(
  "line", ["[1, 2]", "7", "null", '"text"', '{"number": [7], "sample": 1}', '{"number": 7}']
)
def test_a_line_that_is_no_answer_ends_what_is_read_of_a_journal(tmp_path, line):
  whole = dict(tokens=[4], logps=np.zeros(1, np.float32), ended="stop_token", kept=None)
  journal = completions.Journal(tmp_path, 1, "abc")
  journal.put(0, 0, **whole)
  journal.close()
  (path,) = (tmp_path / "completions").glob("answers_*")
  text = path.read_text()
  path.write_text(text + line + "\n")
  again = completions.Journal(tmp_path, 1, "abc")
  assert again.written(0, 0)["tokens"] == [4]
  assert path.read_text() == text


def test_each_process_writes_its_own_journal_and_knows_what_is_in_all(tmp_path):
  put = dict(tokens=[7], logps=np.zeros(1), ended="stop_token", kept=None)
  both = [completions.Journal(tmp_path, 3, "abc", process=i) for i in range(2)]
  for i, journal in enumerate(both):
    journal.put(i, 0, **put)
  both[1].put(5, 0, **put)
  for journal in both:
    journal.close()
  second = tmp_path / completions.FOLDER / "answers-1_00003.jsonl"
  cut = second.read_bytes()[:-9]
  second.write_bytes(cut)  # killed as it wrote its last line
  one = completions.Journal(tmp_path, 3, "abc")
  assert [bool(one.written(number, 0)) for number in (0, 1, 5)] == [True, True, False]
  one.close()
  assert second.read_bytes() == cut  # which is another's to mend
  completions.Journal(tmp_path, 3, "abc", process=1).close()
  assert second.read_bytes() < cut
  assert completions.Journal(tmp_path, 3, "xyz", process=2).written(0, 0) is None
  completions.Journal(tmp_path, 9, "abc", last=2).close()
  assert not second.exists()


def test_the_scores_of_all_processes_are_forgotten_together(tmp_path):
  paths = [completions.scores(tmp_path, 3, last=None, process=i) for i in range(2)]
  other = completions.scores(tmp_path, 4, last=None, process=1)
  for path in (*paths, other):
    path.parent.mkdir(exist_ok=True)
    path.touch()
  assert completions.of_all(paths[1]) == paths
  completions.forget_scores(tmp_path, [3])
  assert [path.exists() for path in (*paths, other)] == [False, False, True]
