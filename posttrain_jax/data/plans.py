"""Rows become texts: each with where in it what is trained begins and ends, or why there is none.

A conversation is rendered once for each trained turn, as it is asked for and as it is written, and what the template
leaves out of it is looked for.
"""

import functools
import itertools
import logging
from collections.abc import Sequence
from typing import Any

from posttrain_jax.data import conversation, lengths, said, schema, templates
from posttrain_jax.data import messages as messages_lib
from posttrain_jax.data.conversation import Turns
from posttrain_jax.data.errors import RowError
from posttrain_jax.data.schema import Row
from posttrain_jax.data.spans import Plan
from posttrain_jax.data.template_sandbox import MAX_CHARACTERS, TemplateError

log = logging.getLogger(__name__)

IN_STEPS = "in steps"  # rows whose answer is told apart into steps: `answers` makes them
SEPARATOR = "\n"  # after each step
MAX_RENDERED = 1_000_000  # messages, in all renderings of a row


class Planner:
  """The plans of rows of one data set; it remembers what the template drops of conversations of each shape."""

  def __init__(
    self,
    tokenizer: Any,
    template: Any,  # a Template; None where no row holds messages
    max_length: int,
    truncate: str,
    train_on: str | None,
  ):
    self.tokenizer, self.template = tokenizer, template
    self.max_length, self.truncate, self.train_on = max_length, truncate, train_on
    # by a template, of conversations of a shape
    self.dropped: dict[said.Shape, set[tuple[int, str]]] = {}
    self.unread: dict[str, str] = {}  # what the template does not read, and where the first was
    self.told: set[str] = set()
    self._ends: dict[str, tuple[int | None, str]] = {}

  def tell(self) -> None:
    """Says once what the template is given and does not write or read."""
    for what, origin in self.unread.items():
      if what not in self.told:
        log.warning("%s, which the template does not read (first: %s)", what, origin)
    self.told |= self.unread.keys()

  def plans(self, rows: Sequence[Row]) -> list[Plan | RowError]:
    parsed = [self._turns(row) for row in rows]
    jobs: list[dict] = []
    for row, turns in zip(rows, parsed):
      if isinstance(turns, Turns):
        if self.template is None:
          raise RowError("no template", row.origin, "the row holds messages: pass a chat template")
        jobs += turns.jobs()
    new = self._new_shapes(parsed)
    texts = iter(self.template.render_all(jobs + [job for job, _ in new.values()]) if jobs else [])
    rendered = [
      [next(texts) for _ in range(2 * len(turns.trained))] if isinstance(turns, Turns) else []
      for turns in parsed
    ]
    for key, (_, marks) in new.items():
      text = next(texts)
      # a template that asks more of the words than that they are words says nothing of them here
      self.dropped[key] = said.dropped(marks, text) if isinstance(text, str) else set()
    return [
      self._chat_plan(row, turns, some) if isinstance(turns, Turns) else turns
      for row, turns, some in zip(rows, parsed, rendered)
    ]

  def ending(self, has_tools: bool) -> tuple[int | None, str]:
    """(the token that ends a turn or None, how it is written)."""
    of = self.template.of(has_tools)
    if of.name not in self._ends:
      end = templates.end_of_turn(self.tokenizer, of)
      written = "" if end is None else self.tokenizer.convert_ids_to_tokens(end)
      self._ends[of.name] = end, written
    return self._ends[of.name]

  def _new_shapes(self, parsed):
    new: dict[said.Shape, tuple[dict, dict]] = {}
    for turns in parsed:
      if isinstance(turns, Turns) and turns.shape not in self.dropped and turns.shape not in new:
        messages, variables, marks = said.marked(turns.messages, turns.variables)
        new[turns.shape] = templates.job(messages, False, **variables), marks
    return new

  def _turns(self, row: Row) -> Turns | Plan | RowError:
    fields = row.fields
    if row.kind == "text":
      return Plan(fields["text"], ((0, len(fields["text"])),))
    if row.kind == "prompt_completion" and isinstance(fields["prompt"], str):
      prompt, text = fields["prompt"], fields["prompt"] + fields["completion"]
      return Plan(text, ((len(prompt), len(text)),))
    if row.kind == IN_STEPS:
      return _in_steps(fields["prompt"], fields["completions"])
    if row.kind == "prompt_completion":
      messages, first = fields["prompt"] + fields["completion"], len(fields["prompt"])
    elif row.kind == "messages":
      messages, first = fields["messages"], 0
    else:
      return RowError(
        "wrong schema",
        row.origin,
        f"{row.kind!r} rows cannot be fine-tuned on; that takes text, messages or prompt and completion (answers to"
        " compare are for configs/preference.py, kto.py, reward.py and grouped.py, or eval --workdir of their runs)",
      )
    return self._conversation(row, messages, first)

  def _conversation(self, row, messages, first):
    if self.truncate == "keep_start":
      messages = messages[: self.max_length]  # each has a token at least
    size = sum(len(message.get("content") or "") for message in messages)
    if size > MAX_CHARACTERS:
      detail = f"the conversation has {size:,} characters, more than {MAX_CHARACTERS:,}"
      return RowError("too long", row.origin, detail)
    if len(messages) > self.max_length:
      return too_long(
        *(row.origin, f"{len(messages):,} messages", len(messages), self.max_length, self.truncate),
        counted=False,
      )
    trained = tuple(
      at
      for at, message in enumerate(messages)
      if at >= first and message["role"] == "assistant" and message.get("weight", 1)
    )
    if not trained:
      return RowError(
        "nothing to train", row.origin, "no assistant's message is there to be trained"
      )
    if self.train_on == "last":
      trained = trained[-1:]
    if 2 * len(trained) * trained[-1] > MAX_RENDERED:
      return RowError(
        "too long",
        row.origin,
        f"{len(trained):,} messages to train of {trained[-1] + 1:,}, and the template is asked for each anew",
        "part the conversation into several rows, or train the last message only",
      )
    if trained[0] == 0:
      return RowError(
        "starts with the assistant",
        row.origin,
        "the first message is the assistant's, with no prompt",
      )
    variables = dict(row.fields.get(schema.TEMPLATE_VALUES, {}))
    if row.fields.get("tools"):
      variables["tools"] = row.fields["tools"]
    cited = row.fields.get("documents") or variables.pop("documents", None)
    if cited:
      try:
        variables["documents"] = messages_lib.documents(cited, row.origin)
      except RowError as error:
        return error
    # what follows the last trained message is seen by no trained token
    messages = messages[: trained[-1] + 1]
    if self.template is not None:
      ending = self.ending("tools" in variables)[1]
      messages = [conversation.without_ending(message, ending) for message in messages]
    for at, message in enumerate(messages):
      if at in trained and not (message.get("content", "").strip() or message.get("tool_calls")):
        what = f"{conversation.place(first, at)}, an assistant's message, is empty"
        return RowError("empty completion", row.origin, what)
    return Turns(messages, first, trained, variables, said.shape(messages, variables))

  def _chat_plan(self, row, turns, texts):
    for text in texts:
      if isinstance(text, TemplateError):
        return self._refused(row, turns, text)
    end, ending = self.ending("tools" in turns.variables)
    whole, spans = texts[-1], []
    if not whole.startswith(texts[-2]):
      opened = conversation.after_thoughts(texts[-2], whole, turns.messages[-1])
      if opened is None:
        return self._no_border(row, turns, texts[-2], whole)
      whole = texts[-1] = opened
    for index, prompt, text in zip(turns.trained, texts[0::2], texts[1::2]):
      shared = conversation.common(text, whole)
      stop = conversation.ended(text, len(prompt), shared, ending)
      if not (whole.startswith(prompt) and text.startswith(prompt)) or stop is None:
        advice = (
          'write --config.data.train_on=last (or give the others "weight": 0) to train the last turn only, or name'
          " another template"
          if self.train_on is not None
          else "an answer is to be one assistant's message, or name another template"
        )
        return RowError(
          "template without prefixes",
          row.origin,
          f"message {index} is rendered differently once others follow it, so template"
          f" {self.template.name!r} does not say which tokens the assistant wrote; {advice}",
        )
      spans.append((len(prompt), stop))
    self._note_unread(row, turns)
    lost = self._lost(turns, whole, spans)
    if lost is not None:
      return RowError("dropped by the template", row.origin, lost)
    return Plan(whole, tuple(spans), is_chat=True, end=end, ending=ending)

  def _note_unread(self, row, turns):
    """What need not be in the text, and is not."""
    dropped = self.dropped[turns.shape]
    for at, message in enumerate(turns.messages):
      if message.keys() <= {"role", "content"}:
        continue
      for key in said.unread(message):
        if not isinstance(message[key], str) or (at, key) in dropped:
          self.unread.setdefault(f"messages have {key!r}", row.origin)
    if turns.variables:
      known = self.template.of("tools" in turns.variables).renderer.variables
      for key in turns.variables.keys() - {"tools", "documents"} - known:
        self.unread.setdefault(f"{schema.TEMPLATE_VALUES} sets {key!r}", row.origin)

  def _refused(self, row, turns, error):
    calls = [at for at, message in enumerate(turns.messages) if message.get("tool_calls")]
    cure = ""
    if calls and self.template.of("tools" in turns.variables).call_form is None:
      cure = "; " + self._advice(turns, turns.where(calls[0], "tool_calls"), "tool_calls")
    return RowError("refused by the template", row.origin, f"the chat template says: {error}{cure}")

  def _no_border(self, row, turns, prompt, whole):
    rest = prompt[conversation.common(prompt, whole) :]
    return RowError(
      "template without prefixes",
      row.origin,
      f"template {self.template.name!r} begins an answer with {rest[-60:]!r} when it asks for one, and writes"
      f" {turns.where(turns.trained[-1])} without it, so what the assistant goes on from is never trained; name another"
      " template",
    )

  def _lost(self, turns, whole, spans):
    """What the row says and the text does not hold, in words; None for nothing."""
    template = self.template.of("tools" in turns.variables)
    span_of = dict(zip(turns.trained, spans))
    dropped = self.dropped[turns.shape]
    for at, message in enumerate(turns.messages):
      text, kept = whole, said.past(message)
      if at in span_of:
        start, stop = span_of[at]
        text, kept = whole[conversation.before_opening(whole, start) : stop], message
      for field in sorted(field for index, field in dropped if index == at):
        if field in said.unread(message):
          continue
        is_past = at not in span_of and template.writes_reasoning
        if field in said.REASONING and (is_past or said.holds(text, message[field])):
          continue
        return self._advice(turns, turns.where(at, field), field)
      field = said.missing(kept, text)
      if field is not None:
        return self._advice(turns, turns.where(at, field), field)
    if (-1, "tools") in dropped or not all(
      said.holds(whole, _name(tool)) for tool in turns.variables.get("tools", ())
    ):
      return self._advice(turns, "'tools'", "tools")
    for i, document in enumerate(turns.variables.get("documents", ())):
      for key, words in said.words(document).items():
        where = f"documents[{i}][{key!r}]"
        if (-1, where) in dropped or not said.holds(whole, words):
          return self._advice(turns, where, "documents")
    return None

  def _advice(self, turns, where, field):
    cure = "name another template with --config.model.template=FILE.jinja"
    if field not in ("content", "documents") and self.template.name != "chatml":
      if self.template.with_tools is not None and "tools" not in turns.variables:
        cure = "give the row its 'tools': rows that have them are rendered with the tokenizer's tool_use template"
      elif self._takes_chatml:
        cure = "name one that does with --config.model.template=chatml, or a .jinja file"
    return (
      f"template {self.template.of('tools' in turns.variables).name!r} does not write all of {where}, which would be"
      f" left out of what is trained; {cure}, or take the field out of the rows"
    )

  @functools.cached_property
  def _takes_chatml(self):
    return templates.fitting(self.tokenizer, "chatml")


def _name(tool):
  return (tool["function"] if isinstance(tool.get("function"), dict) else tool)["name"]


def _in_steps(prompt, steps):
  ends = list(
    itertools.accumulate((len(step) + len(SEPARATOR) for step in steps), initial=len(prompt))
  )
  return Plan(prompt + "".join(step + SEPARATOR for step in steps), tuple(itertools.pairwise(ends)))


def too_long(
  origin: str, what: str, tokens: int, limit: int, truncate: str, *, counted: bool = True
) -> lengths.TooLong:
  """A row that is too long, said in words."""
  cure = "raise --config.data.length, or write --config.data.truncate=keep_start or drop"
  if truncate in ("prompt", "whole"):
    cure = "raise --config.data.length, or write --config.data.truncate=drop"
  elif truncate == "split":
    cure = "only plain text can be split: write --config.data.truncate=keep_start or drop"
  return lengths.TooLong(
    origin, f"{what}, but a row has {limit} (data.length)", cure, tokens, counted=counted
  )
