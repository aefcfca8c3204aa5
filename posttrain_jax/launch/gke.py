"""Kubernetes with JobSet, as GKE has it: a JobSet a point, a Job a slice, a pod a host; configs in a ConfigMap.

- A pod's code that is neither 75 nor that of a process that was killed or left behind fails the JobSet at once
  (`podFailurePolicy`, which wants `restartPolicy: Never`).  Any other end of a pod restarts all of them, up to
  maxRestarts, as no process can go on without the others.
- xpk's JobSets restart on 42 and 127 to 255 alone: give `xpk workload create` --restart-on-exit-codes=75.
- The shell becomes posttrain (`exec`): as process 1 it would keep SIGTERM to itself.
- JAX finds the hosts of a TPU slice in what GKE puts into the environment; others find host 0 by its name in the set.
"""

from __future__ import annotations

import math
import posixpath
import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from posttrain_jax.launch import jobs
from posttrain_jax.launch.jobs import Job, Options, Platform
from posttrain_jax.settings import ConfigError

PLATFORM = Platform(
  tool="kubectl",
  absent="install it (gcloud components install kubectl) and get the cluster's credentials",
  uses=(
    "nodes",
    "slices",
    "accelerator",
    "topology",
    "image",
    "volume",
    "spot",
    "grace",
    "restarts",
  ),
)
GO_ON = (*jobs.LEFT_BEHIND, jobs.KILLED, jobs.TERMINATED)
CONFIGS = "/posttrain"
TPU_HOST = 4  # chips of a host; a slice of fewer chips is one host
# GKE's names of TPUs, and a slice of each: those that fill space have three numbers, and wait for ever for two
TPUS = {
  "tpu-v4-podslice": "2x2x2",
  "tpu-v5-lite-podslice": "4x4",
  "tpu-v5p-slice": "2x2x2",
  "tpu-v6e-slice": "4x4",
  "tpu7x": "2x2x2",
}
LARGEST = 900_000  # bytes; a ConfigMap holds 1 MiB


def files(job: Job) -> dict[str, str]:
  """{name: text} of a job: the manifest of every point, and what submits it."""
  o = job.options
  if not o.image:
    raise ConfigError("--to=gke needs --image=NAME: a container in which posttrain is installed")
  _check_outlives(job)
  written = {}
  for number in sorted(job.points):
    written[f"{_name(job, number)}.yaml"] = jobs.as_yaml(
      [_configs(job, number), _jobset(job, number)]
    )
  listed = " ".join(f"--filename={name}" for name in written)
  return {
    **written,
    jobs.SUBMIT: f'#!/bin/bash\nset -u\ncd "$(dirname "$0")" || exit\nkubectl apply {listed}\n',
  }


def _volume(o: Options) -> tuple[str, str]:
  """(claim, path) of --volume."""
  claim, _, path = (o.volume or "").partition(":")
  if not claim or not path.startswith("/") or not path.strip("/"):
    asked = f"--volume={o.volume}" if o.volume else "--to=gke needs a --volume for its runs"
    raise ConfigError(f"{asked}: write CLAIM:/path, a volume claim and where it is")
  return claim, posixpath.normpath(path)


def _check_outlives(job: Job) -> None:
  """Raises ConfigError for a workdir that is in a pod's own files, which go with it."""
  claim, path = _volume(job.options)
  if not PurePosixPath(posixpath.normpath(job.root)).is_relative_to(path):
    inside = posixpath.join(path, PurePosixPath(job.root).name)
    raise ConfigError(
      f"--workdir={job.root} is not on --volume={claim}:{path}, and would go with its pod; write --workdir={inside}"
    )


def _name(job: Job, number: int) -> str:
  return f"{job.name}-{number}" if job.summary else job.name


def _configs(job: Job, number: int) -> dict[str, Any]:
  text = job.text(number)
  if len(text.encode()) > LARGEST:
    raise ConfigError(f"the config of {job.points[number].name} is too large for a ConfigMap")
  return {
    "apiVersion": "v1",
    "kind": "ConfigMap",
    "metadata": {"name": _name(job, number)},
    "immutable": True,  # what is launched later under this name is refused, and changes no job that waits
    "data": {PurePosixPath(job.config(number)).name: text},
  }


def _jobset(job: Job, number: int) -> dict[str, Any]:
  o, name = job.options, _name(job, number)
  hosts = _hosts(o)
  slices = o.slices or 1
  pods = {
    "parallelism": hosts,
    "completions": hosts,
    "completionMode": "Indexed",
    "backoffLimit": 0,
    "podFailurePolicy": {
      "rules": [
        {
          "action": "FailJob",
          "onExitCodes": {
            "containerName": "posttrain",
            "operator": "NotIn",
            "values": sorted(GO_ON),
          },
        }
      ]
    },
    "template": {"spec": _pod(job, number, hosts * slices)},
  }
  exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
  return {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {"name": name, **({"annotations": exclusive} if slices > 1 else {})},
    "spec": {
      "failurePolicy": {
        "maxRestarts": o.restarts,
        "restartStrategy": "BlockingRecreate",  # none starts beside one that still saves
        "rules": [
          {
            "name": "mistake",
            "action": "FailJobSet",
            "onJobFailureReasons": ["PodFailurePolicy"],
          }
        ],
      },
      "replicatedJobs": [{"name": "slice", "replicas": slices, "template": {"spec": pods}}],
    },
  }


def _pod(job: Job, number: int, processes: int) -> dict[str, Any]:
  o = job.options
  mounts = [{"name": "configs", "mountPath": f"{CONFIGS}/{jobs.POINTS}"}]
  volumes: list[dict[str, Any]] = [
    {"name": "configs", "configMap": {"name": _name(job, number)}},
    {"name": "memory", "emptyDir": {"medium": "Memory"}},
  ]
  mounts.append({"name": "memory", "mountPath": "/dev/shm"})
  claim, path = _volume(o)
  volumes.append({"name": "runs", "persistentVolumeClaim": {"claimName": claim}})
  mounts.append({"name": "runs", "mountPath": path})
  selector = dict(line.split("=", 1) for line in o.site)
  resource, chips = _accelerator(job)
  if o.accelerator:
    selector = {**_selected(job), **selector}
  if o.spot:
    selector["cloud.google.com/gke-spot"] = "true"
  container: dict[str, Any] = {
    "name": "posttrain",
    "image": o.image,
    "command": ["/bin/bash", "-c", _shell(job, number, processes)],
    "env": [{"name": name, "value": value} for name, value in jobs.environment(o).items()],
    "volumeMounts": mounts,
  }
  if resource:
    container["resources"] = {"requests": {resource: chips}, "limits": {resource: chips}}
  spec: dict[str, Any] = {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": o.grace,
    "containers": [container],
    "volumes": volumes,
  }
  if selector:
    spec["nodeSelector"] = selector
  if o.spot:
    spot = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"}
    spec["tolerations"] = [{**spot, "effect": "NoSchedule"}]
  return spec


def _shell(job: Job, number: int, processes: int) -> str:
  o = job.options
  lines = ["set -eu", *([o.setup] if o.setup else [])]
  if processes > 1 and _is_tpu(job.options):
    lines.append("export POSTTRAIN_DISTRIBUTED=auto")
  elif processes > 1:
    name = _name(job, number)
    lines += [
      f"export POSTTRAIN_COORDINATOR={name}-slice-0-0.{name}:{jobs.PORT}",
      f"export POSTTRAIN_PROCESSES={processes}",
      'export POSTTRAIN_PROCESS_ID="$JOB_COMPLETION_INDEX"',
    ]
  shell = "\n".join([*lines, f"exec {shlex.join(job.command(number, CONFIGS))}"])
  return shell.replace("$", "$$")  # Kubernetes makes one of two, and reads $(NAME) itself


def _is_tpu(o: Options) -> bool:
  return (o.accelerator or "").startswith("tpu")


def _accelerator(job: Job) -> tuple[str, int]:
  """(the resource that a pod asks for, how many)."""
  accelerator = job.options.accelerator
  if not accelerator:
    return "", 0
  if _is_tpu(job.options):
    return "google.com/tpu", min(_chips(job.options), TPU_HOST)
  count = accelerator.rpartition(":")[2]
  if not count.isdecimal() or not int(count):
    raise ConfigError(f"--accelerator={accelerator}: write nvidia-h100-80gb:8, GPUs of a host")
  return "nvidia.com/gpu", int(count)


def _selected(job: Job) -> Mapping[str, str]:
  accelerator = job.options.accelerator or ""
  if _is_tpu(job.options):
    return {
      "cloud.google.com/gke-tpu-accelerator": accelerator,
      "cloud.google.com/gke-tpu-topology": job.options.topology or "",
    }
  return {"cloud.google.com/gke-accelerator": accelerator.rpartition(":")[0]}


def processes(o: Options) -> int:
  return _hosts(o) * (o.slices or 1)


def _hosts(o: Options) -> int:
  """Of a slice: a TPU's follow from its topology."""
  if not _is_tpu(o):
    if o.topology or (o.slices or 1) > 1:
      raise ConfigError("--topology and --slices are a TPU's; write --nodes for hosts with GPUs")
    return o.nodes or 1
  if o.nodes:
    raise ConfigError("--nodes: the hosts of a TPU slice follow from --topology; leave it out")
  return math.ceil(_chips(o) / TPU_HOST)


def _chips(o: Options) -> int:
  """Of a slice."""
  if (example := TPUS.get(o.accelerator or "")) is None:
    raise ConfigError(f"--accelerator={o.accelerator}: GKE's TPUs here are {', '.join(TPUS)}")
  sizes = (o.topology or "").split("x")
  is_like = len(sizes) == example.count("x") + 1
  chips = math.prod(map(int, sizes)) if is_like and all(map(str.isdecimal, sizes)) else 0
  if not chips or (chips > TPU_HOST and chips % TPU_HOST):
    raise ConfigError(
      f"--topology={o.topology}: write the slice of {o.accelerator}, whole hosts of {TPU_HOST} chips, as in {example}"
    )
  return chips
