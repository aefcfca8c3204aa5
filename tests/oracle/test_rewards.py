"""Rewards beside TRL's own, and expressions beside math-verify without a worker."""

import pytest

from posttrain_jax.rewards import trl as trl_functions
from posttrain_jax.rewards.formats import Tags
from posttrain_jax.rewards.length import SoftOverlong
from posttrain_jax.rewards.reward import Part, Reward
from posttrain_jax.rewards.verifier import Answer

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize(("longest", "soft"), [(100, 20), (50, 50), (64, 0), (7, 1)])
def test_the_penalty_of_long_answers_is_trls(longest, soft):
  from trl.rewards import get_soft_overlong_punishment

  theirs = get_soft_overlong_punishment(longest, soft)
  lengths = range(longest + 10)
  ours = [SoftOverlong(longest, soft)("", "", {"completion_ids": [0] * n}).value for n in lengths]
  assert ours == theirs(completion_ids=[[0] * n for n in lengths])


def test_trls_own_functions_are_parts_as_they_are():
  from trl.rewards import get_repetition_penalty_reward, think_format_reward

  prompt = [{"role": "user", "content": "?"}]
  texts = ["<think>a</think>b", "b", "<think>a<think></think>"]
  answers = [Answer(prompt, text, {}, [1, 1, 1, 1, 2]) for text in texts]
  functions = {"think": think_format_reward, "repeats": get_repetition_penalty_reward(2)}
  reward = Reward([Part(n, trl_functions.Function(f, n)) for n, f in functions.items()])
  parts = [one.parts for one in reward.score(answers).answers]
  conversations = [[{"role": "assistant", "content": text}] for text in texts]
  assert [p["think"].value for p in parts] == think_format_reward(conversations)
  assert [p["repeats"].value for p in parts] == functions["repeats"]([[1, 1, 1, 1, 2]] * 3)
  assert Tags(("think",))("?", "<think>a</think>", {}).value == 1


def test_expressions_are_math_verifys():
  math_verify = pytest.importorskip("math_verify", reason="the extra `math` is not installed")
  from posttrain_jax.rewards import expressions

  golds = [r"$\frac{1}{2}$", "$(x+1)^2$", r"$\{1, 2\}$", "$x = 3$", "$[0, 1)$", r"$2\sqrt{2}$"]
  given = [*golds, r"\boxed{0.5}", r"$x^2+2x+1$", r"$\{2,1\}$", "3", "50%", r"$\sqrt 8$", "none"]
  for gold in golds:
    for answer in given:
      theirs = math_verify.verify(math_verify.parse(gold), math_verify.parse(answer))
      assert expressions.expression(answer, gold)[0] == theirs, (gold, answer)
