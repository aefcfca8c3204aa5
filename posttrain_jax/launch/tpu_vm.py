"""Cloud TPU VMs: `submit.sh` makes the slice, runs a point on all its hosts, and makes it anew after a preemption.

It runs on the machine that launches, for as long as the points do.  A slice has a label by which the folder of files
that made it knows it again: one of the same name that somebody else made is left alone.

Each host writes down the code that its process ended with: `gcloud ... ssh` has no code of its own for several hosts.
JAX finds the hosts in the TPU's metadata (`POSTTRAIN_DISTRIBUTED=auto`).  `--workdir` lies on a disk that outlives the
slice (a mounted bucket or file store).
"""

from __future__ import annotations

import shlex

from posttrain_jax.launch import jobs
from posttrain_jax.launch.jobs import Job, Platform
from posttrain_jax.settings import ConfigError

PLATFORM = Platform(
  tool="gcloud",
  absent="install the Google Cloud CLI and run gcloud auth login",
  uses=("accelerator", "image", "zone", "spot", "restarts"),
)
HOST = 8  # of what an accelerator's name counts
THERE = "posttrain-job"  # in the home of each host
LABEL, KEY = (
  "posttrain-job",
  "slice-key",
)  # of a slice, and the file that holds what it is for those that are made here
SUBMIT = """\
#!/bin/bash
# Written by posttrain launch.  75 (stopped when asked) and a lost slice go on, another code stops.
set -u
cd "$(dirname "$0")" || exit
if [ ! -s {key} ]; then od -An -N8 -tx1 /dev/urandom | tr -d '[:space:]' > {key} || exit; fi
key=$(cat {key})
# what is launched from here later changes nothing of this job
files=$(mktemp --directory) || exit
trap 'rm -rf "$files"' EXIT
cp -R {points} run.sh "$files" && cd "$files" || exit
zone={zone}
tpu() {{ gcloud compute tpus tpu-vm "$@" --zone="$zone"; }}
found() {{ # sets state, and whose: nothing where there is no slice of that name
  IFS=, read -r state whose < <(
    tpu describe {name} --format='csv[no-heading](state,labels.{label})' 2>/dev/null
    echo # a line where there is none
  )
}}
on_all() {{ tpu ssh {name} --worker=all --command="$1"; }}

ready() {{
  found
  if [ -n "$state" ] && [ "$whose" != "$key" ]; then
    echo "the TPU VM {name} was not made from this folder and is left alone: launch with another --name, or delete it"
    echo "by gcloud compute tpus tpu-vm delete {name} --zone=$zone"
    exit 1
  fi
  case "$state" in
    READY) ;;
    "") {create} || return 1 ;;
    *) tpu delete {name} --quiet; {create} || return 1 ;;
  esac
  made=1
  on_all "mkdir -p {there} && rm -f {there}/code" &&
    tpu scp --recurse {points} run.sh {name}:{there}/ --worker=all
}}

train() {{ # POINT: 0 it is finished, 75 it goes on, else its mistake
  ready && on_all "bash {there}/run.sh $1"
  if [ -z "$made" ]; then
    echo "the slice could not be made"
    return 1
  fi
  codes=$(on_all "cat {there}/code" 2>/dev/null | tr -d '\\r' | grep --line-regexp '[0-9][0-9]*')
  [ -n "$codes" ] || return {preempted} # the slice is gone, and its hosts' codes with it
  mistake=$(grep --invert-match --line-regexp --max-count=1 -e 0 {left} <<< "$codes")
  if [ -n "$mistake" ]; then return "$mistake"; fi
  if grep --invert-match --line-regexp --quiet -e 0 <<< "$codes"; then return {preempted}; fi
}}

made=
code=0
points=({numbers})
for point in "${{points[@]}}"; do
  restarts=0
  while :; do
    train "$point"
    ended=$?
    if [ "$ended" -ne {preempted} ] || [ "$restarts" -ge {restarts} ]; then break; fi
    restarts=$((restarts + 1))
    echo "point $point goes on, restart $restarts"
    sleep "${{POSTTRAIN_PAUSE:-30}}"
  done
  if [ "$ended" -ne 0 ]; then code=$ended; fi
  echo "point $point ended with $ended"
done
found
if [ -n "$state" ] && [ "$whose" = "$key" ]; then tpu delete {name} --quiet; fi
exit "$code"
"""
RUN = """\
#!/bin/bash
# On each host: the point whose number is given, and the code that it ends with.
set -u
cd "$HOME" || exit 1
{setup}{exports}
export POSTTRAIN_DISTRIBUTED=auto
case "$1" in
{cases}
esac
trap : TERM HUP
"${{command[@]}}"
code=$?
echo "$code" > {there}/code
exit "$code"
"""


def processes(options: jobs.Options) -> int:
  """Hosts of a slice: one has up to eight chips of v5e and v6e, or eight cores, by which the others are counted.

  >>> processes(jobs.Options(accelerator="v5litepod-8")), processes(jobs.Options(accelerator="v5p-16"))
  (1, 2)
  """
  return max(1, _count(options.accelerator or "") // HOST)


def _count(accelerator: str) -> int:
  """What the accelerator's name counts; 0 where it counts nothing."""
  count = accelerator.rpartition("-")[2]
  return int(count) if count.isdecimal() else 0


def files(job: Job) -> dict[str, str]:
  """{name: text} of a job: what runs on every host, and what makes the slice and looks after it."""
  o = job.options
  for name, value, example in (
    ("accelerator", o.accelerator, "v5litepod-16"),
    ("zone", o.zone, "us-west4-a"),
    ("image", o.image, "v2-alpha-tpuv5-lite, the runtime of the VMs"),
  ):
    if not value:
      raise ConfigError(f"--to=tpu-vm needs --{name}, as in {example}")
  if not _count(o.accelerator or ""):
    raise ConfigError(
      f"--accelerator={o.accelerator}: write the slice, with its chips or cores, as in v5litepod-16"
    )
  create = ["tpu", "create", job.name, f"--accelerator-type={o.accelerator}"]
  create += [f"--version={o.image}", *(["--spot"] if o.spot else [])]
  labels = [line.removeprefix("labels=") for line in o.site if line.startswith("labels=")]
  create += [f"--{line}" for line in o.site if not line.startswith("labels=")]
  labelled = f'--labels={"".join(f"{shlex.quote(one)}," for one in labels)}{LABEL}="$key"'
  cases = "\n".join(
    f"  {number}) command=({_there(job, number)}) ;;" for number in sorted(job.points)
  )
  return {
    "run.sh": RUN.format(
      setup=f"{o.setup}\n" if o.setup else "",
      exports=jobs.exports(o),
      cases=cases,
      there=THERE,
    ),
    jobs.SUBMIT: SUBMIT.format(
      zone=shlex.quote(o.zone or ""),
      name=job.name,
      create=f"{shlex.join(create)} {labelled}",
      label=LABEL,
      key=KEY,
      points=jobs.POINTS,
      there=THERE,
      numbers=" ".join(map(str, sorted(job.points))),
      left=" ".join(f"-e {code}" for code in jobs.LEFT_BEHIND),
      preempted=jobs.PREEMPTED,
      restarts=o.restarts,
    ),
  }


def _there(job: Job, number: int) -> str:
  quoted = shlex.join(job.command(number, "@FILES@"))
  return quoted.replace("@FILES@", f'"$HOME"/{THERE}')
