"""config.reward: what scores the answers that a model writes, and the reward models that it may name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import types
from collections.abc import Callable, Collection, Generator, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from posttrain_jax import settings
from posttrain_jax.adapters import peft_format
from posttrain_jax.build import decisions, use
from posttrain_jax.core import files
from posttrain_jax.evals.judge import Judge
from posttrain_jax.rewards import named, section
from posttrain_jax.rewards.model import Model
from posttrain_jax.rewards.reward import Part, Reward
from posttrain_jax.rewards.workers import Workers
from posttrain_jax.runs import record
from posttrain_jax.settings import ConfigError

SECTIONS = ("reward", "holdout_reward")
# in the place of a reward where a teacher alone says what is learned
SILENT = Part("none", lambda *_: 0.0, range=(0.0, 1.0), untested=True)


def make(
  config: ml_collections.ConfigDict,
  columns: Collection[str],
  partly: Mapping[str, str],
  stopping: Callable[[], bool] = lambda: False,
) -> tuple[Reward, Reward | None]:
  """The reward of a run, and what scores the same answers and is not trained on, if anything does.

  Args:
    columns, partly: see `rewards.section.make`.
    stopping: see `rewards.workers.Workers`.

  Raises:
    ConfigError: as `rewards.section.make`, or a folder that holds no reward model.
  """
  workers = Workers(
    stopping=stopping
  )  # one call at a time: what times out says something of the verifier
  sections = (settings.plain(config[name]) for name in SECTIONS)
  reward, other = (
    of(spec, columns, workers, partly=partly) if spec["parts"] else None for spec in sections
  )
  if reward is None:
    if not decisions.teacher(config):
      raise ConfigError("reward.parts is empty: nothing says how good an answer is")
    reward = Reward([SILENT])
  return reward, other


def is_silent(reward: Reward) -> bool:
  """Whether nothing scores the answers."""
  return reward.parts == (SILENT,)


def check_not_negative(reward: Reward) -> None:
  """Raises ConfigError where a total may be below 0."""
  low = [part for part in reward.parts if not part.gate and part.weight * part.within[0] < 0]
  low += [part for part in reward.parts if not part.gate and part.weight < 0 < part.within[1]]
  if not low:
    return
  name, (least, most) = low[0].name, low[0].within
  range_of = (
    f"its scores lie within {least:g} and {most:g}"
    if math.isfinite(least)
    else f"nothing says that its scores are from 0 on; write --config.reward.ranges=\"{{'{name}': (0, 1)}}\""
  )
  raise ConfigError(
    f"objective.advantage=max_rl divides by the mean reward, which {name} may make negative: {range_of}"
  )


def of(
  spec: Mapping[str, Any],
  columns: Collection[str],
  workers: Workers | None = None,
  *,
  partly: Mapping[str, str] = types.MappingProxyType({}),
) -> Reward:
  """The reward that a section describes, its reward models loaded; see `rewards.section.make`."""
  section.check(spec)
  given = {name: Model(_judge_named(spec, name).scores) for name in _named(spec) if _folder(name)}
  return section.make(spec, columns, partly=partly, given=given, workers=workers)


def _folder(name: str) -> Path | None:
  """The folder that a part of a reward is, if it is one: a reward model's."""
  path = Path(name).expanduser()
  try:
    return path if path.is_dir() else None
  except OSError:  # the name is too long for any file
    return None


def _judge_named(spec: Mapping[str, Any], name: str) -> Judge:
  """The reward model that a section names; what is wrong with it is said with the field."""
  try:
    return judge(name)
  except (ValueError, OSError) as error:
    field = "parts" if name in section.names(spec.get("parts", ())) else "gates"
    raise ConfigError(
      f"reward.{field}: {name!r} is a folder, and so a reward model's: {error}"
    ) from error


def identity(spec: Mapping[str, Any]) -> str:
  """A name for what a section's scores depend on, beside the answers: its fields, and the files that it names."""
  models = [path for name in _named(spec) if (path := _folder(name))]
  return _digest([spec, sources(spec), [state for path in models for state in _stated(path)]])


def _stated(model: Path) -> list[tuple[str, int, int]]:
  """(name, size, time of its last change) of each file of a reward model."""
  every = sorted([*model.glob("*.*"), *model.glob("adapter/*")])
  return [(str(file), at.st_size, at.st_mtime_ns) for file in every for at in [file.stat()]]


def scored_with(config: ml_collections.ConfigDict) -> dict[str, str]:
  """{name: a digest} of the user's files and of the reward models that score a run's answers."""
  names = [name for section in SECTIONS for name in _named(settings.plain(config[section]))]
  own = [path for name in names if (path := name.rpartition(":")[0]).endswith(".py")]
  models = {name: _digest(_stated(path)) for name in names if (path := _folder(name))}
  return {path: _digest(Path(path).expanduser().read_text()) for path in own} | models


def note_changes(folder: Path, config: ml_collections.ConfigDict, step: int) -> str:
  """What is to be said where a run goes on with other scoring files than it had; "" where they are the same.

  Its record has what it scores with, and at which steps that changed: curves go on, and their scale is another.
  """
  written, now = files.read_json(folder / record.CONFIG), scored_with(config)
  was = written.get(record.SCORED_WITH)
  changed = [name for name, digest in now.items() if step and was and digest != was.get(name)]
  changes = [*written.get(record.RESCORED, ())] if step else []
  if changed:
    changes.append({"step": step, "changed": changed})
  told = {record.SCORED_WITH: now} | ({record.RESCORED: changes} if changes else {})
  if now:
    kept = {name: value for name, value in written.items() if name != record.RESCORED}
    files.write_json(folder / record.CONFIG, kept | told)
  if not changed:
    return ""
  return (
    f"{', '.join(changed)} has changed since this run scored with it: from step {step} on answers are scored by what is"
    " there now, and rewards before and after are not of one scale"
  )


def sources(spec: Mapping[str, Any]) -> str:
  """A digest of the user's files that score."""
  paths = {name.rpartition(":")[0] for name in _named(spec)}
  named = sorted(path for path in paths if path.endswith(".py"))
  return _digest([Path(path).expanduser().read_text() for path in named]) if named else ""


def _named(spec: Mapping[str, Any]) -> list[str]:
  return [name for field in ("parts", "gates") for name in section.names(spec.get(field, ()))]


def titles(spec: Mapping[str, Any]) -> Mapping[str, str]:
  """{name in the section: what the part or gate is called}."""
  return named.titles(_named(spec))


def _digest(value: Any) -> str:
  text = json.dumps(value, sort_keys=True, default=str)
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def spec(
  parts: str, gates: str = "", *, untested: str = "", unsafe_code: bool = False
) -> dict[str, Any]:
  """The section that command-line options stand for.

  Args:
    parts: names with commas between, "" for none, or a .json file with fields of the section.
    gates, untested: names with commas between.

  Raises:
    ConfigError: the file cannot be read, or a gate has nothing to multiply.
  """
  if not parts and gates:
    raise ConfigError("--gate multiplies a reward: write --reward, too")
  if not parts and untested:
    raise ConfigError("--untested names parts of a reward: write --reward, too")
  asked = _written(parts) if parts.endswith(".json") else {}
  if parts and not asked:
    asked = {"parts": section.names(parts)}
  return (
    asked
    | ({"gates": section.names(gates)} if gates else {})
    | ({"untested": section.names(untested)} if untested else {})
    | ({"unsafe_code": True} if unsafe_code else {})
  )


@contextlib.contextmanager
def told_of_files(spec: Mapping[str, Any]) -> Generator[None]:
  """What fields are to be written is said as commands without a config take them: options, or --reward=FILE.json."""
  try:
    yield
  except ConfigError as error:
    text = str(error).replace("reward.unsafe_code=true", "--unsafe_code")
    text = text.replace("--config.reward.untested=", "--untested=")
    fields = [field for field in re.findall(r"\breward\.(\w+)", text) if field in section.SHAPES]
    if fields and fields[0] not in ("parts", "gates", "untested"):
      parts = json.dumps([*section.names(spec.get("parts", ()))])
      value = "{...}" if fields[0] in ("options", "ranges") else "[...]"
      text += (
        f"; {fields[0]} is a field of --reward=FILE.json, as"
        f' {{"parts": {parts}, "{fields[0]}": {value}}}'
      )
    raise ConfigError(text) from error


def _written(path: str) -> dict[str, Any]:
  """The fields of a section in a file."""
  try:
    written = json.loads(Path(path).expanduser().read_text())
  except (OSError, ValueError) as error:
    raise ConfigError(f"--reward={path}: {error}") from error
  if not isinstance(written, dict):
    raise ConfigError(
      f'--reward={path}: it holds no object of fields, like {{"parts": ["number"]}}'
    )
  return written


def judge(folder: str, *, base: str | None = None, template: str | None = None) -> Judge:
  """The reward model in a folder of a model, of an adapter or of a run, which reads answers as it was trained to.

  Raises:
    ConfigError: it is no reward model.
  """
  path = Path(folder).expanduser()
  is_adapter = (path / peft_format.CONFIG).exists()
  if is_adapter and not use.scores(path):
    raise ConfigError(f"{folder}: this adapter has no score head; it is no reward model")
  model, adapter = (None, folder) if is_adapter else (folder, None)
  used = use.load(model, adapter, base=base, template=template)
  if used.config.scores != 1:
    raise ConfigError(
      f"{folder}: {used.config.scores or 'no'} scores a token; a reward model has one"
    )
  manner = used.manner
  return Judge(
    used.bound,
    used.config,
    used.tokenizer,
    used.template,
    chat=manner.chat,
    system=manner.system,
    dtype=used.dtype,
  )
