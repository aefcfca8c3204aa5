"""A job's files are written, and the site's own tool is given them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from posttrain_jax import settings
from posttrain_jax.build import sweep
from posttrain_jax.core import files
from posttrain_jax.launch import gke, jobs, skypilot, slurm, tpu_vm
from posttrain_jax.launch.jobs import Job, Options, Platform
from posttrain_jax.runs import folder as run_folder
from posttrain_jax.settings import ConfigError

PLATFORMS: Mapping[str, tuple[Platform, Callable[[Job], dict[str, str]]]] = {
  "slurm": (slurm.PLATFORM, slurm.files),
  "tpu-vm": (tpu_vm.PLATFORM, tpu_vm.files),
  "gke": (gke.PLATFORM, gke.files),
  "skypilot": (skypilot.PLATFORM, skypilot.files),
}
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
  platform, _ = PLATFORMS[to]
  jobs.check(to, platform, options)
  if options.at_once and not is_sweep:
    raise ConfigError("--at_once is of points: write --sweep beside it")
  home, is_shared = Path.cwd(), to in SHARED
  root = str(home / Path(workdir).expanduser()) if is_shared else workdir
  points = sweep.expand(config, overrides) if is_sweep else [_single(config, overrides)]
  points = [sweep.checked(point) for point in points]
  folders = [f"{root}/{point.name}" if is_sweep else root for point in points]
  left = {
    number: point
    for number, (point, folder) in enumerate(zip(points, folders, strict=True))
    if not run_folder.is_complete(Path(folder), point.resolved)
  }
  if not left:
    return None
  name = jobs.label(name or Path(workdir).name)
  program = [sys.executable, "-m", "posttrain_jax"] if is_shared else ["posttrain"]
  summary = None
  if is_sweep:
    summary = [*program, "sweep", f"--config={config}", *overrides, f"--workdir={root}", "--jobs=0"]
  return Job(
    name=name,
    folder=(home / (out or f"jobs/{name}")).absolute(),
    home=home,
    points=left,
    workdirs={number: folders[number] for number in left},
    program=program,
    options=options,
    summary=summary,
  )


def _single(config: str, overrides: Sequence[str]) -> sweep.Point:
  resolved = settings.plain(settings.load(config, overrides))
  return sweep.Point("run", config, tuple(overrides), resolved, {})


def write(job: Job, to: str) -> list[Path]:
  """The files of a job, in its folder; those of an earlier launch there are gone."""
  written = PLATFORMS[to][1](job)  # which may refuse, before anything is there
  if job.folder.exists() and not (job.folder / jobs.SUBMIT).exists() and any(job.folder.iterdir()):
    raise ConfigError(f"{job.folder} holds something else than a job's files; name another --out")
  shutil.rmtree(job.folder / jobs.POINTS, ignore_errors=True)
  (job.folder / jobs.POINTS).mkdir(parents=True)
  for old in (*job.folder.glob("*.yaml"), *job.folder.glob("*.sh")):
    old.unlink()
  for number, point in job.points.items():
    written[job.config(number)] = json.dumps(point.resolved, indent=2) + "\n"
  for name, text in written.items():
    files.write_text(job.folder / name, text)
  return [job.folder / name for name in written]


def submit(job: Job, to: str) -> int:
  """The exit code of what hands the job over; what the site's tool says is printed as it says it.

  Raises:
    ConfigError: the tool is not on this machine.
  """
  platform, _ = PLATFORMS[to]
  if shutil.which(platform.tool) is None:
    raise ConfigError(
      f"{platform.tool} is not on this machine: {platform.absent}; or run bash {job.folder}/{jobs.SUBMIT} where it is"
    )
  return subprocess.run(["bash", str(job.folder / jobs.SUBMIT)], check=False).returncode
