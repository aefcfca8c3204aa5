"""Slurm: one batch script; a sweep is an array of it.

- `--signal=B:USR1@grace` tells the script before the time limit.  It hands SIGTERM on with `scancel`, as an `srun` that
  gets one kills its processes.  They save and end with 75, and the script requeues its job.
- A job that somebody cancels ends with 75 too: only one that Slurm still calls RUNNING is requeued.
- Of several processes `srun` returns the highest code, which may hide a mistake's 1 behind 75: each writes its own.
- Several hosts: one process a host.  JAX finds the coordinator in Slurm's variables (`POSTTRAIN_DISTRIBUTED=auto`).  It
  would take one GPU a process, so that JAX_LOCAL_DEVICE_IDS names all of a host's.
"""

from __future__ import annotations

import re
import shlex

from posttrain_jax.launch import jobs
from posttrain_jax.launch.jobs import Job, Platform
from posttrain_jax.settings import ConfigError

PLATFORM = Platform(
  tool="sbatch",
  absent="launch from a login node of the cluster",
  uses=("nodes", "accelerator", "time", "at_once", "grace", "restarts"),
)
TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d\d))?(?::(\d\d))?", re.ASCII)
LONGEST_GRACE = 65535  # seconds; what --signal takes
SCRIPT = """\
#!/bin/bash
{directives}
# Written by posttrain launch.  75 (stopped when asked) goes on, another code stops.
set -u
cd {home} || exit 1
{setup}{exports}
{cases}
# the last task of an array has the array's own number, which would stand for all of them
me=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
me=${{me:-$SLURM_JOB_ID}}
# srun kills its processes when it is sent SIGTERM; scancel lets them save
trap 'scancel --signal=TERM "$me"' USR1
trap : TERM
{run} &
step=$!
while :; do
  wait "$step"
  code=$?
  kill -0 "$step" 2>/dev/null || break
done
{codes}if [ "$code" -ne {preempted} ]; then exit "$code"; fi
restarts=${{SLURM_RESTART_COUNT:-0}}
state=$(squeue --noheader --jobs="$me" --format=%T)
if [ "$state" != RUNNING ]; then
  echo "stopped when asked; Slurm calls the job $state, so it is not requeued here"
elif [ "$restarts" -ge {restarts} ]; then
  echo "stopped when asked; not requeued after $restarts restarts (--restarts={restarts})"
else
  echo "stopped when asked; requeued"
  scontrol requeue "$me"
fi
exit {preempted}
"""
# of each process; a mistake of one is the job's, whatever the others end with
CODES = """\
mistake=$(grep --invert-match --line-regexp --max-count=1 -e 0 {left} "$codes" 2>/dev/null)
if [ -n "$mistake" ]; then
  code=$mistake
elif [ "$code" -ne 0 ] && [ -s "$codes" ]; then
  code={preempted}
fi
rm -f "$codes"
"""
TASK = 'trap : TERM; "$@"; code=$?; echo "$code" >> "$codes"; exit "$code"'
SEVERAL = f"""\
# shellcheck disable=SC2016 # the shell of each process expands it
srun --kill-on-bad-exit=0 --wait=60 bash -c {shlex.quote(TASK)} task "${{command[@]}}\""""


def files(job: Job) -> dict[str, str]:
  """{name: text} of a job: the batch script, that of a sweep's summary, and what submits them."""
  _check_times(job.options)
  submit = 'job=$(sbatch --parsable job.sh) || exit\necho "job $job"\n'
  written = {"job.sh": _script(job)}
  if job.summary:
    written["summary.sh"] = _summary(job)
    submit += (
      'last=$(sbatch --parsable --dependency="afterany:${job%%;*}" summary.sh) || exit\n'
      'echo "its summary: job $last"\n'
    )
  return {
    **written,
    jobs.SUBMIT: f'#!/bin/bash\nset -u\ncd "$(dirname "$0")" || exit\n{submit}',
  }


def _check_times(o: jobs.Options) -> None:
  """Raises ConfigError where a start would be told to end before it has begun, for as often as it is requeued."""
  if o.grace > LONGEST_GRACE:
    raise ConfigError(f"--grace={o.grace}: Slurm takes at most {LONGEST_GRACE} seconds")
  if o.time is None:
    return
  limit = seconds(o.time)
  if 0 < limit <= o.grace:
    raise ConfigError(
      f"--time={o.time}: the run is told to save {o.grace} seconds before the end (--grace), which leaves nothing;"
      " write a longer time, or a shorter grace"
    )


def seconds(time: str) -> int:
  """A limit as Slurm reads it; 0 is none.

  >>> seconds("90"), seconds("1:30"), seconds("4:00:00"), seconds("1-4"), seconds("1-04:30")
  (5400, 90, 14400, 100800, 102600)

  Raises:
    ConfigError: Slurm would not read it.
  """
  if not (match := TIME.fullmatch(time)):
    raise ConfigError(f"--time={time}: write [days-]hours:minutes:seconds")
  days, *parts = match.groups()
  numbers = [int(part) for part in parts if part is not None]
  if days is not None:
    units = (3600, 60, 1)
  else:
    units = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}[len(numbers)]
  return int(days or 0) * 86400 + sum(n * unit for n, unit in zip(numbers, units))


def _directive(text: str) -> str:
  """A value as an #SBATCH line has it: sbatch takes quotes as a shell does, and \\ for what makes the next one plain.

  >>> _directive("/a b"), _directive("/a/b")
  ('"/a b"', '/a/b')
  """
  if re.fullmatch(r"[\w./=+:@,%-]+", text):
    return text
  return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def _log(job: Job, name: str) -> str:
  """Where output goes; what of the path could be one of Slurm's own patterns is written double."""
  return _directive(f"{str(job.folder).replace('%', '%%')}/{name}")


def _of_site(o: jobs.Options) -> list[str]:
  pairs = (line.partition("=") for line in o.site)
  return [f"--{key}={_directive(value)}" for key, _, value in pairs]


def _script(job: Job) -> str:
  o, nodes = job.options, job.options.nodes or 1
  lines = [
    f"--job-name={job.name}",
    f"--nodes={nodes}",
    "--ntasks-per-node=1",
    "--requeue",
    "--open-mode=append",
    f"--signal=B:USR1@{o.grace}",
    f"--output={_log(job, 'log-%A_%a.txt' if job.summary else 'log-%j.txt')}",
  ]
  if o.time:
    lines.append(f"--time={o.time}")
  gpus = _gpus(o.accelerator)
  if o.accelerator:
    lines.append(f"--gpus-per-node={_directive(o.accelerator)}")
  if job.summary:
    at_once = f"%{o.at_once}" if o.at_once else ""
    lines.append(f"--array={ranges(sorted(job.points))}{at_once}")
  lines += _of_site(o)
  return SCRIPT.format(
    directives="\n".join(f"#SBATCH {line}" for line in lines),
    home=shlex.quote(str(job.home)),
    setup=f"{o.setup}\n" if o.setup else "",
    exports=jobs.exports(o) + (_several(job, gpus) if nodes > 1 else ""),
    cases=_cases(job),
    run=SEVERAL if nodes > 1 else 'srun "${command[@]}"',
    codes=CODES.format(
      left=" ".join(f"-e {code}" for code in jobs.LEFT_BEHIND), preempted=jobs.PREEMPTED
    )
    if nodes > 1
    else "",
    preempted=jobs.PREEMPTED,
    restarts=o.restarts,
  )


def _several(job: Job, gpus: int) -> str:
  lines = ["", "export POSTTRAIN_DISTRIBUTED=auto"]
  if gpus:
    lines.append(f"export JAX_LOCAL_DEVICE_IDS={','.join(map(str, range(gpus)))}")
  folder = shlex.quote(f"{job.folder}/codes")
  return "\n".join([*lines, f'export codes={folder}"-$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}"'])


def _cases(job: Job) -> str:
  """The command of the array's task."""
  if not job.summary:
    ((number, _),) = job.points.items()
    return f"command=({shlex.join(job.command(number))})"
  cases = "\n".join(
    f"  {number}) command=({shlex.join(job.command(number))}) ;;" for number in sorted(job.points)
  )
  return f'case "$SLURM_ARRAY_TASK_ID" in\n{cases}\nesac'


def _summary(job: Job) -> str:
  assert job.summary is not None
  lines = [
    f"--job-name={job.name}-summary",
    "--ntasks=1",
    f"--output={_log(job, 'summary.txt')}",
    *_of_site(job.options),
  ]
  directives = "\n".join(f"#SBATCH {line}" for line in lines)
  setup = f"{job.options.setup}\n" if job.options.setup else ""
  return (
    f"#!/bin/bash\n{directives}\ncd {shlex.quote(str(job.home))} || exit 1\n{setup}"
    f"{shlex.join(job.summary)}\n"
  )


def _gpus(accelerator: str | None) -> int:
  """Of `4` or `h100:4`, as Slurm's --gpus-per-node has it; 0 where there are none."""
  if not accelerator:
    return 0
  count = accelerator.rpartition(":")[2]
  if not count.isdecimal() or not int(count):
    raise ConfigError(f"--accelerator={accelerator}: write GPUs of a host, as in 8 or h100:8")
  return int(count)


def ranges(numbers: list[int]) -> str:
  """An array's tasks.

  >>> ranges([0, 1, 2, 5, 7, 8])
  '0-2,5,7-8'
  """
  runs: list[list[int]] = []
  for number in numbers:
    if runs and number == runs[-1][1] + 1:
      runs[-1][1] = number
    else:
      runs.append([number, number])
  return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
