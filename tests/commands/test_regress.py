"""`posttrain regress` on tiny models: sides, exit codes, what is kept, stages; and a run that measures a suite."""

import json
import shutil

import jax
import pytest

from posttrain_jax.__main__ import main
from posttrain_jax.build import regress
from posttrain_jax.core import files
from posttrain_jax.evals import compare, gate, measure, report
from posttrain_jax.models import decoder, hf
from posttrain_jax.runs import record
from posttrain_jax.settings import ConfigError
from tests import tiny

PARTS = [
  {"name": "text", "kind": "text", "rows": "text.jsonl", "tolerance": 0.02},
  {"name": "end", "kind": "answers", "rows": "say.jsonl", "metric": "stops", "max_new_tokens": 2},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """Two models of one shape, a suite, and the page of what one forgot."""
  folder = tmp_path_factory.mktemp("regress")
  tiny.tiny_model_folder(folder / "one")
  other = decoder.init(jax.random.key(1), tiny.config(), std=3 * tiny.STD)
  hf.save(folder / "other", other, tiny.config())
  tiny.tokenizer().save_pretrained(folder / "other")
  (folder / "suite").mkdir()
  texts = [{"text": f"Text {i} of {'no ' * (i % 5)}weight."} for i in range(8)]
  tiny.write_jsonl(folder / "suite" / "text.jsonl", texts)
  tiny.write_jsonl(folder / "suite" / "say.jsonl", [{"prompt": "say a"}, {"prompt": "say b"}])
  (folder / "suite" / "suite.json").write_text(json.dumps({"name": "small", "parts": PARTS}))
  return folder


def command(place, *more):
  return main(["regress", f"--suite={place / 'suite'}", "--batch_size=2", *more])


def test_a_worse_model_exits_1_and_names_the_part_and_the_same_model_exits_0(place, capsys):
  one, other = f"--before={place / 'one'}", f"--after={place / 'other'}"
  assert command(place, one, other, f"--out={place / 'out'}") == 1
  said = capsys.readouterr().out
  assert "text dropped: " in said
  assert "bits per byte agreed" in said
  assert (place / "out" / gate.NAME).exists()
  written = files.read_json(place / "out" / "regress.json")
  assert [v["verdict"] for v in written["verdicts"]] == ["drop", "cannot tell"]
  kept = f"--before={place / 'out' / 'before.jsonl'}"
  assert command(place, kept, f"--after={place / 'one'}") == 0
  assert "Both sides have the same weights." in capsys.readouterr().out
  assert command(place, kept, f"--after={place / 'one'}", "--strict") == 1


def test_another_template_or_way_of_decoding_is_refused_before_it_is_measured(
  place, capsys, tmp_path, monkeypatch
):
  one = [f"--{side}={place / 'one'}" for side in ("before", "after")]
  assert command(place, *one, f"--out={tmp_path / 'kept'}") == 0
  monkeypatch.setattr(measure, "_likely", lambda *a: pytest.fail("it was measured"))
  monkeypatch.setattr(measure, "_written", lambda *a: pytest.fail("it was measured"))
  kept = f"--before={tmp_path / 'kept' / 'before.jsonl'}"
  drawn = shutil.copytree(place / "suite", tmp_path / "drawn")
  parts = [PARTS[0], {**PARTS[1], "temperature": 0.7}]
  (drawn / "suite.json").write_text(json.dumps({"name": "small", "parts": parts}))
  for more, said in (
    (["--template=none"], "the chat templates differ"),
    ([f"--suite={drawn}"], "the suite's rows or settings differ in end"),
    (["--seed=1"], "answers were drawn with other seeds"),
  ):
    assert command(place, kept, one[1], *more) == 1
    told = capsys.readouterr().err
    assert "not comparable" in told
    assert said in told
    assert "--template=NAME" in told


def test_several_stages_are_told_beside_each_other(place):
  sides = [str(place / name) for name in ("one", "other", "one")]
  wanted = regress.Wanted(sides[0], sides[1:], str(place / "suite"), str(place / "stages"), rows=2)
  found = regress.run(wanted)
  assert found.over["heads"] == ["part", "before", "stage 1", "stage 2", "forgotten"]
  text = next(row for row in found.over["rows"] if row[0] == "text")
  assert text[1] == text[3] != text[2]
  assert text[4] == "+0.000", "the last stage is as good as any before it"
  assert "Over the stages" in found.page.read_text()


def test_what_is_missing_is_said(place, capsys):
  assert command(place) == 1
  assert "write --after=NAME_OR_DIR" in capsys.readouterr().err
  assert command(place, f"--after={place / 'one'}") == 1
  assert "write --before=NAME_OR_DIR" in capsys.readouterr().err


def test_what_is_wrong_is_said_before_a_model_is_read(place, capsys, monkeypatch, tmp_path):
  monkeypatch.setattr(regress.use, "load", lambda *a, **k: pytest.fail("a model was read"))
  one = f"--before={place / 'one'}"
  rows = [{"prompt": "1 + 1", "completion": "2"}, {"prompt": "1 + 2", "completion": "three"}]
  tiny.write_jsonl(tmp_path / "sums.jsonl", rows)
  part = {"name": "sums", "kind": "answers", "rows": "sums.jsonl", "metric": "number"}
  (tmp_path / "suite.json").write_text(json.dumps({"parts": [part]}))
  suite = f"--suite={tmp_path}"
  assert main(["regress", suite, one, f"--after={place / 'other'}"]) == 1
  assert "sums.jsonl:2: the expected answer 'three' is not right" in capsys.readouterr().err
  for side in ("nowhere", "nowhere.jsonl", f"{place / 'one'}+nowhere"):
    assert command(place, one, f"--after={side}") == 1
    assert "nowhere" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run_folder(place):
  rows = tiny.write_jsonl(place / "rows.jsonl", tiny.rows(12))
  config = f"--config=sft:model={place / 'one'},data={rows},adapter=lora,smoke"
  fields = (
    f"--config.eval.suite={place / 'suite'}",
    "--config.data.length=64",
    "--config.batch.rows=8",
  )
  assert main(["train", config, *fields, f"--workdir={place / 'run'}"]) == 0
  return place / "run"


def test_a_run_measures_its_suite_before_and_after(run_folder, place):
  done = record.read(run_folder).done["final"]
  assert {
    "eval_suite/end",
    "eval_bits_per_byte/text",
    "eval_bits_per_byte/trained/sql",
  } <= done.keys()
  assert "eval_suite/change" in done
  page = (run_folder / report.NAME).read_text()
  assert "What was kept and forgotten" in page
  assert "What was trained for" in page
  both = compare.write(compare.read([run_folder, run_folder.parent / "run"]), place / "both.html")
  assert "What they kept and forgot" in both.read_text()


def test_a_run_is_a_side_and_brings_what_it_held_out(run_folder, place):
  wanted = regress.Wanted("", [str(run_folder)], str(place / "suite"), rows=2)
  found = regress.run(wanted)
  names = [one.part for one in found.comparison.verdicts]
  assert names[:2] == ["text", "end"]
  assert {one.part for one in found.comparison.verdicts if one.trained} == {*names[2:]}
  assert found.page == run_folder / "regress" / gate.NAME
  before = measure.read(run_folder / "regress" / "before.jsonl")
  own = measure.read(run_folder / "suite" / "before.jsonl")
  for part in ("text", "end"):
    values = [r.value for r in before.results[part]]
    assert values == pytest.approx([r.value for r in own.results[part]], rel=1e-5)


def test_a_suite_of_a_run_needs_what_it_compares_with(place):
  with pytest.raises(ConfigError, match=r"leave eval\.before=True"):
    _dry(place, "--config.eval.before=False")
  with pytest.raises(ConfigError, match="nowhere: there is no such suite"):
    _dry(place, "--config.eval.suite=nowhere")


def _dry(place, *fields):
  from posttrain_jax import settings
  from posttrain_jax.build import run

  rows = tiny.write_jsonl(place / "rows.jsonl", tiny.rows(12))
  given = [f"--config.eval.suite={place / 'suite'}", "--config.data.length=64", *fields]
  config = settings.load(f"sft:model={place / 'one'},data={rows},adapter=lora,smoke", given)
  run.build(config, None)
