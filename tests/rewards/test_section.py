"""Rewards as configs describe them, and what is wrong with a description."""

import importlib.util

import ml_collections
import pytest

from posttrain_jax.rewards import sandbox, score, section
from posttrain_jax.rewards.reward import Scored
from posttrain_jax.rewards.verifier import Answer
from posttrain_jax.rewards.workers import Workers
from posttrain_jax.settings import ConfigError

OWN = """
import beside

def plain(prompt, completion, example):
  return len(completion) * beside.FACTOR if example["answer"] else None

def trl(completions, answer, **columns):
  return [float(c == a) for c, a in zip(completions, answer)]

def trl_of(completions, solution, **columns):
  return [0.0 for c in completions]

def metric(answer, row):
  return 1.0

def fails(prompt, completion, example):
  return example["answer"]["x"]

def is_right(prompt, completion, example) -> bool:
  return completion == example["answer"]

def are_right(completions, answer, **columns) -> "list[bool]":
  return [c == a for c, a in zip(completions, answer)]

async def later(prompt, completion, example):
  return 1.0

async def later_trl(completions, **columns):
  return [1.0 for c in completions]
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  folder = tmp_path_factory.mktemp("own")
  (folder / "beside.py").write_text("FACTOR = 2\n")
  path = folder / "mine.py"
  path.write_text(OWN)
  return path


@pytest.fixture(scope="module")
def workers():
  pool = Workers(1)
  yield pool
  pool.close()


def make(spec, columns=("question", "answer"), **options):
  return section.make(spec, columns, **options)


def test_programs_are_refused_where_nothing_isolates_them(monkeypatch):
  nothing = sandbox.Probe("", "Programs that a model writes cannot be run here.")
  monkeypatch.setattr(sandbox, "probe", lambda: nothing)
  with pytest.raises(ConfigError, match=r"python: Programs .*reward\.unsafe_code=true"):
    make({"parts": ("python",)}, ("tests",))
  reward = make({"parts": ("python",), "unsafe_code": True, "seconds": 7}, ("tests",))
  assert reward.parts[0].verifier.verifier.unsafe_code
  assert reward.parts[0].verifier.seconds == 7
  with pytest.raises(ConfigError, match="python has no option 'unsafe_code'; it has none"):
    make({"parts": ("python",), "options": {"python": {"unsafe_code": True}}}, ("tests",))


def test_a_sum_with_a_gate_and_functions_of_ones_own(file, workers):
  spec = {
    "parts": ("number", f"{file}:plain", f"{file}:trl"),
    "weights": (1.0, 0.1, 2.0),
    "gates": ("tags",),
    "options": {"number": {"tolerance": 0.01}, "tags": {"names": ("answer",)}},
  }
  reward = make(spec, workers=workers)
  row = {"question": "1 + 1?", "answer": "2"}
  result = reward.score([Answer("?", text, row) for text in ("<answer>2</answer>", "2")])
  first, second = result.answers
  assert first.total.value == pytest.approx(1 + 0.1 * 2 * 18)
  assert {name: given.value for name, given in second.parts.items()} == {
    "number": 1, "mine.py:plain": 2, "mine.py:trl": 1, "tags": 0,
  }  # fmt: skip
  assert second.total.value == 0


def test_a_file_of_ones_own_is_called_by_its_name_alone_in_every_field(file):
  whole = f"{file}:plain"
  for name in (whole, "mine.py:plain"):
    spec = {"parts": (whole,), "ranges": {name: (0, 8)}, "untested": (name,)}
    (part,) = make(spec).parts
    assert (part.name, part.range, part.untested) == ("mine.py:plain", (0, 8), True)


def test_what_is_true_or_false_has_a_highest_score(file):
  reward = make({"parts": [f"{file}:{name}" for name in ("is_right", "are_right")]})
  assert reward.bounds() == (0, 2)
  assert make({"parts": f"{file}:is_right", "ranges": {"mine.py:is_right": (-1, 1)}}).has_most
  assert not make({"parts": f"{file}:plain"}).has_most


def test_files_of_one_name_are_told_apart(tmp_path):
  for folder in "ab":
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "mine.py").write_text("def f(prompt, completion, example):\n  return 1\n")
  parts = [f"{tmp_path / folder / 'mine.py'}:f" for folder in "ab"]
  assert make({"parts": parts}).names == ("a/mine.py:f", "b/mine.py:f")
  with pytest.raises(ConfigError, match=r"two parts are called .*a/mine\.py:f"):
    make({"parts": (parts[0], parts[0].replace("/a/", "/a/../a/"))})


def test_scores_of_an_earlier_version_are_those_of_the_parts_in_their_order(file):
  reward = make({"parts": (f"{file}:plain",), "gates": ("tags",)})
  parts = {f"{file}:plain": score.of(2), "tags": score.of(1)}
  again = reward.renamed(Scored(score.of(2), parts))
  assert dict(again.parts) == {"mine.py:plain": score.of(2), "tags": score.of(1)}
  assert reward.renamed(again) is again
  assert reward.value(again) == 2


def test_a_fault_of_ones_own_is_told_with_its_line(file, workers):
  reward = make({"parts": (f"{file}:fails",), "retries": 0}, workers=workers)
  (one,) = reward.score([Answer("?", "!", {"answer": "2"})]).answers
  line = OWN.splitlines().index('  return example["answer"]["x"]') + 1
  assert f"{file}:{line}: raised TypeError: " in one.total.reason


def test_what_a_file_imports_is_no_part_of_a_calls_time(tmp_path, workers):
  path = tmp_path / "slow.py"
  path.write_text(
    "import time\ntime.sleep(0.5)\ndef one(prompt, completion, example):\n  return 1\n"
  )
  reward = make({"parts": f"{path}:one", "seconds": 0.4, "retries": 0}, workers=workers)
  (one,) = reward.score([Answer("?", "!", {})]).answers
  assert one.total.value == 1


def test_what_the_caller_made_has_a_name(workers):
  reward = make(
    {"parts": ("model", "exact"), "weights": (0.5, 1)}, given={"model": lambda p, c, e: len(c)}
  )
  (one,) = reward.score([Answer("?", "four", {"answer": "four"})]).answers
  assert one.total.value == 3


@pytest.mark.parametrize(
  ("spec", "columns", "message"),
  [
    (dict(parts=("nubmer",)), ("answer",), "there is no 'nubmer': known are exact, .* did you mean number"),
    (dict(parts=("number",)), ("question", "reply"), r"of the data's columns \(question, reply\) none has a name"),
    (dict(parts=("number",)), ("answer", "solution"), "answer and solution may be it"),
    (dict(parts=("exact",), options={"exact": {"column": "reply"}}), ("answer",), "column 'reply', which"),
    (dict(parts=("exact",), options={"exact": {"tolerence": 1}}), ("answer",), "no option 'tolerence'; it has column"),
    (dict(parts=("exact",), options={"number": {}}), ("answer",), "'number' is neither .*; its parts are exact$"),
    (dict(parts=("exact", "number"), gates=("tags",), untested="vowels"), ("answer",),
     "reward.untested: 'vowels' is .*; its parts are exact, number, and its gates tags$"),
    (dict(parts=("exact",), weights=(1, 2)), ("answer",),
     r"reward.weights=\(1, 2\): there is 1 part \(exact\); write one"),
    (dict(parts=("exact",), gate=("tags",)), ("answer",), "reward.gate: there is no such field; there are parts"),
    (dict(parts=("exact", "tags"), gates=("tags",)), ("answer",), "'tags' is a part, too"),
    (dict(parts=(), gates=("tags",)), ("answer",), "nothing to multiply"),
    (dict(parts=("length",)), ("answer",),
     r"length needs longest and soft; write reward.options=\{'length': \{'longest': ..., 'soft': ...\}\}"),
    (dict(parts=("exact", "exact")), ("answer",), "reward.parts: 'exact' is there twice; name it once"),
    (dict(parts=("exact",), gates=("length",), options={"length": {"longest": 4, "soft": 2}}),
     ("answer",), "length is a gate, and its scores lie within -1 and 0; .*reward.parts"),
    (dict(parts=("exact",), gates=("judge",), options={"judge": {"url": "http://a/v1", "model": "m"}}), ("answer",),
     "judge is a gate, and its scores lie within 1 and 10"),
    (dict(parts=("exact",), gates=("tags",), ranges={"tags": (0, 2)}), ("answer",), "tags lie within 0 and 1"),
    (dict(parts="exact", ranges={"exact": (0.5, 0.5)}), ("answer",), "the low end below the high one"),
    (dict(parts="exact", ranges={"exact": (0.5, 2)}), ("answer",), r"exact lie within 0 and 1, and \(0.5, 2\) is"),
    (dict(parts="exact", weights=(0.0,)), ("answer",), "every part has the weight 0"),
    (dict(parts="exact", weights=(-0.0,), gates="tags"), ("answer",), "every part has the weight 0"),
    (dict(parts=("regex",), options={"regex": {"pattern": "("}}), ("answer",), "is no regular expression"),
    (dict(parts=("judge",), options={"judge": {"url": "x", "model": "m"}}), ("answer",), "begins with http"),
    (dict(parts=3), (), "reward.parts=3: it is a list of names, or a text with commas"),
    (dict(parts="exact", weights=1.0), (), "reward.weights=1.0: it is a list of numbers"),
    (dict(parts="exact", weights=("a",)), (), "it is a list of numbers"),
    (dict(parts="exact", options={"exact": 3}), (), r"it is \{name: \{option: value\}\}"),
    (dict(parts="exact", ranges={"exact": (1, 0)}), (), r"it is \{name: \(low, high\)\}"),
    (dict(parts="exact", seconds=0), (), "reward.seconds=0: it is a number of seconds above 0"),
    (dict(parts="exact", retries=1.5), (), "reward.retries=1.5: it is a count from 0"),
    (
      dict(parts="length", options={"length": {"longest": "x", "soft": 1}}),
      (),
      "length has longest='x'; it is a whole number",
    ),
    (dict(parts=("mine.py:f",)), ("answer",), "mine.py does not exist"),
  ],
)  # fmt: skip
def test_mistakes_are_told(spec, columns, message):
  with pytest.raises(ConfigError, match=message):
    make(spec, columns)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("trl_of", r"mine\.py:trl_of reads the column 'solution', which the data does not have; its columns are answer"),
    ("metric", r"mine\.py:metric takes \(answer, row\); a verifier takes \(prompt, completion, example\)"),
    ("absent", "has no function 'absent'; it has plain, trl"),
    ("later", r"mine\.py:later is `async`; write `def`.*only TRL's form .* may be async"),
  ],
)  # fmt: skip
def test_mistakes_in_ones_own_functions_are_told_before_anything_runs(file, name, message):
  with pytest.raises(ConfigError, match=message):
    make({"parts": (f"{file}:{name}",)})


def test_who_asks_for_the_rows_own_answer_by_another_name_hears_what_it_is_called(tmp_path):
  file = tmp_path / "own.py"
  file.write_text("def same(completions, completion):\n  return [0.0]\n")
  with pytest.raises(
    ConfigError, match=r"its columns are channel, gold, which is the row's own answer$"
  ):
    make({"parts": (f"{file}:same",)}, ("channel", "gold"))


def test_a_schema_is_read_from_the_column_of_that_name():
  pytest.importorskip("jsonschema", reason="schema needs an extra")
  column = lambda spec, columns: make(spec, columns).parts[0].verifier.verifier.column
  assert column({"parts": ("schema",)}, ("prompt", "schema")) == "schema"
  one_for_all = {"parts": ("schema",), "options": {"schema": {"schema": {"type": "object"}}}}
  assert column(one_for_all, ("prompt", "schema")) == ""
  with pytest.raises(ConfigError, match=r"write one of its options schema, .* and column"):
    make({"parts": ("schema",)}, ("prompt",))


def test_names_may_stand_in_a_text():
  reward = make({"parts": "number, exact", "weights": (2, 1), "untested": "exact"})
  assert [(p.name, p.weight, p.untested) for p in reward.parts] == [
    ("number", 2, False), ("exact", 1, True),
  ]  # fmt: skip


def test_a_section_of_a_config_is_read():
  section = ml_collections.ConfigDict(
    {"parts": "number", "gates": "tags", "options": {"tags": {"names": "think, answer"}}}
  )
  (one,) = (
    make(section).score([Answer("?", "<think></think><answer>2</answer>", {"answer": 2})]).answers
  )
  assert one.total.value == 1


def test_gold_is_what_our_own_rows_call_it():
  reward = make({"parts": ("exact",)}, ("gold", "answer", "solution"))
  (one,) = reward.score([Answer("?", "a", {"gold": "a", "answer": "b"})]).answers
  assert one.total.value == 1


@pytest.mark.parametrize("extra", [("expression", "math_verify", "math"), ("gym", "reasoning_gym", "gym")])  # fmt: skip
def test_an_extra_that_is_not_installed_is_named(extra, monkeypatch):
  name, package, words = extra
  found = importlib.util.find_spec
  monkeypatch.setattr(
    "importlib.util.find_spec", lambda wanted: None if wanted == package else found(wanted)
  )
  with pytest.raises(ConfigError, match=rf"{name} needs .*posttrain-jax\[{words}\]"):
    make({"parts": (name,)}, ("answer", "gym"))
