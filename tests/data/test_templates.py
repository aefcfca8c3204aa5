import sys

import pytest

from posttrain_jax.data import chat, template_sandbox, templates
from posttrain_jax.data.template_sandbox import Renderer, TemplateError

TALK = [
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": "Hi"},
  {"role": "assistant", "content": "Hello"},
  {"role": "user", "content": "Bye"},
]
# Each format as its family's own tokenizer writes it.
FORMATS = [
  (
    "chatml",
    "chatml",
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    "<|im_start|>assistant\n",
  ),
  (
    "llama3",
    "llama3",
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
  ),
  (
    "llama2",
    "sentence",
    "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] Bye [/INST]",
  ),
  ("mistral", "sentence", "<s>[INST] Be brief.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]"),
  ("vicuna", "sentence", "<s>Be brief. USER: Hi ASSISTANT: Hello</s>USER: Bye ASSISTANT:"),
  (
    "gemma",
    "gemma",
    "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n"
    "<start_of_turn>model\nHello<end_of_turn>\n<start_of_turn>user\nBye<end_of_turn>\n"
    "<start_of_turn>model\n",
  ),
]


@pytest.mark.parametrize(("name", "family", "expected"), FORMATS)
def test_named_template_writes_its_familys_format(name, family, expected, tokenizers):
  template = chat.template(tokenizers[family], name)
  assert template.render(TALK, add_generation_prompt=True) == expected


def test_vicuna_has_a_default_system_message(tokenizers):
  text = chat.template(tokenizers["sentence"], "vicuna").render(TALK[1:2])
  assert text.startswith("<s>A chat between a curious user and an artificial intelligence")


@pytest.mark.parametrize("name", ["llama2", "mistral", "vicuna", "gemma"])
def test_turns_must_alternate(name, tokenizers):
  template = chat.template(tokenizers["gemma" if name == "gemma" else "sentence"], name)
  with pytest.raises(TemplateError, match=r"must alternate.*turn 2 is user"):
    template.render([TALK[1], TALK[1]])


def test_a_bos_is_left_out_where_the_tokenizer_has_no_use_for_it(tokenizers):
  tokenizer = tokenizers["chatml"]
  tokenizer_with_idle_bos = type(tokenizer)(
    tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>"
  )
  assert not templates.adds_bos(tokenizer_with_idle_bos)
  text = chat.template(tokenizer_with_idle_bos, "mistral").render(TALK[1:3])
  assert text == "[INST] Hi [/INST] Hello<|im_end|>"


def test_a_template_whose_ending_is_no_token_is_refused(tokenizers):
  with pytest.raises(ValueError, match=r"ends a turn with '<\|im_end\|>'.*fit it: .*vicuna"):
    chat.template(tokenizers["sentence"], "chatml")


def test_a_missing_template_names_the_choices(tokenizers, tmp_path):
  with pytest.raises(ValueError, match="no chat template; name one of chatml, llama3"):
    chat.template(tokenizers["chatml"])
  with pytest.raises(ValueError, match=r"no chat template 'chatlm'; write one of chatml"):
    chat.template(tokenizers["chatml"], "chatlm")
  (tmp_path / "own.jinja").write_text("{{ messages[0]['content'] }}<|im_end|>")
  own = chat.template(tokenizers["chatml"], str(tmp_path / "own.jinja"))
  assert own.render(TALK) == "Be brief.<|im_end|>"


def rendered(text, **job):
  (result,) = Renderer(text, {}, cpu_seconds=0.3).render([{"messages": TALK, **job}])
  return result


def test_templates_have_what_transformers_gives_them():
  assert rendered("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
  assert rendered("{{ strftime_now('%Y') | length }}") == "4"
  assert rendered("  {% if true %}\nx\n  {% endif %}\n") == "x\n"
  assert rendered("{% generation %}{{ messages[1]['content'] }}{% endgeneration %}!") == "Hi!"
  assert rendered("{% for m in messages %}{{ loop.index }}{% break %}{% endfor %}") == "1"
  assert "odd" in str(rendered("{{ raise_exception('odd') }}"))


HOSTILE = {
  "endless": (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "s,",
  ),
  "huge": ("{{ 'a' * 10000000 }}", "more than 4,000,000"),
  "memory": ("{{ 'a' * 2000000000 }}", "MiB"),
  "python": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
  "namespace": ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "Error"),
  "mutating": ("{{ messages.append(1) }}", "SecurityError"),
  "deep": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_stopped(name):
  text, message = HOSTILE[name]
  result = rendered(text)
  assert isinstance(result, TemplateError)
  assert message in str(result)


def test_one_bad_conversation_does_not_take_the_others_along():
  loop = "{% for a in range(n) %}{% for b in range(n) %}{% endfor %}{% endfor %}{{ n }}"
  renderer = Renderer(loop, {}, cpu_seconds=0.3)
  first, second, third = renderer.render([{"n": 1}, {"n": 50_000}, {"n": 3}])
  assert (first, third) == ("1", "3")
  assert "more than 0.3 s" in str(second)


def test_conversations_are_rendered_by_the_portion(monkeypatch):
  """The renderer's memory holds some of them and not all; one that is too large is refused alone."""
  monkeypatch.setattr(template_sandbox, "MAX_JOB", 2000)
  jobs = [{"messages": [], "text": "x" * size} for size in (10, 1500, 900, 3000, 20, 1900)]
  found = Renderer("{{ text | length }}", {}).render(jobs)
  assert [found[i] for i in (0, 1, 2, 4, 5)] == ["10", "1500", "900", "20", "1900"]
  assert "more than 4,000,000 characters" in str(found[3])


def test_a_file_of_the_users_does_not_stand_in_for_a_library(monkeypatch, tmp_path):
  """A script's folder is the first of its sys.path."""
  (tmp_path / "types.py").write_text("raise SystemExit")
  monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
  assert rendered("{{ 1 }}") == "1"


def test_a_template_with_a_mistake_says_so():
  with pytest.raises(TemplateError, match="cannot be used: TemplateSyntaxError"):
    rendered("{% for %}")


def test_a_renderer_keeps_no_secrets(monkeypatch):
  monkeypatch.setenv("SECRET_TOKEN", "hunter2")
  renderer = Renderer("x", {})
  renderer.render([{}])
  with open(f"/proc/{renderer._process.pid}/environ", "rb") as file:
    assert b"hunter2" not in file.read()


def test_a_folder_without_a_tokenizer_is_named(tmp_path, tokenizers):
  with pytest.raises(FileNotFoundError, match="not a folder"):
    chat.load_tokenizer(tmp_path / "none")
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(FileNotFoundError, match=r"no tokenizer.json; found config.json"):
    chat.load_tokenizer(tmp_path)
  tokenizers["chatml"].save_pretrained(tmp_path)
  assert chat.load_tokenizer(tmp_path)("Hi")["input_ids"] == tokenizers["chatml"]("Hi")["input_ids"]
