"""A suite: what a model is asked before and after training, as files that anybody can add to.

A suite is a folder with `suite.json` and files of rows beside it, JSONL or whatever `data.files` reads:

  {"name": "mine", "parts": [
    {"name": "prices", "kind": "answers", "rows": "prices.jsonl", "metric": "number", "tolerance": 0.05}]}

`docs/regress.md` has the fields of a part and the columns of its rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain_jax.core import files, words
from posttrain_jax.data import files as data_files
from posttrain_jax.data import held_out, schema
from posttrain_jax.data.errors import RowError
from posttrain_jax.data.schema import Row
from posttrain_jax.settings import ConfigError

TEXT, ANSWERS, CHOICE = KINDS = ("text", "answers", "choice")
FILE = "suite.json"
BUILT_IN = Path(__file__).parent / "suites"
OF_CHOICE = ("prompt", "choices", "answer")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # what choices are called where they bring no labels
STOPS = "stops"  # the metric that an answer came to its end
UNIT = {TEXT: "bits per byte", ANSWERS: "", CHOICE: ""}
TOLERANCE = {TEXT: 0.02, ANSWERS: 0.05, CHOICE: 0.05}  # where a part says none


@dataclasses.dataclass(frozen=True)
class Part:
  """Rows that are measured in one way, with one verdict.

  kind: `text` (bits per byte), `answers` (greedy ones, scored by `metric`), or `choice` (the likeliest of several).
  rows: checked, of `data.schema`; those of a choice are prompt and right choice, with `choices` in `raw`.
  metric: of answers: a verifier's name, or the fields of a config's section reward; STOPS: whether they end.
  tolerance: the drop that was agreed to be no drop: a share of items, of text bits per byte.
  every: each item has to be right that was right before, as of canaries; nothing is estimated.
  ask: the prompt, with {prompt} where the row's stands.
  samples: answers to each row, drawn at `temperature`; pass_at: the ks of which pass@k is told.
  trained: it is what was trained for: a gain is told beside what the others paid, and it is no part of the verdict.
  """

  name: str
  kind: str
  rows: tuple[Row, ...]
  metric: str | Mapping[str, Any] = ""
  tolerance: float = 0.0
  every: bool = False
  ask: str = "{prompt}"
  max_new_tokens: int = 64
  samples: int = 1
  temperature: float = 0.0
  pass_at: tuple[int, ...] = ()
  trained: bool = False

  @property
  def digest(self) -> str:
    """Of everything that its results depend on, beside the model."""
    how = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    how["rows"] = [[row.fields, row.raw] for row in self.rows]
    return digest({k: v for k, v in how.items() if k not in ("tolerance", "every", "trained")})

  @property
  def ids(self) -> list[str]:
    """A name of each item: its row's `id`, or the file and line."""
    return [_said(row, "id", Path(row.origin).name) for row in self.rows]

  @property
  def groups(self) -> list[str]:
    """What each item has in common with others: its row's `group`, or nothing."""
    return [_said(row, "group", f"item {i}") for i, row in enumerate(self.rows)]


def _said(row: Row, column: str, otherwise: str) -> str:
  """What a row has in a column; tables have null in those of other rows."""
  value = row.raw.get(column)
  return otherwise if value is None else str(value)


@dataclasses.dataclass(frozen=True)
class Suite:
  """parts: of unequal names, in order."""

  name: str
  parts: tuple[Part, ...]

  def __post_init__(self):
    names = [part.name for part in self.parts]
    if twice := [name for name in names if names.count(name) > 1]:
      raise ConfigError(f"the suite {self.name} has two parts named {twice[0]}: name them apart")
    if not names:
      raise ConfigError(f"the suite {self.name} has no parts: nothing would be measured")

  def with_parts(self, more: Sequence[Part]) -> Suite:
    return dataclasses.replace(self, parts=(*self.parts, *more))


def digest(value: Any) -> str:
  """A name for a value of JSON."""
  text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
  return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()


def load(names: str, *, limit: int = 0) -> Suite:
  """The suites of a list with commas, as one.

  A name is a built-in suite, a folder with suite.json, that file, or FORM:FILE with a form of `FORMS`: text, choice,
  gsm8k, humaneval.

  Args:
    limit: so many rows of each part, drawn; 0 for all.

  Raises:
    ConfigError: there is no such suite, or a field of it is none; named with the file.
    RowError: a row cannot be used; named with file and line.
  """
  if limit < 0:
    raise ConfigError(f"--limit={limit}: rows of each part, or 0 for all")
  each = [_named(name.strip()) for name in names.split(",") if name.strip()]
  if not each:
    raise ConfigError(f"--suite={names!r}: name a suite: {', '.join(built_in())}, or a folder")
  parts = tuple(part for one in each for part in one.parts)
  if limit:
    fewer = lambda part: tuple(held_out.limited(part.rows, limit, seed=0))
    parts = tuple(dataclasses.replace(part, rows=fewer(part)) for part in parts)
  return Suite(",".join(one.name for one in each), parts)


def built_in() -> list[str]:
  return sorted(path.parent.name for path in BUILT_IN.glob(f"*/{FILE}"))


def _named(name: str) -> Suite:
  form, colon, file = name.partition(":")
  if colon and form in FORMS:
    described = {**FORMS[form], "name": form, "rows": file}
    return Suite(form, (_part(described, Path(), f"--suite={name}"),))
  inside, path = BUILT_IN / name / FILE, Path(name).expanduser()
  home = inside if name in built_in() else path / FILE if path.is_dir() else path
  if not home.is_file():
    forms = ", ".join(f"{form}:FILE" for form in FORMS)
    raise ConfigError(
      f"{name}: there is no {home if path.is_dir() else 'such suite'}; write"
      f" {' or '.join(built_in())}, a folder with {FILE}, or {forms}"
    )
  return _read(home)


def _read(home: Path) -> Suite:
  written = files.read_json(home)
  _check_fields(written, ("name", "parts", "about"), str(home))
  parts = written.get("parts")
  if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
    raise ConfigError(f"{home}: parts={words.shown(parts, 60)}: write a list of objects")
  return Suite(
    str(written.get("name", home.parent.name)),
    tuple(_part(part, home.parent, f"{home}: part {i}") for i, part in enumerate(parts, 1)),
  )


def _check_fields(written: Mapping[str, Any], known: Sequence[str], where: str) -> None:
  if unknown := [name for name in written if name not in known]:
    raise ConfigError(f"{where}: there is no field {unknown[0]!r}; there are {', '.join(known)}")


_IS_NAME = ("a text", lambda value: isinstance(value, str) and bool(value.strip()))
_IS_COLUMNS = lambda value: (
  isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))
)
_IS_TRUE = ("true or false", lambda value: isinstance(value, bool))
_is_count = lambda low: (f"a whole number from {low}", lambda v: type(v) is int and v >= low)
_is_number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
_SHAPES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
  "name": _IS_NAME,
  "kind": (f"one of {', '.join(KINDS)}", lambda value: value in KINDS),
  "rows": _IS_NAME,
  "metric": ("a verifier's name, or an object", lambda v: isinstance(v, Mapping) or _IS_NAME[1](v)),
  "tolerance": ("a number from 0", lambda v: _is_number(v) and 0 <= v < math.inf),
  "every": _IS_TRUE,
  "trained": _IS_TRUE,
  "ask": ("a text with {prompt} in it", lambda v: isinstance(v, str) and "{prompt}" in v),
  "max_new_tokens": _is_count(1),
  "samples": _is_count(1),
  "temperature": ("a number from 0", lambda v: _is_number(v) and 0 <= v < math.inf),
  "pass_at": (
    "a list of whole numbers from 1",
    lambda v: isinstance(v, list | tuple) and all(type(k) is int and k >= 1 for k in v),
  ),
  "columns": (
    "an object of parts and the columns that they stand in",
    lambda v: isinstance(v, Mapping) and all(map(_IS_COLUMNS, v.values())),
  ),
  "limit": _is_count(1),
}
_OF_ANSWERS = ("metric", "max_new_tokens", "samples", "temperature", "pass_at", "every")


def _part(written: Mapping[str, Any], folder: Path, where: str) -> Part:
  """A part as a suite describes it, its rows read and checked."""
  _check_fields(written, tuple(_SHAPES), where)
  for name, value in written.items():
    what, fits = _SHAPES[name]
    if not fits(value):
      raise ConfigError(f"{where}: {name}={words.shown(value, 60)}: it is {what}")
  if absent := [name for name in ("name", "kind", "rows") if name not in written]:
    raise ConfigError(f"{where} has no {' and no '.join(absent)}")
  kind, where = written["kind"], f"{where} ({written['name']})"
  fields = {name: value for name, value in written.items() if name not in ("columns", "limit")}
  if kind == ANSWERS and "metric" not in written:
    raise ConfigError(f"{where}: answers need a metric, as number, exact, contained, python")
  if kind != ANSWERS and (useless := [name for name in _OF_ANSWERS if name in written]):
    raise ConfigError(f"{where}: {useless[0]} is of answers, and the kind is {kind}: leave it out")
  rows = _rows(folder, written, kind, where)
  made: dict[str, Any] = {"tolerance": TOLERANCE[kind], **fields, "rows": rows}
  made["pass_at"] = tuple(written.get("pass_at", ()))
  part = Part(**made)
  if part.samples > 1 and part.temperature == 0:
    raise ConfigError(f"{where}: {part.samples} samples at temperature 0 are one: raise it")
  if part.pass_at and max(part.pass_at) > part.samples:
    raise ConfigError(f"{where}: pass@{max(part.pass_at)} of {part.samples} samples: draw more")
  if part.every and part.temperature:
    raise ConfigError(
      f"{where}: every item is to stay right, so answers are not drawn: leave temperature out"
    )
  return part


def _rows(folder: Path, written: Mapping[str, Any], kind: str, where: str) -> tuple[Row, ...]:
  path = folder / os.path.expandvars(Path(written["rows"]).expanduser())
  columns = written.get("columns") or None
  if kind == CHOICE:
    rows = tuple(_choices(path, columns or {}))
  else:
    kinds = ("text", "messages", "prompt_completion")
    kinds = kinds if kind == TEXT else ("prompt", "prompt_completion", "messages")
    rows = schema.read(path, columns=columns, kinds=kinds).rows
    for row in rows:
      if row.kind not in kinds:
        raise RowError(
          "another kind", row.origin, f"{where} takes {', '.join(kinds)}, found {row.kind}"
        )
      if kind == ANSWERS and not str(row.fields.get("prompt", row)).strip():
        raise RowError("no prompt", row.origin, "'prompt' is empty; there is nothing to answer")
  _check_ids(rows)
  limit = written.get("limit", 0)
  return tuple(held_out.limited(rows, limit, seed=0)) if limit else rows


def _check_ids(rows: Sequence[Row]) -> None:
  seen: dict[str, str] = {}
  for row in rows:
    name = _said(row, "id", row.origin)
    if name in seen:
      raise RowError(
        "an id twice", row.origin, f"id {name!r} is that of {seen[name]}, too", "name it apart"
      )
    seen[name] = row.origin


def _choices(path: Path, columns: Mapping[str, str]) -> Sequence[Row]:
  """Rows {"prompt", "choices": [TEXT, ...], "answer": place from 0, letter from A, or the text}."""
  of = lambda name: columns.get(name, name)
  if odd := [name for name, at in columns.items() if name not in OF_CHOICE or at != str(at)]:
    raise ConfigError(
      f"{path}: columns has {odd[0]!r}: choices have {', '.join(OF_CHOICE)}, each in one column"
    )
  rows = []
  for origin, raw in data_files.raw_rows(path, "test"):
    if isinstance(raw, RowError):
      raise raw
    if not isinstance(raw, Mapping):
      raise RowError("no object", origin, f"expected an object, found {words.shown(raw, 40)}")
    prompt, choices, answer = (raw.get(of(name)) for name in OF_CHOICE)
    labels: Any = LETTERS
    if isinstance(choices, Mapping):  # as ARC has them, which calls some 1 to 4
      labels, choices = choices.get("label"), choices.get("text")
      labels = labels if isinstance(labels, list) else LETTERS
    if not isinstance(prompt, str) or not prompt.strip():
      raise RowError("no prompt", origin, f"{of('prompt')}={words.shown(prompt, 40)}: write a text")
    is_list = isinstance(choices, list) and all(isinstance(c, str) and c.strip() for c in choices)
    # white space before one is that behind the prompt
    if not is_list or not len({choice.strip() for choice in choices}) == len(choices) > 1:
      raise RowError(
        "no choices",
        origin,
        f"{of('choices')}={words.shown(choices, 60)}: write a list of unequal texts",
      )
    places = _places(answer, choices, labels)
    if len(places) > 1:
      text, label = sorted(places, key=lambda place: choices[place] != answer)
      raise RowError(
        "two answers",
        origin,
        f"{of('answer')}={words.shown(answer, 40)} is the text of choice {text} and the label of choice {label}",
        "write the place of the right choice from 0",
      )
    if not places:
      raise RowError(
        "no answer",
        origin,
        f"{of('answer')}={words.shown(answer, 40)}: write the place of the right choice from 0 to {len(choices) - 1},"
        " its letter, or its text",
      )
    (place,) = places
    fields = {"prompt": prompt, "completion": choices[place]}
    rows.append(
      Row(fields, origin, "prompt_completion", {**raw, "choices": choices, "answer": place})
    )
  if not rows:
    raise ConfigError(f"{path} holds no rows")
  return rows


def _places(answer: Any, choices: Sequence[str], labels: Sequence[Any]) -> set[int]:
  """Where the right choice may be: by its place from 0, else by its text and by its label."""
  if type(answer) is int:
    return {answer} if 0 <= answer < len(choices) else set()
  if not isinstance(answer, str):
    return set()
  named = [at for at, (_, label) in enumerate(zip(choices, labels)) if label == answer]
  return {*named[:1], *(at for at, choice in enumerate(choices) if choice == answer)}


# how data that many people have is asked: --suite=gsm8k:FILE
FORMS: Mapping[str, Mapping[str, Any]] = {
  "text": {"kind": TEXT},
  "choice": {"kind": CHOICE},
  "gsm8k": {
    "kind": ANSWERS,
    "metric": "number",
    "columns": {"prompt": "question", "completion": "answer"},
    "max_new_tokens": 256,
    "tolerance": 0.02,
  },
  "humaneval": {
    "kind": ANSWERS,
    "metric": "python",
    "columns": {"prompt": "prompt"},
    "ask": "Complete this Python function.\n\n```python\n{prompt}```",
    "max_new_tokens": 384,
    "tolerance": 0.02,
  },
}
