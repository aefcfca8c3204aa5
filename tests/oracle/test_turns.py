"""What stands between two turns, and environments, beside TRL's own loop of tools on the same conversations."""

import types

import pytest

pytest.importorskip("trl", reason="TRL is not installed: run `make oracle`")

from trl.trainer.grpo_trainer import GRPOTrainer

from posttrain_jax.data import templates, tool_calls
from posttrain_jax.environments import shapes
from tests import tiny
from tests.environments import made

pytestmark = pytest.mark.oracle
LLAMA = """\
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.tool_calls %}{%- for c in m.tool_calls %}
{{- '{"name": "' + c.function.name + '", "parameters": ' + (c.function.arguments | tojson) + '}' }}
{%- endfor %}{%- else %}{{- m.content }}{%- endif %}{{- '<|im_end|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
SAID = [
  [{"role": "tool", "name": "double", "content": "42"}],
  [
    {"role": "tool", "name": "a", "content": "one\n"},
    {"role": "tool", "name": "b", "content": "  two"},
  ],
  [{"role": "tool", "name": "double", "content": "{'error': 'no'}"}],
]


@pytest.mark.parametrize("messages", SAID)
@pytest.mark.parametrize("name", ["chatml", "llama"])
def test_the_tokens_between_turns_are_those_of_trl(name, messages, tmp_path):
  tokenizer = tiny.tokenizer()
  text = templates.CHATML if name == "chatml" else LLAMA
  (tmp_path / "its.jinja").write_text(text)
  template = templates.bind(tokenizer, str(tmp_path / "its.jinja"))
  trainer = types.SimpleNamespace(
    processing_class=tokenizer,
    _tokenizer=tokenizer,
    _is_vlm=False,
    chat_template=text,
    chat_template_kwargs={},
  )
  theirs = GRPOTrainer._get_tool_suffix_ids(trainer, [dict(m) for m in messages])
  end = tokenizer.eos_token_id
  assert tool_calls.Continuation(template, tokenizer).ids(messages, [end]) == theirs


def test_the_tools_of_an_environment_are_those_that_trl_finds():
  import inspect

  instance = made.Counter()
  theirs = [
    name
    for name, _ in inspect.getmembers(type(instance), predicate=inspect.isfunction)
    if name not in ("reset", "get_reward") and not name.startswith("_")
  ]
  assert [tool.__name__ for tool in shapes.of(made.Counter, ()).tools()] == theirs
