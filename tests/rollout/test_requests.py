"""What ends a text."""

import pytest
from tokenizers import AddedToken

from posttrain_jax.rollout import requests
from tests import tiny


def test_a_special_token_ends_a_text_by_its_id_whatever_it_is_called():
  """Llama 3 has hundreds that are special and have no part such as eos."""
  tokenizer = tiny.tokenizer()
  tokenizer.add_tokens([AddedToken("<|eom|>", special=True), AddedToken("<word>", special=False)])
  ids, strings = requests.parted(["<|eom|>", "\n", "<|im_end|>", "<word>", "\ud800"], tokenizer)
  assert ids == {tokenizer.convert_tokens_to_ids(name) for name in ("<|eom|>", "<|im_end|>")}
  assert strings == ["\n", "<word>"]
  with pytest.raises(ValueError, match="empty stop string"):
    requests.parted([""], tokenizer)
