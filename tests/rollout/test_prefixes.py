"""What prompts begin with: which blocks are known, whose they are, which go first."""

import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.models.cache import empty_cache
from posttrain_jax.rollout import engine
from posttrain_jax.rollout.prefixes import Prefixes
from posttrain_jax.rollout.requests import Request
from tests.models import families

SIZE = 4
CONFIG, PARAMS = families.make("llama3")
BLOCK = 2 * SIZE * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * 4  # bytes


def prefixes(blocks):
  made = Prefixes(blocks * BLOCK + 1)
  made.make(empty_cache(CONFIG, 2, 32, jnp.float32), SIZE)
  return made


def keep(made, known_by, prompt):
  """How many blocks are new."""
  args = made.to_keep(None, 0, known_by, prompt)
  return 0 if args is None else int(args[-1])


def test_whole_blocks_are_known_by_all_tokens_before_them():
  made = prefixes(8)
  assert keep(made, "a", [1, 2, 3, 4, 5, 6, 7, 8, 9]) == 2
  assert made.matching("a", [1, 2, 3, 4, 5, 6, 7, 8]) == made.matching("a", [*range(1, 12)])
  assert len(made.matching("a", [1, 2, 3, 4, 5, 6, 7, 9])) == 1
  assert made.matching("a", [0, 2, 3, 4, 5, 6, 7, 8]) == []
  assert made.matching("a", [1, 2, 3]) == []
  assert keep(made, "a", [1, 2, 3, 4, 9, 9, 9, 9]) == 1


def test_no_content_finds_what_another_read():
  made = prefixes(8)
  keep(made, ("adapter", "x"), [1, 2, 3, 4])
  assert made.matching(("adapter", "y"), [1, 2, 3, 4]) == []
  assert made.matching(("base",), [1, 2, 3, 4]) == []
  assert len(made.matching(("adapter", "x"), [1, 2, 3, 4])) == 1
  made.forget(("adapter", "x"))
  assert made.matching(("adapter", "x"), [1, 2, 3, 4]) == []
  assert made.used_bytes == 0


def test_the_block_unused_for_longest_goes_and_never_one_before_those_behind_it():
  made = prefixes(3)
  first, second = [1] * 8, [2] * 4
  assert keep(made, "a", first) == 2
  assert keep(made, "a", second) == 1
  assert made.used_bytes == 3 * BLOCK
  assert len(made.matching("a", first)) == 2  # used again, so `second` goes
  assert keep(made, "a", [3] * 4) == 1
  assert made.matching("a", second) == []
  assert len(made.matching("a", first)) == 2
  assert keep(made, "a", [4] * 8) == 2  # [3] * 4 goes, then the end of `first` before its beginning
  assert len(made.matching("a", first)) == 1


def test_a_prompt_longer_than_the_room_keeps_its_beginning():
  made = prefixes(2)
  assert keep(made, "a", [1] * 20) == 2
  assert len(made.matching("a", [1] * 20)) == 2
  assert Prefixes(0).used_bytes == 0


@pytest.mark.parametrize("family", ["llama3", "gemma3"])
def test_a_prompt_read_from_blocks_is_answered_bit_by_bit_as_one_read_whole(family):
  config, params = families.make(family)
  ready = engine.prepare(params, config)
  prompts = [
    families.tokens(40, seed=1).tolist() + families.tokens(5, seed=s).tolist() for s in (1, 2)
  ]
  asked = [Request(prompt, 6, number=i) for i, prompt in enumerate(prompts)]
  how = dict(rows=2, length=64, window=4, pieces=(16,))
  plain = dict(engine.Engine(ready, config, **how).run(asked))
  kept = Prefixes(2**22)
  one = engine.Engine(ready, config, **how, prefixes=kept)
  first = dict(one.run(asked[:1]))
  one._held = [None] * 2
  again = {place + 1: answer for place, answer in one.run(asked[1:])}
  assert kept.hits == 32
  for place, answer in {**first, **again}.items():
    assert answer.tokens == plain[place].tokens
    np.testing.assert_array_equal(answer.logps, plain[place].logps)


def test_blocks_of_other_weights_are_not_read_again():
  kept = Prefixes(2**22)
  one = engine.Engine(
    engine.prepare(PARAMS, CONFIG), CONFIG, rows=1, length=64, pieces=(16,), prefixes=kept
  )
  asked = Request(families.tokens(40, seed=1).tolist(), 2)
  dict(one.run([asked]))
  assert kept.used_bytes > 0
  one.load(PARAMS)
  assert kept.used_bytes == 0


def test_prompts_are_read_a_few_tokens_between_windows():
  """A row that answers goes on while a long prompt is read beside it, and neither changes the other."""
  ready = engine.prepare(PARAMS, CONFIG)
  how = dict(rows=2, length=128, window=2, pieces=(16,))
  asked = [
    Request(families.tokens(8, seed=1).tolist(), 30, number=0),
    Request(families.tokens(90, seed=2).tolist(), 6, number=1),
  ]
  plain = dict(engine.Engine(ready, CONFIG, **how).run(asked))
  one = engine.Engine(ready, CONFIG, **how, at_once=16)
  tickets = [one.submit(asked[0])]
  one.advance()
  tickets.append(one.submit(asked[1]))
  before_it, answers = 0, {}
  while not one.is_idle:
    for told in one.advance():
      if told.ticket == tickets[1] or answers:
        pass
      elif one._readings:
        before_it += len(told.tokens)
      if told.answer is not None:
        answers[tickets.index(told.ticket)] = told.answer
  assert before_it >= 2 * 4  # windows while five or six pieces were read
  for place, answer in plain.items():
    assert answers[place].tokens == answer.tokens
    np.testing.assert_array_equal(answers[place].logps, answer.logps)
