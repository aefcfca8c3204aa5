"""What is learned from times where it is written: a critic, pairs, a teacher; turns, another engine, other prompts."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from posttrain_jax.__main__ import main
from posttrain_jax.data import templates
from posttrain_jax.runs import completions
from tests import tiny
from tests.commands.test_elsewhere import Server
from tests.commands.test_rl import adapter, lines, same
from tests.commands.test_train import environment

pytestmark = pytest.mark.usefixtures("in_float32", "one_device")
MINE = """
class Echo:
  def reset(self, seed=None):
    self.heard = []
    return " " + str(seed % 10)

  def step(self, action: str):
    self.heard.append(action)
    score = sum(map(ord, action)) % 97 / 97
    return "so", score, len(self.heard) == 3, False, {}

def early(prompt, completion, example):
  return sum(map(ord, completion)) % 97 / 97

def rare(prompt, completion, example):  # most groups agree
  return float(sum(map(ord, completion)) % 3 == 0)

def double(number: int) -> int:
  \"\"\"
  Doubles a number.

  Args:
    number: The number.
  \"\"\"
  return 2 * number
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("together")
  tiny.tiny_model_folder(folder / "model")
  config = json.loads((folder / "model" / "config.json").read_text())
  config["eos_token_id"] = [258, *range(70, 77)]  # so that a turn of random bytes ends
  (folder / "model" / "config.json").write_text(json.dumps(config))
  user = lambda word: [{"role": "user", "content": word}]
  said = lambda word: [{"role": "assistant", "content": word}]
  words = ("one", "two", "red", "sky", "sea", "hat")
  rows = [{"prompt": user(word), "completion": said(word)} for word in words]
  tiny.write_jsonl(folder / "prompts.jsonl", rows)
  (folder / "mine.py").write_text(MINE)
  return folder


@pytest.fixture(scope="module")
def server(folder):
  made = Server(folder)
  yield made
  made.end()


def command(folder, workdir, arguments, *changes, config="rl"):
  mine = f"{folder / 'mine.py'}"
  data = f"model={folder / 'model'},data={folder / 'prompts.jsonl'}"
  small = ["steps=2", "batch.rows=2", "online.max_new_tokens=64", "data.length=420"]
  small += ["optimizer.lr=1e-2", "adapter.r=2", "model.template=chatml"]
  if "Echo" in f"{arguments} {changes}":
    small += ["online.tool_tokens=8"]
  return [
    "train",
    f"--config={config}:{data},{arguments.replace('MINE', mine)}",
    f"--workdir={workdir}",
    *(f"--config.{change.replace('MINE', mine)}" for change in [*small, *changes]),
  ]


GROUP = "online.samples=3"
ECHO = ("online.environment=MINE:Echo",)
BOUNDED = "reward.ranges={'MINE:early': (0, 1)}"
BOUNDED_RARE = "reward.ranges={'MINE:rare': (0, 1)}"
CRITIC = ("critic.warmup=1", "online.passes=2", GROUP)
TEACHER = "teacher=MODEL"
# (config, its arguments, fields): all of them run
RUNS = {
  "a critic, turns": ("rl", "method=ppo,reward=environment,environment=MINE:Echo", CRITIC),
  "a critic, elsewhere": ("rl", "method=ppo,reward=MINE:early,engine=URL", CRITIC),
  "a critic, turns, elsewhere": (
    "rl",
    "method=ppo,reward=environment,environment=MINE:Echo,engine=URL",
    ("critic.trunk=shared", GROUP),
  ),
  "a critic, groups replaced, by pass rate, turns": (
    "rl",
    "method=ppo,reward=MINE:rare,environment=MINE:Echo",
    (GROUP, "online.dynamic=true", "online.curriculum=pass_rate", BOUNDED_RARE),
  ),
  "pairs, turns": ("rl", "method=online_dpo,reward=environment,environment=MINE:Echo", (GROUP,)),
  "pairs, elsewhere": ("rl", "method=online_dpo,reward=MINE:early,engine=URL", (GROUP,)),
  "pairs, groups replaced": (
    "rl",
    "method=online_dpo,reward=MINE:rare",
    (GROUP, "online.dynamic=true"),
  ),
  "groups replaced, by pass rate, turns": (
    "rl",
    "method=dapo,reward=MINE:rare,environment=MINE:Echo",
    (GROUP, "online.curriculum=pass_rate", "online.most_rounds=3", BOUNDED_RARE),
  ),
  "by pass rate, elsewhere": (
    "rl",
    "method=grpo,reward=MINE:early,engine=URL",
    (GROUP, "online.curriculum=pass_rate", "online.ahead=0", BOUNDED),
  ),
  "a teacher, turns": (
    "rl",
    f"method=grpo,reward=environment,environment=MINE:Echo,{TEACHER}",
    (GROUP,),
  ),
  "a teacher alone, turns": ("distil", f"{TEACHER},on_policy=1.0", ECHO),
  "a teacher alone, elsewhere": ("distil", f"{TEACHER},on_policy=1.0", ("online.engine=URL",)),
  "a teacher alone, rows of the data, elsewhere": (
    "distil",
    f"{TEACHER},on_policy=0.5,loss=jsd",
    ("online.engine=URL", "online.gold_rows=1"),
  ),
  "a teacher's advantage, elsewhere": (
    "distil",
    f"{TEACHER},loss=policy_gradient",
    ("online.engine=URL", "objective.importance=token"),
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", RUNS)
def test_what_is_learned_from_goes_with_where_it_is_written(folder, tmp_path, server, case):
  config, arguments, changes = RUNS[case]
  filled = lambda text: text.replace("URL", server.url).replace("MODEL", str(folder / "model"))
  run = command(folder, tmp_path / "run", filled(arguments), *map(filled, changes), config=config)
  assert main(run) == 0
  told = lines(tmp_path / "run")
  assert [line["step"] for line in told] == [1, 2]
  assert all(np.isfinite(line["loss"]) for line in told)
  if "turns" in case:
    assert max(row["turns"] for row in completions.rows(tmp_path / "run", 1)) > 1
    assert 0 < told[0]["turns/masked_share"] < 1
  if "elsewhere" in case:
    assert told[0]["sampling/staleness"] == 0
  if "critic" in case or "teacher" in case:
    assert told[0].get("sampling/logp_difference", 0) < 1e-4  # of the tokens that were written
  if "critic" in case:
    assert any(line.get("critic/moved", 0) > 0 for line in told)
  if "pairs" in case:
    assert told[0]["loss"] == pytest.approx(np.log(2), rel=1e-4)
    assert told[-1]["grad_norm"] > 0
  if case == "a teacher alone, turns":
    assert told[0]["loss"] == pytest.approx(0, abs=1e-5)  # of itself, in all turns


TURNS = "method=grpo,reward=environment,environment=MINE:Echo"
GOLD = ("online.gold_rows=1", "objective.sft_weight=0.5")
REFUSED = {
  "a critic and a teacher": (
    f"method=ppo,reward=MINE:early,{TEACHER}",
    (),
    "a critic's are of its",
  ),
  "a critic and rows": ("method=ppo,reward=MINE:early", GOLD, "beside groups, not a critic"),
  "pairs and a teacher": (f"method=online_dpo,{TEACHER}", (), "pairs have no advantage"),
  "pairs and rows": ("method=online_dpo,reward=MINE:early", GOLD[:1], "beside groups, not pairs"),
  "turns and rows": (TURNS, (GROUP, *GOLD), "know nothing of its tools"),
  "one answer to be replaced": (
    "method=ppo,reward=MINE:early",
    ("online.samples=1", "online.dynamic=true"),
    "one answer agrees with itself",
  ),
  "turns ahead": (
    f"{TURNS},engine=http://127.0.0.1:9/v1",
    ("online.ahead=1",),
    "is not asked ahead",
  ),
  "by pass rate ahead": (
    "method=grpo,reward=MINE:early,engine=http://127.0.0.1:9/v1",
    ("online.curriculum=pass_rate", BOUNDED),
    "write --config.online.ahead=0",
  ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused_before_anything_is_written(
  folder, tmp_path, case, capsys
):
  arguments, changes, sentence = REFUSED[case]
  arguments = arguments.replace("MODEL", str(folder / "model"))
  assert main(command(folder, tmp_path / "run", arguments, *changes)) in (1, 2)
  assert sentence in " ".join(capsys.readouterr().err.split())
  assert not (tmp_path / "run").exists()


def test_a_template_that_never_tells_of_tools_is_refused(folder, tmp_path, capsys):
  silent = templates.CHATML.replace("if tools", "if false")
  assert silent != templates.CHATML
  (tmp_path / "silent.jinja").write_text(silent)
  arguments = "method=grpo,reward=MINE:early,tools=MINE:double"
  changes = (GROUP, f"model.template={tmp_path / 'silent.jinja'}")
  assert main(command(folder, tmp_path / "run", arguments, *changes)) == 1
  assert "does not tell the model which tools there are" in " ".join(
    capsys.readouterr().err.split()
  )


class Own:
  """`posttrain serve` as a process on one port; it can be killed and started anew."""

  def __init__(self, folder, adapters):
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    self.url = f"http://127.0.0.1:{port}/v1"
    own = [f"--model={folder / 'model'}", f"--adapters={adapters}", f"--port={port}"]
    own += ["--allow_loading", "--length=128", "--dtype=float32", "--rows=4", "--slots=3"]
    self.command = [sys.executable, "-m", "posttrain_jax", "serve", *own]
    self.log = open(adapters.parent / "log", "w+")  # noqa: SIM115
    self.start()

  def start(self):
    said = dict(stdout=self.log, stderr=subprocess.STDOUT)
    self.process = subprocess.Popen(self.command, env=environment(), **said)

  def end(self):
    self.process.kill()
    self.process.wait()

  def anew_behind(self, file):
    """Killed once that file is there, and started anew."""
    while not file.exists():
      time.sleep(0.01)
    self.end()
    self.start()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_our_own_server_writes_and_may_be_killed_amid_a_run(folder, tmp_path, method):
  (tmp_path / "adapters").mkdir()
  server, run = Own(folder, tmp_path / "adapters"), tmp_path / "run"
  first = run / "completions" / "completions_00001.parquet"
  killer = threading.Thread(target=server.anew_behind, args=(first,), daemon=True)
  killer.start()
  arguments = f"method={method},reward=MINE:early,engine={server.url}"
  changes = (GROUP, "steps=3", "optimizer.lr=1e-3", f"online.engine_folder={tmp_path / 'adapters'}")
  try:
    assert main(command(folder, run, arguments, *changes)) == 0
    killer.join(10)
    assert not killer.is_alive()
  finally:
    server.end()
    server.log.close()
  told = lines(run)
  assert [line["step"] for line in told] == [1, 2, 3]
  assert told[0]["sampling/logp_difference"] < 1e-4


KILLED = {
  "a critic": (
    "method=ppo,reward=MINE:early",
    (*CRITIC, "online.kl_in_reward=0.1", "online.kl_target=0.5", "online.curriculum=pass_rate"),
  ),
  "turns": (TURNS, (GROUP,)),
}


@pytest.mark.slow
@pytest.mark.timeout(900)  # each starts several times, and compiles each time
@pytest.mark.parametrize("case", KILLED)
def test_a_run_that_is_killed_anywhere_ends_as_one_that_is_not(folder, tmp_path, case):
  """Both are processes of their own: they multiply in what the processor has, and are pinned to no core."""
  arguments, changes = KILLED[case]
  changes = [*changes, "steps=12", "checkpoint.every=2", "checkpoint.keep=9", BOUNDED]
  if case == "turns":
    changes.remove(BOUNDED)
  python, env = [sys.executable, "-m", "posttrain_jax"], environment()
  start = lambda where: [*python, *command(folder, tmp_path / where, arguments, *changes)]
  silent = dict(stdout=subprocess.DEVNULL, env=env)
  assert subprocess.run(start("whole"), **silent, check=False).returncode == 0
  rng = np.random.default_rng(0)
  files = lambda: {*(tmp_path / "killed").glob("completions/*")}
  kills = 0
  for _ in range(4):
    before = files()
    run = subprocess.Popen(start("killed"), **silent)
    while run.poll() is None and files() <= before:  # it starts and compiles
      time.sleep(0.02)
    time.sleep(float(rng.uniform(0, 1)))
    if run.poll() is not None:
      break
    run.send_signal(signal.SIGKILL)
    run.wait()
    kills += 1
  assert kills > 1
  assert subprocess.run(start("killed"), **silent, check=False).returncode == 0
  same(adapter(tmp_path / "whole"), adapter(tmp_path / "killed"))
  assert [line["step"] for line in lines(tmp_path / "killed")] == [*range(1, 13)]
  for number in completions.numbers(tmp_path / "whole"):
    one, other = (completions.rows(tmp_path / where, number) for where in ("whole", "killed"))
    assert one == other
