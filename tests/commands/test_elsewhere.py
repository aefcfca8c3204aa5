"""Online learning from answers that a server writes, as a user runs it: a process apart, killed and started anew."""

import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pyarrow.parquet
import pytest

from posttrain_jax.__main__ import main
from posttrain_jax.build import elsewhere
from posttrain_jax.train.signals import PREEMPTED
from tests import tiny
from tests.commands.processes import launched
from tests.commands.test_processes import assert_learned_alike
from tests.commands.test_rl import WORDS, lines
from tests.commands.test_train import environment

pytestmark = pytest.mark.usefixtures("in_float32", "one_device")
VERIFIER = """
def early(prompt, completion, example):
  return sum(ord(letter) for letter in completion) % 97 / 97
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("elsewhere")
  tiny.tiny_model_folder(folder / "model")
  rows = [{"prompt": f"Say {word}", "answer": word} for word in WORDS]
  tiny.write_jsonl(folder / "prompts.jsonl", rows)
  (folder / "verify.py").write_text(VERIFIER)
  return folder


class Server:
  """The server as a process; where it dies it is started anew, `lives` times."""

  def __init__(self, folder, lives=1, **faults):
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      self.port = free.getsockname()[1]
    self.url = f"http://127.0.0.1:{self.port}/v1"
    self.folder, self.faults, self.lives, self.started = folder, faults, lives, 0
    self.ended = False
    self._start()
    threading.Thread(target=self._watch, daemon=True).start()

  def _start(self):
    self.started += 1
    faults = self.faults if self.started < self.lives else {}
    command = [
      sys.executable,
      "-m",
      "tests.rollout.served",
      str(self.folder / "model"),
      str(self.port),
    ]
    self.process = subprocess.Popen(
      [*command, json.dumps(faults)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert self.process.stdout.readline().startswith("serving")

  def _watch(self):
    while not self.ended:
      if self.process.poll() is not None and self.started < self.lives:
        self._start()
      time.sleep(0.05)

  def names(self):
    with urllib.request.urlopen(f"{self.url}/models") as reply:
      return [one["id"] for one in json.load(reply)["data"]]

  def end(self):
    self.ended = True
    self.process.kill()
    self.process.wait()
    self.process.stdout.close()


@pytest.fixture
def serve(folder):
  servers = []

  def start(**how):
    servers.append(Server(folder, **how))
    return servers[-1]

  yield start
  for server in servers:
    server.end()


def command(folder, workdir, url, *changes):
  name = f"{folder / 'verify.py'}:early"
  small = [
    "steps=3",
    "batch.rows=2",
    "online.samples=3",
    "online.max_new_tokens=6",
    "online.rows=3",
  ]
  small += ["data.length=128", "optimizer.lr=1e-2", "adapter.r=2", f"reward.untested=({name!r},)"]
  config = f"rl:model={folder / 'model'},data={folder / 'prompts.jsonl'},reward={name},engine={url}"
  fields = (f"--config.{change}" for change in [*small, *changes])
  return ["train", f"--config={config}", f"--workdir={workdir}", *fields]


@pytest.mark.parametrize("wire", ["openai", pytest.param("sglang", marks=pytest.mark.slow)])
def test_a_server_that_dies_and_comes_back_amid_a_run_goes_on_with_its_adapter(
  folder, tmp_path, serve, wire
):
  server = serve(lives=2, dies_after=14)  # in the second batch
  changes = ["online.ahead=0", f"online.engine_wire={wire}"]
  assert main(command(folder, tmp_path / "run", server.url, *changes)) == 0
  assert server.started == 2
  told = lines(tmp_path / "run")
  assert [line["step"] for line in told] == [1, 2, 3]
  assert all(
    line["sampling/logp_difference"] < 1e-4 for line in told
  )  # the adapter of each batch was there
  assert all(line["sampling/staleness"] == 0 for line in told)
  assert told[-1]["rollout_corr/rollout_is_mean"] == pytest.approx(1, abs=1e-3)
  assert len([name for name in server.names() if name.startswith("posttrain-")]) <= elsewhere.KEPT


@pytest.mark.slow
def test_who_is_told_to_stop_does_not_wait_for_a_server_that_hangs(folder, tmp_path, serve):
  line = command(folder, tmp_path / "run", serve(lives=2, hangs_after=6).url, "online.ahead=0")
  process = subprocess.Popen([sys.executable, "-m", "posttrain_jax", *line], env=environment())
  try:
    while not (tmp_path / "run" / "completions" / "answers_00001.jsonl").exists():
      assert process.poll() is None
      time.sleep(0.1)
    time.sleep(1)
    process.terminate()
    assert process.wait(60) == PREEMPTED
  finally:
    process.kill()


@pytest.mark.slow
def test_a_batch_is_written_while_another_is_learned_from(folder, tmp_path, serve):
  assert main(command(folder, tmp_path / "run", serve().url, "steps=4", "optimizer.lr=1e-3")) == 0
  told = lines(tmp_path / "run")
  assert [line["sampling/staleness"] for line in told] == [0, 1, 1, 1]
  apart = [line["sampling/logp_difference"] for line in told]
  assert apart[0] < 1e-4 < min(apart[1:])  # by weights of the batch before, for which is corrected
  table = pyarrow.parquet.read_table(tmp_path / "run" / "completions" / "completions_00004.parquet")
  assert len(table) == 6


@pytest.mark.slow
def test_two_processes_ask_a_server_for_their_own_prompts_each(folder, tmp_path, serve):
  """The main one gives it the adapters; after its death whoever comes first does."""
  alike = ["optimizer.name=sgd", "optimizer.lr=0.1"]
  assert main(command(folder, tmp_path / "one", serve().url, *alike, "online.ahead=0")) == 0
  server = serve(lives=2, dies_after=14)  # in the second batch
  two = command(folder, tmp_path / "two", server.url, *alike, "online.ahead=0", "mesh.fsdp=-1")
  ahead = command(
    folder, tmp_path / "ahead", server.url, *alike, "optimizer.lr=0.01", "mesh.fsdp=-1"
  )
  launched([two, ahead], 2, environment())
  assert server.started == 2
  assert_learned_alike(tmp_path / "one", tmp_path / "two")
  assert [line["sampling/staleness"] for line in lines(tmp_path / "ahead")] == [0, 1, 1]
  assert (
    len([name for name in server.names() if name.startswith("posttrain-")]) <= 2 * elsewhere.KEPT
  )


def test_a_server_that_leaves_the_adapter_out_is_refused(
  folder, tmp_path, serve, monkeypatch, capsys
):
  server = serve()
  monkeypatch.setattr(
    elsewhere.Elsewhere,
    "_answer",
    lambda self, request, version: self.address.answer(request, "base", lambda: None),
  )
  assert main(command(folder, tmp_path / "run", server.url)) == 1
  assert "does not have the weights that are trained" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    (["online.temperature=0.7"], "write 1, where both are one"),
    (["online.top_p=0.9"], "no server says which tokens"),
    (["objective.importance=none"], "importance=token"),
    (["online.storage=int8"], "this program's own engine"),
    (["online.ahead=2"], "at most 1"),
    (["online.engine_key=NOT_THERE"], "has no NOT_THERE"),
    (["online.engine_patience=0.2"], "Connection refused"),
  ],
)
def test_what_a_server_cannot_do_is_refused(folder, tmp_path, capsys, changes, says):
  assert main(command(folder, tmp_path / "run", "http://127.0.0.1:9/v1", *changes)) == 1
  assert says in capsys.readouterr().err


def test_full_fine_tuning_has_no_adapter_to_send(folder, tmp_path, capsys):
  asked = command(folder, tmp_path / "run", "http://127.0.0.1:9/v1")
  asked = [
    part.replace("engine=", "adapter=none,engine=") for part in asked if "adapter.r" not in part
  ]
  assert main(asked) == 1
  assert "this run trains all parameters" in capsys.readouterr().err
