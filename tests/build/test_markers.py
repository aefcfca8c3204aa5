"""What the objective is told of the tokenizer."""

import pytest

from posttrain_jax.build import objective
from tests import tiny


@pytest.mark.parametrize(
  ("tokens", "wanted"),
  [
    ((), {"end_of_turn": ["<|endoftext|>", "<|im_end|>"]}),
    (
      ("<tool_call>", "</tool_call>", "<think>", "</think>"),
      {
        "end_of_turn": ["<|endoftext|>", "<|im_end|>"],
        "tool": ["<tool_call>", "</tool_call>"],
        "think": ["<think>", "</think>"],
      },
    ),
    (
      ("<|eot_id|>", "<|python_tag|>", "<|start_header_id|>"),
      {"end_of_turn": ["<|endoftext|>", "<|im_end|>", "<|eot_id|>"], "tool": ["<|python_tag|>"]},
    ),
    (
      ("[TOOL_CALLS]", "[INST]"),
      {"end_of_turn": ["<|endoftext|>", "<|im_end|>"], "tool": ["[TOOL_CALLS]"]},
    ),
    (("<end_of_turn>",), {"end_of_turn": ["<|endoftext|>", "<|im_end|>", "<end_of_turn>"]}),
  ],
)
def test_markers_are_found_by_kind_whether_special_or_not(tokens, wanted):
  tokenizer = tiny.tokenizer()
  tokenizer.add_tokens(list(tokens))
  found = {k: tokenizer.convert_ids_to_tokens(list(ids)) for k, ids in objective.markers(tokenizer)}
  assert found == wanted
