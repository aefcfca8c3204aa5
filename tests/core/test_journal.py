"""A journal's lines are whole, or were never written."""

import json

import pytest

from posttrain_jax.core.journal import Journal


def test_what_stands_behind_the_last_line_break_was_never_said(tmp_path):
  path = tmp_path / "j"
  with Journal(path).begin({"of": 1}) as journal:
    for i in range(3):
      journal.write({"i": i, "text": "ä\n"})
  whole = path.read_bytes()
  ends = [at + 1 for at, byte in enumerate(whole) if byte == 10]
  for at in range(len(whole) + 1):
    path.write_bytes(whole[:at])
    with Journal(path).begin({"of": 1}) as journal:
      count = sum(end <= at for end in ends)
      assert [line["i"] for line in journal.lines] == list(range(max(count - 1, 0)))
      for i in range(len(journal.lines), 3):
        journal.write({"i": i, "text": "ä\n"})
    assert path.read_bytes() == whole


def test_the_header_is_that_of_the_file(tmp_path):
  Journal(tmp_path / "j").begin({"of": 1}).__exit__(None, None, None)
  assert Journal(tmp_path / "j").header == {"of": 1}
  assert Journal(tmp_path / "none").header is None
  assert not (tmp_path / "none").exists()


def test_two_do_not_write_at_once(tmp_path):
  with Journal(tmp_path / "j").begin({}), pytest.raises(ValueError, match="another process writes"):
    Journal(tmp_path / "j").begin({})
  Journal(tmp_path / "j").begin({}).__exit__(None, None, None)


def test_a_line_that_is_no_json_is_named(tmp_path):
  (tmp_path / "j").write_text(json.dumps({}) + "\nnothing\n")
  with pytest.raises(ValueError, match=r"j:2 is not JSON"):
    Journal(tmp_path / "j")


@pytest.mark.parametrize(
  ("line", "said"),
  [
    ({}, "has no 'at'"),
    ({"at": []}, r"cannot be read \(list index out of range\)"),
    ({"at": 5}, "cannot be read"),
  ],
)
def test_a_line_that_lacks_what_is_read_is_named(tmp_path, line, said):
  with Journal(tmp_path / "j").begin({}) as journal:
    journal.write({"at": [1]})
    journal.write(line)
  first = Journal(tmp_path / "j").each(lambda line: line["at"][0])
  assert next(first) == 1
  with pytest.raises(ValueError, match=f"j:3 {said}.*: remove the file"):
    next(first)
