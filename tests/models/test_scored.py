"""Reward models on a language model's base: what is kept of its head, in memory and in files."""

import jax
import numpy as np
import pytest

from posttrain_jax.models import decoder, hf
from tests import tiny

KEY = jax.random.key(0)
TOKENS = np.arange(3, 12)[None]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("writes", [True, False])
def test_a_reward_model_that_writes_keeps_its_own_head(tied, writes, tmp_path):
  model = tiny.config("qwen2", tie_word_embeddings=tied)
  params = decoder.init(KEY, model, std=tiny.STD)
  logits = decoder.forward(params, TOKENS, model)
  scored, config = decoder.scored(KEY, params, model, writes=writes)
  assert ("lm_head" in scored) == (writes and not tied)
  hf.save(tmp_path / "model", scored, config)
  again, read = hf.load(tmp_path / "model")
  assert read.scores == 1
  assert read.writes == ("lm_head" in scored)
  jax.tree.map(np.testing.assert_array_equal, again, scored)
  if writes or tied:
    np.testing.assert_array_equal(decoder.forward(again, TOKENS, read), logits)
