"""What a shell completes: verbs, options, configs with their arguments, fields and their values."""

import pathlib
import shutil
import subprocess
import sys

import pytest

from posttrain_jax import __main__
from posttrain_jax.commands import completion

ROOT = pathlib.Path(__file__).parents[2]
CASES = [
  ("posttrain tr", ["train"]),
  ("posttrain ", [*__main__.COMMANDS]),
  ("posttrain train --dry", ["--dry_run"]),
  ("posttrain report --config.st", []),
  (
    "posttrain train --config=quick",
    ["--config=quickstart", "--config=quickstart_dpo", "--config=quickstart_rl"],
  ),
  ("posttrain train --config=sft:ad", ["--config=sft:adapter="]),
  ("posttrain train --config=sft:base=nf4,mo", ["--config=sft:base=nf4,model="]),
  (
    "posttrain train --config=sft --config.optimizer.w",
    [f"--config.optimizer.{name}=" for name in ("warmup", "weight_decay")],
  ),
  ("posttrain train --config=sft --config.optimizer.up", []),
  (
    "posttrain train --config=sft:optimizer=galore --config.optimizer.up",
    ["--config.optimizer.update_gap="],
  ),
  (
    "posttrain train --config=sft --config.optimizer.schedule=c",
    ["--config.optimizer.schedule=constant", "--config.optimizer.schedule=cosine"],
  ),
  ("posttrain train --config=sft --config.data.packing=f", ["--config.data.packing=false"]),
  ("posttrain train --config.opt", []),
  ("posttrain nothing --x", []),
  ("posttrain train --workdir=runs/s", []),
]


@pytest.mark.parametrize(("line", "expected"), CASES, ids=lambda c: str(c)[:60])
def test_the_words_that_a_line_may_become(line, expected):
  found = completion.words(line, __main__._options())
  assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(
  ("line", "expected"),
  [
    ("posttrain train --config=quickstart_", ["quickstart_dpo", "quickstart_rl"]),
    ("posttrain train --config=sft:base=nf4,mo", ["nf4,model="]),
    ("posttrain train --config=sft --config.optimizer.schedule=li", ["linear"]),
    ("posttrain train --config=sft --config.optimizer.lr", ["--config.optimizer.lr="]),
  ],
)
@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_them(line, expected, tmp_path):
  """By the function itself, whose replies leave out what readline has broken off."""
  command = tmp_path / "posttrain"
  command.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m posttrain_jax "$@"\n')
  command.chmod(0o755)
  script = (
    f'PATH={tmp_path}:$PATH\neval "$(posttrain completion bash)"\n'
    f'COMP_LINE="{line}" COMP_POINT={len(line)}\n_posttrain\nprintf "%s\\n" "${{COMPREPLY[@]}}"'
  )
  ran = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True)
  assert ran.stdout.split() == expected
