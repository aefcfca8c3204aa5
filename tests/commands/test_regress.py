"""`posttrain regress` on tiny models: sides, exit codes, what is kept, stages; and a run that measures a suite."""

import json

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


def test_another_template_is_refused_as_not_comparable(place, capsys):
  assert (
    command(
      place, f"--before={place / 'one'}", f"--after={place / 'one'}", f"--out={place / 'kept'}"
    )
    == 0
  )
  kept = f"--before={place / 'kept' / 'before.jsonl'}"
  assert command(place, kept, f"--after={place / 'one'}", "--template=none") == 1
  said = capsys.readouterr().err
  assert "not comparable" in said
  assert "--template=NAME" in said


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
