"""A run does not start with a verifier that cannot tell right from wrong."""

import pytest

from posttrain_jax.rewards import sandbox, score, section, selftest, table
from posttrain_jax.rewards.reward import Part, Reward
from posttrain_jax.rewards.verifier import Answer, Known
from posttrain_jax.rewards.workers import Workers
from posttrain_jax.settings import ConfigError

ROWS = [Answer("?", text, {"gold": text}) for text in ("Paris", "Rome", "Rome")]
NEEDS = {"expression": "math_verify", "gym": "reasoning_gym"}
OPTIONS = {"length": {"longest": 100, "soft": 20}}


@pytest.fixture(scope="module")
def workers():
  pool = Workers(1)
  yield pool
  pool.close()


def of(verifier, **options):
  return Reward([Part("mine", verifier, **options)], retries=0)


@pytest.mark.parametrize(
  "name", [n for n in table.VERIFIERS if n not in ("regex", "schema", "judge")]
)
def test_every_built_in_passes_on_answers_of_its_own(name, workers):
  if name in NEEDS:
    pytest.importorskip(NEEDS[name], reason=f"{name} needs an extra")
  if name == "python" and not sandbox.probe().isolation:
    pytest.skip(sandbox.probe().sentence)
  spec = {"parts": (name,), "options": {name: OPTIONS.get(name, {})}, "seconds": 60}
  columns = ("gold", "gym", "tests", "environment_reward", "refuse")
  reward = section.make(spec, columns, workers=workers)
  known = reward.parts[0].known
  assert {k.is_right for k in known} == {True, False}
  selftest.check(reward)


@pytest.mark.parametrize(
  ("verifier", "message"),
  [
    (lambda p, c, e: 0.0, "from a wrong one: it gives the right 'a' 0 and the wrong 'b' 0"),
    (lambda p, c, e: c != "a", "the right 'a' 0 and the wrong 'b' 1"),
    (lambda p, c, e: score.missing("no network"),
     r"mine has no score for an answer that is known to be right, 'a': no network"),
    (lambda p, c, e: 1 / 0, r"raised ZeroDivisionError: division by zero"),
  ],
)  # fmt: skip
def test_known_answers_that_are_not_told_apart_stop_the_run(verifier, message):
  known = (Known("a", {}, True), Known("b", {}, False))
  with pytest.raises(ConfigError, match=message):
    selftest.check(of(verifier, known=known))
  selftest.check(of(lambda p, c, e: c == "a", known=known))


def test_rows_try_a_verifier_of_the_users():
  selftest.check(of(lambda p, c, e: c == e["gold"]), ROWS)
  selftest.check(of(lambda p, c, e: len(c)), ROWS)  # that of Paris is told apart, and one is enough
  with pytest.raises(ConfigError, match="cannot tell a right answer from a wrong one"):
    selftest.check(of(lambda p, c, e: c != e["gold"]), ROWS)


def test_rows_say_both_answers_and_scores():
  with pytest.raises(ConfigError) as error:
    selftest.check(of(lambda p, c, e: c == e["answer"] if "answer" in e else 0.5), ROWS)
  told = str(error.value)
  assert "the right 'Paris' 0.5 and the wrong 'Rome' 0.5" in told
  assert "all 3 rows that were tried" in told
  assert told.endswith("whether an answer is right, write --config.reward.untested=mine")


def test_the_flag_that_is_told_keeps_what_was_named_before():
  same = lambda p, c, e: 0.5
  reward = Reward([Part("style", same, untested=True), Part("my own.py:f", same)], retries=0)
  with pytest.raises(
    ConfigError, match=r"'--config\.holdout_reward\.untested=style,my own\.py:f'$"
  ):
    selftest.check(reward, ROWS, section="holdout_reward")


def test_what_is_not_about_rightness_is_not_tried():
  style = of(lambda p, c, e: 0.5)
  selftest.check(of(lambda p, c, e: 0.5, untested=True), ROWS)
  selftest.check(style, [])
  selftest.check(style, ROWS[1:])  # one answer to all: there is no wrong one
  selftest.check(of(lambda p, c, e: score.not_applicable()), ROWS)
  gate = Part("gate", lambda p, c, e: 1.0, gate=True)
  selftest.check(Reward([Part("mine", lambda p, c, e: c == e["gold"]), gate]), ROWS)
  regex = section.make({"parts": ("regex",), "options": {"regex": {"pattern": "."}}}, ())
  selftest.check(regex, ROWS)
  own = section.make(
    {"parts": ("style",), "untested": ("style",)}, (), given={"style": lambda p, c, e: 1}
  )
  selftest.check(own, ROWS)


@pytest.mark.parametrize(
  ("verifier", "message"),
  [
    (lambda p, c, e: e["anwser"], r"mine raised KeyError: 'anwser', at .*\.py:\d+, on all 3 rows that were tried$"),
    (lambda p, c, e: score.missing("the judge at http://a does not answer: Connection refused"),
     "mine has no score for any of the 3 rows that were tried: the judge at http://a does not answer"),
    (lambda p, c, e: "0.5", "returned '0.5', a str; a verifier returns a finite number, true or false$"),
  ],
)  # fmt: skip
def test_what_fails_is_not_said_to_be_unable_to_judge(verifier, message):
  with pytest.raises(ConfigError, match=message) as error:
    selftest.check(of(verifier), ROWS)
  assert "untested" not in str(error.value)


@pytest.mark.parametrize(
  "verifier",
  [
    lambda p, c, e: 0.0 if c != e["gold"] else 1 / 0,  # on every right answer, and on no wrong one
    lambda p, c, e: score.not_applicable() if e["gold"] == "Paris" else 1 / 0,
  ],
)
def test_what_fails_on_right_answers_is_not_to_be_left_untested(verifier):
  with pytest.raises(ConfigError, match="raised ZeroDivisionError") as error:
    selftest.check(of(verifier), ROWS)
  assert "untested" not in str(error.value)


def test_a_row_where_both_answers_have_scores_is_shown():
  fails_on_paris = lambda p, c, e: 1 / (e["gold"] != "Paris")
  with pytest.raises(ConfigError, match="the right 'Rome' 1 and the wrong 'Paris' 1"):
    selftest.check(of(fails_on_paris), ROWS)


def test_what_tells_some_rows_apart_and_not_others_is_said():
  (said,) = selftest.check(of(lambda p, c, e: len(c)), ROWS)
  assert said.startswith(
    "reward: mine tells the right answer from a wrong one in 1 of the 3 rows that were tried"
  )
  assert said.endswith("the right 'Rome' 4 and the wrong 'Paris' 5")
  assert selftest.check(of(lambda p, c, e: c == e["gold"]), ROWS) == []


def test_rows_that_a_built_in_cannot_read_are_told():
  reward = section.make({"parts": ("number",)}, ("gold",))
  with pytest.raises(
    ConfigError, match=r"number has no score for any of the 3 rows that were tried: .*'Paris'"
  ):
    selftest.check(reward, ROWS)
  selftest.check(reward, [*ROWS, Answer("?", "7", {"gold": "7"})])


def test_a_verifier_that_fails_on_every_row_is_told_also_where_no_answer_is_known():
  rows = [Answer("?", "", {"answer": i}) for i in range(3)]
  for options in ({}, {"untested": True}):
    with pytest.raises(
      ConfigError, match=r"mine raised KeyError: 'gold', at .*\.py:\d+, on all 3 rows"
    ):
      selftest.check(of(lambda p, c, e: e["gold"], **options), rows)
  selftest.check(of(lambda p, c, e: e["answer"]), rows)
  selftest.check(section.make({"parts": ("length",), "options": OPTIONS}, ()), rows)


def test_verifiers_are_given_the_token_ids_of_what_is_tried():
  """Of a row's own answer and of another's."""
  ids = lambda text, add_special_tokens: {"input_ids": [ord(letter) for letter in text]}
  rows = [section.reference("?", {"answer": text}, ids) for text in ("Paris", "Rome")]
  seen = []

  def told(prompt, completion, example):
    seen.append((completion, example["completion_ids"]))
    return completion == example["answer"]

  selftest.check(of(told), rows)
  assert {completion for completion, _ in seen} == {"Paris", "Rome"}
  assert all(tokens == [ord(letter) for letter in completion] for completion, tokens in seen)
