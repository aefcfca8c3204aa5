"""What lm-evaluation-harness asks, as the engine is asked; its numbers are tests/oracle's."""

import jax

from posttrain_jax.evals import harness
from posttrain_jax.evals.samples import Writer
from posttrain_jax.models import decoder
from tests import tiny


def test_a_special_token_among_until_ends_an_answer():
  tokenizer = tiny.tokenizer()
  params = decoder.init(jax.random.key(0), tiny.config())
  writer = Writer(params, tiny.config(), tokenizer, None, (tokenizer.eos_token_id,))
  asked = harness.Asked(writer)
  made = asked._request(0, "a", {"until": ["<|endoftext|>", "\n", "<|im_end|>"], "max_gen_toks": 4})
  assert made.stop_tokens == (tokenizer.eos_token_id, tokenizer.pad_token_id)
  assert made.stop_strings == ["\n"]
