"""A job's files are written, and the site's own tool is given them."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from posttrain_jax import settings
from posttrain_jax.build import checks, sweep
from posttrain_jax.core import files
from posttrain_jax.launch import gke, jobs, skypilot, slurm, tpu_vm
from posttrain_jax.launch.jobs import Job, Options, Platform
from posttrain_jax.runs import folder as run_folder
from posttrain_jax.settings import ConfigError

# what a platform takes, its files of a job, and how many processes one of its runs is
PLATFORMS: Mapping[
  str, tuple[Platform, Callable[[Job], dict[str, str]], Callable[[Options], int]]
] = {
  "slurm": (slurm.PLATFORM, slurm.files, jobs.nodes),
  "tpu-vm": (tpu_vm.PLATFORM, tpu_vm.files, tpu_vm.processes),
  "gke": (gke.PLATFORM, gke.files, gke.processes),
  "skypilot": (skypilot.PLATFORM, skypilot.files, jobs.nodes),
}
OWNER = "job.json"  # in the folder of a job's files: which workdir it is for
SHARED = ("slurm",)  # whose hosts see this machine's files, and its Python


def prepare(
  config: str,
  workdir: str,
  *,
  to: str,
  overrides: Sequence[str] = (),
  is_sweep: bool = False,
  out: str | None = None,
  name: str | None = None,
  options: Options,
) -> Job | None:
  """The job of a config, or of the points of its sweep that are not finished; None where all are.

  Raises:
    ConfigError: what `posttrain train` would refuse, or what the platform has no use for.
  """
  platform, _, processes = PLATFORMS[to]
  jobs.check(to, platform, options)
  for flag, given in (("name", name), ("out", out)):
    jobs.check_filled(flag, given)
  if options.at_once and not is_sweep:
    raise ConfigError("--at_once is of points: write --sweep beside it")
  home, is_shared = Path.cwd(), to in SHARED
  if not is_shared and not PurePosixPath(workdir).is_absolute():
    raise ConfigError(
      f"--workdir={workdir}: a host of {to} has no folder of yours to begin from; write the whole path of what all"
      f" hosts see and what outlives them, as in --workdir=/runs/{PurePosixPath(workdir).name}"
    )
  root = str(home / Path(workdir).expanduser()) if is_shared else workdir
  points = sweep.expand(config, overrides) if is_sweep else [_single(config, overrides)]
  points = [sweep.fitting(point) for point in points]
  if processes(options) > 1:
    _check_several(points)
  folders = [f"{root}/{point.name}" if is_sweep else root for point in points]
  left = {
    number: point
    for number, (point, folder) in enumerate(zip(points, folders, strict=True))
    if not run_folder.is_complete(Path(folder), point.resolved)
  }
  if not left:
    return None
  name = jobs.label(name or Path(root).name)
  program = [sys.executable, "-m", "posttrain_jax"] if is_shared else ["posttrain"]
  summary = None
  if is_sweep:
    summary = [*program, "sweep", f"--config={config}", *overrides, f"--workdir={root}", "--jobs=0"]
  return Job(
    name=name,
    root=root,
    folder=(home / (out or f"jobs/{name}")).absolute(),
    home=home,
    points=left,
    workdirs={number: folders[number] for number in left},
    program=program,
    options=options,
    summary=summary,
  )


def _check_several(points: Sequence[sweep.Point]) -> None:
  for point in points:
    if why := checks.alone(settings.restored(point.resolved)):
      raise ConfigError(why)


def _single(config: str, overrides: Sequence[str]) -> sweep.Point:
  resolved = settings.plain(settings.load(config, overrides))
  return sweep.Point("run", config, tuple(overrides), resolved, {})


def write(job: Job, to: str) -> list[Path]:
  """The files of a job, in its folder.

  Those of an earlier launch of the same workdir there are gone, but for configs, which a job that waits may read yet.

  Raises:
    ConfigError: what the platform refuses, or a folder that holds something else or the job of another workdir.
  """
  written = PLATFORMS[to][1](job)  # which may refuse, before anything is there
  if job.folder.exists() and not (job.folder / jobs.SUBMIT).exists() and any(job.folder.iterdir()):
    raise ConfigError(f"{job.folder} holds something else than a job's files; name another --out")
  _check_own(job)
  (job.folder / jobs.POINTS).mkdir(parents=True, exist_ok=True)
  for old in (*job.folder.glob("*.yaml"), *job.folder.glob("*.sh")):
    old.unlink()
  for number in job.points:
    written[job.config(number)] = job.text(number)
  files.write_json(job.folder / OWNER, {"workdir": job.root})
  for name, text in written.items():
    files.write_text(job.folder / name, text)
  return [job.folder / name for name in written]


def _check_own(job: Job) -> None:
  """Jobs of one name are one job to a scheduler, and to its files: two workdirs want two names."""
  try:
    owner = json.loads((job.folder / OWNER).read_text())["workdir"]
  except FileNotFoundError:
    return
  except (ValueError, KeyError, TypeError):
    raise ConfigError(
      f"{job.folder / OWNER} is damaged; delete that folder, or name another --out"
    ) from None
  if owner != job.root:
    raise ConfigError(
      f"{job.folder} holds the job of --workdir={owner}, which may wait or go on yet; give this one a --name of its"
      " own, or delete that folder"
    )


def by_hand(job: Job) -> str:
  """The command that hands the job over."""
  return shlex.join(["bash", str(job.folder / jobs.SUBMIT)])


def submit(job: Job, to: str) -> int:
  """The exit code of what hands the job over; what the site's tool says is printed as it says it.

  Raises:
    ConfigError: the tool is not on this machine.
  """
  platform, *_ = PLATFORMS[to]
  if shutil.which(platform.tool) is None:
    raise ConfigError(
      f"{platform.tool} is not on this machine: {platform.absent}; or run {by_hand(job)} where it is"
    )
  return subprocess.run(["bash", str(job.folder / jobs.SUBMIT)], check=False).returncode
