"""Calls are read as each chat template writes them, and what stands between turns begins where a turn ends."""

import pytest

from posttrain_jax.data import templates, tool_calls
from posttrain_jax.data.template_sandbox import TemplateError
from posttrain_jax.data.tool_calls import Continuation, Form
from tests import tiny

TOKENIZER = tiny.tokenizer()
TURN = "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
ENDS = "{{- '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
LLAMA = (
  TURN
  + '{%- for c in m.tool_calls or [] %}{{- \'{"name": "\' + c.function.name + \'", "parameters": \''
  + " + (c.function.arguments | tojson) + '}' }}{%- else %}{{- m.content }}{%- endfor %}"
  + ENDS
)
MISTRAL = (
  TURN
  + "{%- if m.tool_calls %}{{- '[TOOL_CALLS] [' }}{%- for c in m.tool_calls %}{{- '{\"name\": \"' + c.function.name"
  + ' + \'", "arguments": \' + (c.function.arguments | tojson) + \', "id": "\' + c.id + \'"}\' }}{%- endfor %}'
  + "{{- ']' }}"
  + "{%- else %}{{- m.content }}{%- endif %}"
  + ENDS
)
XML = (
  TURN
  + "{%- for c in m.tool_calls or [] %}{{- '<function=' + c.function.name + '>' }}{%- for k, v in"
  + " c.function.arguments.items() %}{{- '<' + k + '>' + v + '</' + k + '>' }}{%- endfor %}{%- else %}{{- m.content }}"
  + "{%- endfor %}"
  + ENDS
)


def bound(text, tmp_path):
  (tmp_path / "its.jinja").write_text(text)
  return templates.bind(TOKENIZER, str(tmp_path / "its.jinja"))


@pytest.mark.parametrize(
  ("text", "form"),
  [
    (templates.CHATML, Form("<tool_call>", "</tool_call>")),
    (LLAMA, Form("", "", arguments="parameters")),
    (MISTRAL, Form("[TOOL_CALLS]", "", is_list=True)),
  ],
  ids=["hermes", "llama", "mistral"],
)
def test_the_form_is_seen_from_what_a_template_writes_and_reads_it_back(text, form, tmp_path):
  template = bound(text, tmp_path)
  assert tool_calls.form(template) == form
  call = {"name": "f", "arguments": {"x": 1, "y": ["</tool_call>", "}"]}}
  turn = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": "a", "function": call}],
  }
  asked = [{"role": "user", "content": "?"}]
  written = template.render([*asked, turn])
  opening = template.render(asked, add_generation_prompt=True)
  said = written[len(opening) :].removesuffix("<|im_end|>\n").removesuffix("<|im_end|>")
  read = form.read(said)
  assert [dict(one) for one in read.calls] == [call]
  assert (read.text, read.problem) == ("", "")
  assert read.message["tool_calls"][0]["function"] == call


def test_templates_without_calls_and_with_calls_that_are_no_json_are_refused(tmp_path):
  with pytest.raises(ValueError, match="writes no calls of tools"):
    tool_calls.form(templates.bind(TOKENIZER))
  with pytest.raises(ValueError, match=r"no JSON \('<function=probe_name>"):
    tool_calls.form(bound(XML, tmp_path))


HERMES = Form("<tool_call>", "</tool_call>")


@pytest.mark.parametrize(
  ("text", "problem"),
  [
    ("<tool_call>{</tool_call>", "a call is no JSON"),
    ("<tool_call>", "a call is no JSON: ''"),
    ('<tool_call>{"name": "f"}', "does not end with"),
    ('<tool_call>{"name": 3}</tool_call>', "a text as 'name'"),
    ('<tool_call>["f"]</tool_call>', "a text as 'name'"),
    ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "an object as 'arguments'"),
    ('<tool_call>{"name": "f", "arguments": "[1"}</tool_call>', "a call is no JSON"),
    ("<tool_call>" + "[" * 100_000, "a call is no JSON"),
    ('<tool_call>{"name": "f"}</tool_call><tool_call>', "a call is no JSON: ''"),
  ],
)
def test_a_call_that_cannot_be_read_is_a_problem_and_no_call(text, problem):
  turn = HERMES.read(text)
  assert problem in turn.problem
  assert turn.calls == ()


def test_words_beside_calls_stay_and_arguments_may_be_text_or_absent():
  turn = HERMES.read(
    'A <tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call> B <tool_call>{"name": "g"}</tool_call>'
  )
  assert turn.text == "A  B"
  assert turn.calls == ({"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}})


@pytest.mark.parametrize("text", ["{x", "[1, 2]", '{"a": 1}', "So be it."])
def test_of_a_form_without_a_mark_what_is_no_call_is_words(text):
  assert Form("", "").read(text) == tool_calls.Turn(text)


def test_what_follows_a_turn_begins_behind_its_last_token(tmp_path):
  template = bound(templates.CHATML, tmp_path)
  end = TOKENIZER.eos_token_id
  said = [{"role": "user", "content": "go on"}]
  ids = Continuation(template, TOKENIZER).ids(said, [7, end])
  assert TOKENIZER.decode(ids) == "\n<|im_start|>user\ngo on<|im_end|>\n<|im_start|>assistant\n"
  assert Continuation(template, TOKENIZER).ids(said, [7]) == [end, *ids]


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path):
  rewrites = templates.CHATML.replace(
    "'<|im_start|>' + message['role']",
    "'<|im_start|>' + message['role'] + (messages | length | string)",
  )
  assert rewrites != templates.CHATML
  with pytest.raises(TemplateError, match="writes a turn otherwise once others follow"):
    Continuation(bound(rewrites, tmp_path), TOKENIZER).ids([{"role": "user", "content": "x"}])


def test_a_template_whose_turns_end_with_no_token_is_refused(tmp_path):
  plain = "{%- for m in messages %}{{- m.role + ': ' + m.content + '\\n' }}{%- endfor %}"
  with pytest.raises(ValueError, match="no token of its own"):
    Continuation(bound(plain, tmp_path), TOKENIZER)
