"""A run's folder as it is read again: config, metrics, evaluations, and whether it is finished."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain_jax.core import files

# in config.json: digests of the files that score answers, and [{"step", "changed"}] where a run went on with others
SCORED_WITH, RESCORED = "scored_with", "rescored"
HISTORY = "history"  # in config.json: the lengths that a run had before it was given another
CONFIG, METRICS, DONE = "config.json", "metrics.jsonl", "done.json"
LOG = "log.txt"  # what a sweep's point printed
BEFORE, AFTER = "evaluation-before.json", "evaluation-after.json"


@dataclasses.dataclass(frozen=True)
class TaskResult:
  """How many of a split's questions were answered correctly, and every answer.

  by_channel: {channel: (correct, total)}.
  reasons: {verdict: count}, "ok" among them.
  answers: one dict a question, in the order of the task: question, answer, gold, correct (None where nobody graded
    it), reason, channel, scores ({metric: value}), `finished`, False where max_new_tokens cut the answer, and of
    several turns `problem`, which ended it before an answer.
  seconds: of generating and scoring, compilation included.
  by_member: of an ensemble, how many each adapter alone answered correctly; () where there was none.
  scores: {metric: {"mean", "low", "high", "count", "right"}}, as `evals.intervals.mean` gives them; `correct` is of the
    first.
  digests: {metric: of the code, where it is the user's}.
  max_new_tokens: the most that an answer could have; 0 where nobody wrote it down.
  """

  task: str
  split: str
  correct: int
  total: int
  by_channel: Mapping[str, tuple[int, int]]
  reasons: Mapping[str, int]
  answers: Sequence[Mapping[str, Any]]
  seconds: float
  new_tokens: int
  by_member: Sequence[int] = ()
  scores: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  digests: Mapping[str, str] = dataclasses.field(default_factory=dict)
  max_new_tokens: int = 0

  @property
  def accuracy(self) -> float:
    """Correct / total, in [0, 1]; NaN where nothing was graded."""
    return self.correct / self.total if self.total and self.is_graded else math.nan

  @property
  def is_graded(self) -> bool:
    return any(answer["correct"] is not None for answer in self.answers)

  @property
  def is_share(self) -> bool:
    """Whether the first metric says right or wrong, so that `correct` counts; of another its mean is what is told."""
    first = next(iter(self.scores.values()), None)
    return self.is_graded and (first is None or first["right"] is not None)

  @property
  def cut(self) -> int:
    """How many answers max_new_tokens cut."""
    return sum(not answer.get("finished", True) for answer in self.answers)

  def to_json(self) -> dict[str, Any]:
    graded = {"accuracy": self.accuracy} if self.is_graded else {}
    return dict(dataclasses.asdict(self), **graded)

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> TaskResult:
    """The result that `to_json` gave, before or after a round trip through a file."""
    # older results have no ensemble, and one metric
    absent: dict[str, Any] = dict(by_member=(), scores={}, digests={}, max_new_tokens=0)
    value = absent | dict(value)
    fields: dict[str, Any] = {field.name: value[field.name] for field in dataclasses.fields(cls)}
    fields["by_channel"] = {name: tuple(pair) for name, pair in value["by_channel"].items()}
    fields["by_member"] = tuple(value["by_member"])
    return cls(**fields)


@dataclasses.dataclass(frozen=True)
class Run:
  """What `posttrain train` left in a folder; a part that is not there is empty or None.

  record: config.json: {"config": the resolved config, "command", "versions", "commit", ...}.
  rows: the lines of metrics.jsonl.
  done: {"steps": ..., "final": {metric: value}, ...} of a finished run; "best" is {"step", "metric", "value",
    "is_exported"} of the best evaluation, and "ended_early" {"after": evaluations, "of": steps} is there where the run
    ended for want of a better one.
  """

  folder: Path
  record: Mapping[str, Any]
  rows: Sequence[Mapping[str, Any]]
  before: TaskResult | None
  after: TaskResult | None
  done: Mapping[str, Any] | None

  def field(self, name: str) -> Any:
    """The value of a dotted field of the config, such as `optimizer.lr`; None where there is none."""
    node: Any = self.record.get("config", {})
    for part in name.split("."):
      node = node.get(part) if isinstance(node, Mapping) else None
    return node

  def adapters(self) -> dict[str, Mapping[str, Any]]:
    """{method: its options} of the run's adapter, several where they train together; {} for full fine-tuning."""
    section = self.field("adapter")
    if section is None:
      return {}
    methods = [name for name in section["method"].split("+") if name != "none"]
    return {name: section if len(methods) == 1 else section[name] for name in methods}

  @property
  def history(self) -> Sequence[Mapping[str, Any]]:
    """The lengths that the run had before: {"step": up to which, "steps", "epochs", "command"}."""
    return self.record.get(HISTORY, [])

  @property
  def rescored(self) -> Sequence[Mapping[str, Any]]:
    """Where other files scored from then on: {"step", "changed": their names}."""
    return self.record.get(RESCORED, [])

  @property
  def given_step(self) -> int | None:
    """The step whose adapter or model a finished run exported, where that is the best and not the last."""
    best = (self.done or {}).get("best")
    return best["step"] if best and best["is_exported"] else None

  def names(self) -> list[str]:
    """The metrics that some row has, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in self.rows for name in row if name != "step"))

  def series(self, name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one metric."""
    points = [(row["step"], row[name]) for row in self.rows if name in row]
    return [step for step, _ in points], [value for _, value in points]

  def given(self) -> dict[str, float]:
    """The last value of every metric, and of held-out rows that of the step that was exported."""
    at_best = [row for row in self.rows if row["step"] == self.given_step]
    held_out = {k: v for row in at_best for k, v in row.items() if k.startswith("eval_")}
    return {**self.final(), **held_out}

  def final(self) -> dict[str, float]:
    """The last value of every metric: what done.json says, else what the rows do."""
    if self.done is not None:
      return dict(self.done["final"])
    return {name: value for row in self.rows for name, value in row.items() if name != "step"}

  @property
  def steps(self) -> int:
    """Steps done so far."""
    if self.done is not None:
      return int(self.done["steps"])
    return max((int(row["step"]) for row in self.rows), default=0)


def read(folder: str | Path) -> Run:
  """The run in a folder, finished or under way.

  Raises:
    FileNotFoundError: the folder holds no run.
    ValueError: a file of it cannot be read; the message names it.
  """
  folder = Path(folder)
  if not (folder / CONFIG).exists() and not (folder / METRICS).exists():
    listed = ", ".join(sorted(p.name for p in folder.glob("*"))[:8]) if folder.is_dir() else ""
    what = f"holds {listed or 'nothing'}" if folder.is_dir() else "is no folder"
    raise FileNotFoundError(
      f"{folder} {what}, expected {CONFIG} and {METRICS}; give the --workdir of a `posttrain train`"
    )
  if (folder / CONFIG).exists():
    config(folder)
  return Run(
    folder=folder,
    record=read_json(folder / CONFIG) or {},
    rows=read_rows(folder / METRICS),
    before=_evaluation(folder / BEFORE),
    after=_evaluation(folder / AFTER),
    done=read_json(folder / DONE),
  )


def config(folder: str | Path) -> dict[str, Any]:
  """The resolved config of the run in a folder.

  Raises:
    FileNotFoundError: the folder has no config.json.
    ValueError: it is that of something else; the message says of what.
  """
  folder = Path(folder)
  written = files.read_json(folder / CONFIG)
  if not isinstance(written.get("config"), dict):
    raise ValueError(
      f"{folder} is {_what(folder, written)}, not a run's folder; name another --workdir"
    )
  return written["config"]


def _what(folder: Path, written: Mapping[str, Any]) -> str:
  """What a folder is whose config.json is no run's."""
  if "model_type" in written or "architectures" in written:
    return f"a model's folder (its {CONFIG} is of a {written.get('model_type', 'model')})"
  return (
    f"a folder of something else (its {CONFIG} has {', '.join(list(written)[:4]) or 'nothing'})"
  )


def is_begun(folder: Path) -> bool:
  """Whether a step of the run in a folder is there: in a checkpoint, or in its metrics."""
  return saved_step(folder) > 0 or last_step(folder) > 0


def saved_step(folder: Path) -> int:
  """The newest step that a checkpoint of a run holds; 0 for none."""
  checkpoints = folder / "checkpoints"
  names = [entry.name for entry in checkpoints.iterdir()] if checkpoints.is_dir() else []
  return max((int(name) for name in names if name.isdecimal()), default=0)


def read_json(path: Path) -> dict[str, Any] | None:
  """The object in a file, None where there is no file."""
  return files.read_json(path) if path.exists() else None


def read_rows(path: Path) -> list[dict[str, Any]]:
  """The lines of a metrics file; the last may be under way, and is left out when it is.

  Raises:
    ValueError: another line is damaged; the message has its number.
  """
  try:
    *lines, rest = path.read_bytes().split(b"\n")
  except FileNotFoundError:
    return []
  rows = []
  for number, line in enumerate([*lines, rest], 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except ValueError:
      row = None
    if isinstance(row, dict) and type(row.get("step")) is int:
      rows.append(row)
    elif number <= len(lines):
      shown = line[:60].decode(errors="replace")
      raise ValueError(
        f"{path}:{number} is damaged: {shown!r} is no object with a step; take the line out, and run again (training"
        " does not read this file)"
      )
  return rows


def last_step(folder: Path) -> int:
  """The last step that the metrics of a run tell of; 0 for none."""
  return max((row["step"] for row in read_rows(folder / METRICS)), default=0)


def _evaluation(path: Path) -> TaskResult | None:
  value = read_json(path)
  try:
    return None if value is None else TaskResult.from_json(value)
  except KeyError as error:
    raise ValueError(f"{path} is no evaluation: it has no {error}") from error


def last_values(folder: str | Path) -> dict[str, float]:
  """The last value of every metric in a run's metrics.jsonl."""
  values: dict[str, float] = {}
  for row in read_rows(Path(folder) / METRICS):
    values.update(row)
  return {name: value for name, value in values.items() if name != "step"}
