"""Several runs on one page: what differs, what compares, and who answered what."""

import re

import pytest

from posttrain_jax.__main__ import main
from posttrain_jax.evals import compare, report
from posttrain_jax.runs import record
from tests.evals import runs
from tests.evals.test_report import ONLINE, Page, online_lines


@pytest.fixture
def folders(tmp_path):
  """Two finished runs of one config but for the rate and the rank."""
  made = []
  for i, rank in enumerate((4, 16)):
    config = dict(
      runs.CONFIG,
      adapter=dict(runs.CONFIG["adapter"], r=rank),
      optimizer=dict(name="adamw", lr=0.1 / rank),
    )
    answers = [
      runs.answer(f"Q{k}", "join", k < 2 + 2 * i, f"said by {rank}: {k}") for k in range(4)
    ]
    done = dict(steps=40, seconds=1, final={"loss": 0.5 - 0.25 * i, "eval_loss": 1.0 + i})
    parts = dict(lines=runs.rows(seed=i), after=runs.result(answers), done=done)
    made.append(runs.write(tmp_path / f"point__lr={0.1 / rank}__r={rank}", config=config, **parts))
  return made


def page(folders, out):
  path = compare.write(compare.read(folders), out)
  return Page(path.read_text(encoding="utf-8"))


def test_settings_that_differ_and_no_others(folders, tmp_path):
  text = page(folders, tmp_path / "c.html").text
  assert "run adapter.r optimizer.lr lr=0.025, r=4 4 0.025 lr=0.00625, r=16 16 0.00625" in text
  assert "lora_alpha" not in text


def test_values_and_the_best_of_each(folders, tmp_path):
  found = page(folders, tmp_path / "c.html")
  assert re.search(
    r"answers right after higher is better loss, held out lower is better", found.text
  )
  assert "lr=0.025, r=4 0.5 1 " in found.text
  html = (tmp_path / "c.html").read_text()
  assert re.findall(r'class="number best">([^<]*)<', html) == ["1", "1"]


def test_losses_across_betas_are_not_ranked(folders, tmp_path):
  configs = [dict(runs.CONFIG, objective=dict(runs.PREFERENCE, beta=beta)) for beta in (0.1, 0.3)]
  both = [
    runs.write(tmp_path / str(i), config=config, lines=runs.preference_rows(seed=i, speed=1 + i))
    for i, config in enumerate(configs)
  ]
  text = page(both, tmp_path / "c.html").text
  assert "The losses of these runs do not compare: the runs differ in objective.beta" in text
  assert "The margins and rewards of these runs do not compare" in text
  assert "loss, held out does not compare likelihood term, held out lower is better" in text
  html = (tmp_path / "c.html").read_text()
  # likelihood term, accuracies and token accuracy; neither loss nor margin
  assert html.count('class="number best"') == 5


def test_runs_that_write_their_answers_are_compared_by_those_of_the_last_fifth(tmp_path):
  made = []
  for loss in ("ppo", "cispo"):
    config = dict(ONLINE, objective=dict(ONLINE["objective"], loss=loss))
    done = dict(steps=40, seconds=1, final={"loss": 0.1, "reward": 0.9, "pass@1": 0.9})
    made.append(runs.write(tmp_path / loss, config=config, lines=online_lines(), done=done))
  text = page(made, tmp_path / "c.html").text
  assert "compare pass@1, the reward and entropies." in text
  assert "accuracies" not in text.partition("Read their shapes")[2]
  final = compare.finals(compare.read(made)[0])
  assert final["pass@1"] == pytest.approx(0.102 + 0.01 * 17.5)  # of the last 4 batches of 20
  assert final["loss"] == 0.1


def test_every_curve_of_every_run_and_their_names(folders, tmp_path):
  found = page(folders, tmp_path / "c.html")
  html = (tmp_path / "c.html").read_text()
  figures = [text.partition(" over steps")[0] for text in found.figures]
  assert figures[:2] == ["loss", "loss, held out"]
  assert len(re.findall(r'class="line c0 run0"', html)) == len(figures)
  assert len(re.findall(r'class="line c1 run1"', html)) == len(figures)
  assert 'id="run1"' in html


def test_answers_side_by_side_those_first_on_which_runs_differ(folders, tmp_path):
  text = page(folders, tmp_path / "c.html").text
  assert text.index("Q2") < text.index("Q0")
  assert "lr=0.025, r=4: wrong result said by 4: 2 lr=0.00625, r=16: ok said by 16: 2" in text


def test_it_links_to_reports_whatever_their_names(folders, tmp_path):
  odd = runs.write(tmp_path / "javascript:alert(1)#%", lines=runs.rows())
  report.write(odd)
  out = tmp_path / "pages" / "c.html"
  out.parent.mkdir()
  found = page([odd, folders[0]], out)
  assert found.addresses[0] == "../javascript%3Aalert%281%29%23%25/report.html"
  assert found.addresses[1].endswith("r%3D4")  # no report yet: its folder


def test_what_models_write_is_text(tmp_path):
  evil = "</pre><script>alert('x')</script>"
  for name in ("a", "b"):
    answers = [runs.answer(evil, evil, name == "a", evil, evil)]
    config = dict(runs.CONFIG, data=dict(train=evil + name))
    runs.write(
      tmp_path / name,
      lines=[{"step": 1, "loss": 1.0, f"loss/{evil}": 2.0}],
      config=config,
      after=runs.result(answers),
    )
  found = page([tmp_path / "a", tmp_path / "b"], tmp_path / "c.html")
  assert "script" not in found.tags
  assert found.text.count(evil) >= 5


@pytest.mark.parametrize(
  "parts",
  [
    dict(),
    dict(lines=[{"step": 1, "loss": float("nan")}]),
    dict(config={"steps": 3}),
    dict(before=runs.result([])),
  ],
  ids=str,
)
def test_parts_may_be_missing(parts, tmp_path):
  some = [runs.write(tmp_path / "a", **parts), runs.write(tmp_path / "b", lines=runs.rows())]
  assert "2 runs compared" in page(some, tmp_path / "c.html").text


def test_runs_of_one_name_are_told_apart_and_one_run_is_there_once(tmp_path):
  some = [runs.write(tmp_path / name / "run", lines=runs.rows()) for name in "ab"]
  found = compare.read([*some, some[0]])
  assert compare._names(found) == ["a/run", "b/run"]


def test_a_sweeps_folder_stands_for_its_points_in_the_order_of_their_numbers(tmp_path):
  for rank in (16, 4, 128):
    runs.write(tmp_path / "sweep" / f"r={rank}", lines=runs.rows(steps=2))
  assert [run.folder.name for run in compare.read([tmp_path / "sweep"])] == ["r=4", "r=16", "r=128"]


def test_many_differing_fields_are_rows(folders):
  some = [record.read(folder) for folder in folders]
  more = dict(runs.CONFIG, **{f"field{i}": i for i in range(9)})
  some.append(record.read(runs.write(folders[0].parent / "third", config=more)))
  table = compare.differing(some, ["a", "b", "c"])
  assert table["heads"] == ["field", "a", "b", "c"]
  assert ["field3", "–", "–", "3"] in table["rows"]


def test_the_command(folders, tmp_path, capsys):
  out = tmp_path / "compare.html"
  both = list(map(str, folders))
  assert main(["report", *both]) == 1
  assert "2 runs are compared on one page: write --out=compare.html" in capsys.readouterr().err
  assert main(["report", *both, f"--out={out}"]) == 0
  assert capsys.readouterr().out == f"report: {out}\n"
  assert "2 runs compared" in out.read_text()
  assert main(["report", both[0]]) == 0
  assert (folders[0] / "report.html").exists()
  assert main(["report", str(tmp_path / "nothing")]) == 1
  assert "is no folder" in capsys.readouterr().err
  assert main(["report", *both, f"--out={tmp_path / 'page.pdf'}"]) == 1
  assert "page.html" in capsys.readouterr().err
