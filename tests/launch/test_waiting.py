"""Jobs that wait, and names that a shell, a scheduler or Kubernetes would make something else of."""

import json
import pathlib
import re
import shlex
import subprocess

import pytest

from posttrain_jax.launch import jobs, start
from posttrain_jax.launch.jobs import Options
from posttrain_jax.settings import ConfigError
from tests.launch.test_files import ASKED, here, manifests, pod, prepared, written  # noqa: F401


def test_a_job_that_waits_reads_what_it_was_launched_with(here):  # noqa: F811
  waits, _ = written("slurm", workdir="runs/a")
  changed = ["--config.optimizer.lr=0.5"]
  later = start.prepare("sft", "runs/a", to="slurm", overrides=changed, options=Options())
  start.write(later, "slurm")
  read = lambda job: json.loads((job.folder / job.config(0)).read_text())["optimizer"]["lr"]
  assert (read(waits), read(later)) == (2e-4, 0.5)


@pytest.mark.parametrize("to", ASKED)
def test_two_workdirs_are_not_one_job(to, here):  # noqa: F811
  first, texts = written(to, workdir="/runs/first/lora")
  with pytest.raises(ConfigError, match=r"holds the job of --workdir=/runs/first/lora.*--name"):
    written(to, workdir="/runs/second/lora")
  assert {path.name: path.read_text() for path in start.write(first, to)} == texts


def test_a_job_whose_owner_cannot_be_read_is_left_alone(here):  # noqa: F811
  job, _ = written("slurm")
  (job.folder / start.OWNER).write_text("{")
  with pytest.raises(ConfigError, match=r"job\.json is damaged"):
    written("slurm")


@pytest.mark.parametrize(
  "name", ["o $(touch pwned) `touch pwned`", r"""it's "a" \ %j ü""", "$HOME #x", "100%"]
)
def test_a_folder_of_any_name_is_a_word_in_the_scripts(name, here):  # noqa: F811
  options = Options(**ASKED["slurm"])
  job = start.prepare("sft", f"{name}/run", to="slurm", out=str(here / name), options=options)
  start.write(job, "slurm")
  lines = (job.folder / "job.sh").read_text().splitlines()
  (line,) = [line for line in lines if line.startswith("export codes=")]
  said = subprocess.run(
    ["bash", "-c", f'{line}; printf %s "$codes"'],
    env={"SLURM_JOB_ID": "7"},
    cwd=here,
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  assert said == f"{job.folder}/codes-7-0"
  (line,) = [line for line in lines if line.startswith("#SBATCH --output=")]
  (word,) = shlex.split(line.removeprefix("#SBATCH "), comments=True)
  assert word.removeprefix("--output=").replace("%%", "%") == f"{job.folder}/log-%j.txt"
  assert shlex.split(start.by_hand(job)) == ["bash", f"{job.folder}/{jobs.SUBMIT}"]
  assert not list(here.rglob("pwned"))


def test_what_kubernetes_expands_reaches_the_shell_as_it_was(here):  # noqa: F811
  workdir = "/runs/$(POSTTRAIN_DEADLINE)/$$a"
  _, texts = written("gke", workdir=workdir, setup='echo "$(id -u)"')
  (jobset,) = [d for d in manifests(texts) if d["kind"] == "JobSet"]
  (container,) = pod(jobset)["containers"]
  shell = expanded(container["command"][2], {"POSTTRAIN_DEADLINE": "1800"})
  assert 'echo "$(id -u)"' in shell
  assert shlex.quote(f"--workdir={workdir}") in shell


def expanded(text, variables):
  """As kubelet does with a container's command: $$ is $, and $(NAME) a variable that is known."""
  known = lambda match: "$" if match[0] == "$$" else variables.get(match[1], match[0])
  return re.sub(r"\$\$|\$\(([A-Za-z_]\w*)\)", known, text)


def test_a_config_of_a_cluster_does_not_change_under_a_job(here):  # noqa: F811
  job, texts = written("gke")
  (configs,) = [d for d in manifests(texts) if d["kind"] == "ConfigMap"]
  assert configs["immutable"] is True
  assert [*configs["data"]] == [pathlib.Path(job.config(0)).name]


@pytest.mark.parametrize(
  ("to", "options", "said"),
  [
    ("slurm", dict(time="3:00", grace=180), "--time=3:00: the run is told to save 180 seconds"),
    ("slurm", dict(grace=70_000), "--grace=70000: Slurm takes at most 65535"),
    ("slurm", dict(site=("a=b\n#SBATCH --x",)), "--site='a=b.*without line breaks"),
    ("gke", dict(volume=":/runs"), "write CLAIM:/path"),
    (
      "gke",
      dict(accelerator="nvidia-h100-80gb:0", topology=None, slices=None),
      "write nvidia-h100-80gb:8",
    ),
  ],
)
def test_what_would_wait_in_vain_is_said(to, options, said, here):  # noqa: F811
  with pytest.raises(ConfigError, match=said):
    prepared_and_written(to, options)
  assert not (here / "jobs").exists()


@pytest.mark.parametrize(
  ("to", "options"),
  [
    ("slurm", {}),
    ("tpu-vm", {}),
    ("gke", {}),
    ("gke", dict(topology="2x2")),  # in two slices
    ("skypilot", {}),
  ],
)
@pytest.mark.parametrize("config", ["rl", "sft"])
def test_what_runs_in_one_process_is_launched_on_one_host(to, options, config, here):  # noqa: F811
  asked = Options(**{**ASKED[to], **options})
  samples = ["--config.eval.samples=2"]
  with pytest.raises(ConfigError, match=r"eval\.samples generates text in one process"):
    start.prepare(config, "/runs/a", to=to, overrides=samples, options=asked)
  assert start.prepare(config, "/runs/a", to=to, options=asked)


@pytest.mark.parametrize(
  ("to", "options"),
  [
    ("slurm", dict(nodes=None)),
    ("tpu-vm", dict(accelerator="v5litepod-8")),
    ("gke", dict(topology="2x2", slices=None)),
    ("skypilot", dict(nodes=1)),
  ],
)
def test_one_host_takes_what_runs_in_one_process(to, options, here):  # noqa: F811
  asked, samples = Options(**{**ASKED[to], **options}), ["--config.eval.samples=2"]
  assert start.prepare("rl", "/runs/a", to=to, overrides=samples, options=asked)


def test_sections_that_do_not_fit_are_refused_before_they_wait(here):  # noqa: F811
  asked = ["--config.batch.accumulate=3"]
  with pytest.raises(ConfigError, match=r"batch\.rows=8 does not split"):
    start.prepare("sft", "/runs/a", to="slurm", overrides=asked, options=Options())


def prepared_and_written(to, options):
  return start.write(prepared(to, **options), to)


def test_a_limit_of_any_length_is_no_limit(here):  # noqa: F811
  _, texts = written("slurm", time="0")
  assert "#SBATCH --time=0\n" in texts["job.sh"]
