"""Files of other tools, read as they are: the rows that Axolotl, LLaMA-Factory and OpenAI make of them."""

import json

import pytest

from posttrain_jax.data import forms, schema
from posttrain_jax.data.errors import RowError


def user(text):
  return {"role": "user", "content": text}


def said(text):
  return {"role": "assistant", "content": text}


BRIEF = {"role": "system", "content": "Be brief."}
ADD = {"instruction": "Add.", "input": "1 2", "output": "3"}
TALK = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
TOOL = {"name": "f", "parameters": {"type": "object", "properties": {}}}
CALLED = {
  "role": "assistant",
  "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
}
PAIR = {
  "input": {"messages": [user("Hi")], "tools": [], "parallel_tool_calls": True},
  "preferred_output": [said("Hello")],
  "non_preferred_output": [said("No")],
}

WRITTEN = [
  (ADD, {"prompt": [user("Add.\n1 2")], "completion": [said("3")]}),
  ({**ADD, "input": ""}, {"prompt": [user("Add.")], "completion": [said("3")]}),
  ({**ADD, "input": None}, {"prompt": [user("Add.")], "completion": [said("3")]}),
  ({**ADD, "system": "Be brief."}, {"messages": [BRIEF, user("Add.\n1 2"), said("3")]}),
  (
    {**ADD, "history": [["a", "b"]], "system": ""},
    {"messages": [user("a"), said("b"), user("Add.\n1 2"), said("3")]},
  ),
  (
    {"instruction": "Add.", "chosen": "3", "rejected": "4"},
    {"prompt": [user("Add.")], "chosen": [said("3")], "rejected": [said("4")]},
  ),
  (
    {**ADD, "kto_tag": False},
    {"prompt": [user("Add.\n1 2")], "completion": [said("3")], "label": False},
  ),
  ({"conversations": TALK}, {"messages": [user("Hi"), said("Hello")]}),
  (
    {"conversations": TALK, "system": "Be brief.", "tools": json.dumps([TOOL])},
    {"messages": [BRIEF, user("Hi"), said("Hello")], "tools": [TOOL]},
  ),
  (
    {
      "conversations": [
        {"from": "system", "value": "Be brief."},
        TALK[0],
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        TALK[1],
      ],
      "system": "Be brief.",
      "tools": "",
    },
    {
      "messages": [BRIEF, user("Hi"), CALLED, {"role": "tool", "content": "2"}, said("Hello")],
    },
  ),
  (
    {"conversations": TALK[:1], "chosen": TALK[1], "rejected": {"from": "gpt", "value": "No"}},
    {"prompt": [user("Hi")], "chosen": [said("Hello")], "rejected": [said("No")]},
  ),
  (
    {"conversations": TALK, "label": True},
    {"messages": [user("Hi"), said("Hello")], "label": True},
  ),
  (PAIR, {"prompt": [user("Hi")], "chosen": [said("Hello")], "rejected": [said("No")]}),
  (
    {
      "messages": [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {**user("Hi"), "name": "Ada"},
        {
          "role": "assistant",
          "content": None,
          "function_call": {"name": "f", "arguments": '{"a":1}'},
        },
        {"role": "function", "name": "f", "content": "2"},
        {**said("Hello"), "weight": 0, "refusal": None},
      ],
      "functions": [TOOL],
      "parallel_tool_calls": False,
    },
    {
      "messages": [
        {"role": "developer", "content": "Be brief."},
        {**user("Hi"), "name": "Ada"},
        CALLED,
        {"role": "tool", "name": "f", "content": "2"},
        {**said("Hello"), "weight": 0},
      ],
      "tools": [TOOL],
      "parallel_tool_calls": False,
    },
  ),
]


@pytest.mark.parametrize(("row", "fields"), WRITTEN)
def test_rows_of_other_tools_become_rows_of_trl(row, fields):
  (read,) = schema.read([row], chat=True)
  assert read.fields == fields


def test_alpaca_without_a_template_is_stanfords_prompt():
  """Text of Axolotl's `alpaca` and of LLaMA-Factory's template of that name, character for character."""
  with_input, without = schema.read([ADD, {**ADD, "input": ""}])
  assert with_input.fields == {
    "prompt": "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n",
    "completion": "3",
  }
  assert without.fields["prompt"] == (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Response:\n"
  )
  (told,) = schema.read([{**ADD, "system": "Be brief."}])
  assert told.fields["prompt"].startswith("Be brief.\n\n### Instruction:\nAdd.")
  with pytest.raises(RowError, match="row 0: 'history' holds turns, which need a chat template"):
    schema.read([{**ADD, "history": [["a", "b"]]}])


@pytest.mark.parametrize(
  ("rows", "sentence"),
  [
    (
      [{**ADD, "id": 1}, ADD],
      "reads 'instruction', 'input' as the prompt, 'output' as the answer; nobody reads 'id'",
    ),
    ([{"text": "a"}], "reads 'text' as the text"),
    (
      [PAIR],
      "reads 'input' as the prompt, 'preferred_output' as the better answer, 'non_preferred_output' as the worse",
    ),
    (
      [{"messages": [user("a"), said("b")], "system": ""}],
      "'messages' as the conversation; nobody reads 'system'",
    ),
  ],
)
def test_what_columns_are_taken_for_is_said_once(rows, sentence):
  (told,) = schema.read(rows).reads
  assert sentence in told


def test_columns_that_were_named_are_said_by_their_own_names():
  columns = {"prompt": ["title", "body"], "completion": "reply"}
  rows = [{"title": "a", "body": "b", "reply": "c", "channel": "mail", "system": "d"}]
  assert schema.read(rows, columns=columns).reads == (
    "the list: reads 'title', 'body' as the prompt, 'reply' as the answer, 'channel' as the channel;"
    " nobody reads 'system'",
  )


def test_what_could_be_several_forms_is_refused_with_the_flags_that_choose():
  row = {**ADD, "text": "### Instruction: ..."}
  ways = (
    "write --config.data.columns.text=text, or --config.data.columns.instruction=instruction"
    " --config.data.columns.input=input --config.data.columns.output=output"
  )
  with pytest.raises(RowError) as caught:
    schema.read([row])
  assert str(caught.value).endswith(ways)
  columns = {name: name for name in ("instruction", "input", "output")}
  (read,) = schema.read([row], columns=columns, chat=True)
  assert read.fields == {"prompt": [user("Add.\n1 2")], "completion": [said("3")]}


def test_of_several_forms_the_one_that_can_be_used_is_taken():
  """UltraFeedback has a conversation beside its pairs, and a run reads one of the two."""
  row = {"prompt": "a", "chosen": "b", "rejected": "c", "messages": [user("a"), said("b")]}
  (pair,) = schema.read([row], kinds=("preference",))
  (talk,) = schema.read([row], kinds=("text", "messages", "prompt_completion"))
  assert (pair.kind, talk.kind) == ("preference", "messages")
  assert talk.fields == {"messages": [user("a"), said("b")]}
  with pytest.raises(RowError, match="could be messages or preference; pick"):
    schema.read([row])


def test_a_prompt_says_again_how_a_conversation_begins():
  (row,) = schema.read([{"prompt": "a", "prompt_id": "x", "messages": [user("a"), said("b")]}])
  assert row.kind == "messages"


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ({**ADD, "output": ""}, "'output' is empty"),
    ({**ADD, "output": 3}, "'output' is int 3, expected a string"),
    ({**ADD, "instruction": "", "input": " "}, "'instruction' is empty, and so is 'input'"),
    ({**ADD, "history": ["a"]}, r"'history' is an array .*\[instruction, answer\]"),
    (
      {"conversations": [{"from": "system", "value": "a"}, *TALK], "system": "b"},
      "another system message",
    ),
    ({"conversations": [{"from": "function_call", "value": "f("}]}, "is a string that is not JSON"),
    ({**PAIR, "input": "Hi"}, r"'input' is the string 'Hi', expected an object \{\"messages\""),
    (
      {"problem": "a", "solution": "b"},
      "columns.prompt=problem --config.data.columns.completion=solution",
    ),
  ],
)
def test_what_is_wrong_with_a_row_of_a_form_is_said_in_its_own_words(row, message):
  with pytest.raises(RowError, match=message):
    schema.read([row], chat=True)


def test_no_form_is_read_that_none_is_known_by():
  known = {name for form in forms.FORMS for name in form.needs}
  assert all({*form.needs} <= {*form.parts} for form in forms.FORMS)
  assert not known & {*forms.ALIASES}
