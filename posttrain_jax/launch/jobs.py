"""What is launched, in words that no platform owns; each platform's file makes its own of it.

How a job's end is read is decided here, once for all of them: 75 goes on, a mistake stops.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from posttrain_jax.build.sweep import Point
from posttrain_jax.core.ending import PREEMPTED
from posttrain_jax.settings import ConfigError

ABORTED = 134  # as a shell tells SIGABRT: how JAX ends a process whose coordinator is gone
KILLED, TERMINATED = 137, 143  # SIGKILL, and SIGTERM before anything listened
LEFT_BEHIND = (PREEMPTED, ABORTED)  # of one of several processes
PORT = 8476  # of the coordinator, where the platform does not choose it
POINTS, SUBMIT = "points", "submit.sh"  # in the folder of a job's files


@dataclasses.dataclass(frozen=True)
class Options:
  """What a job asks for; a platform refuses what it has no use for (`Platform.uses`)."""

  nodes: int | None = None  # hosts of a job, or of a slice
  slices: int | None = None
  accelerator: str | None = None  # as the platform writes it
  topology: str | None = None  # of a TPU slice on GKE: 4x4
  time: str | None = None  # limit of one start, [days-]hours:minutes:seconds
  grace: int = 180  # seconds in which a run that is to stop saves
  deadline: int = 1800  # seconds without a step after which a process counts as hung
  restarts: int = 100  # after preemptions, each job
  at_once: int | None = None  # points of a sweep that run at the same time
  setup: str | None = None  # shell, before posttrain
  image: str | None = None
  zone: str | None = None
  volume: str | None = None  # CLAIM:/path
  spot: bool = False
  site: tuple[str, ...] = ()  # KEY=VALUE lines of the site's own


@dataclasses.dataclass(frozen=True)
class Job:
  """Points that are trained the same way: one, or those of a sweep that are not finished."""

  name: str
  root: str  # the workdir that was asked for, of all points
  folder: Path  # of the files, absolute
  home: Path  # where paths of configs and workdirs begin
  points: Mapping[int, Point]  # by their number in the sweep
  workdirs: Mapping[int, str]
  program: Sequence[str]  # what `posttrain` is there
  options: Options
  summary: Sequence[str] | None = None  # the command that sums a sweep up

  def config(self, number: int) -> str:
    """Where a point's config lies, within the folder of the files.

    The name follows what is in it: a job that waits reads what it was launched with, whatever is launched later.
    """
    digest = hashlib.sha256(self.text(number).encode()).hexdigest()[:8]
    return f"{POINTS}/{number}-{digest}.json"

  def text(self, number: int) -> str:
    """What that file holds."""
    return json.dumps(self.points[number].resolved, indent=2) + "\n"

  def command(self, number: int, folder: str | None = None) -> list[str]:
    """The point's training.  folder: where this job's files are there; its own by default."""
    return [
      *self.program,
      "train",
      f"--config={folder or self.folder}/{self.config(number)}",
      *self.points[number].overrides,
      f"--workdir={self.workdirs[number]}",
    ]


@dataclasses.dataclass(frozen=True)
class Platform:
  """How jobs are written for one scheduler.  `tool` is its own program, `absent` says where that is found."""

  tool: str
  absent: str
  uses: tuple[str, ...]  # of Options, beside ALL_USE


ALL_USE = ("deadline", "setup", "site")


def check(to: str, platform: Platform, options: Options) -> None:
  """Raises ConfigError for options that the platform has no use for, or that are no numbers of anything."""
  for field in dataclasses.fields(Options):
    is_used = field.name in (*platform.uses, *ALL_USE)
    if not is_used and vars(options)[field.name] != field.default:
      flags = ", ".join(f"--{name}" for name in (*platform.uses, *ALL_USE))
      raise ConfigError(f"--{field.name} is of no use to --to={to}, which takes {flags}")
  for name in ("nodes", "slices", "at_once", "grace", "deadline"):
    value = vars(options)[name]
    if value is not None and value < 1:
      raise ConfigError(f"--{name}={value}: write at least 1")
  if options.restarts < 0:
    raise ConfigError(f"--restarts={options.restarts}: write 0 or more")
  for name, value in vars(options).items():
    check_filled(name, value)
    for text in value if isinstance(value, tuple) else (value,):
      if name != "setup" and isinstance(text, str) and not text.isprintable():
        raise ConfigError(f"--{name}={text!r}: write it without line breaks and control characters")
  for line in options.site:
    if not re.fullmatch(r"[A-Za-z0-9][^\s=]*=.*", line):
      raise ConfigError(f"--site={line}: write --site=KEY=VALUE, as in --site=account=me")
  if why := _unreadable(options.setup or ""):
    raise ConfigError(f"--setup={options.setup}: bash cannot read it: {why}")


def check_filled(name: str, value: Any) -> None:
  """Raises ConfigError for an option with nothing in it, as a variable of a shell that is not set gives."""
  if isinstance(value, str) and not value.strip():
    raise ConfigError(f"--{name}={value}: nothing is in it; write a value, or leave --{name} out")


def _unreadable(shell: str) -> str:
  """What bash says of a text that it cannot read; nothing where it can, or where there is no bash to ask."""
  if (bash := shutil.which("bash")) is None:
    return ""
  done = subprocess.run(
    [bash, "-n"], input=f"{shell}\n", capture_output=True, text=True, check=False
  )
  return done.stderr.strip()


def nodes(options: Options) -> int:
  """Processes of a run, one a host, where hosts are asked for by their number."""
  return options.nodes or 1


def label(text: str) -> str:
  """A name that schedulers take: RFC 1123, as Kubernetes asks.

  >>> label("runs/LoRA_r=4"), label("7b")
  ('runs-lora-r-4', 'p7b')

  Raises:
    ConfigError: nothing is left of it.
  """
  name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-")
  if not name:
    raise ConfigError(
      f"no job can be called {text!r}: schedulers take letters a to z and digits; write --name=NAME"
    )
  return name if name[0].isalpha() else f"p{name}"


def environment(options: Options) -> dict[str, str]:
  """What every process of a job finds in its environment."""
  return {"POSTTRAIN_DEADLINE": str(options.deadline), "PYTHONUNBUFFERED": "1"}


def exports(options: Options) -> str:
  return "\n".join(f"export {name}={value}" for name, value in environment(options).items())


class _Yaml(yaml.SafeDumper):
  """Scripts as blocks of lines."""


_Yaml.add_representer(
  str,
  lambda dumper, text: dumper.represent_scalar(
    "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
  ),
)


def as_yaml(documents: Sequence[Mapping[str, Any]]) -> str:
  return yaml.dump_all(documents, Dumper=_Yaml, sort_keys=False, width=120)
