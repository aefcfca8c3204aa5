"""A chain of stages: references, what is refused, what goes on after a kill; stages are a script's here."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from posttrain_jax import settings
from posttrain_jax.__main__ import main
from posttrain_jax.build import chain
from posttrain_jax.evals import chain_page
from posttrain_jax.settings import ConfigError
from tests import tiny
from tests.commands.test_train import environment

ROOT = pathlib.Path(__file__).parents[2]
# What a stage does: a line in calls.txt, then what its verb would leave.  A file `stop` or `fail` in the folder of
# the chain that holds its name stops it.
SCRIPT = """
import json, os, pathlib, signal, sys, time
verb, *given = sys.argv[1:]
where = {arg.partition("=")[0]: arg.partition("=")[2] for arg in given}
made = pathlib.Path(where.get("--workdir") or where["--out"])
home = made if verb == "train" else made.parent
root = home.parent
with (root / "calls.txt").open("a") as file:
  file.write(home.name + " " + " ".join([verb, *given]) + "\\n")
if (root / "fail").exists() and (root / "fail").read_text() == home.name:
  sys.exit("this is why it failed")
if (root / "hang").exists() and (root / "hang").read_text() == home.name:
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
  (root / "hangs.new").write_text(str(os.getpid()))
  os.rename(root / "hangs.new", root / "hangs")
  time.sleep(60)
if verb == "train":
  home.mkdir(exist_ok=True)
  config = json.loads((root.parent / "configs.json").read_text())[home.name]
  (home / "config.json").write_text(json.dumps({"config": config, "command": ""}))
  (home / "done.json").write_text(json.dumps({"steps": config["steps"], "final": {"loss": 0.5, "steps": 3}}))
  (home / "report.html").touch()
else:
  made.parent.mkdir(exist_ok=True)
  made.write_text("rows")
print("what it said")
"""
STAGES = """
def stages(arg=None):
  yield {"name": "cold", "train": "sft:data=rows.jsonl", "fields": {"steps": 3}}
  yield {"name": "answers", "sample": {"model": "{cold}", "task": "sql", "n": 2}}
  yield {"name": "again", "train": "sft:data={answers}", "fields": {"model.adapter": "{cold}", "steps": 4}}
"""


@pytest.fixture
def made(tmp_path):
  """(the chain's file, its folder, what runs a stage)."""
  script = tmp_path / "stage.py"
  script.write_text(SCRIPT)
  file = tmp_path / "mine.py"
  file.write_text(STAGES)
  return str(file), tmp_path / "runs", (sys.executable, "-S", str(script))


def run(file, folder, command, **options):
  said = []
  configs = {
    stage.name: stage.config
    for stage in chain.expand(settings.stages(file), folder)
    if stage.config is not None
  }
  (folder.parent / "configs.json").write_text(json.dumps(configs))
  code = chain.run(file, folder, command=command, say=said.append, **options)
  return code, said


def calls(folder):
  return [line.split()[0] for line in (folder / "calls.txt").read_text().splitlines()]


def test_stages_run_in_order_and_each_starts_from_what_others_made(made):
  _file, folder, _command = made
  code, said = run(*made)
  assert code == 0
  assert said[-1] == f"report: {folder / 'report.html'}"
  lines = (folder / "calls.txt").read_text().splitlines()
  assert calls(folder) == ["cold", "answers", "again"]
  assert f"--model={folder / 'cold'}" in lines[1]
  assert f"--config=sft:data={folder / 'answers' / 'answers.jsonl'}" in lines[2]
  assert f"--config.model.adapter={folder / 'cold'}" in lines[2]
  page = (folder / "report.html").read_text()
  assert "3 of 3 stages are finished" in page
  assert 'href="again/report.html"' in page
  assert "what it said" in page
  assert "0.5" in page


def test_a_finished_stage_is_skipped_and_a_failed_one_goes_on(made):
  _file, folder, _command = made
  folder.mkdir()
  (folder / "chain.json").write_text('{"stages": []}')
  (folder / "fail").write_text("answers")
  code, said = run(*made)
  assert code == 1
  assert "this is why it failed" in said[-1]
  assert calls(folder) == ["cold", "answers"]
  assert "1 of 3 stages are finished" in (folder / "report.html").read_text()
  (folder / "fail").unlink()
  code, said = run(*made)
  assert code == 0
  assert said[0] == "cold (train, 1 of 3): finished before"
  assert calls(folder) == ["cold", "answers", "answers", "again"]
  run(*made)
  assert len(calls(folder)) == 4


def test_a_chain_goes_on_however_its_folder_is_written(made, monkeypatch):
  file, folder, command = made
  assert run(*made)[0] == 0
  monkeypatch.chdir(folder.parent)
  assert run(file, pathlib.Path(folder.name), command)[0] == 0
  assert calls(folder) == ["cold", "answers", "again"]


def test_what_a_finished_stage_made_is_made_again_where_it_is_gone(made):
  _file, folder, _command = made
  run(*made)
  (folder / "answers" / "answers.jsonl").unlink()
  run(*made)
  assert calls(folder) == ["cold", "answers", "again", "answers"]


def test_a_stage_that_has_begun_may_not_be_changed_and_a_later_one_may(made):
  file, folder, _command = made
  folder.mkdir()
  (folder / "chain.json").write_text('{"stages": []}')
  (folder / "fail").write_text("answers")
  run(*made)
  path = pathlib.Path(file)
  path.write_text(STAGES.replace('"n": 2', '"n": 3'))
  with pytest.raises(ConfigError, match="whose stage 'answers' has begun as") as error:
    run(*made)
  assert "--n=2" in str(error.value)
  assert "--n=3" in str(error.value)
  (folder / "fail").unlink()
  path.write_text(STAGES.replace('"steps": 4', '"steps": 5'))
  assert run(*made)[0] == 0
  assert "--config.steps=5" in (folder / "calls.txt").read_text().splitlines()[-1]


def test_a_stage_that_has_begun_may_be_changed_once_what_was_made_so_is_gone(made):
  file, folder, _command = made
  folder.mkdir()
  (folder / "chain.json").write_text('{"stages": []}')
  (folder / "fail").write_text("again")
  assert run(*made)[0] == 1
  path = pathlib.Path(file)
  path.write_text(STAGES.replace('"n": 2', '"n": 3'))
  (folder / "fail").unlink()
  gone = [folder / "answers", folder / "again"]
  with pytest.raises(ConfigError, match=f"made so: {gone[0]}, {gone[1]}$"):
    run(*made)
  shutil.rmtree(gone[0])
  with pytest.raises(ConfigError, match=f"made so: {gone[1]}$"):  # of answers that are gone
    run(*made)
  shutil.rmtree(gone[1])
  code, said = run(*made)
  assert (code, said[0]) == (0, "cold (train, 1 of 3): finished before")
  assert calls(folder) == ["cold", "answers", "again", "answers", "again"]
  assert "--n=3" in (folder / "calls.txt").read_text().splitlines()[3]


def test_braces_around_what_is_no_name_are_the_stages_own(tmp_path):
  options = {"regex": {"pattern": r"\d{2} {1,3}"}}
  fields = {"reward.options": options, "reward.untested": ("regex",)}
  (stage,) = chain.expand(
    [{"name": "a", "train": "rl:data=sql,reward=regex+sql", "fields": fields}], tmp_path
  )
  assert stage.config["reward"]["options"] == options


def hanging(made, tmp_path):
  """A chain in a process of its own, in the middle of its second stage."""
  file, folder, command = made
  folder.mkdir()
  (folder / "chain.json").write_text('{"stages": []}')
  (folder / "hang").write_text("answers")
  configs = {s.name: s.config for s in chain.expand(settings.stages(file), folder) if s.config}
  (tmp_path / "configs.json").write_text(json.dumps(configs))
  code = textwrap.dedent(f"""
    import sys
    from posttrain_jax.build import chain
    sys.exit(chain.run({file!r}, {str(folder)!r}, command={command!r}))
  """)
  process = subprocess.Popen(
    [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, env={**os.environ}
  )
  while not (folder / "hangs").exists():
    time.sleep(0.05)
    assert process.poll() is None
  return process


def test_asked_to_stop_it_lets_its_stage_save_and_goes_on_later(made, tmp_path):
  folder, process = made[1], hanging(made, tmp_path)
  with pytest.raises(ConfigError, match="in use by another chain"):
    run(*made)
  process.send_signal(signal.SIGTERM)
  assert process.wait(60) == 75
  (folder / "hang").unlink()
  assert run(*made)[0] == 0
  assert calls(folder) == ["cold", "answers", "answers", "again"]


def test_killed_it_goes_on_once_its_stage_has_ended(made, tmp_path):
  folder, process = made[1], hanging(made, tmp_path)
  process.kill()
  process.wait(60)
  stage = int((folder / "hangs").read_text())
  with pytest.raises(ConfigError, match="by a run that one left"):
    run(*made)
  os.kill(stage, signal.SIGKILL)
  (folder / "hang").unlink()
  ends = time.monotonic() + 30
  while True:
    try:
      code, said = run(*made)
      break
    except ConfigError:  # the stage is not gone yet
      assert time.monotonic() < ends
      time.sleep(0.05)
  assert code == 0
  assert said[0] == "cold (train, 1 of 3): finished before"
  assert calls(folder) == ["cold", "answers", "answers", "again"]


WRONG = {
  "no stages": ("  yield from ()", "the chain has no stages"),
  "no name": ('  yield {"train": "sft"}', "stage 1: name=None"),
  "a name that is no folder's": (
    '  yield {"name": "a/b", "train": "sft"}',
    "write letters, digits",
  ),
  "a name twice": (
    '  yield {"name": "a", "train": "sft"}\n  yield {"name": "a", "train": "sft"}',
    "there is a stage 'a' before it",
  ),
  "two verbs": ('  yield {"name": "a", "train": "sft", "sample": {}}', "'sample' is|2 things"),
  "no verb": ('  yield {"name": "a"}', "it does 0 things"),
  "an unknown key": ('  yield {"name": "a", "train": "sft", "field": {}}', "'field' is none"),
  "fields of a sample": ('  yield {"name": "a", "sample": {}, "fields": {}}', "'fields' is none"),
  "a later stage": (
    '  yield {"name": "a", "train": "sft:data={b}"}\n  yield {"name": "b", "sample": {}}',
    r"\{b\} is no stage before it; it is the first",
  ),
  "itself": ('  yield {"name": "a", "sample": {"model": "{a}"}}', r"\{a\} is no stage before it"),
  "an unknown field": (
    '  yield {"name": "a", "train": "sft", "fields": {"optimizer.lrr": 1}}',
    "stage 'a': unknown config key 'optimizer.lrr'",
  ),
  "an unknown argument": ('  yield {"name": "a", "train": "sft:dat=x"}', "stage 'a': .*'dat'"),
  "out": ('  yield {"name": "a", "sample": {"out": "x"}}', "without out"),
  "no stage": ('  yield "sft"', "stage 1 is 'sft'; write a dict of its name"),
  "nothing": ('  return {"name": "a"}.clear()', r"stages\(arg\) returns None; write `yield`"),
  "fields in a list": (
    '  yield {"name": "a", "train": "sft", "fields": ["steps=1"]}',
    "write a dict .* fields of a training as a dict",
  ),
  "a training that its command refuses": (
    '  yield {"name": "a", "train": "rl:data=sql,reward=sql", "fields": {"online.samples": 1}}',
    "stage 'a': online.samples=1: an answer is compared with others",
  ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_not_understood_is_refused_before_anything_runs(wrong, tmp_path):
  body, sentence = WRONG[wrong]
  file = tmp_path / "mine.py"
  file.write_text(f"def stages(arg=None):\n{body}\n")
  with pytest.raises(ConfigError, match=sentence):
    chain.run(str(file), tmp_path / "runs")
  assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
  ("option", "sentence"),
  [
    ('"nn": 2', "unrecognized arguments: --nn=2"),
    ('"reward": ["number", "length"]', "reward is a list and takes one value; write a text"),
  ],
)
def test_an_option_that_a_stage_s_command_refuses_is_told_with_the_stage(
  tmp_path, capsys, option, sentence
):
  file = tmp_path / "mine.py"
  sample = f'{{"model": "m", {option}}}'
  file.write_text(f'def stages(arg=None):\n  yield {{"name": "a", "sample": {sample}}}\n')
  assert main(["chain", f"--config={file}", f"--workdir={tmp_path / 'runs'}"]) == 1
  assert f"stage 'a': posttrain sample: {sentence}" in " ".join(capsys.readouterr().err.split())
  assert not (tmp_path / "runs").exists()


def test_a_list_is_an_option_many_times_and_what_is_false_is_left_out(tmp_path):
  asked = {"model": "m", "stop": ["\n", "###"], "unsafe_code": False}
  (stage,) = chain.expand([{"name": "a", "sample": asked}], tmp_path)
  assert stage.line[:-1] == ("sample", "--model=m", "--stop=\n", "--stop=###")


def test_a_folder_of_something_else_is_left_alone(made):
  file, folder, _command = made
  folder.mkdir()
  (folder / "notes.txt").touch()
  with pytest.raises(ConfigError, match="holds no chain"):
    chain.run(file, folder)
  with pytest.raises(ConfigError, match="which commas, braces"):
    chain.run(file, folder.parent / "a,b")


@pytest.mark.parametrize("name", settings.CHAINS)
def test_the_chains_that_come_with_posttrain_are_understood(name, tmp_path):
  stages = chain.expand(settings.stages(name), tmp_path / "runs")
  assert [stage.verb for stage in stages] == [
    *("train", "train", "sample", "train", "train", "student", "train")
  ]


def test_a_config_of_a_run_is_no_chain_and_the_other_way_round(tmp_path):
  with pytest.raises(ConfigError, match=r"no stages\(arg\).*`posttrain train` reads it"):
    chain.run("sft", tmp_path / "runs")
  with pytest.raises(ConfigError, match=r"no get_config.*`posttrain chain` reads it"):
    settings.load(str(ROOT / "configs" / "chain.py"))


def test_the_page_says_what_each_stage_changed_of_what_it_was_made_of(tmp_path):
  made = {
    "cold": ({"accuracy/before": 0.1, "accuracy/after": 0.4}, []),
    "small": ({}, ["cold"]),
    "one": ({"accuracy/after": 0.35}, ["small"]),
    "one-more": ({"accuracy/after": 0.5}, ["one"]),
    "two": ({"accuracy/after": 0.6}, ["small"]),
    "three": ({"loss": 1.0}, ["small"]),
    "apart": ({"accuracy/after": 0.2}, []),
    "asked": ({"accuracy/before": 0.3, "accuracy/after": 0.4}, ["two"]),
    "last": ({"accuracy/after": 0.7}, ["cold", "one-more"]),
  }
  stages = [
    {"name": name, "line": [f"--a={tmp_path / of}/b" for of in named] + [f"--workdir={tmp_path / name}"]}
    for name, (_, named) in made.items()
  ]  # fmt: skip
  changes = chain_page._changes(tmp_path, stages, [known for known, _ in made.values()])
  assert dict(zip(made, changes, strict=True)) == {
    "cold": "+0.300",
    "small": "",
    "one": "-0.050",
    "one-more": "+0.150",
    "two": "+0.200",
    "three": "",
    "apart": "",
    "asked": "+0.100",
    "last": "+0.200",
  }


def test_the_experiment_on_half_the_layers_is_understood(tmp_path):
  stages = chain.expand(settings.stages(str(ROOT / "experiments" / "half_layers.py")), tmp_path)
  assert [stage.name for stage in stages[3:]] == [
    "gold",
    "traces",
    "off_policy",
    "on_policy",
    "more_traces",
    "more_on_policy",
  ]


REAL = """
MODEL, ROWS, VERIFY = {model!r}, {rows!r}, {verify!r}
SMALL = {{"data.length": 96, "batch.rows": 4, "optimizer.lr": 1e-2}}
ANSWERS = {{"online.samples": 2, "online.max_new_tokens": 6, "batch.rows": 2, "data.length": 128}}

def stages(arg=None):
  start = f"model={{MODEL}},data={{ROWS}}"
  rewarded = f"rl:{{start}},reward={{VERIFY}}:early"
  free = {{"reward.untested": (f"{{VERIFY}}:early",), **ANSWERS}}
  yield {{"name": "cold", "train": f"sft:{{start}}", "fields": {{**SMALL, "steps": 2}}}}
  yield {{"name": "rl", "train": rewarded, "fields": {{**free, "steps": 2, "model.adapter": "{{cold}}"}}}}
  asked = {{"model": "{{rl}}", "data": ROWS, "reward": f"{{VERIFY}}:early", "untested": f"{{VERIFY}}:early"}}
  yield {{"name": "answers", "sample": {{**asked, "n": 2, "keep": "all", "max_new_tokens": 6}}}}
  again = {{**SMALL, "steps": 2, "model.adapter": "{{rl}}"}}
  yield {{"name": "again", "train": f"sft:model={{MODEL}},data={{{{answers}}}}", "fields": again}}
  yield {{"name": "small", "student": {{"model": "{{again}}", "layers": 1}}}}
  taught = f"distil:model={{{{small}}}},teacher={{{{again}}}},data={{ROWS}},adapter=none,on_policy=0.5"
  yield {{"name": "student", "train": taught, "fields": {{"steps": 2, "online.max_new_tokens": 6}}}}
"""


@pytest.mark.slow
@pytest.mark.timeout(900)  # six commands, each of which starts anew
def test_real_stages_run_to_their_end(tmp_path, monkeypatch):
  """On a tiny model: fine-tuning, reinforcement, sampling, fine-tuning, a student, distillation into it."""
  for name, value in environment().items():  # one device
    monkeypatch.setenv(name, value)
  model = tiny.tiny_model_folder(tmp_path / "model")
  rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(12))
  verify = tmp_path / "verify.py"
  verify.write_text(
    "def early(prompt, completion, example):\n  return sum(map(ord, completion)) % 97 / 97\n"
  )
  file, folder = tmp_path / "mine.py", tmp_path / "runs"
  file.write_text(REAL.format(model=str(model), rows=str(rows), verify=str(verify)))
  said = []
  assert chain.run(str(file), folder, say=said.append) == 0, said
  config = json.loads((folder / "small" / "model" / "config.json").read_text())
  assert config["num_hidden_layers"] == 1
  assert (folder / "student" / "model" / "model.safetensors").exists()
  assert "6 of 6 stages are finished" in (folder / "report.html").read_text()
  again = []
  assert chain.run(str(file), folder, say=again.append) == 0
  assert [line.endswith("finished before") for line in again[:-1]] == [True] * 6
