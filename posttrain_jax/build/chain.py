"""Stages of which each starts from what others made: ordinary commands in one folder, one after the other.

A stage is a dict: its name, and what it does.

  {"name": "rl", "train": "rl:data=sql,reward=sql", "fields": {"model.adapter": "{cold}"}}
  {"name": "answers", "sample": {"model": "{rl}", "task": "sql", "n": 4}}

`{cold}` stands for what the stage of that name made: a run's folder, the rows that were sampled, a model.  Every stage
is resolved and checked before the first begins; killed anywhere, the same call goes on; what is finished stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain_jax import settings
from posttrain_jax.build import checks, sweep
from posttrain_jax.core import files, words
from posttrain_jax.evals import chain_page
from posttrain_jax.runs import record
from posttrain_jax.settings import ConfigError
from posttrain_jax.train.signals import PREEMPTED

COMMAND = (sys.executable, "-m", "posttrain_jax")
LOCK, STATE, LOG = ".chain", chain_page.STATE, record.LOG
# what a verb that is no training makes in the stage's folder
MADE = {"sample": "answers.jsonl", "pairs": "pairs.jsonl", "student": "model", "export": "model"}
VERBS = ("train", *MADE)
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
# braces around other things, as of a pattern (\d{2}) or a dict, are the stage's own
REFERENCE = re.compile(r"\{([A-Za-z][\w -]*)\}")
POLL = 0.2  # seconds

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Stage:
  """One command of a chain.  line: what stands behind `posttrain`; made: what others get for its name."""

  name: str
  verb: str
  line: tuple[str, ...]
  made: Path
  config: Mapping[str, Any] | None = None  # resolved, of a training

  @property
  def record(self) -> dict[str, Any]:
    """What tells the stage from another, for the chain's state."""
    return {"name": self.name, "verb": self.verb, "line": [*self.line]}


def run(
  config: str,
  workdir: str | Path,
  *,
  command: Sequence[str] = COMMAND,
  check: Callable[[Stage], None] = lambda stage: None,
  say: Say = print,
) -> int:
  """The exit code of a chain: 0 all stages finished, 1 one failed, 75 stopped and safe to run again.

  Writes `chain.json`, what each stage is and came to, and `report.html`, their scores beside one another; each stage
  has a folder with its log and what its own command leaves there.

  Args:
    config: `FILE[:arguments]`, whose `stages(arg)` says what there is.
    command: what runs a stage, before its verb.
    check: raises ConfigError for a line that its command would refuse.

  Raises:
    ConfigError: before anything runs: no stages, one that is not understood, or one that has begun otherwise.
  """
  folder = Path(workdir).expanduser().absolute()  # the same chain, however its folder is written
  stages = expand(settings.stages(config), folder)
  for stage in stages:
    check(stage)
  _check_folder(folder)
  _check_same(folder, stages)
  with sweep.claimed(folder, LOCK, "chain") as lock, sweep.stopping() as asked:
    state = _State(folder, stages)
    for place, stage in enumerate(stages, 1):
      what = f"{stage.name} ({stage.verb}, {place} of {len(stages)})"
      if state.is_finished(stage):
        say(f"{what}: finished before")
        continue
      say(f"{what}: begins")
      code = _run(stage, state, command, lock, asked)
      chain_page.write(folder)
      log = folder / stage.name / LOG
      if code == PREEMPTED or (code and asked.count):
        say(f"{what}: stopped; the same command goes on")
        return PREEMPTED
      if code:
        say(f"{what}: FAILED ({sweep.cause(code)}); the end of {log}:\n{sweep.tail(log)}")
        return 1
      say(f"{what}: finished in {state.seconds(stage):.0f} s{state.came_to(stage)}")
      if asked.count and place < len(stages):
        return PREEMPTED
  say(f"report: {chain_page.write(folder)}")
  return 0


def expand(given: Iterable[Mapping[str, Any]], folder: Path) -> list[Stage]:
  """The stages with paths in the place of names, each training's config resolved.

  Raises:
    ConfigError: a stage without a name or a verb, a name twice, a reference to none that is before it, or a training
      that its command would refuse by its config.
  """
  if set(str(folder)) & set(",{}*+"):
    raise ConfigError(
      f"--workdir={folder}: stages name each other's folders in arguments, which commas, braces, * and + would cut;"
      " name another"
    )
  stages: list[Stage] = []
  for place, one in enumerate(given, 1):
    stages.append(_stage(one, place, folder, {stage.name: str(stage.made) for stage in stages}))
  if not stages:
    raise ConfigError("the chain has no stages: stages(arg) gives none")
  return stages


def _stage(one: Mapping[str, Any], place: int, folder: Path, made: Mapping[str, str]) -> Stage:
  where = f"stage {place}"
  if not isinstance(one, Mapping) or not isinstance(one.get("fields", {}), Mapping):
    raise ConfigError(
      f"{where} is {words.shown(one)}; write a dict of its name and what it does, fields of a training as a dict, too"
    )
  name = one.get("name")
  if not isinstance(name, str) or not NAME.fullmatch(name):
    raise ConfigError(f"{where}: name={name!r}; write letters, digits, _ and -, a letter first")
  if name in made:
    raise ConfigError(f"{where}: there is a stage {name!r} before it; give each a name of its own")
  verbs = [verb for verb in VERBS if verb in one]
  known = ("name", "fields", *VERBS) if "train" in one else ("name", *VERBS)
  unknown = [key for key in one if key not in known]
  if len(verbs) != 1 or unknown:
    wrong = f"{unknown[0]!r} is none of its keys" if unknown else f"it does {len(verbs)} things"
    raise ConfigError(
      f"stage {name!r}: {wrong}; write one of {', '.join(VERBS)}, and fields beside train alone"
    )
  (verb,) = verbs
  told = lambda text: _told(text, made, name)
  home = folder / name
  if verb == "train":
    text, fields = told(str(one[verb])), one.get("fields", {})
    overrides = [settings.override(field, told_in(value, told)) for field, value in fields.items()]
    with _said_of(name):
      loaded = settings.load(text, overrides)
      config = settings.plain(loaded)
      settings.fields.check(config, settings.given(overrides))
      checks.sections(loaded)
    return Stage(
      name, verb, (verb, f"--config={text}", *overrides, f"--workdir={home}"), home, config
    )
  options, out = one[verb], home / MADE[verb]
  if not isinstance(options, Mapping) or "out" in options:
    raise ConfigError(
      f"stage {name!r}: {verb} takes a dict of the options of `posttrain {verb}`, without out"
    )
  flags = [flag for key, value in options.items() for flag in _flags(key, told_in(value, told))]
  return Stage(name, verb, (verb, *flags, f"--out={out}"), out)


def _flags(key: str, value: Any) -> list[str]:
  """An option as a command line has it.

  >>> _flags("n", 4), _flags("merge", True), _flags("merge", False), _flags("stop", ["a", "b"])
  (['--n=4'], ['--merge'], [], ['--stop=a', '--stop=b'])
  """
  if isinstance(value, bool):
    return [f"--{key}"] * value
  return [f"--{key}={one}" for one in (value if isinstance(value, list | tuple) else [value])]


def told_in(value: Any, told: Callable[[str], str]) -> Any:
  """A value whose texts have paths in the place of names; dicts and lists are searched, too.

  >>> told_in({"a": ["{x}", 1]}, lambda text: text.replace("{x}", "there"))
  {'a': ['there', 1]}
  """
  if isinstance(value, str):
    return told(value)
  if isinstance(value, Mapping):
    return {key: told_in(each, told) for key, each in value.items()}
  if isinstance(value, list | tuple):
    return type(value)(told_in(each, told) for each in value)
  return value


def _told(text: str, made: Mapping[str, str], name: str) -> str:
  """The text with what other stages made in the place of their names."""
  unknown = [each for each in REFERENCE.findall(text) if each not in made]
  if unknown:
    there = f"before it there are {', '.join(made)}" if made else "it is the first"
    raise ConfigError(f"stage {name!r}: {{{unknown[0]}}} is no stage before it; {there}")
  return REFERENCE.sub(lambda found: made[found[1]], text)


@contextlib.contextmanager
def _said_of(name: str):
  """What is wrong with a stage's config is said with its name."""
  try:
    yield
  except ConfigError as error:
    raise ConfigError(f"stage {name!r}: {error}") from error


def _check_folder(folder: Path) -> None:
  if folder.is_file():
    raise ConfigError(f"{folder} is a file; name another --workdir")
  others = [path.name for path in folder.iterdir()] if folder.is_dir() else []
  if not (folder / STATE).exists() and any(not name.startswith(".") for name in others):
    raise ConfigError(
      f"{folder} is not empty and holds no chain (no {STATE}); name another --workdir"
    )


def _check_same(folder: Path, stages: Sequence[Stage]) -> None:
  """Raises where a stage that has begun is another one now, unless its folder and all that was made of it are gone."""
  now = {stage.name: stage.record for stage in stages}
  known = [was for was in chain_page.read(folder) if was.get("began")]
  for was in known:
    there = now.get(was["name"])
    if _is_same(was, there):
      continue
    if left := [str(path) for path in _made_of(folder, was["name"], known) if path.exists()]:
      line = lambda of: "(none)" if of is None else shlex.join(of["line"])
      raise ConfigError(
        f"{folder} holds a chain whose stage {was['name']!r} has begun as\n  {line(was)}\nand is now\n  {line(there)}\n"
        f"Name another --workdir, or restore it, or remove what was made so: {', '.join(left)}"
      )


def _is_same(was: Mapping[str, Any], now: Mapping[str, Any] | None) -> bool:
  return now is not None and all(now[key] == was.get(key) for key in now)


def _made_of(folder: Path, name: str, stages: Sequence[Mapping[str, Any]]) -> list[Path]:
  """The folders of a stage and of all that name it or one of these; stages are in their order."""
  made = [folder / name]
  for one in stages:
    of_these = re.compile("|".join(rf"{re.escape(str(path))}(?![\w-])" for path in made))
    if one["name"] != name and any(map(of_these.search, one["line"])):
      made.append(folder / one["name"])
  return made


@dataclasses.dataclass
class _State:
  """What chain.json holds: a dict a stage, in their order."""

  folder: Path
  stages: Sequence[Stage]

  def __post_init__(self) -> None:
    was = {one["name"]: one for one in chain_page.read(self.folder)}
    noted = lambda now: was.get(now["name"], {}) if _is_same(was.get(now["name"], {}), now) else {}
    self._all = {stage.name: {**noted(stage.record), **stage.record} for stage in self.stages}
    self._write()

  def _write(self) -> None:
    files.write_json(self.folder / STATE, {"stages": [*self._all.values()]})

  def note(self, stage: Stage, **values: Any) -> None:
    self._all[stage.name] |= values
    self._write()

  def is_finished(self, stage: Stage) -> bool:
    """Whether the stage is done, and what it made is there still."""
    made = stage.made / record.DONE if stage.verb == "train" else stage.made
    return bool(self._all[stage.name].get("finished")) and made.exists()

  def seconds(self, stage: Stage) -> float:
    return float(self._all[stage.name].get("seconds", 0.0))

  def came_to(self, stage: Stage) -> str:
    said = chain_page.scores(self.folder, self._all[stage.name])
    return "".join(f"; {name} {value:.4g}" for name, value in said.items())


def _run(stage: Stage, state: _State, command: Sequence[str], lock: int, asked: sweep.Asked) -> int:
  """The exit code of the stage's command, run to its end or until the chain is asked to stop."""
  home = state.folder / stage.name
  home.mkdir(parents=True, exist_ok=True)
  state.note(stage, began=True)
  if stage.verb in ("student", "export") and stage.made.exists():
    # made whole or not at all, and only the note of it is missing
    state.note(stage, finished=True)
    return 0
  line, began = [*command, *stage.line], time.monotonic()
  with (home / LOG).open("ab") as log:
    log.write(f"\n$ {shlex.join(line)}\n".encode())
    log.flush()
    start = log.tell()
    process = subprocess.Popen(
      line,
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      start_new_session=True,  # a terminal's Ctrl-C is for the chain, which tells the stage to save
      pass_fds=(
        lock,
      ),  # should the chain be killed, its stage holds on to the folder until it ends
      env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
  try:
    while process.poll() is None:
      _pass_on(process, asked)
      time.sleep(POLL)
  finally:
    if process.poll() is None:  # only where something above failed
      process.terminate()
  took = state.seconds(stage) + time.monotonic() - began
  if process.returncode == 0:
    with (home / LOG).open("rb") as log:
      log.seek(start)
      said = log.read().decode(errors="replace")
    state.note(stage, finished=True, seconds=round(took, 1), said=_last_lines(said))
  else:
    state.note(stage, seconds=round(took, 1))
  return process.returncode


def _pass_on(process: subprocess.Popen, asked: sweep.Asked) -> None:
  """A request to stop: SIGTERM (save and end) the first time, SIGKILL from the second on."""
  if asked.count == asked.told:
    return
  with contextlib.suppress(ProcessLookupError):
    if asked.count == 1:
      process.terminate()
    else:
      os.killpg(process.pid, signal.SIGKILL)
  asked.told = asked.count


def _last_lines(text: str, most: int = 12) -> list[str]:
  lines = [line.rstrip() for line in text.splitlines() if line.strip()]
  return lines[-most:]
