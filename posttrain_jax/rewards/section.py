"""Rewards as a section of a config describes them: names, weights, options."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from posttrain_jax.core import words
from posttrain_jax.rewards import named, score, trl
from posttrain_jax.rewards.judge import Judge
from posttrain_jax.rewards.reward import Part, Reward
from posttrain_jax.rewards.table import STOPPING, UNSAFE, VERIFIERS, BuiltIn
from posttrain_jax.rewards.verifier import Answer, Batch, Known, Prompt, Tried, Verifier
from posttrain_jax.rewards.workers import SECONDS, Apart, Workers
from posttrain_jax.settings import ConfigError

# Names that data sets give to the column of the expected answer; `gold` is the one that our own rows have.
EXPECTED = ("gold", "answer", "solution", "ground_truth", "target")


def expected(row: Mapping[str, Any]) -> str:
  """The right answer by the row, "" where no column has it.

  >>> expected({"question": "1 + 1", "answer": 2})
  '2'
  """
  return next((str(row[name]) for name in EXPECTED if row.get(name) is not None), "")


def reference(prompt: Prompt, row: Mapping[str, Any], tokenizer: Any) -> Answer:
  """The row's own right answer as a model would have given it, with its token ids."""
  text = expected(row)
  return Answer(prompt, text, row, tokenizer(text, add_special_tokens=False)["input_ids"])


def make(
  spec: Mapping[str, Any],
  columns: Collection[str],
  *,
  partly: Mapping[str, str] = types.MappingProxyType({}),
  given: Mapping[str, Verifier | Batch] | None = None,
  workers: Workers | None = None,
) -> Reward:
  """The reward that a config's section describes.

  >>> reward = make({"parts": ("number",), "gates": ("tags",)}, ["question", "answer"])
  >>> [(part.name, part.gate) for part in reward.parts]
  [('number', False), ('tags', True)]

  Args:
    spec: parts: names of verifiers, a list or a text with commas, `FILE.py:name` for one's own, which is called by
      its title (`named.titles`) in other fields, too; weights: one each, 1 where there are none; gates: names of those
      that multiply; options: {name: the verifier's options}; ranges: {name: (low, high)}; untested: names of those
      that do not ask whether an answer is right (`selftest`); seconds: the deadline of a call in a worker, None: each
      verifier's own; unsafe_code: programs that the model wrote are run where nothing isolates them; retries: how
      often a missing score is asked for again.
    columns: that the rows have.
    partly: {column that some rows have and not all: the first row without it}.
    given: verifiers that the caller made, by the names that parts give them, as a reward model.
    workers: the processes that verifiers run in; None: as many as there are cores.

  Raises:
    ConfigError: there is no such verifier or option, or the rows do not have what one reads.
  """
  asked = _read(spec)
  room = _Room(columns, partly, given or {}, workers)
  try:
    return Reward([room.part(asked, name) for name in asked.names], retries=asked.retries)
  except ConfigError:
    raise
  except ValueError as error:
    raise ConfigError(f"reward: {str(error).removeprefix('reward: ')}") from error


@dataclasses.dataclass(frozen=True)
class _Spec:
  """The section, field by field."""

  parts: tuple[str, ...] = ()
  weights: tuple[float, ...] = ()
  gates: tuple[str, ...] = ()
  options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  ranges: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
  untested: tuple[str, ...] = ()
  seconds: float | None = None
  retries: int = 1
  unsafe_code: bool = False

  @property
  def names(self) -> tuple[str, ...]:
    return (*self.parts, *self.gates)

  @property
  def titles(self) -> Mapping[str, str]:
    return named.titles(self.names)

  def weight(self, name: str) -> float:
    weights = self.weights or (1.0,) * len(self.parts)
    return 1.0 if name in self.gates else float(weights[self.parts.index(name)])


def check(spec: Mapping[str, Any]) -> None:
  """Raises ConfigError where a field is none of the section, or its value is of another kind."""
  fields = [field.name for field in dataclasses.fields(_Spec)]
  unknown = [key for key in spec if key not in fields]
  if unknown:
    raise ConfigError(f"reward.{unknown[0]}: there is no such field; there are {', '.join(fields)}")
  for field, value in spec.items():
    what, is_one = SHAPES[field]
    if not is_one(value):
      raise ConfigError(f"reward.{field}={words.shown(value)}: it is {what}")


def _read(spec: Mapping[str, Any]) -> _Spec:
  check(spec)
  lists = {key: names(spec[key]) for key in ("parts", "gates", "untested") if key in spec}
  values: dict[str, Any] = {**spec, **lists}
  asked = _Spec(**values)
  if len(asked.weights) not in (0, len(asked.parts)):
    raise ConfigError(
      f"reward.weights={words.shown(tuple(asked.weights))}: there {_are(len(asked.parts), 'part')}"
      f" ({', '.join(asked.parts)}); write one weight for each, or none for 1 each"
    )
  twice = [name for name in asked.parts if asked.parts.count(name) > 1]
  if twice:
    raise ConfigError(
      f"reward.parts: {twice[0]!r} is there twice; name it once, with reward.weights for how much each part counts"
    )
  both = [name for name in asked.gates if name in asked.parts]
  if both:
    raise ConfigError(
      f"reward.gates: {both[0]!r} is a part, too; a gate multiplies the sum and is not in it, so name it in one of them"
    )
  written = {title: name for name, title in asked.titles.items()} | {n: n for n in asked.names}
  named_there = {"options": asked.options, "ranges": asked.ranges, "untested": asked.untested}
  for field, there in named_there.items():
    for name in there:
      if name not in written:
        raise ConfigError(
          f"reward.{field}: {name!r} is neither a part nor a gate of this reward{_those(asked)}"
        )
  return dataclasses.replace(
    asked,
    options={written[name]: value for name, value in asked.options.items()},
    ranges={written[name]: value for name, value in asked.ranges.items()},
    untested=tuple(written[name] for name in asked.untested),
  )


def _those(asked: _Spec) -> str:
  """What a reward has, for who named something else."""
  titles = asked.titles
  parts = ", ".join(titles[name] for name in asked.parts) or "none"
  gates = ", ".join(titles[name] for name in asked.gates)
  return f"; its parts are {parts}{f', and its gates {gates}' if gates else ''}"


def _are(count: int, what: str) -> str:
  """
  >>> _are(1, "part"), _are(2, "part")
  ('is 1 part', 'are 2 parts')
  """
  return f"is {count} {what}" if count == 1 else f"are {count or 'no'} {what}s"


def _is_list(value: Any, kind: Any) -> bool:
  return isinstance(value, list | tuple) and all(_is_a(one, kind) for one in value)


def _is_a(value: Any, kind: Any) -> bool:
  """Whether the value is of a kind as annotations write it: a type, a union, a sequence or mapping of others."""
  outer, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
  if outer in (types.UnionType, typing.Union):
    return any(_is_a(value, one) for one in inner)
  if outer is float:
    return _is_number(value)
  if outer is int:
    return isinstance(value, int) and not isinstance(value, bool)
  if outer in (tuple, Sequence):
    return _is_list(value, inner[0])
  if outer is Mapping:
    return isinstance(value, Mapping | ConfigDict)
  return outer is Any or isinstance(value, outer)


def _are_names(value: Any) -> bool:
  return isinstance(value, str) or _is_list(value, str)


def _is_number(value: Any) -> bool:
  """Whether it is a float, or an integer that one holds."""
  return isinstance(value, float) or (_is_a(value, int) and abs(value) <= sys.float_info.max)


def _are_options(value: Any) -> bool:
  return isinstance(value, Mapping | ConfigDict) and all(
    isinstance(one, Mapping | ConfigDict) for one in value.values()
  )


def _are_ranges(value: Any) -> bool:
  return isinstance(value, Mapping | ConfigDict) and all(
    _is_list(one, float) and len(one) == 2 and one[0] < one[1] for one in value.values()
  )


KINDS = {
  str: "a text",
  float: "a number",
  int: "a whole number",
  bool: "true or false",
  tuple: "a list",
  Sequence: "a list",
  Mapping: "an object",
  type(None): "None",
}
NAMES = ("a list of names, or a text with commas", _are_names)
SHAPES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
  "parts": NAMES,
  "weights": ("a list of numbers, one a part", lambda value: _is_list(value, float)),
  "gates": NAMES,
  "options": ("{name: {option: value}}", _are_options),
  "ranges": ("{name: (low, high)}, the low end below the high one", _are_ranges),
  "untested": NAMES,
  "seconds": (
    "a number of seconds above 0, or None",
    lambda value: value is None or (_is_number(value) and value > 0),
  ),
  "retries": ("a count from 0", lambda value: _is_a(value, int) and value in range(1000)),
  "unsafe_code": ("true or false", lambda value: isinstance(value, bool)),
}


def _in_words(kind: Any) -> str:
  """A kind for the person at the prompt.

  >>> _in_words(str | Sequence[str])
  'a text or a list'
  """
  outer = typing.get_origin(kind) or kind
  if outer in (types.UnionType, typing.Union):
    return " or ".join(_in_words(one) for one in typing.get_args(kind))
  return KINDS.get(outer, "a value of another kind")


def names(value: str | Sequence[str]) -> tuple[str, ...]:
  """The names of a list, or of a text with commas."""
  listed = value.split(",") if isinstance(value, str) else value
  return tuple(name.strip() for name in listed if name.strip())


def _said_by(verifier: Verifier | Batch) -> tuple[float, float]:
  """The range that a function's annotation says: what returns `bool` gives 0 or 1."""
  function: Any = verifier
  if isinstance(verifier, Apart):
    function = verifier.verifier
  elif isinstance(verifier, trl.Function):
    function = verifier.function
  if not callable(function):
    return score.ANY
  annotation = inspect.signature(function).return_annotation
  is_true_or_false = annotation is bool or str(annotation) in ("bool", "list[bool]")
  return (0.0, 1.0) if is_true_or_false else score.ANY


class _Room:
  """What all parts of a reward are made with."""

  def __init__(
    self,
    columns: Collection[str],
    partly: Mapping[str, str],
    given: Mapping[str, Verifier | Batch],
    workers: Workers | None,
  ):
    self.columns, self.partly, self.given = columns, partly, given
    self._workers = workers

  @property
  def workers(self) -> Workers:
    if self._workers is None:
      self._workers = Workers()  # its processes start when they are called
    return self._workers

  def part(self, asked: _Spec, name: str) -> Part:
    built_in = None if name in self.given else VERIFIERS.get(name)
    options = dict(asked.options.get(name, {}))
    known: tuple[Known, ...] = ()
    if built_in is not None:
      verifier, known = self._built_in(name, built_in, options, asked)
    elif options:
      raise ConfigError(f"reward.options: {name} takes none here")
    else:
      verifier = self.given[name] if name in self.given else self._own(name, asked.seconds)
    own = score.ANY if built_in is None else built_in.range
    if built_in is None and name not in self.given:
      own = _said_by(verifier)
    low, high = asked.ranges.get(name) or own
    if built_in is not None and own not in (score.ANY, (low, high)):
      raise ConfigError(
        f"reward.ranges: the scores of {name} lie within {own[0]:g} and {own[1]:g}, and ({low:g}, {high:g}) is another"
        " range; leave it out, it is for functions of yours"
      )
    if name in asked.gates and isinstance(verifier, Judge) and (low, high) == score.ANY:
      low, high = verifier.low, verifier.high
    return Part(
      asked.titles[name],
      verifier,
      asked.weight(name),
      name in asked.gates,
      (float(low), float(high)),
      known,
      name in asked.untested or (built_in is not None and built_in.untested),
    )

  def _built_in(
    self, name: str, built_in: BuiltIn, options: dict[str, Any], asked: _Spec
  ) -> tuple[Verifier | Batch, tuple[Known, ...]]:
    wrong = [option for option in options if option not in built_in.options]
    if wrong:
      there = ", ".join(built_in.options) or "none"
      raise ConfigError(f"reward.options: {name} has no option {wrong[0]!r}; it has {there}")
    if "column" in built_in.needed:
      options["column"] = self._column(name, options.get("column"))
    if not options and built_in.column in self.columns:
      options["column"] = built_in.column
    absent = [option for option in built_in.needed if option not in options]
    if absent:
      values = ", ".join(f"{option!r}: ..." for option in built_in.needed)
      raise ConfigError(
        f"reward.options: {name} needs {' and '.join(absent)}; write reward.options={{{name!r}: {{{values}}}}}"
      )
    for option, kind in built_in.kinds.items():
      if option in options and not _is_a(options[option], kind):
        value = words.shown(options[option])
        raise ConfigError(f"reward.options: {name} has {option}={value}; it is {_in_words(kind)}")
    self._has_one(name, built_in.reads)
    if built_in.runs_code:
      options[UNSAFE] = asked.unsafe_code
    if built_in.waits:
      options[STOPPING] = self.workers.stopping
    made = built_in.make(**options)
    known = tuple(made.known()) if isinstance(made, Tried) else ()
    if not built_in.apart:
      return made, known
    return Apart(made, self.workers, asked.seconds or built_in.seconds), known

  def _column(self, name: str, asked: str | None) -> str:
    """The column with what is expected: the one that was named, or the only one whose name says so."""
    if asked is not None:
      return self._has(name, asked)
    there = [column for column in EXPECTED if column in self.columns]
    if "gold" in there or len(there) == 1:
      return there[0]
    listed = ", ".join(self.columns)
    for column in EXPECTED:
      if column in self.partly and not there:
        self._has(name, column)
    what = f"{' and '.join(there)} may be it" if there else "none has a name that says so"
    raise ConfigError(
      f"reward.options: {name} compares with the expected answer, and of the data's columns ({listed}) {what}; write"
      f" reward.options={{{name!r}: {{'column': NAME}}}}"
    )

  def _has(self, name: str, column: str) -> str:
    if column not in self.columns:
      absent = trl.absent(column, self.columns, self.partly)
      raise ConfigError(f"reward: {name} reads the column {column!r}, {absent}")
    return column

  def _has_one(self, name: str, reads: Sequence[tuple[str, ...]]) -> None:
    """Raises where the rows have all columns of none of these."""
    if len(reads) == 1:
      for column in reads[0]:
        self._has(name, column)
    elif reads and not any({*columns} <= {*self.columns} for columns in reads):
      for column in (column for columns in reads for column in columns if column in self.partly):
        self._has(name, column)
      listed = ", ".join(self.columns)
      wanted = ", or ".join(" and ".join(columns) for columns in reads)
      raise ConfigError(
        f"reward: {name} reads the columns {wanted}, which the data does not have; its columns are {listed}"
      )

  def _own(self, name: str, seconds: float | None) -> Verifier | Batch:
    """A function of the user's: a plain verifier, or one of TRL's."""
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py"):
      known = [*VERIFIERS, *self.given]
      near = difflib.get_close_matches(name, known, n=1)
      hint = f"; did you mean {near[0]}?" if near else ""
      raise ConfigError(
        f"reward: there is no {name!r}: known are {', '.join(known)}, or a function of yours as FILE.py:name{hint}"
      )
    file = str(Path(path).expanduser().absolute())
    try:
      called = named.load(file, function)
    except ConfigError as error:
      raise ConfigError(f"reward: {error}") from error
    own = named.Named(file, function)
    is_async = inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called)
    if is_async and not trl.is_one(called):
      raise ConfigError(
        f"reward: {own} is `async`; write `def`. A verifier (prompt, completion, example) is a plain function, and only"
        " TRL's form (prompts, completions, **columns) may be async"
      )
    if trl.is_one(called):
      trl.check(called, str(own), self.columns, self.partly)
      return trl.Function(own, str(own), self.workers, seconds or SECONDS)
    try:
      inspect.signature(called).bind("prompt", "completion", {})
    except TypeError as error:
      raise ConfigError(
        f"reward: {own} takes {inspect.signature(called)}; a verifier takes (prompt, completion, example), and a reward"
        " function of TRL's lists by their names: (prompts, completions, **columns)"
      ) from error
    return Apart(own, self.workers, seconds or SECONDS)
