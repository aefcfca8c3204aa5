import gzip
import json
import logging
import os
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from posttrain_jax.data import schema
from posttrain_jax.data.errors import RowError

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}


def write(path, *lines):
  path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines))
  return path


GOOD = [
  ("text", {"text": "a"}),
  ("messages", {"messages": [USER, ASSISTANT], "channel": "talk"}),
  ("prompt", {"prompt": "a"}),
  ("prompt_completion", {"prompt": "a", "completion": "b", "gold": 3}),
  ("prompt_completion", {"prompt": [USER], "completion": [ASSISTANT]}),
  ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}),
  ("preference", {"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}),
  ("unpaired", {"prompt": "a", "completion": "b", "label": True}),
  ("unpaired", {"messages": [USER, ASSISTANT], "label": False}),
  ("stepwise", {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}),
]


@pytest.mark.parametrize(("kind", "fields"), GOOD)
def test_each_schema_is_recognised(kind, fields, tmp_path):
  (row,) = schema.read(write(tmp_path / "a.jsonl", fields))
  assert row.kind == kind
  assert row.fields == fields


def calls(made):
  return {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": made}]}


DEEP: list = []
for _ in range(200):
  DEEP = [DEEP]

BAD = [
  ("not JSON", b'{"text": "a"'),
  ("not JSON", b'{"text": NaN}'),
  ("not JSON", b"[" * 100_000),
  ("not UTF-8", '{"text": "café"}'.encode("latin1")),
  ("not text", b'{"text": "\\ud800"}'),
  ("not an object", ["a"]),
  ("not an object", "a"),
  ("unknown columns", {"question": "a", "answer": "b"}),
  ("ambiguous columns", {"text": "a", "messages": [USER]}),
  ("wrong type", {"text": 3}),
  ("wrong type", {"prompt": "a", "completion": None}),
  ("wrong type", {"prompt": "a", "completion": "b", "label": 1}),
  ("wrong type", {"text": "a", "channel": 3}),
  ("wrong type", {"messages": "hello"}),
  ("wrong type", {"messages": ["hello"]}),
  ("wrong type", {"messages": [{"role": "user", "content": 3}]}),
  ("empty text", {"text": " \n"}),
  ("empty completion", {"prompt": "a", "completion": ""}),
  ("empty completion", {"prompt": "a", "completion": " "}),
  ("empty completion", {"prompt": [USER], "completion": []}),
  ("empty completion", {"messages": [USER, {"role": "assistant", "content": ""}]}),
  ("empty completion", {"prompt": "a", "chosen": "", "rejected": "b"}),
  ("empty messages", {"messages": []}),
  ("unknown role", {"messages": [{"role": "robot", "content": "a"}]}),
  ("message without role", {"messages": [{"content": "a"}]}),
  ("message without content", {"messages": [{"role": "user"}]}),
  ("not text", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
  ("unusable weight", {"messages": [{**ASSISTANT, "weight": 0.5}]}),
  ("mixed forms", {"prompt": "a", "completion": [ASSISTANT]}),
  ("mixed forms", {"prompt": [USER], "chosen": [ASSISTANT], "rejected": "b"}),
  ("not an object", None),
  ("wrong type", {"prompt": ["a"], "completion": "b"}),
  ("wrong type", {"prompt": "a", "completions": ["b", None], "labels": [True, False]}),
  ("wrong type", b'{"prompt": "a", "completions": ["b", "c"], "scores": [1e999, 0]}'),
  ("wrong type", {"prompt": "a", "completions": ["b", "c"], "scores": [10**400, 0]}),
  ("wrong type", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 10**400}),
  ("negative weight", {"prompt": "a", "chosen": "b", "rejected": "c", "weight": -1}),
  ("wrong type", {"messages": [USER, ASSISTANT], "tools": {"name": "f"}}),
  ("wrong type", {"messages": [USER, ASSISTANT], "tools": [3]}),
  ("not JSON", {"messages": [USER, ASSISTANT], "tools": "[{"}),
  ("tool without name", {"messages": [USER, ASSISTANT], "tools": [{"function": {}}]}),
  ("wrong type", {"messages": [USER, ASSISTANT], "chat_template_kwargs": []}),
  ("wrong type", calls("f")),
  ("wrong type", calls(["f"])),
  ("wrong type", calls([{"function": "f"}])),
  ("wrong type", calls([{"function": {"name": None}}])),
  ("wrong type", calls([{"function": {"name": "f", "arguments": [1]}}])),
  ("wrong type", calls([{"function": {"name": "f", "arguments": "[1]"}}])),
  ("not JSON", calls([{"function": {"name": "f", "arguments": "{a: 1}"}}])),
  ("not JSON", calls([{"function": {"name": "f", "arguments": '{"a": NaN}'}}])),
  ("call without arguments", calls([{"function": {"name": "f", "parameters": {"a": 1}}}])),
  ("nested too deeply", calls([{"function": {"name": "f", "arguments": {"a": DEEP}}}])),
  ("nested too deeply", {"messages": [USER, {**ASSISTANT, "extra": DEEP}]}),
  ("not text", calls([{"function": {"name": "f", "arguments": r'{"a": "\ud800"}'}}])),
  ("call of another", {"messages": [{**USER, "tool_calls": [{"function": {"name": "f"}}]}]}),
  (
    "function_call",
    {"messages": [USER, {"role": "assistant", "function_call": {"name": "f"}, "tool_calls": [{}]}]},
  ),
  ("wrong type", {"messages": [USER, {**ASSISTANT, "reasoning_content": 3}]}),
  ("message without content", {"messages": [USER, {"role": "assistant", "tool_calls": []}]}),
  ("unknown role", {"messages": [{"role": ["user"], "content": "a"}]}),
  ("unequal steps", {"prompt": "a", "completions": ["b"], "labels": [True, False]}),
]


@pytest.mark.parametrize(("reason", "line"), BAD, ids=lambda x: str(x)[:40])
def test_a_bad_row_names_file_and_line_and_can_be_skipped(reason, line, tmp_path):
  path = write(tmp_path / "a.jsonl", {"text": "first"}, b"", line, {"text": "last"})
  with pytest.raises(RowError) as caught:
    schema.read(path)
  assert caught.value.reason == reason
  assert str(caught.value).startswith(f"{path}:3: ")
  rows = schema.read(path, on_error="skip")
  assert [row.fields["text"] for row in rows] == ["first", "last"]
  assert [row.origin for row in rows] == [f"{path}:1", f"{path}:4"]
  assert dict(rows.skipped.counts) == {reason: 1}
  assert f"1 {reason} (first: {path}:3: " in str(rows.skipped)


def test_unknown_columns_show_the_schemas_and_how_to_map(tmp_path):
  path = write(tmp_path / "a.jsonl", {"question": "a", "answer": "b"})
  with pytest.raises(
    RowError, match=r"columns.prompt=question --config.*completion=answer;(.|\n)*chosen"
  ):
    schema.read(path)


def test_columns_rename_join_and_carry(tmp_path):
  row = {"instruction": "Add", "input": "1 2", "output": "3", "channel": "maths", "text": "x"}
  path = write(tmp_path / "a.jsonl", row, {**row, "input": ""})
  columns = {"prompt": ["instruction", "input"], "completion": "output"}
  first, second = schema.read(path, columns=columns)
  assert first.fields == {"prompt": "Add\n1 2", "completion": "3", "channel": "maths"}
  assert second.fields["prompt"] == "Add"
  with pytest.raises(RowError, match=r"a.jsonl:1: .*asks for 'answer'.*'instruction'"):
    schema.read(path, columns={"prompt": "instruction", "completion": "answer"})


@pytest.mark.parametrize(
  ("columns", "row", "kinds", "fields"),
  [
    ("completion=answer", dict(prompt="a", answer="b", text="c"), None, dict(prompt="a", completion="b")),
    ("prompt=question", dict(question="a", completion="b", id=3), None, dict(prompt="a", completion="b")),
    ("prompt=question", dict(question="a", answer="b"), ("prompt",), dict(prompt="a")),
    ("prompt=question", dict(question="a", chosen="b", rejected="c", completion="d"), ("preference",),
     dict(prompt="a", chosen="b", rejected="c")),
    ("chosen=good", dict(prompt="a", good="b", rejected="c"), None, dict(prompt="a", chosen="b", rejected="c")),
    ("chosen=good rejected=bad", dict(prompt="a", good="b", bad="c"), None, dict(chosen="b", rejected="c")),
    ("completion=prompt prompt=completion", dict(prompt="a", completion="b"), None, dict(prompt="b", completion="a")),
    ("label=good", dict(prompt="a", completion="b", good=True), None, dict(prompt="a", completion="b", label=True)),
  ],
)  # fmt: skip
def test_a_part_that_is_not_named_is_the_column_of_its_name(columns, row, kinds, fields):
  named = dict(pair.split("=") for pair in columns.split())
  rows = schema.read([row], columns=named, kinds=kinds)
  assert rows[0].fields == fields
  read = {named.get(part, part) for part in fields}
  (told,) = rows.reads
  assert all(repr(name) in told.partition("; nobody")[0] for name in read)


def test_too_few_named_parts_say_which_go_with_them():
  with pytest.raises(RowError) as error:
    schema.read(
      [dict(question="a", answer="b")],
      columns={"completion": "answer"},
      kinds=("prompt", "prompt_completion"),
    )
  assert str(error.value).endswith(
    "names ['completion'], which make no row alone; the row has ['answer', 'question']: write"
    " --config.data.columns.prompt=COLUMN, too"
  )
  with pytest.raises(RowError, match=r"completion=COLUMN, too"):
    schema.read([dict(question="a")], columns={"prompt": "question"}, kinds=("prompt_completion",))


def test_chat_makes_messages_of_two_strings(tmp_path):
  path = write(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"})
  (row,) = schema.read(path, chat=True, system="Be brief.", channel="talk")
  system = {"role": "system", "content": "Be brief."}
  assert row.fields == {
    "prompt": [system, {"role": "user", "content": "a"}],
    "completion": [{"role": "assistant", "content": "b"}],
    "channel": "talk",
  }
  with pytest.raises(RowError, match="not all strings"):
    schema.read(
      write(tmp_path / "b.jsonl", {"messages": [USER, ASSISTANT]}), chat=True, system="Be brief."
    )


def test_chat_leaves_messages_and_text_as_they_are(tmp_path):
  for fields in ({"messages": [USER, ASSISTANT]}, {"text": "once"}):
    (row,) = schema.read(write(tmp_path / "a.jsonl", fields), chat=True)
    assert row.fields == fields


def test_messages_come_in_one_form(tmp_path):
  told = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
  parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
  path = write(
    tmp_path / "a.jsonl",
    {"conversations": told},
    {"conversations": [{"role": "user", "content": parts, "name": None}, ASSISTANT]},
  )
  for row in schema.read(path, columns={"messages": "conversations"}):
    assert row.fields == {"messages": [USER, ASSISTANT]}


def test_calls_come_in_one_form():
  call = {"type": "function", "function": {"name": "f", "arguments": {"a": None}}}
  for made in (
    [call],
    [{"name": "f", "arguments": {"a": None}}],
    [{"function": {"name": "f", "arguments": '{"a": null}', "x": None}, "id": None}],
  ):
    (row,) = schema.read([calls(made)])
    assert row.fields["messages"][1]["tool_calls"] == [call]
  for nothing in ({}, {"arguments": None}, {"arguments": ""}, {"arguments": "{}"}):
    (row,) = schema.read([calls([{"name": "f", **nothing}])])
    assert row.fields["messages"][1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
  tools = [{"type": "function", "function": {"name": "f"}}]
  for written in (tools, json.dumps(tools), [json.dumps(tools[0])]):
    assert schema.validate({"text": "a", "tools": written}, "x")["tools"] == tools
  assert "tools" not in schema.validate({"text": "a", "tools": []}, "x")


def test_what_is_no_text_in_rows_of_a_list():
  for text in ("\ud800", "a\udfff"):
    for row in (
      {"text": text},
      {"prompt": "a", "completion": text},
      {"messages": [{**USER, "content": text}]},
    ):
      with pytest.raises(RowError, match=r"row 0: .*half of a surrogate pair"):
        schema.read([row])
  with pytest.raises(RowError, match="row 0: expected an object with named columns"):
    schema.read([{3: "a"}])


def test_answers_in_strings_that_repeat_their_prompt_are_told(caplog):
  pair = {"prompt": "Capital?", "chosen": "Capital? Paris", "rejected": "Capital? Lyon"}
  with caplog.at_level(logging.WARNING):
    schema.read([pair, {**pair, "rejected": "Lyon"}])
  (record,) = caplog.records
  assert "1 of 2 rows begin with their whole prompt" in record.getMessage()
  caplog.clear()
  schema.read([{"prompt": "a", "chosen": "abc", "rejected": "ab"}])
  assert not caplog.records


def test_every_container_gives_the_same_rows(tmp_path):
  rows = [{"prompt": "a", "completion": "é"}, {"prompt": "c", "completion": "d"}]
  text = "\n".join(json.dumps(row) for row in rows)
  (tmp_path / "a.jsonl").write_text("﻿" + text + "\n\n")
  (tmp_path / "a.json").write_text(json.dumps(rows, indent=2))
  with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
    file.write(text)
  with gzip.open(tmp_path / "a.json.gz", "wt") as file:
    file.write(json.dumps(rows))
  parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
  for path in sorted(tmp_path.iterdir()):
    assert [row.fields for row in schema.read(path)] == rows, path
  lines = [row.origin.rpartition(":")[2] for row in schema.read(tmp_path / "a.json")]
  assert lines == ["2", "6"]


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ('[\n{"text": "a"},\n{"text": }]', r"a.json:3: not JSON"),
    ('[\n{"text": "a"}\n{"text": "b"}]', r"a.json:3: not JSON \(expected ','"),
    ('[{"text": "a"}] 1', r"a.json:1: not JSON \(something follows"),
    (
      '{\n"rows": [{"text": "a"}]}',
      r"a.json:1: expected one array of rows, or an object to a line",
    ),
    ("", "found an empty file"),
    ("[]", "holds no usable row"),
    ('[\n{"text": "a"},', r"a.json:2: not JSON"),
  ],
)
def test_a_broken_array_names_its_line(text, message, tmp_path):
  path = tmp_path / "a.json"
  path.write_text(text)
  with pytest.raises(ValueError, match=message):
    schema.read(path)


def test_a_broken_array_cannot_be_skipped(tmp_path):
  (tmp_path / "a.json").write_bytes('[{"text": "a"},\n{"text": "é"}]'.encode("latin1"))
  with pytest.raises(RowError, match=r"a.json:2: byte 0xe9 at column 11 is not UTF-8"):
    schema.read(tmp_path / "a.json", on_error="skip")


def test_a_source_that_is_not_there(tmp_path):
  write(tmp_path / "train.jsonl", {"text": "a"})
  with pytest.raises(FileNotFoundError, match=r"did you mean .*train.jsonl"):
    schema.read(tmp_path / "trian.jsonl")
  with pytest.raises(FileNotFoundError, match=r"holds train.jsonl"):
    schema.read(str(tmp_path / "unlike-anything.parquet"))
  with pytest.raises(IsADirectoryError, match=r"name one of its files: train.jsonl"):
    schema.read(tmp_path)
  with pytest.raises(ValueError, match="no built-in task"):
    schema.read("what is this?")
  (tmp_path / "link.jsonl").symlink_to("gone.jsonl")
  with pytest.raises(
    FileNotFoundError, match=r"link.jsonl does not exist: it is a link to gone.jsonl"
  ):
    schema.read(tmp_path / "link.jsonl")
  damaged = tmp_path / "a.parquet"
  damaged.write_bytes(b"PAR1 and nothing else")
  with pytest.raises(ValueError, match=r"a.parquet is a damaged parquet file"):
    schema.read(damaged)
  (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:-12])
  with pytest.raises(ValueError, match="damaged gzip"):
    schema.read(tmp_path / "a.jsonl.gz")


def test_hub_datasets_go_through_the_library(monkeypatch):
  import datasets

  asked = []
  data = datasets.Dataset.from_list([{"question": "a", "answer": "b"}])
  monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or data)
  columns = {"prompt": "question", "completion": "answer"}
  (row,) = schema.read("openai/gsm8k:main", split="test", columns=columns)
  assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]
  assert row.origin == "openai/gsm8k:main/test:1"
  schema.read("openai/gsm8k:main#train[:5]", split="test", columns=columns)
  schema.read("openai/gsm8k#test_sft", split="eval", columns=columns)
  assert asked[1:] == [
    (("openai/gsm8k", "main"), {"split": "train[:5]"}),
    (("openai/gsm8k", None), {"split": "test_sft"}),
  ]


def test_a_hub_failure_is_explained(monkeypatch):
  import datasets

  def fail(*args, **kwargs):
    raise ConnectionError("no route")

  monkeypatch.setattr(datasets, "load_dataset", fail)
  with pytest.raises(ValueError, match=r"'owner/name' with split 'train' .*no route"):
    schema.read("owner/name")


def test_real_gsm8k():
  folder = os.environ.get("POSTTRAIN_DATA")
  if folder is None:
    pytest.skip("POSTTRAIN_DATA is not set, so there is no gsm8k to read")
  columns = {"prompt": "question", "completion": "answer"}
  rows = schema.read(Path(folder) / "gsm8k" / "train.jsonl", columns=columns)
  assert len(rows) == 7473
  assert schema.kinds(rows) == {"prompt_completion": 7473}


BEGUN = {"role": "assistant", "content": "The ans"}
REST = {"role": "assistant", "content": "wer is yes"}


@pytest.mark.parametrize(
  "fields",
  [
    {"prompt": [USER, BEGUN], "completion": [REST]},
    {"prompt": [USER, BEGUN], "completion": REST, "label": True},
    {"prompt": [USER, BEGUN], "chosen": [REST], "rejected": [ASSISTANT]},
    {"prompt": [USER, BEGUN], "completions": [[REST], [ASSISTANT]], "scores": [1, 0]},
    {"prompt": [USER, BEGUN], "completion": [USER, {**REST, "content": "The answer is yes"}]},
    {"prompt": [USER, BEGUN], "completion": [USER, BEGUN, REST]},
  ],
)
def test_an_answer_that_a_prompt_begins_is_no_turn_of_its_own(fields, tmp_path):
  """A prefilled prompt: its template would end the turn in the middle of a word."""
  path = write(tmp_path / "a.jsonl", fields)
  with pytest.raises(RowError, match=r"a.jsonl:1: 'prompt' ends with an .*; end 'prompt' with the"):
    schema.read(path)


def test_a_prompt_may_end_with_a_call_or_be_answered_by_the_user(tmp_path):
  call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
  rows = [{"prompt": [USER, call], "completion": [REST]}]
  rows += [{"prompt": [USER, ASSISTANT], "completion": [{**USER, "content": "More"}, REST]}]
  assert len(schema.read(write(tmp_path / "a.jsonl", *rows))) == 2
