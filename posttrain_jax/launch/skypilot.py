"""SkyPilot: a managed job a point; it starts anew elsewhere after a preemption, and where a process ended with 75.

A mistake stops: `max_restarts_on_errors` is 0.  SkyPilot does not count restarts on the codes that are listed.
"""

from __future__ import annotations

import shlex
from typing import Any

from posttrain_jax.launch import jobs
from posttrain_jax.launch.jobs import Job, Platform
from posttrain_jax.settings import ConfigError

PLATFORM = Platform(
  tool="sky",
  absent="install it: pip install 'skypilot[gcp]', and run sky check",
  uses=("nodes", "accelerator", "image", "spot"),
)
FILES = "~/posttrain-job"


def files(job: Job) -> dict[str, str]:
  """{name: text} of a job: a task for each point, and what submits them."""
  if not job.options.accelerator:
    raise ConfigError("--to=skypilot needs --accelerator=NAME:COUNT, as in H100:8 or tpu-v5e-4")
  written, lines = {}, ["#!/bin/bash", "set -u", 'cd "$(dirname "$0")" || exit']
  for number in sorted(job.points):
    name = f"{job.name}-{number}" if job.summary else job.name
    written[f"{name}.yaml"] = jobs.as_yaml([_task(job, number, name)])
    lines.append(f"sky jobs launch --yes --detach-run --name={name} {name}.yaml || exit")
  return {**written, jobs.SUBMIT: "\n".join(lines) + "\n"}


def _task(job: Job, number: int, name: str) -> dict[str, Any]:
  o = job.options
  resources: dict[str, Any] = {
    "accelerators": o.accelerator,
    "use_spot": o.spot,
    "job_recovery": {
      "max_restarts_on_errors": 0,
      "recover_on_exit_codes": list(jobs.LEFT_BEHIND),
    },
  }
  if o.image:
    resources["image_id"] = f"docker:{o.image.removeprefix('docker:')}"
  for line in o.site:
    key, _, value = line.partition("=")
    resources[key] = value
  task: dict[str, Any] = {
    "name": name,
    "resources": resources,
    "num_nodes": o.nodes or 1,
    "file_mounts": {f"{FILES}/{job.config(number)}": f"./{job.config(number)}"},
    "envs": jobs.environment(o),
  }
  if o.setup:
    task["setup"] = o.setup
  # TPU pods are one node of several hosts: addresses are counted
  run = [
    "set -eu",
    'hosts=$(echo "$SKYPILOT_NODE_IPS" | wc -l)',
    'if [ "$hosts" -gt 1 ]; then',
    '  first=$(echo "$SKYPILOT_NODE_IPS" | head -n1)',
    f'  export POSTTRAIN_COORDINATOR="$first:{jobs.PORT}"',
    '  export POSTTRAIN_PROCESSES="$hosts"',
    '  export POSTTRAIN_PROCESS_ID="$SKYPILOT_NODE_RANK"',
    "fi",
  ]
  # ~ of a quoted word stays as it is: the command names the home by its variable
  command = job.command(number, "@FILES@")
  quoted = shlex.join(command).replace("@FILES@", '"$HOME"/' + FILES.removeprefix("~/"))
  task["run"] = "\n".join([*run, f"exec {quoted}"]) + "\n"
  return task
