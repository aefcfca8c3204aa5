"""The road from a run to its evaluation, chat and export: what training did is what they do."""

import io
import json
import pathlib
import shutil

import numpy as np
import pytest

from posttrain_jax.__main__ import main
from posttrain_jax.build import use
from posttrain_jax.rollout import engine
from posttrain_jax.rollout.speaker import answer_lines
from tests import tiny
from tests.commands.test_train import lines
from tests.commands.test_train_answers import ROWS

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
FIELDS = {
  "steps": 3,
  "batch.rows": 8,
  "data.length": 120,
  "data.eval_rows": 6,
  "eval.every": 0,
  "optimizer.lr": 0.02,
  "adapter.r": 2,
  "adapter.target_modules": "('q_proj','down_proj')",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A tiny model with and without a chat template, and rows of every kind."""
  made = tmp_path_factory.mktemp("use")
  tiny.tiny_model_folder(made / "model")
  shutil.copytree(made / "model", made / "bare")
  (made / "bare" / "chat_template.jinja").unlink()
  tiny.write_jsonl(made / "rows.jsonl", tiny.rows(40))
  for kind, make in ROWS.items():
    tiny.write_jsonl(made / f"{kind}.jsonl", [make(i) for i in range(24)])
  return made


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))


def options(arguments):
  """The fields that an adapter has."""
  standing = any(name in arguments for name in ("adapter=none", "adapter=prompt"))
  return {k: v for k, v in FIELDS.items() if not (standing and k.startswith("adapter."))}


def train(folder, out, *, config="sft", kind="rows", arguments="", model="model", **fields):
  given = options(arguments) | {name.replace("__", "."): value for name, value in fields.items()}
  data = f"model={folder / model},data={folder / (kind + '.jsonl')}"
  return main(
    [
      "train",
      f"--config={CONFIGS / (config + '.py')}:{data}{arguments}",
      f"--workdir={out}",
      *(f"--config.{name}={value}" for name, value in given.items()),
    ]
  )


def evaluated(out, *flags):
  assert main(["eval", f"--workdir={out}", *flags]) == 0
  return json.loads((out / "eval.json").read_text())


def last(out, name):
  return [line[name] for line in lines(out) if name in line][-1]


@pytest.fixture(scope="module")
def spoken(folder, tmp_path_factory):
  """A QLoRA run with a system message and a template that the base's tokenizer has not."""
  out = tmp_path_factory.mktemp("spoken") / "run"
  said = dict(model__template="chatml", data__system="Be brief", arguments=",base=nf4")
  assert train(folder, out, model="bare", **said) == 0
  return out


@pytest.mark.slow
def test_a_runs_evaluation_is_the_one_that_training_printed(folder, spoken, capsys):
  found = evaluated(spoken)
  assert found["loss"] == pytest.approx(last(spoken, "eval_loss"), rel=1e-5)
  assert (found["examples"], found["rows"], found["base"]) == (6, "held out", "nf4")
  dense = evaluated(spoken, "--base=dense")
  assert dense["base"] == "dense"
  assert dense["loss"] != pytest.approx(found["loss"], rel=1e-3)


SYNC = dict(objective__sync_every=2, objective__cache_reference="false")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("config", "kind", "how"),
  [
    ("sft", "rows", dict(arguments=",adapter=none", data__limit=30, data__packing=False)),
    ("sft", "rows", dict(arguments=",adapter=pissa,base=nf4")),
    ("sft", "rows", dict(arguments=",adapter=prompt", adapter__num_virtual_tokens=5)),
    ("kto", "labels", dict()),
    ("kto", "pairs", dict(data__replay="labels.jsonl", data__replay_fraction=0.3)),
    ("preference", "pairs", dict(data__eval="labels.jsonl", data__eval_rows=4)),
    ("preference", "pairs", dict(arguments=",loss=bco", objective__running_shift="true")),
    ("preference", "pairs", SYNC),
    ("reward", "steps", dict(arguments=",kind=steps")),
  ],
)
def test_whatever_was_trained_is_evaluated_on_its_own_rows(config, kind, how, folder, tmp_path):
  other = "pairs" if kind == "pairs" and config == "preference" else "labels"
  how = {
    name: folder / f"{other}.jsonl" if str(value).endswith(".jsonl") else value
    for name, value in how.items()
  }
  out = tmp_path / "run"
  assert train(folder, out, config=config, kind=kind, **how) == 0
  assert evaluated(out)["loss"] == pytest.approx(last(out, "eval_loss"), rel=1e-4)


@pytest.mark.slow
def test_rows_that_changed_since_are_not_held_out(folder, tmp_path, capsys):
  tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(30))
  shutil.copytree(folder / "model", tmp_path / "model")
  out = tmp_path / "run"
  assert train(tmp_path, out, steps=1) == 0
  tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(31))
  assert main(["eval", f"--workdir={out}"]) == 1
  assert "the held-out rows are not those" in capsys.readouterr().err
  record = json.loads((out / "config.json").read_text())
  del record["rows"]
  (out / "config.json").write_text(json.dumps(record))
  assert main(["eval", f"--workdir={out}"]) == 1
  assert "held out other rows" in capsys.readouterr().err
  found = evaluated(out, f"--data={tmp_path / 'rows.jsonl'}")
  assert found["examples"] == 31


def answers(used, prompt, capsys):
  speaker, system = use.speaker(used, sampling=engine.GREEDY, max_new_tokens=6)
  out = io.StringIO()
  answer_lines(speaker, system=system, stdin=io.StringIO(prompt), stdout=out)
  return speaker.tokens([dict(role="system", content=system), dict(role="user", content=prompt)])


@pytest.mark.slow
def test_an_adapter_alone_is_used_as_it_was_trained(folder, spoken, tmp_path, caplog, capsys):
  """Exported and moved away from its run: base storage, template, system message."""
  assert main(["export", f"--workdir={spoken}", f"--out={tmp_path / 'out'}"]) == 0
  with caplog.at_level("INFO"):
    used = use.load(adapter=str(tmp_path / "out"))
    tokens = answers(used, "say a", capsys)
  assert used.storage == "nf4"
  text = used.tokenizer.decode(tokens)
  assert text.startswith("<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nsay a")
  for said in ("in nf4, as the adapter was trained", "chat template: that of", "'Be brief'"):
    assert said in caplog.text
  by_run = use.load(str(spoken))
  assert (by_run.storage, by_run.manner.system) == ("nf4", "Be brief")
  assert "--system=Be brief" in json.loads(json.dumps(use_line(spoken)))


def use_line(out):
  from posttrain_jax.evals import report
  from posttrain_jax.runs import record

  return report.use_command(record.read(out)).replace("'", "")


@pytest.mark.slow
def test_a_reward_model_reads_answers_as_it_was_trained_to(folder, tmp_path, capsys):
  out = tmp_path / "run"
  how = dict(config="reward", kind="pairs", arguments=",kind=pairs", model="bare")
  assert train(folder, out, model__template="chatml", data__system="Judge", **how) == 0
  capsys.readouterr()
  data = f"--data={folder / 'pairs.jsonl'}"
  assert main(["eval", f"--reward={out / 'adapter'}", data]) == 0
  scored = [json.loads(line) for line in capsys.readouterr().out.splitlines() if '"row"' in line]
  margins = [line["chosen"] - line["rejected"] for line in scored]
  by_run = evaluated(out, data)
  assert np.mean(margins) == pytest.approx(by_run["margin"], rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_ids_and_positions_in_use_are_what_counts(folder, tmp_path, capsys):
  shutil.copytree(folder / "model", tmp_path / "model")
  config = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
  last = config["added_tokens"][-1]
  config["added_tokens"] += [
    {**last, "id": number, "content": name}
    for number, name in ((259, "<one>"), (260, "<two>"), (261, "<extra>"))
  ]
  (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(config))
  rows = tiny.rows(20)
  tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
  out = tmp_path / "run"
  assert train(tmp_path, out, steps=1, eval__every=0, data__eval_rows=2) == 0
  tiny.write_jsonl(tmp_path / "extra.jsonl", [*rows, dict(prompt="a", completion="<extra>")])
  for command in (
    lambda: train(tmp_path, tmp_path / "other", kind="extra"),
    lambda: main(["eval", f"--workdir={out}", f"--data={tmp_path / 'extra.jsonl'}"]),
  ):
    assert command() == 1
    said = capsys.readouterr().err
    assert "extra.jsonl:21: token 261 ('<extra>') has no row in the model's embedding" in said
  tiny.write_jsonl(tmp_path / "long.jsonl", [*rows, dict(prompt="a", completion="b" * 500)])
  assert train(tmp_path, tmp_path / "other", kind="long", data__length=1000) == 1
  assert "long.jsonl:21: 1 of 21 rows is too long for the model, the first with 5" in (
    said := capsys.readouterr().err
  )
  assert "but the model has 128 positions" in said
  assert not (tmp_path / "other").exists()
  how = dict(data__length=1000, data__truncate="keep_start", steps=1)
  assert train(tmp_path, tmp_path / "cut", kind="long", **how) == 0
