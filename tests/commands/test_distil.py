"""Distillation on a tiny model, as a user runs it: off policy, kept beforehand, on policy, as an advantage."""

import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from posttrain_jax.__main__ import main
from posttrain_jax.models import decoder, hf
from posttrain_jax.runs import record
from tests import tiny

pytestmark = pytest.mark.usefixtures("in_float32", "one_device")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("distil")
  tiny.tiny_model_folder(folder / "model")
  larger = tiny.config(hidden_size=96, num_hidden_layers=3)
  hf.save(folder / "teacher", decoder.init(jax.random.key(3), larger, std=0.3), larger)
  tiny.tokenizer().save_pretrained(folder / "teacher")
  tiny.write_jsonl(folder / "rows.jsonl", tiny.rows(12))
  return folder


def train(folder, workdir, *changes, teacher="teacher", **arguments):
  named = "".join(f",{name}={value}" for name, value in arguments.items())
  config = (
    f"distil:teacher={folder / teacher},model={folder / 'model'},data={folder / 'rows.jsonl'}"
  )
  small = ["steps=3", "batch.rows=4", "data.length=96", "optimizer.lr=1e-2", "adapter.r=2"]
  if "on_policy" in arguments or arguments.get("loss") == "policy_gradient":
    small += ["online.max_new_tokens=6"]
  else:
    small += ["eval.every=0", "data.eval_rows=2"]
  flags = [f"--config.{change}" for change in (*small, *changes)]
  return ["train", f"--config={config}{named}", f"--workdir={workdir}", *flags]


def lines(workdir):
  every = map(json.loads, (workdir / record.METRICS).read_text().splitlines())
  return [line for line in every if "loss" in line]


def adapter(workdir):
  return load_file(workdir / "adapter" / "adapter_model.safetensors")


def test_a_student_moves_towards_a_larger_teacher_and_is_measured_as_it_was(
  folder, tmp_path, capsys
):
  run = tmp_path / "run"
  assert main(train(folder, run, "steps=6", "batch.rows=2")) == 0
  first, last = lines(run)[0], lines(run)[-1]
  assert last["loss"] < first["loss"]
  assert {"teacher/agreement", "nll_loss", "mean_token_accuracy"} <= last.keys()
  capsys.readouterr()
  assert main(["eval", f"--workdir={run}"]) == 0
  told = capsys.readouterr().out
  measured = json.loads((run / record.METRICS).read_text().splitlines()[-1])["eval_loss"]
  assert f"{measured:.3f}" in told
  page = (run / "report.html").read_text()
  assert "forward_kl to teacher" in page
  assert "off the teacher&#39;s; 0 is a student" in page
  assert "Likeliest token the same" in page


def test_the_likeliest_tokens_are_asked_for_once(folder, tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
  how = dict(top_k=8, loss="reverse_kl")
  assert main(train(folder, tmp_path / "a", "objective.sft_weight=0.1", **how)) == 0
  assert "teacher: computing the 8 most likely tokens in 10 examples" in capsys.readouterr().out
  last = lines(tmp_path / "a")[-1]
  assert 0 < last["teacher/mass"] <= 1
  assert last["loss"] == pytest.approx(last["loss/distil"] + 0.1 * last["loss/sft"], rel=1e-4)
  assert main(train(folder, tmp_path / "b", "objective.sft_weight=0.1", **how)) == 0
  assert "teacher: the 8 most likely tokens of 10 examples read from" in capsys.readouterr().out
  for name, array in adapter(tmp_path / "a").items():
    np.testing.assert_array_equal(array, adapter(tmp_path / "b")[name])


def test_the_student_writes_some_of_the_rows_and_goes_on_bit_by_bit(folder, tmp_path, capsys):
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  how = dict(on_policy=0.5, loss="jsd")
  fields = ("objective.sft_weight=0.2", "checkpoint.every=1", "online.gold_rows=2")
  assert main(train(folder, whole, *fields, **how)) == 0
  said = capsys.readouterr().out
  assert (
    "2 prompts x 1 = 2 answers of at most 6 tokens and 2 answers of the data beside them" in said
  )
  last = lines(whole)[-1]
  assert last["loss"] == pytest.approx(last["loss/distil"] + 0.2 * last["loss/sft"], rel=1e-4)
  assert "reward" not in last
  assert "pass@1" not in last
  assert main(train(folder, cut, *fields, "steps=1", **how)) == 0
  assert main(train(folder, cut, *fields, **how)) == 0
  for name, array in adapter(whole).items():
    np.testing.assert_array_equal(array, adapter(cut)[name])


def test_the_teachers_advantage_stands_beside_rows_of_the_data(folder, tmp_path):
  fields = ("online.gold_rows=1", "objective.sft_weight=0.5")
  assert main(train(folder, tmp_path / "run", *fields, loss="policy_gradient")) == 0
  every = lines(tmp_path / "run")
  assert all(line["teacher/reverse_kl"] > 0 for line in every)
  assert every[-1]["grad_norm"] > 0
  assert "loss/sft" in every[-1]


def test_a_run_is_a_teacher_and_of_itself_nothing_is_learned(folder, tmp_path):
  assert main(train(folder, tmp_path / "first")) == 0
  again = train(
    folder, tmp_path / "again", f"model.adapter={tmp_path / 'first'}", teacher=tmp_path / "first"
  )
  assert main(again) == 0
  assert lines(tmp_path / "again")[0]["loss"] < 1e-5
  assert lines(tmp_path / "again")[0]["teacher/agreement"] == 1


WRONG = {
  "no teacher": (dict(teacher=""), (), "objective.teacher is empty"),
  "nothing there": (dict(teacher="gone"), (), "objective.teacher=.*gone"),
  "more likeliest tokens than there are": (dict(top_k=300), (), "there are 261 tokens"),
  "kept of what is written anew": (dict(on_policy=1.0), ("objective.top_k=4",), "write top_k=0"),
  "no row of its own": (dict(on_policy=1.0), ("online.gold_rows=4",), "leaves no row"),
  "gold without weight": (
    dict(loss="policy_gradient"),
    ("online.gold_rows=1",),
    "write both above 0, or neither",
  ),
  "likelihood without gold": (
    dict(on_policy=1.0),
    ("online.gold_rows=0", "objective.sft_weight=0.5"),
    "write both above 0, or neither",
  ),
  "groups of one outcome where nothing scores": (
    dict(on_policy=1.0),
    ("online.dynamic=true",),
    "nothing scores them here",
  ),
  "a share above 1": (dict(on_policy=1.5), (), "a share of the rows"),
  "a reward without the gradient": (dict(reward="number"), (), "write loss=policy_gradient"),
  "likeliest tokens of drawn ones": (dict(loss="policy_gradient", top_k=3), (), "drawn alone"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_work_is_refused_before_anything_is_written(wrong, folder, tmp_path, capsys):
  arguments, changes, sentence = WRONG[wrong]
  teacher = arguments.pop("teacher", "teacher") if "teacher" in arguments else "teacher"
  command = train(folder, tmp_path / "run", *changes, teacher=teacher or "teacher", **arguments)
  if not teacher:
    command = [part.replace(f"teacher={folder / 'teacher'}", "teacher=") for part in command]
  assert main(command) in (1, 2)
  assert any_match(sentence, capsys.readouterr().err)
  assert not (tmp_path / "run").exists()


def any_match(sentence, text):
  return re.search(sentence, " ".join(text.split())) is not None


def test_a_teacher_of_another_vocabulary_is_refused_with_the_first_difference(
  folder, tmp_path, capsys
):
  other = tiny.tokenizer()
  other.add_tokens(["and"])
  theirs = tiny.config(vocab_size=262)
  hf.save(tmp_path / "other", decoder.init(jax.random.key(0), theirs, std=0.1), theirs)
  other.save_pretrained(tmp_path / "other")
  assert main(train(folder, tmp_path / "run", teacher=tmp_path / "other")) in (1, 2)
  told = " ".join(capsys.readouterr().err.split())
  assert "its vocabulary is another one" in told
  assert "posttrain sample" in told


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    ({}, "it reads 24 tokens, and .*rows.jsonl:.* has 3[0-9]; lower data.length"),
    ({"on_policy": 0.5}, "with 6 of an answer behind it; lower online.max_new_tokens"),
  ],
)
def test_a_teacher_that_reads_less_than_the_student_is_refused(
  folder, tmp_path, capsys, arguments, says
):
  short = tiny.config(max_position_embeddings=24)
  hf.save(tmp_path / "short", decoder.init(jax.random.key(0), short, std=0.1), short)
  tiny.tokenizer().save_pretrained(tmp_path / "short")
  assert main(train(folder, tmp_path / "run", teacher=tmp_path / "short", **arguments)) in (1, 2)
  assert any_match(says, capsys.readouterr().err)
  assert not (tmp_path / "run").exists()


def test_a_student_of_some_layers_is_a_model_that_learns(folder, tmp_path, capsys):
  out = tmp_path / "small"
  teacher = folder / "teacher"
  assert main(["student", f"--model={teacher}", f"--out={out}", "--layers=2"]) == 0
  assert "2 of 3 layers: 0, 2" in capsys.readouterr().out
  params, config = hf.load(out)
  whole, _ = hf.load(teacher)
  assert config.num_layers == 2
  np.testing.assert_array_equal(
    params["layers"]["mlp"]["up_proj"]["weight"],
    np.asarray(whole["layers"]["mlp"]["up_proj"]["weight"])[[0, 2]],
  )
  assert main(["student", f"--model={teacher}", f"--out={out}", "--layers=2"]) in (1, 2)
  assert "is there already" in capsys.readouterr().err
  assert main(["student", f"--model={teacher}", f"--out={tmp_path / 'x'}", "--layers=9"]) in (1, 2)
  assert "has 3; write from 1 to 3" in " ".join(capsys.readouterr().err.split())
  assert main(["student", f"--model={teacher}", f"--out={tmp_path / 'x'}", "--keep=2,1"]) in (1, 2)
  assert "in rising order" in " ".join(capsys.readouterr().err.split())


def test_a_run_that_trained_the_whole_student_is_trained_on_by_its_folder(folder, tmp_path):
  first, second = tmp_path / "first", tmp_path / "second"
  rows = f"data={folder / 'rows.jsonl'},adapter=none"
  small = ["steps=2", "batch.rows=4", "data.length=96", "eval.every=0", "data.eval_rows=2"]
  flags = [f"--config.{change}" for change in small]
  model = folder / "model"
  assert main(["train", f"--config=sft:model={model},{rows}", f"--workdir={first}", *flags]) == 0
  assert main(["train", f"--config=sft:model={first},{rows}", f"--workdir={second}", *flags]) == 0
  assert lines(second)[0]["loss"] < lines(first)[0]["loss"]
  assert main(["eval", f"--workdir={second}"]) == 0
