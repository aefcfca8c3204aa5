"""A context stretched by position interpolation: angles, config.json both ways, what is refused."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.models import decoder, rotary
from posttrain_jax.models.config import from_hf, to_hf
from tests.models import families


@pytest.mark.parametrize("family", ["llama", "llama_biased", "gemma3", "qwen3", "mistral"])
def test_a_stretched_position_is_the_old_one_divided(family):
  config = families.config(family)
  longer = rotary.stretched(config, 2 * config.max_length)
  where = jnp.arange(0, 2 * config.max_length, 7)[None]
  found = rotary.angles(where, longer.rope, config.head_dim)
  expected = rotary.angles(where / 2, config.rope, config.head_dim)
  for a, b in zip(found, expected):
    np.testing.assert_allclose(a, b, atol=2e-5)
  assert longer.local_rope == config.local_rope
  assert longer.max_length == 256


@pytest.mark.parametrize("family", ["llama", "llama_biased", "gemma3", "qwen3", "mistral"])
def test_the_config_that_is_written_says_the_same(family):
  longer = rotary.stretched(families.config(family), 320)
  written = json.loads(json.dumps(to_hf(longer, tied=longer.tied, dtype="float32")))
  again = from_hf(written)
  assert again.rope == longer.rope
  assert again.local_rope == longer.local_rope
  assert again.max_length == 320


def test_stretching_twice_multiplies():
  config = families.config("llama")
  assert rotary.stretched(rotary.stretched(config, 256), 512) == rotary.stretched(config, 512)
  assert rotary.stretched(config, 0) is config


def test_a_model_without_a_file_is_described_stretched():
  bare = dataclasses.replace(families.config("llama"), source="{}")
  config = rotary.stretched(bare, 4096)
  assert from_hf(to_hf(config, tied=False, dtype="float32")).rope == config.rope


@pytest.mark.parametrize(
  ("family", "length", "message"),
  [
    ("llama", 128, "context_length=128: the model reads 128 tokens as it is"),
    ("llama", 64, "reads 128 tokens as it is"),
    ("llama3", 256, "rescaled as 'llama3' already"),
  ],
)
def test_what_cannot_be_stretched_is_refused(family, length, message):
  with pytest.raises(ValueError, match=message):
    rotary.stretched(families.config(family), length)


@pytest.mark.slow
def test_stretching_acts_on_the_logits_far_out_more_than_near():
  config, params = families.make("llama")
  tokens = families.tokens(1, 40)
  longer = rotary.stretched(config, 512)
  run = lambda config: decoder.forward(params, tokens, config)
  change = np.abs(run(longer) - run(config)).max(axis=(0, 2))
  assert change[0] < 1e-5  # position 0 stays
  assert 0.05 < change[1] < change[20:].max()
