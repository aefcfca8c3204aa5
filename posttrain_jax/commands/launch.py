"""`posttrain launch`: a config, or its sweep, as jobs of Slurm, TPU VMs, GKE or SkyPilot."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from posttrain_jax.commands import common

TO = ("slurm", "tpu-vm", "gke", "skypilot")


def add(parser: argparse.ArgumentParser) -> None:
  common.add_config(parser)
  add_to = parser.add_argument
  add_to("--to", choices=TO, help="whose jobs")
  add_to("--workdir", metavar="DIR", help="the folder that becomes the run, as its hosts see it")
  add_to("--sweep", action="store_true", help="a job for each point of the config's sweep()")
  add_to("--dry_run", action="store_true", help="write the files, and hand nothing over")
  add_to("--out", metavar="DIR", help="where the files go; default jobs/NAME")
  add_to("--name", help="of the job; default the workdir's")
  add_to("--nodes", type=int, help="hosts of a run, a process each; of a TPU they follow")
  add_to("--slices", type=int, help="TPU slices of a run")
  add_to("--accelerator", metavar="NAME", help="as the platform writes it: h100:8, v5litepod-16")
  add_to("--topology", help="of a TPU slice on GKE: 4x4")
  add_to("--time", help="limit of one start on Slurm, [days-]hours:minutes:seconds")
  add_to("--grace", type=int, help="seconds that a run gets to save; default 180")
  add_to("--deadline", type=int, help="seconds without a step that are a hang; default 1800")
  add_to("--restarts", type=int, help="of a job that was preempted; default 100")
  add_to("--at_once", type=int, metavar="N", help="points at the same time")
  add_to("--setup", metavar="SHELL", help="before posttrain: source .venv/bin/activate")
  add_to("--image", help="a container, or the runtime of TPU VMs")
  add_to("--zone", help="of TPU VMs")
  add_to("--volume", metavar="CLAIM:/PATH", help="a volume claim on GKE, and where it is mounted")
  add_to("--spot", action="store_true", help="cheaper machines that may be taken away")
  add_to("--site", metavar="KEY=VALUE", action="append", help="what else the site's tool is told")


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
  from posttrain_jax import settings

  for flag, example in (("to", f"one of {', '.join(TO)}"), ("workdir", "the folder of the run")):
    if not vars(args)[flag]:
      raise settings.ConfigError(f"--{flag} is needed: {example}")
  from posttrain_jax.launch import jobs, start

  names = [field for field in jobs.Options.__dataclass_fields__ if field != "site"]
  asked = {name: vars(args)[name] for name in names if vars(args)[name] is not None}
  options = jobs.Options(**asked, site=tuple(args.site or ()))
  job = start.prepare(
    args.config,
    args.workdir,
    to=args.to,
    overrides=overrides,
    is_sweep=args.sweep,
    out=args.out,
    name=args.name,
    options=options,
  )
  if job is None:
    print(f"{args.workdir} is finished; there is nothing to launch")
    return 0
  for path in start.write(job, args.to):
    print(path)
  if args.dry_run:
    print(f"to hand them over: {start.by_hand(job)}")
    return 0
  return start.submit(job, args.to)
