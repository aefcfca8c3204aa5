"""What a row says is what is trained: in the form that its template reads, or not at all, in a sentence."""

import json
import logging

import pytest

from posttrain_jax.data import answers, chat, schema, templates
from posttrain_jax.data.errors import RowError
from tests import tiny

TOKENIZER = tiny.tokenizer()
CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "x"}}]
ASKED = {"role": "user", "content": "weather in the city of Oslo"}  # the call's own words
TURN = "<|im_start|>{{ m.role }}\n"
END = "<|im_end|>\n"


def calling(call=None, **fields):
  call = CALL if call is None else call
  return {"role": "assistant", "tool_calls": [{"type": "function", "function": call}], **fields}


def template(text, tmp_path):
  """A template whose loop over messages holds the text."""
  opening = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
  path = tmp_path / "own.jinja"
  path.write_text(f"{{% for m in messages %}}{text}{{% endfor %}}{opening}")
  return chat.template(TOKENIZER, str(path))


def trained(rows, spoken, **options):
  """What is trained of each row."""
  encoded = chat.encode_all(schema.read(rows), TOKENIZER, spoken, max_length=2000, **options)
  return [TOKENIZER.decode(e.tokens[e.mask]) for e in encoded]


OWN = None  # of the tokenizer: plain ChatML
WRITES_OBJECTS = TURN + (
  "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
  "{{ c.function.arguments | tojson }}{% endfor %}" + END
)
WRITES_TEXT = TURN + (
  "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}"
  + END
)
PRINTS = WRITES_TEXT.replace(
  "c.function.name + c.function.arguments", "c.function.name ~ c.function.arguments"
)
ASKS_FOR_NONE = TURN + (
  "{% if m.content is none %}{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
  "{% endfor %}{% else %}{{ m.content }}{% endif %}" + END
)


@pytest.mark.parametrize(
  "text",
  [WRITES_OBJECTS, WRITES_TEXT, PRINTS, ASKS_FOR_NONE],
  ids=["objects", "text", "prints", "none"],
)
@pytest.mark.parametrize("words", [{}, {"content": None}, {"content": ""}], ids=str)
@pytest.mark.parametrize("as_text", [False, True])
def test_a_call_is_trained_as_one_whatever_way_it_is_written(text, words, as_text, tmp_path):
  """Arguments as an object or as the wire's JSON text, no words as null, "" or nothing at all."""
  arguments = json.dumps(CALL["arguments"]) if as_text else CALL["arguments"]
  row = {"messages": [ASKED, calling({**CALL, "arguments": arguments}, **words)]}
  assert trained([row], template(text, tmp_path)) == ['weather{"city": "Oslo"}<|im_end|>']


def test_arrows_nulls_are_not_said(tmp_path):
  """A struct column has every field of every row; a JSON null is a word of its row."""
  import pyarrow as pa
  from pyarrow import parquet

  add = {"name": "add", "arguments": {"a": 2, "b": 3}}
  schemas = [
    {"function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}},
    {"function": {"name": "add", "parameters": {"properties": {"a": {"type": "number"}}}}},
  ]
  rows = [
    {"messages": [ASKED, calling(call, content="")], "tools": [tool]}
    for call, tool in zip((CALL, add), schemas)
  ]
  path = tmp_path / "a.parquet"
  parquet.write_table(pa.Table.from_pylist(rows), path)
  assert '"a": null' in json.dumps(parquet.read_table(path).to_pylist())
  spoken = chat.template(TOKENIZER, "chatml")
  examples = lambda rows: chat.encode_all(schema.read(rows), TOKENIZER, spoken, max_length=2000)
  for one, other in zip(examples(path), examples(rows), strict=True):
    assert one.tokens.tolist() == other.tokens.tolist()
  said = {"name": "add", "arguments": {"a": None}}
  assert '{"a": null}' in trained([{"messages": [ASKED, calling(said)]}], spoken)[0]


def test_maps_of_arrow_are_objects(tmp_path):
  import pyarrow as pa
  from pyarrow import parquet

  column = pa.array([[("city", "Oslo")]], pa.map_(pa.string(), pa.string()))
  parquet.write_table(pa.table({"text": ["a"], "arguments": column}), tmp_path / "a.parquet")
  (row,) = schema.read(tmp_path / "a.parquet")
  assert row.fields["arguments"] == {"city": "Oslo"}


DROPS = [
  (OWN, {"messages": [ASKED, calling(content="")]}, r"messages\[1\]\['tool_calls'\]\[0\].*=chatml"),
  (OWN, {"messages": [ASKED, calling()]}, r"messages\[1\]\['tool_calls'\]\[0\].*=chatml"),
  (OWN, {"messages": [ASKED, calling(content="I look.")]}, r"\['tool_calls'\]\[0\].*=chatml"),
  (
    OWN,
    {"messages": [ASKED, {"role": "assistant", "content": "dry"}], "tools": TOOLS},
    r"'tools'.*=chatml",
  ),
  *(
    (
      OWN,
      {"messages": [ASKED, {"role": "assistant", "content": "dry", name: "weather in Oslo"}]},
      rf"messages\[1\]\['{name}'\].*=chatml",
    )
    for name in ("reasoning_content", "reasoning", "thinking")
  ),
  (
    OWN,
    {"prompt": [ASKED], "completion": [calling(content="")]},
    r"completion\[0\]\['tool_calls'\]",
  ),
  # a name alone, which the text holds anyway
  (OWN, {"messages": [ASKED, calling({"name": "weather", "arguments": {}}, content="so")]}, "tool_calls"),
  (
    "{% if m.role != 'system' %}" + TURN + "{{ m.content }}" + END + "{% endif %}",
    {"messages": [{"role": "system", "content": "a"}, ASKED, {"role": "assistant", "content": "b"}]},
    r"messages\[0\]\['content'\]",
  ),
  (
    TURN + "{{ m.content[:4] }}" + END,
    {"messages": [ASKED, {"role": "assistant", "content": "fourteen"}]},
    r"\['content'\]",
  ),
  (
    TURN + "{{ m.content.split('</think>')[-1] }}" + END,
    {"messages": [ASKED, {"role": "assistant", "content": "<think>so</think>dry"}]},
    r"messages\[1\]\['content'\]",
  ),
  (
    TURN + "{{ m.content }}{{ m.tool_calls[0].function.name if m.tool_calls else '' }}" + END,
    {"messages": [ASKED, calling(content="I look.")]},
    r"\['tool_calls'\]\[0\]",
  ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "row", "message"), DROPS, ids=lambda x: str(x)[-40:])
def test_what_a_template_leaves_out_is_an_error_with_the_fields_name(text, row, message, tmp_path):
  spoken = chat.template(TOKENIZER) if text is OWN else template(text, tmp_path)
  with pytest.raises(RowError, match=message) as caught:
    trained([row], spoken)
  assert str(caught.value).startswith("row 0: template")


@pytest.mark.parametrize("name", templates.NAMED)
def test_named_templates_leave_nothing_out_unsaid(name, tokenizers):
  family = {"chatml": "chatml", "llama3": "llama3", "gemma": "gemma"}.get(name, "sentence")
  spoken = chat.template(tokenizers[family], name)
  thinking = {"role": "assistant", "content": "dry", "reasoning_content": "clouds"}
  for row in (
    {"messages": [ASKED, calling(content="I look.")]},
    {"messages": [ASKED, thinking]},
    {"messages": [ASKED, {"role": "assistant", "content": "dry"}], "tools": TOOLS},
  ):
    encode = lambda row=row: chat.encode_all(
      schema.read([row]), tokenizers[family], spoken, max_length=2000
    )
    if name == "chatml":
      assert encode()
    else:
      with pytest.raises(RowError, match=r"row 0: .*(tool_calls|reasoning_content|tools)"):
        encode()


def test_chatml_writes_tools_as_qwen_and_hermes_do():
  spoken = chat.template(TOKENIZER, "chatml")
  talk = [
    {"role": "system", "content": "Be brief."},
    ASKED,
    calling(),
    {"role": "tool", "content": "dry"},
    {"role": "tool", "content": "cold"},
    {"role": "assistant", "content": "No rain.", "reasoning": "It is dry."},
  ]
  text = spoken.render(schema.validate({"messages": talk}, "x")["messages"], tools=TOOLS)
  assert text == (
    "<|im_start|>system\nBe brief.\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    '{"type": "function", "function": {"name": "weather", "description": "x"}}\n</tools>\n\n'
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML"
    ' tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\nweather in the city of Oslo<|im_end|>\n"
    '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\n<tool_response>\ndry\n</tool_response>\n<tool_response>\ncold\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\n<think>\nIt is dry.\n</think>\n\nNo rain.<|im_end|>\n"
  )
  assert trained([{"messages": talk, "tools": TOOLS}], spoken) == [
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
    "<think>\nIt is dry.\n</think>\n\nNo rain.<|im_end|>"
  ]


def test_rows_with_tools_are_rendered_with_the_tool_use_template():
  tokenizer = tiny.tokenizer()
  plain = tokenizer.chat_template
  tokenizer.chat_template = {"default": plain, "tool_use": templates.CHATML}
  spoken = chat.template(tokenizer)
  row = {"messages": [ASKED, calling(content="")]}
  encode = lambda *rows: chat.encode_all(schema.read(rows), tokenizer, spoken, max_length=2000)
  with_tools, without = encode(
    {**row, "tools": TOOLS}, {"messages": [ASKED, {"role": "assistant", "content": "a"}]}
  )
  assert "<tools>" in tokenizer.decode(with_tools.tokens)
  assert tokenizer.decode(without.tokens).startswith("<|im_start|>user")
  with pytest.raises(RowError, match="give the row its 'tools'"):
    encode(row)
  assert "<tool_call>" in chat.template(tokenizer, "tool_use").text
  tokenizer.chat_template = {"tool_use": templates.CHATML}
  with pytest.raises(ValueError, match="no chat template; name one of its own tool_use"):
    chat.template(tokenizer)


def test_a_template_may_escape_what_it_is_given(tmp_path):
  text = TURN + "{{ m.content | tojson if m.role == 'tool' else m.content }}" + END
  talk = [
    ASKED,
    {"role": "assistant", "content": "I look."},
    {"role": "tool", "content": 'a "dry"\nday'},
  ]
  rows = [{"messages": [*talk, {"role": "assistant", "content": "Dry."}]}]
  assert trained(rows, template(text, tmp_path)) == ["I look.<|im_end|>Dry.<|im_end|>"]


OPENS = TURN + "{{ m.content.split('</think>')[-1].lstrip() }}" + END


@pytest.mark.parametrize(
  ("answer", "expected"),
  [
    ({"content": "<think>\neasy\n</think>\n\n4"}, "easy\n</think>\n\n4<|im_end|>"),
    ({"content": "easy\n</think>\n\n4"}, "easy\n</think>\n\n4<|im_end|>"),
    ({"content": "4", "reasoning_content": "easy"}, "easy\n</think>\n\n4<|im_end|>"),
    ({"content": "4"}, "\n</think>\n\n4<|im_end|>"),
  ],
)
@pytest.mark.parametrize("keeps", [False, True])
def test_an_answer_goes_on_from_a_prompt_that_opens_its_thoughts(answer, expected, keeps, tmp_path):
  """Of templates that drop the thoughts of the past (R1's) and of those that keep the last ones (Qwen's)."""
  spoken = template(OPENS, tmp_path)
  text = spoken.text.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
  if keeps:
    thinking = "{% set r = m.reasoning_content or m.content.split('</think>')[0].split('<think>')[-1].strip() %}"
    thinking += (
      "{% if '</think>' not in m.content and not m.reasoning_content %}{% set r = '' %}{% endif %}"
    )
    thinking += "{{ '<think>\n' + r + '\n</think>\n\n' if m.role == 'assistant' else '' }}"
    text = text.replace(TURN, TURN + thinking)
  (tmp_path / "own.jinja").write_text(text)
  spoken = chat.template(TOKENIZER, str(tmp_path / "own.jinja"))
  row = {"messages": [ASKED, {"role": "assistant", **answer}]}
  assert trained([row], spoken) == [expected]
  (example,) = chat.encode_all(schema.read([row]), TOKENIZER, spoken, max_length=2000)
  asked = spoken.render([ASKED], add_generation_prompt=True)
  assert TOKENIZER.decode(example.tokens[: len(asked)]).startswith(asked[:40])
  before = TOKENIZER.decode(example.tokens[: example.mask.argmax()])
  assert before == asked


def test_a_call_goes_on_from_a_prompt_that_opens_its_thoughts(tmp_path):
  text = template(
    WRITES_TEXT.replace("m.content", "m.content.split('</think>')[-1]"), tmp_path
  ).text
  (tmp_path / "own.jinja").write_text(
    text.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
  )
  spoken = chat.template(TOKENIZER, str(tmp_path / "own.jinja"))
  call = 'weather{"city": "Oslo"}<|im_end|>'
  rows = [
    {"messages": [ASKED, calling(content=words)]} for words in ("", "<think>\nhm\n</think>\n\n")
  ]
  assert trained(rows, spoken) == [f"\n</think>\n\n{call}", f"hm\n</think>\n\n{call}"]


def test_the_last_turn_alone_of_a_template_that_rewrites_the_others(tmp_path):
  text = (
    TURN
    + "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
    + END
  )
  spoken = template(text, tmp_path)
  talk = [ASKED, {"role": "assistant", "content": "dry"}] * 2
  with pytest.raises(
    RowError, match=r"row 0: message 1 is rendered differently.*data.train_on=last"
  ):
    trained([{"messages": talk}], spoken)
  assert trained([{"messages": talk}], spoken, train_on="last") == [
    "<think>\n\n</think>\n\ndry<|im_end|>"
  ]
  assert trained([{"messages": talk}], chat.template(TOKENIZER), train_on="last") == [
    "dry<|im_end|>"
  ]
  # the last that is trained, and nothing behind it
  talk = [*talk, ASKED, {"role": "assistant", "content": "no", "weight": 0}, ASKED]
  assert trained([{"messages": talk}], spoken, train_on="last") == [
    "<think>\n\n</think>\n\ndry<|im_end|>"
  ]
  with pytest.raises(ValueError, match="train_on='user': write one of assistant, last"):
    trained([{"messages": talk}], spoken, train_on="user")
  # answers have no such field
  pair = {"prompt": [ASKED], "chosen": talk[1:4], "rejected": talk[1:2]}
  with pytest.raises(RowError, match="an answer is to be one assistant's message"):
    answers.encode_all(list(schema.read([pair])), TOKENIZER, spoken, kind="pairs", max_length=999)


def test_thoughts_of_turns_that_are_past_may_be_dropped(tmp_path):
  text = TURN + (
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    + END
  )
  turns = [
    {"role": "assistant", "content": c, "reasoning_content": f"as {c}"} for c in ("dry", "wet")
  ]
  rows = [{"messages": [ASKED, turns[0], ASKED, turns[1]]}]
  assert trained(rows, template(text, tmp_path), train_on="last") == [
    "<think>as wet</think>wet<|im_end|>"
  ]
  with pytest.raises(RowError, match=r"messages\[1\]\['reasoning_content'\]"):
    trained(rows, chat.template(TOKENIZER), train_on="last")


def test_a_prompt_without_a_border_to_its_answer_is_said(tmp_path):
  spoken = template(TURN + "{{ m.content }}" + END, tmp_path)
  text = spoken.text.replace("assistant\n{% endif", "assistant: {% endif")
  (tmp_path / "own.jinja").write_text(text)
  row = {"messages": [ASKED, {"role": "assistant", "content": "dry"}]}
  with pytest.raises(RowError, match=r"row 0: .* begins an answer with ': ' when it asks"):
    trained([row], chat.template(TOKENIZER, str(tmp_path / "own.jinja")))


def test_an_end_that_the_answer_brings_along_stands_once():
  row = {"messages": [ASKED, {"role": "assistant", "content": "dry<|im_end|>\n"}]}
  assert trained([row], chat.template(TOKENIZER)) == ["dry<|im_end|>"]
  with pytest.raises(RowError, match=r"messages\[1\], an assistant's message, is empty"):
    trained(
      [{"messages": [ASKED, {**row["messages"][1], "content": "<|im_end|>"}]}],
      chat.template(TOKENIZER),
    )


def test_variables_of_the_template_stand_in_the_row(tmp_path):
  text = (
    TURN + "{% if m.role == 'assistant' and mood %}{{ mood }}: {% endif %}{{ m.content }}" + END
  )
  row = {"messages": [ASKED, {"role": "assistant", "content": "dry"}]}
  rows = [row, {**row, "chat_template_kwargs": {"mood": "glad"}}]
  assert trained(rows, template(text, tmp_path)) == ["dry<|im_end|>", "glad: dry<|im_end|>"]
  with pytest.raises(RowError, match="sets 'messages', which is the row's own"):
    schema.read([{**row, "chat_template_kwargs": {"messages": []}}])


def test_a_field_that_nothing_reads_is_told_once(caplog):
  rows = [{"messages": [ASKED, {"role": "assistant", "content": "dry", "mood": "glad"}]}] * 3
  with caplog.at_level(logging.WARNING):
    trained(rows, chat.template(TOKENIZER))
  assert [r.getMessage() for r in caplog.records] == [
    "messages have 'mood', which the template does not read (first: row 0)"
  ]


def test_a_hub_datasets_nulls_are_not_said(monkeypatch):
  import datasets

  calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": 2}}]
  rows = [{"messages": [ASKED, calling(call, content="")]} for call in calls]
  data = datasets.Dataset.from_list(rows)
  monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: data)
  texts = trained("owner/name", chat.template(TOKENIZER, "chatml"))
  assert ['"b"' in text for text in texts] == [False, True]
  assert not [text for text in texts if "null" in text]


def test_rows_that_a_template_leaves_out_can_be_counted():
  rows = [{"messages": [ASKED, calling(content="")]}] * 3
  rows += [{"messages": [ASKED, {"role": "assistant", "content": "dry"}]}]
  encoded = chat.encode_all(
    schema.read(rows), TOKENIZER, chat.template(TOKENIZER), max_length=999, on_error="skip"
  )
  assert dict(encoded.skipped.counts) == {"dropped by the template": 3}


DRY = {"role": "assistant", "content": "dry"}
CITES = "{% for d in documents or [] %}{{ d.title ~ d.text }}{% endfor %}"


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ({"documents": [{"title": "Oslo", "text": "rain"}]}, r"documents\[0\]\['title'\].*FILE.jinja"),
    ({"chat_template_kwargs": {"documents": [{"text": "rain"}]}}, r"documents\[0\]\['text'\]"),
    ({"documents": "rain"}, r"'documents' is a string that is not JSON"),
    ({"documents": ["rain"]}, r"'documents' is an array"),
    ({"system": "Be brief."}, r"'system' stands beside 'messages' .*columns.messages=messages"),
    ({"system_prompt": "Be brief."}, r"'system_prompt' stands beside .*first message"),
    ({"functions": [{"name": "f"}]}, r"does not write all of 'tools'"),
    (
      {"functions": [{"name": "f"}], "tools": [{"name": "g"}]},
      r"'functions' stands beside 'messages' .*'tools'",
    ),
  ],
)
def test_what_stands_beside_a_conversation_is_not_lost(row, message):
  """The words of the documents are in no message; a template that ignores them trains on what it never saw."""
  with pytest.raises(RowError, match=r"row 0: .*" + message):
    trained([{"messages": [ASKED, DRY], **row}], chat.template(TOKENIZER))


def test_documents_are_given_to_a_template_that_writes_them(tmp_path):
  row = {"messages": [ASKED, DRY], "documents": [{"doc_id": "7", "title": "Oslo", "text": "rain"}]}
  writes = template(TURN + CITES + "{{ m.content }}" + END, tmp_path)
  encode = lambda row: chat.encode_all(schema.read([row]), TOKENIZER, writes, max_length=2000)
  assert "Oslorain" in TOKENIZER.decode(encode(row)[0].tokens)
  with pytest.raises(RowError, match=r"row 0: .*documents\[0\]\['url'\]"):
    encode({**row, "documents": [{"title": "Oslo", "text": "rain", "url": "here"}]})


@pytest.mark.parametrize(
  "beside",
  [
    {"system": None, "documents": None, "functions": []},
    {"system": ""},
    {"system": "Be brief."},  # which the messages say, too
  ],
)
def test_what_says_nothing_more_may_stand_beside_a_conversation(beside):
  brief = {"role": "system", "content": "Be brief."}
  assert trained([{"messages": [brief, ASKED, DRY], **beside}], chat.template(TOKENIZER))
  assert schema.read([{"text": "a", "system": "linux"}])


def test_what_columns_leave_out_beside_a_conversation_is_told_once():
  rows = [{"conversations": [ASKED, DRY], "system": "Be brief.", "system_prompt": " "}] * 2
  assert schema.read(rows, columns={"messages": "conversations"}).reads == (
    "the list: reads 'conversations' as the conversation; nobody reads 'system', 'system_prompt'",
  )


def test_what_a_template_need_not_write_is_told_once_where_it_does_not(tmp_path, caplog):
  row = {"messages": [{**ASKED, "name": "Ada"}, DRY], "chat_template_kwargs": {"mood": "glad"}}
  with caplog.at_level(logging.WARNING):
    trained([row] * 3, chat.template(TOKENIZER))
  assert sorted(r.getMessage() for r in caplog.records) == [
    "chat_template_kwargs sets 'mood', which the template does not read (first: row 0)",
    "messages have 'name', which the template does not read (first: row 0)",
  ]
  caplog.clear()
  reads = template(TURN + "{{ m.name or mood }}{{ m.content }}" + END, tmp_path)
  with caplog.at_level(logging.WARNING):
    trained([row], reads)
  assert not caplog.records


def test_nulls_of_arrow_that_may_be_meant_are_counted(tmp_path, caplog):
  import pyarrow as pa
  from pyarrow import parquet

  calls = [{"name": "f", "arguments": a} for a in ({"a": 1, "b": None}, {"a": None, "b": 2})]
  rows = [{"messages": [ASKED, calling(call, content="")], "note": None} for call in calls]
  parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
  with caplog.at_level(logging.WARNING):
    schema.read(tmp_path / "a.parquet")
  (told,) = [r.getMessage() for r in caplog.records]
  assert told.startswith(f"{tmp_path / 'a.parquet'}: fields that are null were left out (2 in 'arg")
  caplog.clear()
  texts = [calling({**c, "arguments": json.dumps(c["arguments"])}) for c in calls]
  parquet.write_table(
    pa.Table.from_pylist([{"messages": [ASKED, c]} for c in texts]), tmp_path / "b.parquet"
  )
  kept = schema.read(tmp_path / "b.parquet")
  assert kept[0].fields["messages"][1]["tool_calls"][0]["function"]["arguments"]["b"] is None
  assert not caplog.records
