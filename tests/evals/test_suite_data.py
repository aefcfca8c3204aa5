"""GSM8K and HumanEval as suites: their own answers are right, and wrong ones are not.

`POSTTRAIN_DATA` names a folder with `gsm8k/test.jsonl` and `humaneval/HumanEval.jsonl.gz`, which are no part of the
repository.
"""

import os
import pathlib

import jax
import pytest

from posttrain_jax.data import chat
from posttrain_jax.evals import asked as asked_lib
from posttrain_jax.evals import measure, suite
from posttrain_jax.evals.samples import Writer
from posttrain_jax.models import decoder
from posttrain_jax.rewards.verifier import Answer
from tests import tiny


@pytest.fixture(scope="module")
def data():
  folder = os.environ.get("POSTTRAIN_DATA")
  if folder is None:
    pytest.skip("POSTTRAIN_DATA is not set, so there are no GSM8K and HumanEval to read")
  return pathlib.Path(folder)


@pytest.fixture(scope="module")
def writer():
  config = tiny.config(max_position_embeddings=4096)
  tokenizer = tiny.tokenizer()
  params = decoder.init(jax.random.key(0), config)
  return Writer(params, config, tokenizer, chat.template(tokenizer), (258,))


def test_every_row_of_gsm8k_is_asked_and_its_own_answer_is_right(data, writer):
  (part,) = suite.load(f"gsm8k:{data / 'gsm8k' / 'test.jsonl'}").parts
  assert len(part.rows) == 1319
  one = asked_lib.of(part, writer, 4096)
  reward = measure.reward(one)  # tries each
  wrong = reward.score([Answer("", "#### 123456789", asked_lib.example(one.questions[0]))])
  assert wrong.answers[0].total.value == 0


@pytest.mark.slow
def test_humaneval_is_run_in_the_sandbox(data, writer):
  (part,) = suite.load(f"humaneval:{data / 'humaneval' / 'HumanEval.jsonl.gz'}", limit=3).parts
  one = asked_lib.of(part, writer, 4096)
  reward = measure.reward(one)
  rows = [asked_lib.example(question) for question in one.questions]
  right = [Answer("", f"```python\n{r['prompt']}{r['canonical_solution']}```", r) for r in rows]
  wrong = [Answer("", f"```python\n{r['prompt']}    return None\n```", r) for r in rows]
  assert [s.total.value for s in reward.score(right).answers] == [1.0] * 3
  assert [s.total.value for s in reward.score(wrong).answers] == [0.0] * 3
