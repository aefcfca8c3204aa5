"""Verdicts of two measurements: drops by name, models that are as good, and what does not compare."""

import dataclasses
import json

import numpy as np
import pytest

from posttrain_jax.core import files
from posttrain_jax.data.schema import Row
from posttrain_jax.evals import (
  chain_page,
  gate,
  measure,
  page,
  stages,
  suite,
  suites_page,
  verdicts,
)
from posttrain_jax.evals.measure import Measured, Result
from posttrain_jax.evals.suite import Part, Suite
from posttrain_jax.runs import record
from posttrain_jax.settings import ConfigError
from tests import tiny
from tests.evals import runs

ITEMS = 80


def part(name, kind=suite.ANSWERS, count=ITEMS, **more):
  rows = [
    Row({"prompt": f"{name} {i}?", "completion": "2"}, f"{name}:{i}", "prompt_completion")
    for i in range(count)
  ]
  return Part(name, kind, tuple(rows), **{"tolerance": 0.05, **more})


def measured(parts, values, model="a", sizes=1.0, **header):
  results = {
    p.name: [
      Result(f"{i}", f"{i}", None if v is None else float(v), sizes, answers=(f"{v}",))
      for i, v in enumerate(values[p.name])
    ]
    for p in parts
  }
  same = dict(version=1, rows={}, prompts={}, template="t", ends=["e"], seed=0)
  return Measured({**same, "model": model, "weights": model, "counts": {}, **header}, results)


def compared(parts, before, after, **sides):
  asked = Suite("s", tuple(parts))
  return verdicts.compare(
    asked, measured(parts, before, **sides), measured(parts, after, "b", **sides)
  )


def test_what_fell_is_named_and_what_rose_is_not():
  parts = [part("sums"), part("style")]
  ones, some = [1] * 60 + [0] * 20, [1] * 20 + [0] * 60
  found = compared(parts, {"sums": ones, "style": some}, {"sums": some, "style": ones})
  assert found.dropped == ["sums"]
  (told, *_) = gate.sentences(found)
  assert told.startswith("sums dropped: 75.0 %")
  assert "40 became wrong, 0 right" in told
  style = found.verdicts[1]
  assert (style.verdict, style.is_better) == (verdicts.PASS, True)
  assert len(style.gained) == 40
  assert found.tax == pytest.approx(0)


def test_a_model_that_is_as_good_fails_in_5_of_100_resamples_at_most():
  """Six parts whose items are right by chance alike on both sides, as answers that are drawn are."""
  rng = np.random.default_rng(0)
  parts = [part(f"part {i}", tolerance=0.0) for i in range(6)]
  rates = {p.name: rng.uniform(0, 1, ITEMS) for p in parts}
  draw = lambda: {name: rng.uniform(size=ITEMS) < rate for name, rate in rates.items()}
  failed = sum(bool(compared(parts, draw(), draw()).dropped) for _ in range(100))
  assert failed <= 5


def test_the_built_in_suite_fails_a_model_that_is_as_good_in_5_of_100_at_most():
  """Its own parts, numbers of items and tolerances; an eighth of all items come out otherwise on either side."""
  rng = np.random.default_rng(1)
  parts = suite.load("core").parts
  rates = {p.name: rng.uniform(0.1, 0.9) for p in parts}

  def draw(p, level):
    if p.kind == suite.TEXT:
      return level + rng.normal(0, 0.02, len(p.rows))
    return np.where(rng.uniform(size=len(p.rows)) < 1 / 8, ~level, level)

  failed = 0
  for _ in range(100):
    levels = {
      p.name: rng.uniform(0.5, 1.5, len(p.rows))
      if p.kind == suite.TEXT
      else rng.uniform(size=len(p.rows)) < rates[p.name]
      for p in parts
    }
    some = [p for p in parts if not p.every]
    sides = [{p.name: draw(p, levels[p.name]) for p in some} for _ in range(2)]
    failed += bool(compared(some, *sides).dropped)
  assert failed <= 5


def test_an_identical_model_passes():
  parts = [part("sums"), part("text", suite.TEXT), part("canaries", every=True)]
  values = {p.name: [1, 0] * (ITEMS // 2) for p in parts}
  found = compared(parts, values, values)
  assert [one.verdict for one in found.verdicts] == [verdicts.PASS] * 3


def test_too_few_items_cannot_tell_and_say_what_they_would_have_seen():
  found = compared([part("few", count=20)], {"few": [1] * 20}, {"few": [1] * 20})
  (one,) = found.verdicts
  assert one.verdict == verdicts.UNKNOWN
  assert found.unknown == ["few"]
  assert 0.05 < one.visible < 0.5
  assert any("few" in said for said in gate.sentences(found))


def test_the_tolerance_that_was_agreed_is_no_drop():
  before = {"sums": [1] * 78 + [0] * 2}
  after = {"sums": [1] * 66 + [0] * 14}
  assert compared([part("sums", tolerance=0.05)], before, after).dropped == ["sums"]
  assert compared([part("sums", tolerance=0.2)], before, after).dropped == []


def test_a_canary_that_is_lost_is_a_drop_whatever_the_rest_does():
  before, after = {"canaries": [1] * 8}, {"canaries": [1] * 7 + [0]}
  found = compared([part("canaries", count=8, every=True)], before, after)
  assert found.dropped == ["canaries"]
  assert found.verdicts[0].lost[0].id == "7"
  assert "1 item right before and wrong after (7)" in gate.sentences(found)[0]


def test_a_score_that_is_missing_is_left_out_and_counted_and_never_0():
  before, after = {"sums": [1] * ITEMS}, {"sums": [1] * (ITEMS - 6) + [None] * 6}
  (one,) = compared([part("sums")], before, after).verdicts
  assert (one.missing, one.after["mean"], one.after["count"]) == (6, 1.0, ITEMS - 6)
  canaries = {"c": [1] * 8}, {"c": [1] * 7 + [None]}
  assert (
    compared([part("c", count=8, every=True)], *canaries).verdicts[0].verdict == verdicts.UNKNOWN
  )
  nothing = compared([part("sums")], before, {"sums": [None] * ITEMS})
  assert nothing.verdicts[0].verdict == verdicts.UNKNOWN
  assert gate.rows(nothing)[0][2] == gate.NONE


@pytest.mark.parametrize("kind", [suite.TEXT, suite.CHOICE, suite.ANSWERS])
def test_a_model_whose_numbers_overflow_on_one_item_has_dropped(kind):
  parts, values = [part("sums", kind)], {"sums": [1] * ITEMS}
  before, after = measured(parts, values), measured(parts, values, "b")
  broken = dataclasses.replace(after.results["sums"][0], value=None, reason=measure.NO_NUMBERS)
  after = dataclasses.replace(after, results={"sums": [broken, *after.results["sums"][1:]]})
  found = verdicts.compare(Suite("s", tuple(parts)), before, after)
  assert found.dropped == ["sums"]
  assert "of 1 item that had a score" in gate.sentences(found)[0]
  assert verdicts.Comparison.from_json(json.loads(json.dumps(found.as_json()))) == found
  assert verdicts.compare(Suite("s", tuple(parts)), after, after).dropped == []


def test_more_bits_per_byte_are_a_drop():
  rng = np.random.default_rng(1)
  before = rng.uniform(80, 120, ITEMS)
  after = before + rng.uniform(2, 20, ITEMS)
  found = compared([part("text", suite.TEXT)], {"text": before}, {"text": after}, sizes=100.0)
  (one,) = found.verdicts
  assert found.dropped == ["text"]
  assert one.difference.mean == pytest.approx((before - after).sum() / (100 * ITEMS), rel=1e-12)
  assert one.before["mean"] == pytest.approx(before.sum() / (100 * ITEMS), rel=1e-12)
  assert not one.lost
  assert "bits per byte agreed" in gate.sentences(found)[0]


def test_what_was_trained_is_told_beside_what_was_paid_and_judges_nothing():
  parts = [part("trained", suite.TEXT, trained=True), part("sums", tolerance=0.5)]
  before = {"trained": [100.0 + i % 3 for i in range(ITEMS)], "sums": [1] * ITEMS}
  after = {"trained": [50.0 + i % 4 for i in range(ITEMS)], "sums": [1] * 60 + [0] * 20}
  found = compared(parts, before, after, sizes=100.0)
  assert found.tax == pytest.approx(0.25)
  said = " ".join(gate.sentences(found))
  assert "What was trained for: trained +0." in said
  assert "lost 25.0 points" in said
  worse = compared(parts, after, before, sizes=100.0)
  assert worse.dropped == [], "a gain that did not come is told, and no drop"


@pytest.mark.parametrize(
  ("changed", "said"),
  [
    ({"template": "u"}, "the chat templates differ"),
    ({"ends": ["f"]}, "answers end with other tokens"),
    ({"prompts": {"sums": "x"}}, "the texts that the models were given differ in sums"),
    ({"rows": {"sums": "x"}}, "rows or settings differ in sums"),
    ({"seed": 1}, "other seeds"),
    ({"version": 2}, "versions of this program"),
  ],
)
def test_what_does_not_compare_is_refused(changed, said):
  parts = [part("sums")]
  values = {"sums": [1] * ITEMS}
  one, other = measured(parts, values), measured(parts, values, "b", **changed)
  with pytest.raises(ConfigError, match="not comparable") as caught:
    verdicts.compare(Suite("s", tuple(parts)), one, other)
  assert said in str(caught.value)


def test_pass_at_k_is_of_all_answers():
  several = part("sums", count=2, samples=4, temperature=1.0, pass_at=(1, 2))
  sides = measured([several], {"sums": [0.5, 0.0]})
  with_counts = [dataclasses.replace(r, right=n) for r, n in zip(sides.results["sums"], (2, 0))]
  side = Measured(sides.header, {"sums": with_counts})
  found = verdicts.compare(Suite("s", (several,)), side, side)
  (one,) = found.verdicts
  assert "sums: pass@1 0.250 to 0.250, pass@2 0.417 to 0.417." in gate.sentences(found)
  assert one.pass_at["pass@1"] == (0.25, 0.25)
  assert one.pass_at["pass@2"][0] == pytest.approx((1 - 1 / 6) / 2)


def test_transfer_over_stages_is_that_of_the_matrix():
  """R of three stages, Lopez-Paz and Ranzato's figures by hand."""
  results = [
    {"a": 0.8, "b": 0.3, "c": 0.2},
    {"a": 0.6, "b": 0.9, "c": 0.4},
    {"a": 0.5, "b": 0.7, "c": 0.95},
  ]
  assert stages.backward_transfer(results, ["a", "b", "c"]) == pytest.approx((-0.3 - 0.2) / 2)
  base = {"a": 0.1, "b": 0.1, "c": 0.1}
  assert stages.forward_transfer(base, results, ["a", "b", "c"]) == pytest.approx((0.2 + 0.3) / 2)
  assert stages.forgetting(results, "b") == pytest.approx(0.2)
  assert stages.forgetting(results[:1], "b") is None


def test_a_page_has_every_part_and_both_answers_and_runs_nothing(tmp_path):
  parts = [part("<b>sums</b>")]
  name = parts[0].name
  found = compared(parts, {name: [1] * ITEMS}, {name: [0] * ITEMS})
  text = gate.write(tmp_path, found).read_text()
  assert "&lt;b&gt;sums&lt;/b&gt;" in text
  assert "<b>sums</b>" not in text
  assert "right before, wrong after (80)" in text
  assert "60 more are in regress.json" in text


def test_a_comparison_is_the_same_out_of_a_file():
  grouped = [dataclasses.replace(part("sums"), pass_at=())]
  values = {"sums": [1] * 70 + [None] * 10}, {"sums": [0] * ITEMS}
  found = compared(grouped, *values)
  written = json.loads(json.dumps(found.as_json(), allow_nan=False))
  assert verdicts.Comparison.from_json(written) == found
  assert found.finals() == {"eval_suite/sums": 0.0, "eval_suite/change": -1.0}
  one = measured(grouped, {"sums": [1] * ITEMS})
  alone = {"sums": [dataclasses.replace(r, group="a") for r in one.results["sums"]]}
  side = Measured(one.header, alone)
  (told,) = verdicts.compare(Suite("s", tuple(grouped)), side, side).verdicts
  assert (told.verdict, told.visible) == (verdicts.UNKNOWN, None)
  json.dumps(dataclasses.asdict(told), allow_nan=False)


def measures(folder, after, **more):
  """A run's folder has what its suite came to, where all were right before; more: of each result after."""
  parts, home = [part("sums")], folder / "suite"
  found = compared(parts, {"sums": [1] * ITEMS}, {"sums": after})
  home.mkdir(parents=True)
  files.write_json(home / verdicts.RESULTS, found.as_json())
  side = measured(parts, {"sums": after}, counts={"sums": ITEMS})
  lines = [
    {"part": "sums", "number": i, "result": {**dataclasses.asdict(r), **more}}
    for i, r in enumerate(side.results["sums"])
  ]
  tiny.write_jsonl(home / "after.jsonl", [side.header, *lines])


def test_runs_beside_each_other_show_what_each_forgot(tmp_path):
  measures(tmp_path / "kept", [1] * ITEMS)
  measures(tmp_path / "lost", [0] * ITEMS)
  both = [record.Run(tmp_path / name, {}, [], None, None, None) for name in ("kept", "lost")]
  told = suites_page.section(both, ["kept", "lost"])
  assert told["sentences"][0].startswith("kept forgot nothing")
  assert told["sentences"][1].startswith("lost forgot sums; its scores changed by -100.0 points")
  assert [row["cells"][0]["dropped"] for row in told["rows"]] == [False, True]
  first = told["lost"][0]
  assert [(a["when"], a["correct"]) for a in first["answers"]] == [
    ("before", True),
    ("kept", True),
    ("lost", False),
  ]
  html = page.render(suites_page.BODY, title="both", suites=told)
  assert "Items that some run lost" in html
  assert suites_page.section([record.Run(tmp_path, {}, [], None, None, None)], ["none"]) is None


def test_an_answer_beside_others_is_right_by_its_metric_and_not_by_a_score_of_1(tmp_path):
  """Of a reward of several parts the most may be 1.5."""
  measures(tmp_path / "lost", [0] * ITEMS)
  measures(tmp_path / "kept", [1] * ITEMS, value=1.5, right=1)
  both = [record.Run(tmp_path / name, {}, [], None, None, None) for name in ("lost", "kept")]
  first = suites_page.section(both, ["lost", "kept"])["lost"][0]
  assert [a["correct"] for a in first["answers"]] == [True, False, True]


def test_the_page_of_a_chain_says_what_each_stage_forgot(tmp_path):
  stages_ = [{"name": name, "verb": "train", "line": ["train"]} for name in ("cold", "rl")]
  stages_.append({"name": "answers", "verb": "sample", "line": ["sample"]})
  files.write_json(tmp_path / chain_page.STATE, {"stages": stages_})
  for name, after in (("cold", [1] * ITEMS), ("rl", [0] * ITEMS)):
    runs.write(tmp_path / name, config=runs.CONFIG, lines=runs.rows())
    measures(tmp_path / name, after)
  html = chain_page.write(tmp_path).read_text()
  assert "cold forgot nothing" in html
  assert "rl forgot sums; its scores changed by -100.0 points" in html
  assert "Items that some run lost" in html
