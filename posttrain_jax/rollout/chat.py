"""Talk to a base model, an adapter or a merged model, from a terminal or line by line from a file."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import jax

from posttrain_jax import adapters
from posttrain_jax.adapters import peft_format
from posttrain_jax.data import chat as conversations
from posttrain_jax.data import templates
from posttrain_jax.models import before, fetch, hf, rotary
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.rollout import engine
from posttrain_jax.rollout.sampling import Sampling

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C cuts an answer short"


@dataclasses.dataclass(frozen=True)
class Speaker:
  """A model with all that turns a conversation into its next turn."""

  params: engine.Ready
  config: ModelConfig
  tokenizer: Any
  template: templates.Template | None  # None: a base model, which continues text
  stop_tokens: tuple[int, ...]
  sampling: Sampling
  max_new_tokens: int

  def tokens(self, messages: list[dict]) -> list[int]:
    """The prompt; without a template the last message's text, as it is."""
    if self.template is None:
      return self.tokenizer(messages[-1]["content"])["input_ids"]
    text = self.template.render(messages, add_generation_prompt=True)
    return self.tokenizer(text, add_special_tokens=False)["input_ids"]

  def text(self, tokens: list[int]) -> str:
    return self.tokenizer.decode(
      tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )

  def stream(self, messages: list[dict], key: Any) -> Iterator[str]:
    """The next turn in pieces, each of whole characters."""
    prompt = self.tokens(messages)
    taken = before.slots(self.params.stacked)
    room = self.config.max_length - taken - len(prompt)
    if room < 1:
      raise ValueError(
        f"the conversation has {len(prompt)} tokens, the model {self.config.max_length - taken} positions; "
        "/reset starts anew"
      )
    drawn: list[int] = []
    shown = ""
    most = min(room, self.max_new_tokens)
    for token in engine.stream(
      self.params, self.config, prompt, max_new_tokens=most, **self.how(key)
    ):
      drawn.append(token)
      text = self.text(drawn)
      if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may take several tokens
        yield text[len(shown) :]
        shown = text
    yield self.text(drawn)[len(shown) :]

  def answer(self, conversations: Iterable[list[dict]], key: Any) -> list[str]:
    """The next turn of each conversation, in batches."""
    prompts = [self.tokens(messages) for messages in conversations]
    generation = engine.generate(
      self.params, self.config, prompts, max_new_tokens=self.max_new_tokens, **self.how(key)
    )
    return [self.text(tokens) for tokens in generation.tokens]

  def how(self, key: Any) -> dict:
    return dict(sampling=self.sampling, stop_tokens=self.stop_tokens, key=key)


def chat(
  model: str | Path,
  adapter: str | Path | None = None,
  *,
  system: str | None = None,
  template: str | None = None,
  max_new_tokens: int = 256,
  temperature: float = 0.0,
  top_k: int = 0,
  top_p: float = 1.0,
  seed: int = 0,
  stdin: TextIO | None = None,
  stdout: TextIO | None = None,
  stderr: TextIO | None = None,
) -> None:
  """A conversation where stdin is a terminal; else each line of it is a prompt of its own, answered in order.

  An answer is printed as it is, its own line breaks included, with a line break behind it; empty lines are skipped.

  Args:
    model: a folder, a hub name, or a built-in model.
    adapter: a folder in PEFT's format.
    system: the system message; needs a template.
    template: the name of a chat template; default the adapter's own, then the tokenizer's.  A model with neither
      continues each line as plain text, which is said on stderr.
  """
  stdin, stdout, stderr = stdin or sys.stdin, stdout or sys.stdout, stderr or sys.stderr
  sampling = Sampling(temperature, top_k, top_p)
  speaker = load(
    model, adapter, template=template, sampling=sampling, max_new_tokens=max_new_tokens
  )
  if speaker.template is None:
    if system is not None:
      raise ValueError(
        f"{model} has no chat template, so a system message has no place; "
        f"give a template: {', '.join(templates.NAMED)}"
      )
    print(f"{model} has no chat template: it continues each line as text", file=stderr)
  opening = [] if system is None else [dict(role="system", content=system)]
  key = jax.random.key(seed)
  if stdin.isatty():
    _converse(speaker, opening, key, stdin, stdout, stderr)
    return
  prompts = [line.rstrip("\r\n") for line in stdin if line.strip()]
  for answer in speaker.answer(([*opening, _user(prompt)] for prompt in prompts), key):
    print(answer, file=stdout, flush=True)


def load(
  model: str | Path,
  adapter: str | Path | None = None,
  *,
  template: str | None = None,
  sampling: Sampling,
  max_new_tokens: int,
) -> Speaker:
  """The model of a folder, an adapter merged into it; the tokenizer and template of the adapter's folder come first."""
  folder = fetch.resolve(model)
  params, config = hf.load(folder)
  home = folder
  if adapter is not None:
    node, adapter_config = peft_format.load(adapter, params, config)
    config = rotary.stretched(config, adapter_config.context_length)
    # once, here: fewer products at every step; a soft prompt or prefix has no weight and stays bound
    params = adapters.merge(params, node)
    template_file = Path(adapter) / "chat_template.jinja"
    template = str(template_file) if template is None and template_file.exists() else template
    home = Path(adapter) if (Path(adapter) / "tokenizer.json").exists() else folder
  tokenizer = conversations.load_tokenizer(home)
  has_template = template is not None or tokenizer.chat_template is not None
  spoken = templates.bind(tokenizer, template) if has_template else None
  stops = set(engine.stop_tokens(config, tokenizer, folder))
  if spoken is not None and (end := templates.end_of_turn(tokenizer, spoken)) is not None:
    stops.add(end)
  return Speaker(
    params=engine.prepare(params, config),
    config=config,
    tokenizer=tokenizer,
    template=spoken,
    stop_tokens=tuple(sorted(stops)),
    sampling=sampling,
    max_new_tokens=max_new_tokens,
  )


def _converse(
  speaker: Speaker,
  opening: list[dict],
  key: jax.Array,
  stdin: TextIO,
  stdout: TextIO,
  stderr: TextIO,
) -> None:
  print(HELP, file=stderr)
  messages = opening
  for turn in itertools.count():
    line = _ask(stdin, stdout)
    if not line or line.strip() == "/exit":
      return
    if line.strip() == "/reset":
      messages = opening
    elif line.strip():
      asked = [*messages, _user(line.rstrip("\r\n"))]
      try:
        said = _say(speaker, asked, jax.random.fold_in(key, turn), stdout)
        messages = [*asked, dict(role="assistant", content=said)]
      except ValueError as error:
        # too long, or not what the template takes: the turn did not happen
        print(error, file=stderr)


def _ask(stdin: TextIO, stdout: TextIO) -> str:
  """The next line, '' at the end of input or at Ctrl-C."""
  stdout.write("> ")
  stdout.flush()
  try:
    return stdin.readline()
  except KeyboardInterrupt:
    return ""


def _say(speaker: Speaker, messages: list[dict], key: jax.Array, stdout: TextIO) -> str:
  said = ""
  with contextlib.suppress(KeyboardInterrupt):
    for piece in speaker.stream(messages, key):
      said += piece
      stdout.write(piece)
      stdout.flush()
  stdout.write("\n")
  return said


def _user(content: str) -> dict:
  return dict(role="user", content=content)
