"""What every draw of online learning must do: write, learn from it, and go on where it stopped; or be refused."""

import pathlib
from typing import Any

import numpy as np

from tests.compose import check as check_lib
from tests.compose import online, road
from tests.compose.draws import Draw

# between sampler and trainer, in nats a token, of products in float32
DRIFT = {"auto": 1e-4, "bfloat16": 0.02, "int8": 0.1}


def check(d: Draw, shared: pathlib.Path, scratch: pathlib.Path) -> dict[str, Any]:
  """As `check.check`, of `online.draw`."""
  stages = dict(steps=_steps, resume=check_lib.resumes)
  return check_lib.checked(d, online.command(d, shared), stages, shared, scratch)


def _steps(d, config, folder, whole: road.Result, scratch):
  """Every step is told in numbers, by a sampler that computes as the trainer does; what has a gradient moves."""
  lines = check_lib.lines(folder)
  if [line["step"] for line in lines] != [*range(1, config.steps + 1)]:
    yield f"the steps told are {[line['step'] for line in lines]}"
  bad = {name for line in lines for name, value in line.items() if not np.isfinite(value)}
  if bad:
    yield f"not finite: {', '.join(sorted(bad))}"
  if any(line["skipped"] for line in lines):
    yield "updates left out"
  drift = max(line.get("sampling/logp_difference", 0.0) for line in lines)
  if drift > DRIFT[d["storage"]]:
    yield f"sampler and trainer differ by {drift:.1e} nats a token"
  moved = check_lib.change(whole.trained, whole.first)
  if any(line["grad_norm"] > 1e-6 for line in lines[:-1]) and not moved:
    yield "there was a gradient, and nothing that is trained moved"
