"""Online learning in an environment of several turns, as a user runs it, on a tiny model."""

import json

import numpy as np
import pyarrow.parquet
import pytest

from posttrain_jax.__main__ import main
from posttrain_jax.build import online, turns
from tests import tiny
from tests.commands.test_rl import adapter, lines, same

pytestmark = pytest.mark.usefixtures("in_float32", "one_device")
ENVIRONMENT = """
class Echo:
  def reset(self, seed=None):
    self.heard = []
    return " " + str(seed % 10)

  def step(self, action: str):
    self.heard.append(action)
    score = sum(map(ord, action)) % 97 / 97
    return "so", score, len(self.heard) == 3, False, {}

class Asks(Echo):
  def reset(self, level, seed, **row):
    return ""

class Raises(Echo):
  def step(self, action: str):
    raise ValueError("broken")

class Down(Echo):
  def reset(self, seed=None):
    import pathlib
    if pathlib.Path(__file__).with_name("down").exists():
      raise ConnectionError("no server")
    return super().reset(seed)

def heard(environments, completions, **columns):
  for e, c in zip(environments, completions):  # a turn that was cut is heard by nobody
    assert 0 <= sum(m["role"] == "assistant" for m in c) - len(e.heard) <= 1
  return [sum(map(ord, "".join(e.heard))) % 89 / 89 for e in environments]

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
  folder = tmp_path_factory.mktemp("turns")
  tiny.tiny_model_folder(folder / "model")
  config = json.loads((folder / "model" / "config.json").read_text())
  # so that a turn of random bytes ends
  config["eos_token_id"] = [258, *range(70, 84)]
  (folder / "model" / "config.json").write_text(json.dumps(config))
  rows = [{"prompt": [{"role": "user", "content": word}]} for word in ("one", "two", "red", "sky")]
  tiny.write_jsonl(folder / "prompts.jsonl", rows)
  (folder / "mine.py").write_text(ENVIRONMENT)
  return folder


def command(folder, workdir, *changes, name="Echo", reward="environment", how="environment"):
  small = ["steps=3", "batch.rows=2", "online.samples=3", "online.max_new_tokens=64"]
  small += ["data.length=420", "optimizer.lr=1e-2", "adapter.r=2", "online.tool_tokens=8"]
  small += ["model.template=chatml", "online.max_turns=3"]
  data = f"model={folder / 'model'},data={folder / 'prompts.jsonl'},reward={reward}"
  return [
    "train",
    f"--config=rl:method=grpo,{data},{how}={folder / 'mine.py'}:{name}",
    f"--workdir={workdir}",
    *(f"--config.{change}" for change in [*small, *changes]),
  ]


def table(run, number=1):
  path = run / "completions" / f"completions_{number:05d}.parquet"
  return pyarrow.parquet.read_table(path).to_pylist()


def test_a_run_learns_from_turns_that_an_environment_answers(folder, tmp_path, capsys):
  assert main(command(folder, tmp_path / "run")) == 0
  assert "turns: environment" in capsys.readouterr().out
  rows, told = table(tmp_path / "run"), lines(tmp_path / "run")[0]
  assert max(row["turns"] for row in rows) > 1
  assert told["turns/mean"] == pytest.approx(np.mean([row["turns"] for row in rows]))
  assert 0 < told["turns/masked_share"] < 1
  assert told["grad_norm"] > 0
  assert told["sampling/logp_difference"] < 1e-4  # of all tokens of all turns
  assert told["reward"] == pytest.approx(np.mean([row["reward"] for row in rows]))
  said = json.loads(rows[0]["messages"])
  assert [turn["role"] for turn in said[:3]] == ["assistant", "user", "assistant"][: len(said)]


def test_a_run_that_was_killed_amid_turns_ends_as_one_that_was_not(folder, tmp_path, monkeypatch):
  assert main(command(folder, tmp_path / "whole")) == 0
  put, asked = online.completions.Journal.put, []

  def dies(self, *args, **kwargs):
    put(self, *args, **kwargs)
    asked.append(args)
    if len(asked) == 8:
      raise KeyboardInterrupt

  monkeypatch.setattr(online.completions.Journal, "put", dies)
  main(command(folder, tmp_path / "killed"))
  monkeypatch.setattr(online.completions.Journal, "put", put)
  assert main(command(folder, tmp_path / "killed")) == 0
  same(adapter(tmp_path / "whole"), adapter(tmp_path / "killed"))
  for number in (1, 2, 3):
    both = [table(tmp_path / name, number) for name in ("whole", "killed")]
    assert both[0] == both[1]


@pytest.mark.slow
def test_an_answer_does_not_hang_on_what_is_written_beside_it(folder, tmp_path):
  """Nor on whose tools are quicker: one row at a time gives what six at once give."""
  changes = ["steps=1", "optimizer.lr=0.0"]
  assert main(command(folder, tmp_path / "six", *changes)) == 0
  assert main(command(folder, tmp_path / "one", *changes, "online.rows=2")) == 0
  one, six = (table(tmp_path / name) for name in ("one", "six"))
  assert [row["tokens"] for row in one] == [row["tokens"] for row in six]
  assert [row["messages"] for row in one] == [row["messages"] for row in six]


def test_held_out_questions_are_asked_in_turns_too(folder, tmp_path, monkeypatch):
  said = [{"role": "assistant", "content": "so"}]
  rows = [{"prompt": [{"role": "user", "content": w}], "completion": said} for w in ("sun", "sea")]
  held = tiny.write_jsonl(tmp_path / "held.jsonl", rows)
  asked = [f"eval.task={held}", "eval.metric=contained", "eval.before=false"]
  finals, answer = [], turns.Turns.answer

  def kept(self, *args, **how):
    finals.append(answer(self, *args, **how))
    return finals[-1]

  monkeypatch.setattr(turns.Turns, "answer", kept)
  assert main(command(folder, tmp_path / "run", "steps=1", *asked)) == 0
  answers = json.loads((tmp_path / "run" / "evaluation-after.json").read_text())["answers"]
  assert [(one["answer"], one["finished"]) for one in answers] == [
    (one.text, one.finished) for one in finals[0]
  ]


def test_a_held_out_answer_whose_environment_failed_is_wrong_and_says_why(folder, tmp_path, capsys):
  rows = [{"prompt": [{"role": "user", "content": word}]} for word in ("sun", "sea")]
  held = tiny.write_jsonl(tmp_path / "held.jsonl", rows)
  (tmp_path / "grade.py").write_text("def kind(answer, row):\n  return 1.0\n")
  asked = [f"eval.task={held}", f"eval.metric={tmp_path / 'grade.py'}:kind", "eval.before=true"]
  main(command(folder, tmp_path / "run", "steps=1", *asked, name="Raises"))
  said = json.loads((tmp_path / "run" / "evaluation-before.json").read_text())
  failed = [one for one in said["answers"] if one["finished"]]
  assert failed
  for one in failed:
    assert one["correct"] is False
    assert one["reason"].startswith("environment: ")
    assert "ValueError: broken" in one["reason"]
  assert said["reasons"]["environment"] == len(failed)
  assert "ended before an answer, the first by " in capsys.readouterr().out


def test_reward_functions_of_trls_read_what_environments_were_left_as(folder, tmp_path):
  name = f"{folder / 'mine.py'}:heard"
  assert main(command(folder, tmp_path / "run", "steps=1", reward=name)) == 0
  assert {row["missing"] for row in table(tmp_path / "run")} == {""}


def test_answers_of_an_environment_that_raises_have_no_score(folder, tmp_path, capsys):
  assert main(command(folder, tmp_path / "run", "steps=4", name="Raises")) == 1
  said = capsys.readouterr()
  assert "ValueError: broken" in said.out
  assert "no answer of the batches" in said.err


@pytest.mark.parametrize(
  ("changes", "how", "says"),
  [
    ({"name": "Nothing"}, "environment", "has no function 'Nothing'"),
    ({"name": "double", "reward": "environment"}, "tools", "has neither; name a verifier"),
    ({"name": "double", "reward": "number"}, "tools", "writes no calls of tools"),
    ({"name": "Asks"}, "environment", "mine.py:Asks takes 'level', which the data does not have"),
  ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
  folder, tmp_path, capsys, changes, how, says
):
  extra = ["model.template=tokenizer"] if "calls" in says else []
  assert main(command(folder, tmp_path / "run", *extra, how=how, **changes)) == 1
  assert says in capsys.readouterr().err
  assert not (tmp_path / "run").exists()


def test_a_run_goes_on_once_the_server_of_its_environment_is_back(folder, tmp_path, capsys):
  """What could not be begun is no answer that is kept: the same command asks for it again."""
  (folder / "down").touch()
  ask = command(folder, tmp_path / "run", name="Down")
  try:
    assert main(ask) == 1
  finally:
    (folder / "down").unlink()
  said = " ".join(capsys.readouterr().err.split())
  assert "ConnectionError: no server" in said
  assert "With the environment mended, or a higher online.tool_seconds where it is slow" in said
  assert main(ask) == 0
  assert all(row["turns"] for row in table(tmp_path / "run", 3))
