"""Suites are files: what they may hold, and that a broken one is named by file and line."""

import json

import pytest

from posttrain_jax.data.errors import RowError
from posttrain_jax.evals import suite
from posttrain_jax.settings import ConfigError


def written(folder, rows, **part):
  folder.mkdir(exist_ok=True)
  lines = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
  (folder / "rows.jsonl").write_text(lines)
  described = {"name": "one", "kind": "answers", "rows": "rows.jsonl", "metric": "number"} | part
  described = {name: value for name, value in described.items() if value is not None}
  (folder / suite.FILE).write_text(json.dumps({"name": "mine", "parts": [described]}))
  return str(folder)


SUM = {"prompt": "1 + 1?", "completion": "2"}


def test_the_built_in_suite_has_every_kind_of_part_and_rows_that_can_be_told_apart():
  core = suite.load("core")
  assert {part.kind for part in core.parts} == {*suite.KINDS}
  names = [part.name for part in core.parts]
  assert {"text/general", "text/code", "text/maths", "text/chat", "arithmetic", "canaries"} <= {
    *names
  }
  for part in core.parts:
    assert len({*part.ids}) == len(part.rows), part.name
  assert next(part for part in core.parts if part.name == "canaries").every


def test_the_arithmetic_of_the_built_in_suite_is_right():
  (part,) = [part for part in suite.load("core").parts if part.name == "arithmetic"]
  sums = [row.fields for row in part.rows if row.fields["prompt"].startswith("What is")]
  assert len(sums) == 75
  for row in sums:
    assert eval(row["prompt"].removeprefix("What is").rstrip("?")) == int(row["completion"])


BROKEN_ROWS = [
  ([SUM, "{"], {}, "rows.jsonl:2: not JSON"),
  ([SUM, {"question": "1 + 1?"}], {}, "rows.jsonl:2"),
  ([SUM, {"text": "no question"}], {}, "rows.jsonl:2"),
  (
    [{**SUM, "id": "a"}, {**SUM, "id": "a"}],
    {},
    "rows.jsonl:2: id 'a' is that of .*rows.jsonl:1, too",
  ),
  (
    [{"prompt": "x", "choices": ["a"], "answer": 0}],
    {"kind": "choice", "metric": None},
    "rows.jsonl:1: choices=",
  ),
  (
    [{"prompt": "x", "choices": ["a", "b"], "answer": "C"}],
    {"kind": "choice", "metric": None},
    "rows.jsonl:1: answer='C': write the place of the right choice from 0 to 1",
  ),
  (
    [{"choices": ["a", "b"], "answer": 0}],
    {"kind": "choice", "metric": None},
    "rows.jsonl:1: prompt=None",
  ),
  (["[1]"], {"kind": "choice", "metric": None}, "rows.jsonl:1|not JSON|expected an object"),
  *(
    ([{"prompt": "x", "choices": choices, "answer": 0}], {"kind": "choice", "metric": None}, said)
    for choices in (["a", " a"], ["a", "  "], ["a", 5])
    for said in ["rows.jsonl:1: choices=.*write a list of unequal texts"]
  ),
  (
    [{"prompt": "Which blood fits all?", "choices": ["AB", "B", "A", "O"], "answer": "B"}]
    + [{"prompt": "Which blood takes all?", "choices": ["O", "A", "B", "AB"], "answer": "A"}],
    {"kind": "choice", "metric": None},
    "rows.jsonl:2: answer='A' is the text of choice 1 and the label of choice 0; write the place",
  ),
  ([SUM, {**SUM, "prompt": " "}], {}, "rows.jsonl:2: 'prompt' is empty"),
]


@pytest.mark.parametrize(("rows", "part", "said"), BROKEN_ROWS)
def test_a_broken_row_is_named_by_file_and_line(rows, part, said, tmp_path):
  with pytest.raises((RowError, ConfigError), match=said):
    suite.load(written(tmp_path / "s", rows, **part))


BROKEN_PARTS = [
  ({"metrik": "number"}, "part 1: there is no field 'metrik'; there are name, kind"),
  ({"kind": "answer"}, "kind='answer': it is one of text, answers, choice"),
  ({"tolerance": -0.1}, "tolerance=-0.1: it is a number from 0"),
  ({"tolerance": True}, "tolerance=True"),
  ({"max_new_tokens": 0}, "max_new_tokens=0: it is a whole number from 1"),
  ({"metric": None}, "answers need a metric"),
  ({"name": None}, "has no name"),
  ({"ask": "no place"}, "ask='no place': it is a text with {prompt} in it"),
  ({"samples": 4}, "4 samples at temperature 0 are one"),
  ({"samples": 4, "temperature": 1.0, "pass_at": [5]}, "pass@5 of 4 samples"),
  ({"every": True, "temperature": 1.0}, "answers are not drawn"),
  ({"columns": {"prompt": 5}}, "columns={'prompt': 5}: it is an object of parts and the columns"),
  ({"kind": "text"}, "metric is of answers, and the kind is text"),
]


@pytest.mark.parametrize(("part", "said"), BROKEN_PARTS)
def test_a_field_that_is_none_is_refused_with_the_part_that_has_it(part, said, tmp_path):
  with pytest.raises(ConfigError, match=r"suite\.json") as caught:
    suite.load(written(tmp_path / "s", [SUM], **part))
  assert said in str(caught.value)


def test_a_suite_that_is_none_says_what_there_is(tmp_path):
  with pytest.raises(ConfigError, match=r"core, a folder with suite\.json, or text:FILE"):
    suite.load("nowhere")
  folder = written(tmp_path / "s", [SUM])
  with pytest.raises(ConfigError, match="two parts named one"):
    suite.load(f"{folder},{folder}")
  with pytest.raises(ConfigError, match="--limit=-1"):
    suite.load("core", limit=-1)


def test_a_choice_may_name_the_right_one_by_place_letter_or_text(tmp_path):
  rows = [{"prompt": "x", "choices": ["a", "b"], "answer": answer} for answer in (1, "B", "b")]
  (part,) = suite.load(written(tmp_path / "s", rows, kind="choice", metric=None)).parts
  assert [row.raw["answer"] for row in part.rows] == [1, 1, 1]
  assert {row.fields["completion"] for row in part.rows} == {"b"}


def test_choices_may_bring_labels_as_arcs_do(tmp_path):
  each = [("ABC", "C"), ("123", "3"), ("123", "q")]
  rows = [
    {"prompt": "x", "choices": {"text": ["o", "p", "q"], "label": [*labels]}, "answer": answer}
    for labels, answer in each
  ]
  (part,) = suite.load(written(tmp_path / "s", rows, kind="choice", metric=None)).parts
  assert [row.raw["answer"] for row in part.rows] == [2, 2, 2]


def test_null_is_no_name_and_no_group(tmp_path):
  """Tables have it in every row that says nothing; as a name it would be one twice, and as a group one of strangers."""
  rows = [{**SUM, "id": None, "group": None}, {**SUM, "id": None, "group": None}]
  (part,) = suite.load(written(tmp_path / "s", rows)).parts
  assert part.ids == ["rows.jsonl:1", "rows.jsonl:2"]
  assert part.groups == ["item 0", "item 1"]


@pytest.mark.parametrize("columns", [{"promt": "x"}, {"prompt": ["x", "y"]}])
def test_a_column_that_choices_have_not_is_refused(columns, tmp_path):
  rows = [{"prompt": "x", "choices": ["a", "b"], "answer": 0}]
  folder = written(tmp_path / "s", rows, kind="choice", metric=None, columns=columns)
  with pytest.raises(ConfigError, match="choices have prompt, choices, answer, each in one column"):
    suite.load(folder)


def test_a_tolerance_changes_no_measurement_and_a_row_does(tmp_path):
  load = lambda **part: suite.load(written(tmp_path / "s", [SUM], **part)).parts[0].digest
  assert load() == load(tolerance=0.5)
  assert load() != load(max_new_tokens=7)
  assert load() != suite.load(written(tmp_path / "s", [{**SUM, "completion": "3"}])).parts[0].digest


def test_forms_of_known_data_need_no_description(tmp_path):
  (tmp_path / "test.jsonl").write_text(
    json.dumps({"question": "1 + 1?", "answer": "So #### 2"}) + "\n"
  )
  (part,) = suite.load(f"gsm8k:{tmp_path / 'test.jsonl'}").parts
  assert (part.name, part.metric, part.rows[0].fields["prompt"]) == ("gsm8k", "number", "1 + 1?")
