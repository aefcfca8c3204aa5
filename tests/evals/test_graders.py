"""What the built-in metrics call equal, on inputs that graders get wrong; and functions of the user's."""

import pytest

from posttrain_jax.data.errors import RowError
from posttrain_jax.evals import graders, intervals
from posttrain_jax.settings import ConfigError


def grade(name, answer, gold):
  (grader,) = graders.load(name)
  return grader.score(answer, question(gold))[0]


def question(gold, /, **row):
  return {"gold": gold, "row": row, "origin": "rows.jsonl:7"}


SAME = {
  "exact": [
    ("Paris", "Paris"),
    ("  Paris\n", "Paris"),
    ("a  b\n\tc", "a b c"),
    ("cafe\u0301", "caf\u00e9"),
    ("a\u00a0b", "a b"),
    ("<think>\nRome? No.\n</think>\n\nParis", "Paris"),
  ],
  "contained": [
    ("It is PARIS, of course.", "Paris"),
    ("New\n  York!", "new york"),
    ("首都是巴黎。", "巴黎"),
    ("party art", "art"),
    ("(42)", "42"),
    ("$3,000.", "3,000"),
    ("STRASSE", "straße"),
  ],
  "json": [
    ('{"b": 1, "a": [1.0, 2e0]}', '{"a": [1, 2], "b": 1.00}'),
    ('```json\n{"a": 1}\n```', '{"a": 1}'),
    ("Here:\n```\n[1]\n```\nor\n```\n[2]\n```\nDone.", "[2]"),
    ('"caf\\u00e9"', '"café"'),
    ("null", " null "),
    ("0.1", "0.10"),
    ("100000000000000000000", "1e20"),
  ],
  "number": [
    ("So she has 18.", "18"),
    ("48 + 24 = 72\n#### 72", "#### 72"),
    ("$1,234.50", "1234.5"),
    ("-$5", "-5"),
    ("$-5", "-5"),
    ("\u22125", "-5"),
    ("5 kg", "5"),
    ("50%", "50"),
    (".5", "1/2"),
    ("\\frac{1}{2}", "0.5"),
    ("1 1/2 cups", "1.5"),
    ("\\boxed{1{,}234}", "1234"),
    ("7 m2", "7"),
    ("1e3", "1,000"),
    ("12 - 5 = 7", "7.0"),
    ("1\u202f234\u202f567", "1234567"),
    ("Answer:5", "5"),
    ("12,34,567", "1234567"),
    ("#### 5\n\nShe pays on day 9", "5"),
    ("It is 5 ####", "#### 5"),
  ],
}
DIFFERENT = {
  "exact": [("paris", "Paris"), ("Paris.", "Paris"), ("", "Paris"), ("ab", "a b")],
  "contained": [
    ("party", "art"),
    ("13", "3"),
    ("3.5", "3"),
    ("1,300", "300"),
    ("Pari s", "Paris"),
    ("<think>Paris?</think>Rome", "Paris"),
  ],
  "json": [
    ("true", "1"),
    ("[1, 2]", "[2, 1]"),
    ('{"a": 1}', '{"a": 1, "b": null}'),
    ('{"a": 1, "a": 1}', '{"a": 1}'),
    ("{'a': 1}", '{"a": 1}'),
    ('It is {"a": 1}', '{"a": 1}'),
    ("NaN", "null"),
    ('"1"', "1"),
    ("[" * 100_000, "[]"),
    ("[" * 700 + "]" * 700, "[" * 699 + "]" * 699),
    ("```json\n[" + "[" * 100_000 + "\n```", "[]"),
    ("0.30000000000000004", "0.3"),
    ("", "0"),
  ],
  "number": [
    ("0.333", "1/3"),
    ("3/2", "1/2"),
    ("1 1/2", "2 1/2"),
    ("no number", "0"),
    ("3,5", "5"),
    ("11:30", "30"),
    ("2024-05-06", "6"),
    ("10^5", "5"),
    ("1.2.3", "3"),
    ("m2", "2"),
    ("5", "-5"),
    ("1/0", "0"),
    ("1,23", "23"),
    ("1e99999999", "1"),
  ],
}


@pytest.mark.parametrize("name", SAME)
def test_what_is_the_same(name):
  wrong = [pair for pair in SAME[name] if grade(name, *pair) != 1]
  wrong += [pair for pair in DIFFERENT[name] if grade(name, *pair) != 0]
  assert not wrong


@pytest.mark.parametrize(
  ("name", "gold", "why"),
  [
    ("number", "Paris", "no number ('Paris')"),
    ("number", "3,5", "3,5 can be read in several ways"),
    ("json", '{"a": 1, "a": 2}', "a key stands twice"),
    ("json", "Paris", "not JSON"),
    ("exact", " ", "it is empty"),
    ("contained", "<think>x</think>", "it is empty"),
    ("exact", None, "there is none"),
  ],
)
def test_an_expected_answer_that_nothing_can_equal_is_told_with_its_row(name, gold, why):
  (grader,) = graders.load(name)
  with pytest.raises(RowError) as error:
    graders.check(grader, question(gold))
  assert str(error.value).startswith(f"rows.jsonl:7: the metric {name!r}")
  assert why in str(error.value)


@pytest.fixture
def file(tmp_path):
  (tmp_path / "beside.py").write_text("FACTOR = 2\n")
  path = tmp_path / "mine.py"
  path.write_text(
    "import beside\n\n"
    "def length(answer, row):\n  return len(answer) * beside.FACTOR\n\n"
    "def column(answer, row):\n  return answer == row['key']\n\n"
    "def gold(answer, row):\n  return answer == row['gold']\n\n"
    "def late(answer, row):\n  import beside\n  return beside.FACTOR\n\n"
    "def fails(answer, row):\n  x = 1\n  return x / 0\n\n"
    "def nothing(answer, row):\n  pass\n\n"
    "def infinite(answer, row):\n  return float('inf')\n\n"
    "def ends(answer, row):\n  raise SystemExit(0)\n\n"
    "def huge(answer, row):\n  return 10**400\n\n"
    "def adds(answer, row):\n  row['turns'].append(answer)\n  return len(row['turns'])\n"
  )
  return path


def test_a_function_of_ones_own_gets_the_answer_and_the_row(file):
  score = lambda name, answer, asked: graders.load(f"{file}:{name}")[0].score(answer, asked)[0]
  assert score("length", "abc", question("x")) == 6
  assert score("column", "k", question("x", key="k")) == 1
  assert score("gold", "x", question("x")) == 1
  assert score("gold", "x", question("x", gold="own")) == 0  # a column of that name is the row's
  assert score("late", "", question(None)) == 2
  asked = question("x", turns=[])
  assert [score("adds", "a", asked), score("adds", "a", asked)] == [1, 1]  # each sees the row anew


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("fails", "mine.py:18: fails raised ZeroDivisionError: division by zero (row rows.jsonl:7, answer 'a'"),
    ("nothing", "mine.py: nothing returned None (row rows.jsonl:7"),
    ("infinite", "infinite returned inf"),
    ("ends", "mine.py:27: ends raised SystemExit: 0 (row rows.jsonl:7"),
    ("huge", "huge returned 1000"),
    ("lenght", "has no function 'lenght'; it has length, column"),
  ],
)  # fmt: skip
def test_mistakes_in_it_are_told_with_file_line_and_row(file, name, message):
  with pytest.raises(ConfigError) as error:
    graders.load(f"{file}:{name}")[0].score("a", question("x"))
  assert message in str(error.value)


def test_a_file_that_does_not_load_is_told_with_its_line(tmp_path):
  (tmp_path / "a.py").write_text("x = 1\nraise ValueError('no')\n")
  with pytest.raises(ConfigError, match=r"a\.py:2: ValueError: no"):
    graders.load(f"{tmp_path / 'a.py'}:f")
  with pytest.raises(ConfigError, match=r"eval\.metric: .*b\.py does not exist; there is .*a\.py"):
    graders.load(f"{tmp_path / 'b.py'}:f")
  (tmp_path / "b.py").mkdir()
  with pytest.raises(ConfigError, match=r"b\.py is a folder"):
    graders.load(f"{tmp_path / 'b.py'}:f")


def test_names(file):
  both = graders.load(f"exact, {file}:length")
  assert [grader.name for grader in both] == ["exact", "mine.py:length"]
  before = both[1].digest
  file.write_text(file.read_text() + "\n")
  assert before
  assert graders.load(f"{file}:length")[0].digest != before
  with pytest.raises(ConfigError, match="did you mean exact"):
    graders.load("exat")
  with pytest.raises(ConfigError, match="named twice"):
    graders.load("exact,exact")
  assert graders.load("") == ()


def test_a_mean_of_rights_and_wrongs_has_wilsons_interval_and_others_the_normal_one():
  shares = intervals.mean([1.0] * 8 + [0.0] * 2)
  assert (shares["right"], shares["count"]) == (8, 10)
  assert (shares["low"], shares["high"]) == intervals.wilson(8, 10)
  other = intervals.mean([0.0, 0.5, 1.0])  # s = 1/2
  assert other["right"] is None
  assert other["high"] - 0.5 == pytest.approx(1.959964 * 0.5 / 3**0.5)
  assert intervals.mean([0.5])["low"] is None
  change = intervals.change([0, 0, 1, 1], [1, 0, 1, 1])  # of 1, 0, 0, 0: s = 1/2
  assert change["mean"] == 0.25
  assert change["high"] - 0.25 == pytest.approx(1.959964 * 0.5 / 2)
