"""Whether rows are in strings, which become turns behind a system message, or bring their messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain_jax.data import schema


def in_strings(rows: Sequence[schema.Row], where: str) -> bool:
  """True where every row is a prompt and its answers in strings, False where none is.

  Raises:
    ValueError: some are and others are not.
  """
  forms = {_in_strings(row.fields) for row in rows}
  if len(forms) > 1:
    raise ValueError(
      f"{where} holds rows in strings, which stand behind the system message of training, and rows that bring their"
      " messages; write them alike, or evaluate each kind apart"
    )
  return forms.pop()


def _in_strings(fields: Mapping[str, Any]) -> bool:
  is_steps = "completions" in fields and "scores" not in fields
  answers = any(name in fields for name in (*schema.ANSWERS, "completions"))
  return isinstance(fields.get("prompt"), str) and answers and not is_steps
