"""Conversations with a tiny model in a folder: from a pipe, from a terminal, with an adapter."""

import dataclasses
import io
import os

import jax
import pytest
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from posttrain_jax import adapters
from posttrain_jax.adapters import AdapterConfig, peft_format
from posttrain_jax.build import use
from posttrain_jax.data import template_sandbox, templates
from posttrain_jax.models import hf
from posttrain_jax.rollout import engine
from posttrain_jax.rollout.speaker import answer_lines
from posttrain_jax.settings import ConfigError
from tests.adapters.cases import trained
from tests.data.conftest import make_tokenizer
from tests.models import families

NEW = 12


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """(folder, params, config, tokenizer) of a model without a chat template."""
  folder = tmp_path_factory.mktemp("model") / "base"
  tokenizer = make_tokenizer("chatml")
  config = families.config("llama", vocab_size=len(tokenizer), max_position_embeddings=160)
  params = families.params(config)
  hf.save(folder, params, config)
  tokenizer.save_pretrained(folder)
  return folder, params, config, tokenizer


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
  """(folder, params with it merged)"""
  _, params, config, _ = base
  settings = AdapterConfig(method="lora", r=2, lora_alpha=8, target_modules=["q_proj", "up_proj"])
  _, fresh = adapters.init(jax.random.key(0), params, settings)
  node = trained(fresh)
  folder = tmp_path_factory.mktemp("adapter") / "lora"
  peft_format.save(folder, node, settings, config)
  return folder, adapters.merge(params, node)


def ready(*args, system=None, max_new_tokens=NEW, **options):
  """(speaker, system message) as `posttrain chat` makes them."""
  used = use.load(*map(str, args), **options)
  return use.speaker(used, system=system, sampling=engine.GREEDY, max_new_tokens=max_new_tokens)


def talk(*args, lines, **options):
  """(stdout, stderr) of the answers to lines from a pipe."""
  out, err = io.StringIO(), io.StringIO()
  speaker, system = ready(*args, **options)
  answer_lines(speaker, system=system, stdin=io.StringIO(lines), stdout=out, stderr=err)
  return out.getvalue(), err.getvalue()


def expected(base, *conversations, params=None):
  """What the engine answers, text of each conversation."""
  folder, own, config, tokenizer = base
  template = templates.bind(tokenizer, "chatml")
  prompts = [
    tokenizer(template.render(messages, add_generation_prompt=True))["input_ids"]
    for messages in conversations
  ]
  stops = {*engine.stop_tokens(config, tokenizer, folder)}
  stops.add(tokenizer.convert_tokens_to_ids("<|im_end|>"))
  found = engine.generate(
    own if params is None else params,
    config,
    prompts,
    max_new_tokens=NEW,
    stop_tokens=tuple(stops),
  )
  return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in found.tokens]


def user(content):
  return dict(role="user", content=content)


def assistant(content):
  return dict(role="assistant", content=content)


def test_each_line_of_a_pipe_is_a_conversation_of_its_own(base):
  out, err = talk(base[0], lines="Hello there\n\nWhat is two?\r\n", template="chatml")
  first, second = expected(base, [user("Hello there")], [user("What is two?")])
  assert first != second
  assert (out, err) == (f"{first}\n{second}\n", "")


def test_an_answer_ends_with_a_stop_string_in_a_pipe_and_in_a_chat(base):
  """The first token at which it holds the string, behind so many; a string that cannot be is refused."""
  (free,) = expected(base, [user("Hello there")])
  tokenizer = base[3]
  used = use.load(str(base[0]), template="chatml")
  make = lambda **options: use.speaker(used, sampling=engine.GREEDY, max_new_tokens=NEW, **options)[
    0
  ]
  stop = free[len(free) // 2]
  (cut,) = make(stop_strings=(stop,)).answer([[user("Hello there")]], 0)
  assert stop in cut != free
  assert free.startswith(cut)
  assert "".join(make(stop_strings=(stop,)).stream([user("Hello there")], 0)) == cut
  ids = tokenizer(cut, add_special_tokens=False)["input_ids"]
  (later,) = make(stop_strings=(stop,), min_new_tokens=len(ids) + 1).answer(
    [[user("Hello there")]], 0
  )
  assert len(later) > len(cut)
  with pytest.raises(ValueError, match="cannot make the stop string"):
    make(stop_strings=("\ud800",))


def test_an_adapter_and_the_merged_model_say_the_same_and_the_base_does_not(
  base, adapter, tmp_path
):
  folder, _, config, tokenizer = base
  hf.save(tmp_path / "merged", adapter[1], config)
  tokenizer.save_pretrained(tmp_path / "merged")
  options = dict(lines="Hello there\n", template="chatml")
  with_adapter, _ = talk(folder, adapter[0], **options)
  assert with_adapter == talk(tmp_path / "merged", **options)[0]
  assert with_adapter == expected(base, [user("Hello there")], params=adapter[1])[0] + "\n"
  assert with_adapter != talk(folder, **options)[0]


def test_the_template_in_an_adapters_folder_comes_first(base, adapter):
  folder, written = adapter[0], adapter[0] / "chat_template.jinja"
  written.write_text(templates.CHATML)
  try:
    own, err = talk(base[0], folder, lines="Hello there\n")
  finally:
    written.unlink()
  assert own == talk(base[0], folder, lines="Hello there\n", template="chatml")[0]
  assert err == ""


def test_a_base_model_continues_text_and_says_so(base, caplog):
  folder, params, config, tokenizer = base
  with caplog.at_level("INFO"):
    out, _ = talk(folder, lines="Hello there\n")
  prompt = tokenizer("Hello there")["input_ids"]
  (tokens,) = engine.generate(
    params,
    config,
    [prompt],
    max_new_tokens=NEW,
    stop_tokens=engine.stop_tokens(config, tokenizer),
  ).tokens
  assert out == tokenizer.decode(tokens, skip_special_tokens=True) + "\n"
  assert "has no chat template: it continues each line as text" in caplog.text
  with pytest.raises(ValueError, match=r"a system message has no place; give a template: chatml"):
    talk(folder, lines="", system="Be brief")


def test_streamed_pieces_are_whole_characters(base):
  speaker, _ = ready(base[0], template="chatml", max_new_tokens=40)
  pieces = list(speaker.stream([user("Hello there")], 0))
  (whole,) = speaker.answer([[user("Hello there")]], 0)
  assert "".join(pieces) == whole
  assert len(pieces) > 5


def test_a_model_or_adapter_that_is_not_there(base, tmp_path):
  with pytest.raises(FileNotFoundError, match="no such folder"):
    talk(tmp_path / "nothing", lines="")
  with pytest.raises(FileNotFoundError):
    talk(base[0], tmp_path, lines="")


def test_a_prompt_that_leaves_less_room_is_answered_in_what_is_left_and_one_that_leaves_none_alone_fails(
  base, tmp_path
):
  folder, _, config, tokenizer = base
  longest = config.max_length - len(tokenizer("a"))
  lines = "a\n" + "b " * (longest // 2 - 8) + "\n" + "c " * 400 + "\nd\n"
  speaker, _ = ready(folder, max_new_tokens=100)
  out, err = io.StringIO(), io.StringIO()
  failed = answer_lines(speaker, stdin=io.StringIO(lines), stdout=out, stderr=err)
  assert failed == 1
  assert err.getvalue().startswith("line 3: the conversation has")
  prompts = [templates.opening(tokenizer, line) for line in lines.splitlines()]
  rooms = [config.max_length - len(prompt) for prompt in prompts]
  assert 0 < rooms[1] < 100 < rooms[0]
  answers = speaker.answer([[user(line)] for line in lines.splitlines()], 0)
  assert isinstance(answers[2], ValueError)
  (alone,) = speaker.answer([[user("d")]], 0)
  assert answers[3] == alone
  whole = engine.generate(
    speaker.params, config, [prompts[1]], max_new_tokens=rooms[1], stop_tokens=speaker.stop_tokens
  )
  assert answers[1] == speaker.text(whole.tokens[0])


def test_nothing_that_is_to_be_continued_ends_with_eos(base, tmp_path):
  """A tokenizer with `add_eos_token` ends every text."""
  folder, _, _, tokenizer = base
  tokenizer = ending(tokenizer)
  assert tokenizer("Hello")["input_ids"][-1] == tokenizer.eos_token_id
  speaker, _ = ready(folder)
  speaker = dataclasses.replace(speaker, tokenizer=tokenizer)
  assert speaker.tokens([user("Hello")]) == tokenizer("Hello")["input_ids"][:-1]


def ending(tokenizer):
  """The tokenizer with an EOS behind every text, as add_eos_token has it."""
  inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
  end = tokenizer.eos_token
  inner.post_processor = processors.TemplateProcessing(
    single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
  )
  return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end)


def test_a_template_renders_on_after_a_ctrl_c(base, monkeypatch):
  template = templates.bind(base[3], "chatml")
  jobs = [templates.job([user("one")], True)]
  (wanted,) = template.render_all(jobs)
  receive = template_sandbox._receive
  process = template.renderer._process
  assert os.getsid(process.pid) == process.pid  # a terminal's Ctrl-C does not reach it

  def interrupted(process):
    raise KeyboardInterrupt

  monkeypatch.setattr(template_sandbox, "_receive", interrupted)
  with pytest.raises(KeyboardInterrupt):
    template.render_all([templates.job([user("two")], True)])
  monkeypatch.setattr(template_sandbox, "_receive", receive)
  assert template.render_all(jobs) == [wanted]


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_line_that_is_not_utf8_leaves_the_others_answered(base, errors):
  lines = b"Hello there\ncaf\xe9\nWhat is two?\n"
  stdin = io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8", errors=errors)
  out, err = io.StringIO(), io.StringIO()
  speaker, _ = ready(base[0], template="chatml")
  assert answer_lines(speaker, stdin=stdin, stdout=out, stderr=err) == 1
  first, last = expected(base, [user("Hello there")], [user("What is two?")])
  assert out.getvalue() == f"{first}\n\n{last}\n"
  assert err.getvalue().startswith("line 2: byte 0xe9 at character 4 is not UTF-8; convert")
  with pytest.raises(ValueError, match="system message: byte 0xe9"):
    answer_lines(speaker, system="caf\udce9", stdin=io.StringIO("Hello"))


@pytest.mark.parametrize("writes", [False, None, True])
def test_a_reward_models_adapter_does_not_talk(base, adapter, writes, caplog):
  """Its head for text was never trained with what it changed below it."""
  used = use.load(str(base[0]), str(adapter[0]))
  config = dataclasses.replace(used.config, scores=1, writes=True)
  used = dataclasses.replace(
    used, config=config, manner=dataclasses.replace(used.manner, writes=writes)
  )
  if writes is False:
    with pytest.raises(ConfigError, match=r"is a reward model, .*eval --reward=DIR"):
      use.speaker(used, sampling=engine.GREEDY, max_new_tokens=NEW)
    return
  with caplog.at_level("WARNING"):
    used.check_writes()
  assert ("may be noise" in caplog.text) == (writes is None)
