"""The commonest answer, and an ensemble of prompts that answers a task in one batch."""

import dataclasses

import jax
import pytest

from posttrain_jax import adapters
from posttrain_jax.evals import tasks, vote
from posttrain_jax.evals.graders import Grader
from tests.data.conftest import make_tokenizer
from tests.models import families


def test_the_commonest_wins_and_the_earliest_of_equals():
  assert vote.majority(["a"]) == 0
  assert vote.majority(["a", "b", "b"]) == 1
  assert vote.majority(["b", "a", "a", "b", "c"]) == 0
  assert vote.majority(["SELECT 1", "SELECT 2", "SELECT  2 ;", "select 1"]) == 1
  with pytest.raises(ValueError, match="no answer"):
    vote.majority([])


def test_normalising_keeps_what_distinguishes():
  assert vote.normalised(" 42.\n") == "42"
  assert vote.normalised("SELECT 'A' ;") != vote.normalised("SELECT 'a'")
  assert vote.normalised("4.2") == "4.2"


@pytest.mark.slow
def test_an_ensemble_answers_in_one_batch_and_the_commonest_counts(monkeypatch):
  """Of three prompts two agree: theirs is the answer, and how each does alone is kept."""
  tokenizer = make_tokenizer("chatml")
  config = families.config(
    "llama", vocab_size=len(tokenizer), max_position_embeddings=1024, num_hidden_layers=1
  )
  params = families.params(config)
  start = lambda seed, **options: adapters.init(
    jax.random.key(seed), params, adapters.AdapterConfig(**options)
  )[1]
  one = start(1, method="prompt", num_virtual_tokens=4)
  two = start(2, method="prompt", num_virtual_tokens=2)
  # random models answer no question: a rule stands in for the verdict
  right = lambda answer, question: (float(len(answer) % 2 == 0), "ok")
  task = dataclasses.replace(tasks.TASKS["sql"], graders=(Grader("even", right),))
  monkeypatch.setitem(tasks.TASKS, "sql", task)
  options = dict(limit=5, template="chatml", max_new_tokens=5, batch_size=6)
  alone = [
    tasks.evaluate(adapters.bind(params, adapter), config, tokenizer, **options)
    for adapter in (one, two)
  ]
  texts = [[answer["answer"] for answer in result.answers] for result in alone]
  assert sum(a != b for a, b in zip(*texts)) >= 3
  found = tasks.evaluate(params, config, tokenizer, ensemble=[one, two, two], **options)
  assert [answer["answer"] for answer in found.answers] == texts[1]
  assert found.by_member == (alone[0].correct, alone[1].correct, alone[1].correct)
  assert (found.correct, found.total) == (alone[1].correct, 5)
  assert found.new_tokens == alone[0].new_tokens + 2 * alone[1].new_tokens
  again = tasks.evaluate(params, config, tokenizer, ensemble=[one, two, one], **options)
  assert [answer["answer"] for answer in again.answers] == texts[0]
