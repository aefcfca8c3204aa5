"""An expression of somebody else's: matched as Python would, within a time, or refused in a sentence."""

import re
import time

import pytest

from posttrain_jax.core import patterns

NAMES = [
  f"model.{part}layers.{i}.{module}"
  for part in ("", "language_model.")
  for i in (0, 1, 10, 31)
  for module in ("self_attn.q_proj", "mlp.down_proj", "input_layernorm")
] + ["model.embed_tokens", "lm_head", ""]
USED = [  # by PEFT's documents, and by those who write its files
  r".*(q|v)_proj",
  r"(.*\.)?(layers\.1\.mlp\.down_proj)",
  r"model.language_model.layers.[\d]+.(mlp|cross_attn|self_attn).(up|down|gate|q|k|v|o)_proj",
  r"^(?!.*language_model).*_proj$",
  r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp\..*)",
  r"model\.layers\.(?:[0-9]|1[0-9]|3[01])\..*(?<!norm)",
  r"(?i)MODEL\.EMBED_TOKENS",
  r"(\w+\.)*q_proj",
  "",
]


@pytest.mark.parametrize("expression", USED)
def test_it_matches_what_python_matches(expression):
  for name in NAMES:
    assert patterns.fullmatch(expression, name) == bool(re.fullmatch(expression, name)), name
  assert not expression or any(patterns.fullmatch(expression, name) for name in NAMES)


@pytest.mark.parametrize(
  "expression",
  [
    r"(a|a)*b",
    r"(?:a|aa|aaa)*$(?<=b)",
    r"(.*)*x",
    r"(a+)+$",
    r".*?.*?.*?.*?.*?.*?.*?.*?.*?[xy]{3}",
    r"(a{1,10}){1,10}(a{1,10}){1,10}b",
    r"(((a{1000}){1000}){1000}){1000}",
    r"a{1000000000000}",
    "(" * 9000 + ")" * 9000,
    "a" * 30_000,
  ],
)
def test_what_would_take_hours_is_matched_or_refused_within_seconds(expression):
  began = time.monotonic()
  for text in ("a" * 60, *NAMES):
    try:
      patterns.fullmatch(expression, text)
    except ValueError as error:
      assert len(str(error)) < 400  # noqa: PT017
      assert "expression" in str(error) or "repeats" in str(error)  # noqa: PT017
  assert time.monotonic() - began < 4 * patterns.SECONDS


@pytest.mark.parametrize("expression", ["((", "[", "*", r"\1", "(?P<a>"])
def test_what_is_no_expression_is_named(expression):
  with pytest.raises(ValueError, match=f"{re.escape(repr(expression))} is no regular expression: "):
    patterns.check(expression)
