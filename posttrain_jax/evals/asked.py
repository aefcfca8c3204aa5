"""The rows of a suite as a model is asked them: token ids, and which of them are scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain_jax.data import chat, questions, schema, templates
from posttrain_jax.data.errors import SHORTEN, RowError
from posttrain_jax.data.schema import Row
from posttrain_jax.evals import likelihood, suite
from posttrain_jax.evals.samples import Writer
from posttrain_jax.evals.suite import Part

Marked = tuple[list[int], list[bool]]  # tokens, and whether each is scored


@dataclasses.dataclass(frozen=True)
class Asked:
  """A part for one model.

  questions: as `data.questions` makes them, of answers and choices.
  prompts: their token ids.
  marked: of texts the rows that they go through the model in, of choices one for each, item by item.
  sizes: UTF-8 bytes of what is marked, as `marked`.
  """

  part: Part
  questions: Sequence[Mapping[str, Any]]
  prompts: Sequence[Sequence[int]]
  marked: Sequence[Sequence[Marked]]
  sizes: Sequence[Sequence[int]]

  def digest(self, tokenizer: Any) -> str:
    """Of the texts that the model is given, whatever its tokens are."""
    texts = [tokenizer.decode(list(prompt)) for prompt in self.prompts]
    texts += [tokenizer.decode(tokens) for rows in self.marked for tokens, _ in rows]
    return suite.digest(texts)


def of(part: Part, writer: Writer, longest: int) -> Asked:
  """The part as this model is asked it.

  Args:
    longest: tokens that the model reads.

  Raises:
    RowError: a row is too long, or holds messages and there is no template.
  """
  if part.kind == suite.TEXT:
    each = [_text(row, writer, longest) for row in part.rows]
    return Asked(part, (), (), [rows for rows, _ in each], [sizes for _, sizes in each])
  made = [_question(part, row, writer) for row in part.rows]
  prompts = questions.tokens(made, writer.tokenizer, writer.template)
  room = part.max_new_tokens if part.kind == suite.ANSWERS else 1
  for prompt, row in zip(prompts, part.rows):
    if len(prompt) + room > longest:
      said = f"its prompt has {len(prompt)} tokens, an answer {room}, and the model reads {longest}"
      raise RowError("too long", row.origin, said, SHORTEN)
  if part.kind == suite.ANSWERS:
    return Asked(part, made, prompts, (), ())
  each = [_choices(q, prompt, writer, longest) for q, prompt in zip(made, prompts)]
  return Asked(part, made, prompts, [rows for rows, _ in each], [sizes for _, sizes in each])


def _question(part: Part, row: Row, writer: Writer) -> dict[str, Any]:
  fields = dict(row.fields)
  if isinstance(fields.get("prompt"), str):
    fields["prompt"] = part.ask.replace("{prompt}", fields["prompt"])
  if writer.template is not None:
    fields = schema.as_chat(fields, row.origin, None)
  return questions.of(row._replace(fields=fields), writer.tokenizer)


def example(question: Mapping[str, Any]) -> dict[str, Any]:
  """What a verifier is given: the row's own columns, and the expected answer as `gold` where there is one."""
  row = dict(question["row"])
  if question["gold"] is not None:
    row["gold"] = question["gold"]
  return row


def _text(row: Row, writer: Writer, longest: int) -> tuple[list[Marked], list[int]]:
  """A text in windows; of a conversation, or of a prompt with its completion, what the assistant says."""
  if row.kind == "text":
    ids = writer.tokenizer(row.fields["text"], add_special_tokens=False)["input_ids"]
    cut = list(likelihood.windows(ids, likelihood.start_of(writer.tokenizer), longest))
    return cut, [len(row.fields["text"].encode())] + [0] * (len(cut) - 1)
  fields = row.fields
  if writer.template is not None:
    fields = schema.as_chat(fields, row.origin, None)
  made = chat.encode(
    row._replace(fields=fields), writer.tokenizer, writer.template, max_length=longest
  )
  said = writer.tokenizer.decode(made.tokens[made.mask].tolist(), skip_special_tokens=True)
  return [(made.tokens.tolist(), made.mask.tolist())], [max(1, len(said.encode()))]


def _choices(
  question: Mapping[str, Any], prompt: Sequence[int], writer: Writer, longest: int
) -> tuple[list[Marked], list[int]]:
  """A row for each choice behind the prompt."""
  choices = question["row"]["choices"]
  if isinstance(question["prompt"], str):
    texts = [likelihood.parts(writer.tokenizer, question["prompt"], _spaced(c)) for c in choices]
    bos = [writer.tokenizer.bos_token_id] if templates.adds_bos(writer.tokenizer) else []
    rows = [likelihood.continued([*bos, *ids], len(bos) + n, longest) for ids, n in texts]
  else:
    ids = [writer.tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in choices]
    rows = [likelihood.continued([*prompt, *some], len(prompt), longest) for some in ids]
  return rows, [len(choice.encode()) for choice in choices]


def _spaced(choice: str) -> str:
  """A choice as it goes on behind a prompt that is text."""
  return choice if choice[:1].isspace() else f" {choice}"
