"""Tables in text, and files in other encodings and line ends: the rows that a spreadsheet shows."""

import gzip
import json

import pytest

from posttrain_jax.data import schema
from posttrain_jax.data.errors import RowError

ROWS = [{"prompt": 'Say "a, b"', "completion": "a,\nb"}, {"prompt": "é; \tx", "completion": "ü"}]
CSV = 'prompt,completion\r\n"Say ""a, b""","a,\nb"\r\n\r\n"é; \tx",ü\r\n'


def read(path, data, **options):
  path.write_bytes(data)
  rows = schema.read(path, **options)
  return [row.fields for row in rows], [int(row.origin.rpartition(":")[2]) for row in rows]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(
  "name", ["a.csv", "a.tsv", "a.CSV", "a.csv.gz", "a.jsonl", "a.json", "a.jsonl.gz"]
)
def test_every_encoding_of_every_file_gives_the_same_rows(encoding, name, tmp_path):
  if "json" in name:
    text = json.dumps(ROWS, ensure_ascii=False, indent=1)
    if "jsonl" in name:
      text = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n"
  else:
    tab = 'prompt\tcompletion\n"Say ""a, b"""\t"a,\nb"\n"é; \tx"\tü'
    text = tab if name.endswith("tsv") else CSV
  data = text.encode(encoding)
  rows, _ = read(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
  assert rows == ROWS


def test_lines_are_those_of_the_file(tmp_path):
  assert read(tmp_path / "a.csv", CSV.encode())[1] == [2, 5]


@pytest.mark.parametrize("mark", [";", "\t"])
def test_a_csv_of_semicolons_or_tabs_is_one(mark, tmp_path):
  data = f"prompt{mark} completion\na, b{mark}c\n".encode()
  assert read(tmp_path / "a.csv", data)[0] == [{"prompt": "a, b", "completion": "c"}]


def test_cells_say_labels_numbers_and_json(tmp_path):
  rows, _ = read(tmp_path / "a.csv", b"prompt,completion,label\na,b,TRUE\nc,1,0\n")
  assert rows == [
    {"prompt": "a", "completion": "b", "label": True},
    {"prompt": "c", "completion": "1", "label": False},
  ]
  rows, _ = read(tmp_path / "b.csv", b"prompt,chosen,rejected,margin\na,b,c,0.5\na,b,c,\n")
  assert [row.get("margin") for row in rows] == [0.5, None]
  talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
  cell = json.dumps(talk).replace('"', '""')
  rows, _ = read(tmp_path / "c.csv", f'messages\n"{cell}"\n'.encode())
  assert rows == [{"messages": talk}]
  rows, _ = read(
    tmp_path / "d.csv",
    b"good,q,a\n1,b,c\n",
    columns={"label": "good", "prompt": "q", "completion": "a"},
  )
  assert rows == [{"label": True, "prompt": "b", "completion": "c"}]
  with pytest.raises(RowError, match=r"d.csv:2: 'label' is the string 'maybe', expected true or"):
    read(tmp_path / "d.csv", b"prompt,completion,label\na,b,maybe\n")


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (
      b"prompt,completion\na,b\nc,d,e\n",
      r"a.csv:3: the row has 3 cells, and the first line names 2",
    ),
    (b"prompt,completion\na\n", r"a.csv:2: the row has 1 cells"),
    (b'prompt,completion\na,b\n"c,d\n', r"a.csv:3: a quote that opens in this row is not closed"),
    (b"prompt,prompt\na,b\n", r"a.csv:1: two columns are called 'prompt'"),
    (b"prompt,completion\na,\xe9\n", r"a.csv:2: byte 0xe9 at column 3 is not UTF-8"),
    (b"prompt,completion\n", "holds no usable row"),
    (b"", "holds no usable row"),
    (b"messages\n[{'role': 'user'}]\n", "'messages' is no JSON, but as Python prints it"),
    (b"\xff\xfea\x00,\x00b", "begins as UTF-16 and is not that throughout"),
  ],
)
def test_a_broken_table_names_its_line(text, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    read(tmp_path / "a.csv", text)


def test_a_row_of_too_many_cells_can_be_skipped_and_an_unnamed_column_is_nobodys(tmp_path):
  (tmp_path / "a.csv").write_text(",prompt,completion,\n0,a,b\n1,c,d,e\n2,e,f,,\n")
  rows = schema.read(tmp_path / "a.csv", on_error="skip")
  assert dict(rows.skipped.counts) == {"unequal cells": 1}
  assert [row.fields["prompt"] for row in rows] == ["a", "e"]
  assert "nobody reads 'unnamed column 1'" in rows.reads[0]


def test_lines_and_arrays_are_told_by_their_beginning(tmp_path):
  rows = [{"text": "a"}, {"text": "b"}]
  lined = "\n".join(map(json.dumps, rows)).encode()
  assert read(tmp_path / "a.json", lined)[0] == rows
  assert read(tmp_path / "a.jsonl", b"\n " + json.dumps(rows).encode())[0] == rows
