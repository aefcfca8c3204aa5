"""Every field of a config as help shows it: its name, what the config holds, what it means and what it may be."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import ml_collections

from posttrain_jax.settings import fields

INDENT = 36  # where meanings begin
NARROWEST, WIDEST = 80, 120
CHANGE = """\
--config.NAME=value changes a field: --config.optimizer.lr=1e-4. A field that decides which others there are brings them
along: add --config.optimizer.name=galore to this command, or an argument after the config's colon, to see those."""


def fitting(width: int) -> int:
  """A width of lines that a terminal of this one shows."""
  return min(max(width, NARROWEST), WIDEST)


def text(config: ml_collections.ConfigDict, width: int) -> str:
  """The fields of a resolved config by section, in lines of 80 to 120 characters."""
  width = fitting(width)
  listed = sorted(fields.items(config.to_dict()), key=lambda item: _place(item[0]))
  lines: list[str] = []
  section = None
  for name, value in listed:
    if name.rpartition(".")[0] != section:
      section = name.rpartition(".")[0]
      lines += ["", f"{section or 'the run'}:"]
    lines += _lines(name, value, width)
  total = f"This config has {len(listed)} fields, with these values:"
  return "\n".join([total, *lines, "", *textwrap.wrap(CHANGE, width, break_on_hyphens=False)])


def _place(name: str) -> tuple[int, str, int]:
  """Where a field stands: as in the table, each adapter of several by itself."""
  table, section = list(fields.FIELDS), name.partition(".")[0]
  of_section = [i for i, field in enumerate(table) if field.partition(".")[0] == section]
  known = fields.known_as(name)
  place = table.index(known) if known in fields.FIELDS else len(table)
  first = 0 if section == name else of_section[0] if of_section else len(table)
  return first, name.rpartition(".")[0], place


def _lines(name: str, value: Any, width: int) -> Iterator[str]:
  start = f"  {name}={written(value)}"
  said = textwrap.wrap(meaning(name), width - INDENT, break_on_hyphens=False)
  if len(start) > INDENT - 2:
    yield from textwrap.wrap(start, width, drop_whitespace=False, break_on_hyphens=False)
  else:
    yield f"{start:<{INDENT}}{said.pop(0)}"
  for line in said:
    yield " " * INDENT + line


def meaning(name: str) -> str:
  """What a field means and may be, and where it is read.

  >>> meaning("optimizer.warmup")
  'share of steps in which the learning rate rises to its peak (a number of at least 0 and at most 1)'
  """
  field = fields.FIELDS.get(fields.known_as(name))
  if field is None:
    return "nothing reads such a field"
  when = "" if field.when is None else f"; read where {field.when[0]} is {field.when[2]}"
  return f"{field.meaning} ({field.domain.says}){when}"


def written(value: Any) -> str:
  """The value as it is written after `--config.NAME=`.

  >>> written(True), written("cosine"), written(""), written(2e-4), written(())
  ('true', 'cosine', "''", '0.0002', '()')
  """
  if isinstance(value, bool):
    return str(value).lower()
  plain = isinstance(value, str) and value and not any(c.isspace() for c in value)
  return value if plain else repr(value)
