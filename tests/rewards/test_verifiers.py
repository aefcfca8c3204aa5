"""The built-in verifiers on answers that are easily scored wrong."""

import json

import pytest

from posttrain_jax.rewards import boxed, matching, numbers, table
from posttrain_jax.rewards.formats import Regex, Schema, Tags
from posttrain_jax.rewards.length import SoftOverlong
from posttrain_jax.rewards.verifier import Answer
from posttrain_jax.rewards.workers import Workers

NEEDS = {"expression": "math_verify", "schema": "jsonschema", "gym": "reasoning_gym"}


def verifier(name, **options):
  return table.VERIFIERS[name].make(**options)


def value(check, completion, example=None, tokens=None):
  return check("?", completion, Answer("?", completion, example or {}, tokens).row).value


CASES = {
  "boxed": [
    (r"\boxed{1} then \boxed{2}", "2", 1),
    (r"\boxed{\frac{1}{2}}", r"\boxed{\dfrac{1}{2}}", 1),
    (r"\boxed{1{,}234}", "#### 1,234", 1),
    (r"\boxed{\text{Paris}}", "Paris", 1),
    (r"$\boxed{ x = 3. }$", "x=3", 1),
    (r"\boxed {\{1, 2\}}", r"\{1,2\}", 1),
    (r"\boxed{0.5}", r"\frac{1}{2}", 1),
    (r"\boxed{\$5}", "5", 1),
    (r"\boxed{\frac12}", r"\frac{1}{2}", 1),
    (r"\boxed{\frac 1 2}", r"\frac{1}{2}", 1),
    (r"\boxed{\frac1{72}}", r"\frac{1}{72}", 1),
    (r"\boxed{\frac{\sqrt3}{2}}", r"\frac{\sqrt{3}}{2}", 1),
    (r"\boxed{\tfrac{\sqrt 3}2}", r"\frac{\sqrt{3}}{2}", 1),
    (r"\boxed{\frac\pi2}", r"\frac{\pi}{2}", 1),
    (r"\boxed{\sqrt[3]2}", r"\sqrt[3]{2}", 1),
    (r"\boxed{\sqrt[3]{2}}", r"\sqrt{32}", 0),
    (r"\boxed{x^2 + a_1}", r"x^{2}+a_{1}", 1),
    (r"\boxed{x^{23}}", "x^23", 0),
    (r"\boxed{\frac{12}{3x}}", r"\frac{1}{23x}", 0),
    (r"\boxed{\left(1,\!2\right)}", "(1, 2)", 1),
    (r"\boxed{1\frac12}", "1.5", 1),
    (r"\boxed{10\text{ cm}}", "10", 1),
    (r"\boxed{10}", r"10\mbox{ cm}^2", 1),
    (r"\boxed{10\,\text{cm}}", r"10\text{ cm}.", 1),
    (r"\boxed{10\text{ cm}}", r"10\text{ m}", 0),
    (r"\boxed{5\pi\text{ cm}}", r"5\pi", 1),
    (r"\boxed{x\text{ cm}}", "x", 0),
    (r"\boxed{2\text{ or }3}", "2", 0),
    (r"\boxed{90^\circ}", "90", 1),
    (r"\boxed{x = 10}", "10", 1),
    (r"\boxed{10}", "$x=10$", 1),
    (r"\boxed{x=10}", "y=10", 0),
    (r"\boxed{x=\frac12}", "0.5", 1),
    (r"\boxed{xy=10}", "10", 0),
    (r"\boxed{t=10\text{ s}}", "10.0", 1),
    (r"\boxed{" + "{" * 3000 + "}" * 3001, "2", 0),
    (r"\boxed{" + r"\frac" * 3000 + "}", "2", 0),
    (r"\boxed{2} dogs, not \boxed{3", "2", 1),
    (r"<think>\boxed{1}</think>\boxed{2}", "2", 1),
    (r"<think>\boxed{2}</think>2", "2", 0),
    ("2", "2", 0),
    (r"\boxed{x2}", "2", 0),
    (r"\boxed{}", "2", 0),
    (r"\boxed{12}", "2", 0),
  ],
  "number": [
    (r"It is $\frac12$.", "0.5", 1),
    (r"It is $\frac 1{4}$.", "0.25", 1),
    (r"It is $1\frac{1}{2}$.", "1.5", 1),
    (r"It is $1\frac{1}{2}$.", "5.5", 0),
    ("1,234.5 in all", 1234.5, 1),
    ("It is 72.", "#### 72", 1),
    ("7", "seven", None),
    ("7", "", None),
    ("7", None, None),
    ("7", ["7", "seven"], None),
    ("none", "seven", None),  # not 0: nothing can be right here
  ],
  "json": [('{"a": 1.0}', {"a": 1}, 1), ("{", {"a": 1}, 0), ("{}", "{", None), ("[1]", [1], 1)],
  "fuzzy": [("PARIS", "Paris", 1), ("Pari", "Paris", 8 / 9), ("xyz", "Paris", 0), ("", "Paris", 0)],
  "expression": [
    (r"$x^2 + 2x + 1$", "(x+1)^2", 1),
    (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", 1),
    (r"\boxed{\{2, 1\}}", r"\{1, 2\}", 1),
    ("It is 0.5.", "1/2", 1),
    (r"\boxed{72}", "Two and 70 are #### 72", 1),
    (r"\boxed{x}", "x+1", 0),
    ("I do not know.", "72", 0),
    ("$p a r i s$", "Paris", None),
  ],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_scores(name):
  if name in NEEDS:
    pytest.importorskip(NEEDS[name], reason=f"{name} needs an extra")
  check = verifier(name, column="gold")
  for answer, gold, expected in CASES[name]:
    assert value(check, answer, {"gold": gold}) == expected, (answer, gold)
  assert "no column 'gold'" in check("?", "1", {}).reason


def test_what_a_tag_holds_is_compared_alone():
  check = verifier("exact", column="gold", within="answer")
  row = {"gold": "Paris"}
  assert value(check, "It is <answer>Rome</answer><answer> Paris </answer>!", row) == 1
  assert value(check, "Paris", row) == 0
  assert value(check, "<answer>Paris", row) == 0
  assert value(check, "<think><answer>Paris</answer></think>Rome", row) == 0


def test_a_tolerance_is_a_share_of_the_expected_number():
  assert numbers.number("1009", "1000", tolerance=0.01)[0]
  assert not numbers.number("1011", "1000", tolerance=0.01)[0]
  assert numbers.number("-99", "-100", tolerance=0.01)[0]
  assert not numbers.number("0.001", "0", tolerance=0.01)[0]
  with pytest.raises(ValueError, match="tolerance=2"):
    verifier("number", column="gold", tolerance=2)


def test_a_ratio_is_twice_the_common_letters_by_all():
  def slow(a, b):
    lengths = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in range(len(a)):
      for j in range(len(b)):
        same = lengths[i][j] + 1 if a[i] == b[j] else 0
        lengths[i + 1][j + 1] = max(same, lengths[i][j + 1], lengths[i + 1][j])
    return 2 * lengths[-1][-1] / (len(a) + len(b))

  for a, b in [("kitten", "sitting"), ("abcabba", "cbabac"), ("a" * 70 + "b", "ba" * 50)]:
    assert matching.fuzzy(a, b)[0] == slow(a, b)


@pytest.mark.parametrize(
  ("text", "content"),
  [
    (r"\boxed{a_{1}}", "a_{1}"),
    (r"\fbox{a}", "a"),
    (r"\boxed{\}}", r"\}"),
    (r"\boxed{a} \boxed{b", "a"),
    (r"\boxed{a", None),
    ("a", None),
    (r"\boxed{" * 2000, None),
    (r"} \boxed{a \boxed{b}}", "b"),
    (r"\boxed {1} {", "1"),
  ],
)
def test_the_last_box_that_closes(text, content):
  assert boxed.last(text) == content


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("<think>a</think><answer>b</answer>", 1),
    (" <think>a\n</think>\n\n<answer>b</answer>\n", 1),
    ("<think></think><answer></answer>", 1),
    ("<answer>b</answer><think>a</think>", 0),
    ("<think>a<answer>b</answer></think>", 0),
    ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
    ("<think>a</think>so<answer>b</answer>", 0),
    ("Hm.<think>a</think><answer>b</answer>", 0),
    ("<think>a</think><answer>b</answer>.", 0),
    ("<think>a</think><answer>b", 0),
    ("", 0),
  ],
)
def test_tags_stand_in_their_order_and_once(text, expected):
  assert value(Tags(), text) == expected
  if text.startswith("<think>"):
    assert value(Tags(opened=True), text.removeprefix("<think>")) == expected
    assert value(Tags(opened=True), text) == 0


def test_an_expression_is_matched_within_a_time():
  assert value(Regex(r"<b>.+</b>"), "a\n<b>\nc</b>") == 1
  assert value(Regex(r"<b>.+</b>", whole=True), "a <b>c</b>") == 0
  slow = Regex(r"(a|aa)+$", whole=True, seconds=0.1)
  assert slow("?", "a" * 60 + "b", {}).is_missing
  assert value(slow, "aa") == 1  # and what is quick still has a score
  with pytest.raises(ValueError, match="is no regular expression"):
    Regex("(")


def test_json_of_a_schema():
  pytest.importorskip("jsonschema", reason="schema needs an extra")
  schema = {
    "type": "object",
    "required": ["a"],
    "properties": {"a": {"type": "number", "maximum": 2}},
  }
  check = Schema(schema)
  assert [value(check, t) for t in ('{"a": 1}', '{"a": 1.5}', '{"a": 3}', "{}", "no")] == [
    1,
    1,
    0,
    0,
    0,
  ]
  by_row = Schema(column="schema")
  assert value(by_row, '{"a": 1}', {"schema": json.dumps(schema)}) == 1
  wrong = by_row("?", "1", {"schema": {"properties": {"a": {"type": "arr"}}}}).reason
  assert wrong.startswith(
    "the row's schema is no JSON Schema: at $.properties.a.type, 'arr' is not"
  )
  assert by_row("?", "1", {}).is_missing
  with pytest.raises(ValueError, match="is no JSON Schema"):
    Schema({"type": 3})
  with pytest.raises(ValueError, match="write one of its options schema"):
    Schema()


def test_the_penalty_of_long_answers_is_daos():
  """Eq. 13 with L = 100 and C = 20, at its corners."""
  check = SoftOverlong(100, 20)
  for n, expected in [(0, 0), (80, 0), (81, -0.05), (90, -0.5), (100, -1), (101, -1), (500, -1)]:
    assert value(check, "", tokens=[0] * n) == expected
  assert "token ids are not known" in check("?", "long", {}).reason
  assert [value(SoftOverlong(10, 0), "", tokens=[0] * n) for n in (10, 11)] == [0, -1]
  with pytest.raises(ValueError, match="longest=10, soft=11"):
    SoftOverlong(10, 11)


def test_reasoning_gym_scores_its_own_tasks():
  pytest.importorskip("reasoning_gym", reason="gym needs an extra")
  from posttrain_jax.rewards import gym

  rows = gym.rows("basic_arithmetic", 3, seed=5, max_digits=2)
  assert rows == gym.rows("basic_arithmetic", 3, seed=5, max_digits=2)
  rows = json.loads(json.dumps(rows))  # as a file keeps them
  check = gym.Gym()
  for row in rows:
    assert value(check, f"<think>1</think>So <answer>{row['answer']}</answer>", row) == 1
    assert value(check, "<answer>no</answer>", row) < 1
  assert check("?", "1", {}).is_missing
  assert "draws another question" in check("?", "1", {**rows[0], "answer": "x"}).reason
  with pytest.raises(ValueError, match="gym: no_such_task"):
    gym.rows("no_such_task", 1)


@pytest.mark.slow
def test_an_expression_that_never_ends_is_missing():
  """In this process it would take all memory or hours; the worker is ended and the next call is answered."""
  pytest.importorskip("math_verify", reason="expression needs an extra")
  from posttrain_jax.rewards.verifier import Context
  from posttrain_jax.rewards.workers import Apart

  pool = Workers(1)
  apart = Apart(verifier("expression", column="gold"), pool, 3.0)
  asked = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{2}"]
  hard, plain = apart.scores([Answer("?", text, {"gold": "2"}) for text in asked], Context())
  assert hard.value != 1
  assert plain.value == 1
  pool.close()
