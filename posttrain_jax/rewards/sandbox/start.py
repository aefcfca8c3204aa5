"""One program in one sandbox, from the start of its process to its outcome."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
from collections.abc import Mapping

from posttrain_jax.rewards.sandbox import launch, slots, supervise
from posttrain_jax.rewards.sandbox.outcome import Limits, Outcome


def once(
  isolation: str,
  order: Mapping[str, object],
  *,
  stdin: bytes = b"",
  files: Mapping[str, bytes] | None = None,
  limits: Limits,
  deadline: float,
) -> Outcome:
  """Waits for a free slot, then runs.  order: `code` or `argv`, and `tests` for `inside.tests.run`."""
  with slots.shared().one() as uid:
    nonce = secrets.token_hex(16)
    told = {"tests": None, **order, "nonce": nonce}
    told["files"] = {name: data.hex() for name, data in (files or {}).items()}
    return _run(isolation, uid, json.dumps(told).encode(), stdin, limits, deadline, nonce)


def _run(
  isolation: str,
  uid: int | None,
  order: bytes,
  stdin: bytes,
  limits: Limits,
  deadline: float,
  nonce: str,
) -> Outcome:
  theirs, ours = _pipes()
  try:
    process = subprocess.Popen(
      launch.command(isolation, limits, uid, theirs["order"], theirs["verdict"], theirs["filter"]),
      stdin=theirs["stdin"],
      stdout=theirs["stdout"],
      stderr=theirs["stderr"],
      pass_fds=[theirs[name] for name in ("order", "verdict", "filter")],
      env=launch.ENVIRONMENT,
      cwd="/",
      start_new_session=True,
    )
  except BaseException:
    _close(ours)
    raise
  finally:
    _close(theirs)
  supervisor = supervise.Supervisor(process, limits, deadline, nonce)
  for name, data in (("stdin", stdin), ("order", order), ("filter", _filter(isolation))):
    supervisor.writes(ours[name], data)
  for name in ("stdout", "stderr", "verdict"):
    supervisor.reads(ours[name])
  try:
    return supervisor.outcome(ours["stdout"], ours["stderr"], ours["verdict"])
  finally:
    supervisor.close()


def _filter(isolation: str) -> bytes:
  return launch.filter_of_namespaces() if isolation == "bubblewrap" else b""


def _pipes() -> tuple[dict[str, int], dict[str, int]]:
  """(the sandbox's ends, ours); Python's descriptors are closed in every other child."""
  theirs, ours = {}, {}
  for name in ("stdin", "order", "filter"):
    theirs[name], ours[name] = os.pipe()
  for name in ("stdout", "stderr", "verdict"):
    ours[name], theirs[name] = os.pipe()
  return theirs, ours


def _close(descriptors: Mapping[str, int]) -> None:
  for descriptor in descriptors.values():
    os.close(descriptor)
