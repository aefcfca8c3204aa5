"""The report holds what there is, whole and escaped; the table counts what was counted."""

import html
import html.parser
import io
import re

import numpy as np
import pytest
import rich.console

from posttrain_jax.core import files
from posttrain_jax.evals import online, report
from posttrain_jax.runs import record
from tests.evals import runs

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(html.parser.HTMLParser):
  """The text of a page, its addresses and its figures' titles; fails on tags that do not match."""

  def __init__(self, text):
    super().__init__()
    self.open, self.texts, self.addresses, self.figures, self.tags = [], [], [], [], set()
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attributes):
    self.tags.add(tag)
    self.addresses += [value for name, value in attributes if name in ("src", "href")]
    self.figures += [value for name, value in attributes if name == "aria-label"]
    if tag not in VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data)

  @property
  def text(self):
    return re.sub(r"\s+", " ", " ".join(self.texts))


def page(folder):
  path = report.write(folder)
  assert path == folder / "report.html"
  return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path):
  """A finished run: of 6 questions 1 right before, 4 after (4 fixed, 1 broken, 1 still wrong)."""
  channels = ["join", "join", "join", "lookup", "lookup", "lookup"]
  before = [runs.answer(f"Q{i}", c, i == 5, f"before {i}") for i, c in enumerate(channels)]
  after = [runs.answer(f"Q{i}", c, i < 4, f"after {i}") for i, c in enumerate(channels)]
  done = dict(steps=40, final={"loss": 0.25, "eval_loss": 0.5}, seconds=725)
  parts = dict(before=runs.result(before), after=runs.result(after), done=done)
  folder = runs.write(tmp_path / "sft run", commit="abc123", versions={"jax": "0.10.2"}, **parts)
  (folder / "adapter").mkdir()
  tensors = {"a": ((4, 8), "float32", lambda: np.zeros((4, 8)))}
  files.write_safetensors(folder / "adapter" / "adapter_model.safetensors", tensors)
  return folder


def test_facts_and_commands(folder):
  runs.write_rows(folder, [{"step": i, "tokens_per_second": 10.0 * i} for i in (1, 40, 17)])
  text = page(folder).text
  for fact in (
    "sft run",
    "Finished after 40 steps.",
    "Model smollm2",
    "lora, r 16, lora_alpha 32.0, on all-linear, 32 parameters",
    "Data sql",
    "adamw, peak learning rate 0.0002, 8 rows a batch",
    "12 min 05 s",
    "170 tokens per second",
    "abc123",
    "jax 0.10.2",
    "loss loss 0.25 0.5 lower Nats per trained token: minus log of the right token's probability.",
    "posttrain train --config=c.py",
  ):
    assert fact in text, fact
  adapter = folder / "adapter"
  assert f"posttrain chat --model=smollm2 '--adapter={adapter}'" in text


def test_a_run_may_write_its_report_before_it_says_that_it_is_done(tmp_path):
  folder = runs.write(tmp_path / "a", lines=runs.rows(steps=3))
  report.write(folder, done=dict(steps=40, final={"loss": 0.125}, seconds=61, tokens=12345))
  text = Page((folder / "report.html").read_text(encoding="utf-8")).text
  for fact in ("Finished after 40 steps.", " 0.125 lower", "Time 1 min 01 s", "Tokens 12,345"):
    assert fact in text, fact
  assert not (folder / "done.json").exists()


def of(objective, lines, folder):
  return page(runs.write(folder, config=dict(runs.CONFIG, objective=objective), lines=lines))


def test_a_preference_run_says_its_loss_and_draws_what_it_has(tmp_path):
  found = of(runs.PREFERENCE, runs.preference_rows(), tmp_path / "a")
  assert "Objective dpo + 0.2 sft, beta 0.1, reference base" in found.text
  titles = {text.partition(" over steps")[0] for text in found.figures}
  wanted = {
    "Loss",
    "Accuracy of pairs",
    "Accuracy by length",
    "Margin",
    "Rewards",
    "KL to the reference",
    "Lengths",
  }
  assert wanted <= titles
  assert "margin rewards/margins" in found.text
  assert "higher Reward of the chosen answer less that of the rejected one" in found.text
  assert "Rising accuracy and margin are learning." in found.text
  assert "of the held-out pairs are ordered right (chance is 50 %)" in found.text


@pytest.mark.parametrize(
  ("losses", "beta", "start"),
  [
    ({"dpo": 1.0}, 0.1, "It starts at 0.693,"),
    ({"ipo": 1.0}, 0.25, "It starts at 4,"),
    ({"simpo": 1.0}, 2.0, None),
  ],
)
def test_a_loss_says_where_it_starts(losses, beta, start, tmp_path):
  objective = dict(runs.PREFERENCE, losses=losses, beta=beta)
  text = of(objective, [{"step": 1, "loss": 0.7}], tmp_path / "a").text
  assert f"Mean over the batch's pairs of {next(iter(losses))}, beta {beta}" in text
  assert ("It starts at" in text) is (start is not None)
  assert start is None or start in text


def test_a_loss_of_zero_is_explained(tmp_path):
  found = of(runs.GROUPED, runs.grouped_rows(), tmp_path / "a")
  assert "Objective grpo (loss ppo) on scored groups, advantage group" in found.text
  assert "Minus the mean advantage, about 0 by construction" in found.text
  assert (
    found.text.count("The loss stays near 0, and that is right") == 2
  )  # what the curves say, and how to read it
  assert "A falling curve is learning" not in found.text


ONLINE = dict(
  runs.CONFIG,
  objective=dict(runs.GROUPED, kl_weight=0.0, reference="base"),
  online=dict(samples=4, max_new_tokens=32, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
  | dict(minibatches=2, passes=1, dynamic=False, kl_in_reward=0.0),
  reward=dict(parts=["number", "length"], weights=[1.0, 0.5], gates=["tags"]),
  holdout_reward=dict(parts=["exact"], weights=[], gates=[]),
)
del ONLINE["objective"]["old"]


def online_lines(batches=20):
  """Two updates a batch: reward and right answers rise, the second score falls."""
  return [
    {
      "step": 2 * i + j,
      "loss": 0.001,
      "reward": 0.203 + 0.02 * i + 0.01 * (i % 2),
      "pass@1": 0.102 + 0.01 * i,
      "pass@4": 0.5,
      "holdout/reward": 0.9 - 0.02 * i,
      "completions/mean_length": 12.0,
      "entropy": 1.0,
    }
    for i in range(batches)
    for j in (1, 2)
  ]


def test_an_online_run_says_first_what_it_came_to(tmp_path):
  text = page(runs.write(tmp_path / "a", config=ONLINE, lines=online_lines())).text
  came = (
    "Came to reward 0.24 -> 0.56 over 20 batches, pass@1 0.12 -> 0.28, pass@4 0.50 -> 0.50,"
    " held-out score 0.87 -> 0.55 (means of the first and the last 4) Model"
  )
  for sentence in (
    came,
    "Objective grpo (loss ppo) on answers that the run writes, advantage group",
    "Scored by number + 0.5 x length, times the gate tags",
    "Second score exact",
    "Answers 4 answers to each of 16 prompts a batch, at most 32 tokens, temperature 1, 2 updates",
    "the second score fell from 0.87 to 0.55: the reward is gamed",
    "reward reward 0.593 higher Mean reward of the answers that were written",
    "answers to held-out prompts, which eval.task asks for",
  ):
    assert sentence in text, sentence
  for sentence in ("rows bring", "Read the KL", "reference base,", "scored groups", "beta"):
    assert sentence not in text.partition("Resolved config")[0], sentence


@pytest.mark.parametrize(
  ("parts", "advice"),
  [
    (["number"], "raise it, or let the reward have the part length."),
    (["number", "length"], "raise it, or give the reward's part length more weight."),
  ],
)
def test_what_is_said_of_cut_answers_knows_what_the_reward_has(tmp_path, parts, advice):
  lines = [{"step": i, "reward": 0.1, "completions/clipped_ratio": 1.0} for i in (1, 2)]
  config = dict(ONLINE, reward=dict(parts=parts, weights=[], gates=[]))
  text = page(runs.write(tmp_path / "a", config=config, lines=lines)).text
  assert f"(now 32), and seldom right: {advice}" in text


def test_a_change_within_what_batches_differ_by_is_told_as_that(tmp_path):
  draw = np.random.default_rng(0)
  lines = [{"step": 2 * i + 1, "reward": 0.5 + 0.1 * draw.standard_normal()} for i in range(20)]
  folder = runs.write(tmp_path / "a", config=ONLINE, lines=lines)
  text = page(folder).text
  assert "the change of the reward is within what batches differ by" in text
  assert "is within what single batches differ by: take more steps" in text
  assert "first fifth" in printed(report.summary_table(folder))


def test_the_table_of_a_run_has_means_and_what_is_missing_and_no_rows_of_zeros(tmp_path):
  beside = {
    "rewards/f/mean": 0.5,
    "rewards/f/missing": 0.25,
    "rewards/f/std": 0.1,
    "rewards/retried": 0.0,
  }
  row = {
    "reward": 0.5,
    **beside,
    "rewards/missing": 0.25,
    "holdout/reward": 0.5,
    "holdout/rewards/missing": 0.0,
  }
  row |= {f"holdout/{name}": value for name, value in beside.items()}
  lines = [{"step": i, **row} for i in range(1, 9)]
  run = record.read(runs.write(tmp_path / "a", config=ONLINE, lines=lines))
  assert [name for name, *_ in online.rows(run)] == [
    "reward", "rewards/f/mean", "holdout/reward", "holdout/rewards/f/mean", "rewards/missing",
  ]  # fmt: skip


def test_parts_of_a_sum_are_no_channels(tmp_path):
  lines = [{"step": i, "loss": 2.0, "loss/preference": 1.0 / i, "loss/sft": 1.0} for i in (1, 2)]
  text = of(runs.PREFERENCE, lines, tmp_path / "a").text
  assert "Parts of the loss" in text
  assert "channel" not in text.partition("Parts of the loss")[2].partition("Commands")[0]


def test_special_tokens_are_drawn_apart(tmp_path):
  lines = [
    {
      "step": i,
      "loss": 2.0,
      "loss/sql": 1.0 / i,
      "loss/special": 2.0 / i,
      "loss/special/tool": 3.0 / i,
    }
    for i in (1, 2)
  ]
  found = of(dict(name="sft"), lines, tmp_path / "a")
  by_title = dict(text.split(" over steps: ") for text in found.figures)
  assert by_title["Special tokens"] == "special tokens from 2 to 1; tool from 3 to 1.5"
  assert by_title["Channels: sql"] == "training from 1 to 0.5"


def test_a_run_links_to_what_is_beside_it(folder):
  after = ["config.json", "evaluation-before.json", "evaluation-after.json"]
  assert page(folder).addresses == after
  for name in ("preference.html", "eval.json", "log.txt"):
    (folder / name).touch()
  (folder.parent / ".sweep.lock").touch()
  found = page(folder)
  wanted = ["preference.html", "eval.json", "config.json", "log.txt", *after[1:]]
  assert found.addresses == [*wanted, "../compare.html"]
  assert "all points of the sweep" in found.text


def test_scores_of_own_rows_before_and_after(tmp_path):
  answers = [runs.answer(f"Q{i}", "rows", False, f"A{i}") for i in range(4)]
  before = runs.graded(runs.result(answers), exact=[0.0, 0, 0, 1], mine=[0.1, 0.2, 0.3, 0.4])
  after = runs.graded(runs.result(answers), exact=[1.0, 1, 0, 1], mine=[0.2, 0.3, 0.3, 0.4])
  for results in (before, after):
    for a in results.answers:
      a["correct"] = a["scores"]["exact"] == 1
  folder = runs.write(tmp_path / "own", before=before, after=after)
  found = page(folder).text
  assert "exact: 25.0 % before, 75.0 % after, +50.0 points (95 % interval -6.6 to +100.0" in found
  assert "it may be chance" in found
  assert "mine: 0.25 before, 0.3 after, +0.05" in found
  assert "75.0 % (3/4;" in found
  assert "Wrong before, right after: 2" in found
  assert "Wrong before and after: 1" in found
  assert "Execution accuracy" not in found
  table = printed(report.summary_table(folder))
  assert "+50.0 points" in table
  assert "95 %" not in table


def test_a_metric_that_is_no_share_sorts_answers_into_better_and_worse(tmp_path):
  answers = [runs.answer(f"Q{i}", "rows", False, f"A{i}") for i in range(3)]
  before, after = (
    runs.graded(runs.result(answers), mine=values) for values in ([0.5, 0.5, 0.5], [0.7, 0.2, 0.5])
  )
  found = page(runs.write(tmp_path / "own", before=before, after=after)).text
  for title in ("Better after: 1", "Worse after: 1", "As before: 1"):
    assert title in found


def test_accuracy_before_and_after(folder):
  text = page(folder).text
  assert "Execution accuracy: sql, test split" in text
  assert "16.7 % (1/6) before, 66.7 % (4/6) after: +50.0 points." in text
  assert "join 0.0 % (0/3) 100.0 % (3/3) +100.0" in text
  assert "lookup 33.3 % (1/3) 33.3 % (1/3) +0.0" in text
  assert "all 16.7 % (1/6) 66.7 % (4/6) +50.0" in text
  assert "wrong result 5 2" in text


def test_answers_side_by_side_in_kinds(folder):
  text = page(folder).text
  fixed, broken, wrong = (text.index(kind) for kind in list(report.KINDS.values())[:3])
  assert fixed < broken < wrong
  assert "Wrong before, right after: 4" in text
  assert "before 0" in text[fixed:broken]
  assert "after 0" in text[fixed:broken]
  assert "before 5" in text[broken:wrong]
  assert "after 5" in text[broken:wrong]
  assert "before 4" in text[wrong:]
  assert "Right before and after" not in text


def test_figures_are_in_the_page_and_nothing_comes_from_outside(folder):
  runs.write_rows(folder, runs.rows())
  found = page(folder)
  titles = [text.partition(" over steps")[0] for text in found.figures]
  assert titles[:4] == ["Loss", "Special tokens", "Channels", "Token accuracy"]
  assert "svg" in found.tags
  assert not found.tags & {"script", "link", "iframe", "img"}
  text = (folder / "report.html").read_text(encoding="utf-8")
  assert not re.search(r"""url\(|@import|https?:|src\s*=""", text)
  assert all((folder / address).exists() for address in found.addresses)


def test_what_a_model_writes_is_text(tmp_path):
  evil = "</pre><script>alert('x')</script><img src=http://example.org/>"
  answers = [runs.answer(evil, f"<b>{evil}", False, evil, f"not valid: {evil}")]
  lines = [{"step": i, "loss": 1.0, "loss/$x_{$": 1.0, f"loss/{evil}": 2.0} for i in (1, 2)]
  folder = runs.write(tmp_path / "a", lines=lines, after=runs.result(answers), trainable=evil)
  found = page(folder)
  assert "script" not in found.tags
  assert not found.tags & {"img", "b onmouseover"}
  assert found.addresses == ["metrics.jsonl", "config.json", "evaluation-after.json"]
  assert found.text.count(evil) >= 4


def test_long_answers_are_cut(tmp_path):
  answers = [runs.answer("Q", text="x" * 5000)]
  text = page(runs.write(tmp_path / "a", after=runs.result(answers))).text
  assert "x" * report.LONGEST + " …" in text
  assert "x" * (report.LONGEST + 1) not in text


def test_many_answers_are_shown_over_the_channels(tmp_path):
  answers = [runs.answer(f"J{i}.", "join", False) for i in range(50)]
  answers += [runs.answer(f"L{i}.", "lookup", False) for i in range(50)]
  text = page(runs.write(tmp_path / "a", after=runs.result(answers))).text
  assert "Wrong after: 100, 4 of them" in text
  assert list(re.findall(r"\b[JL]\d+\.", text)) == ["J0.", "L0.", "J1.", "L1."]


@pytest.mark.parametrize(
  "parts",
  [
    dict(),
    dict(lines=[{"step": 1, "eval_loss": 2.0}]),
    dict(lines=[{"step": 1, "loss": float("nan"), "loss/a": float("nan"), "grad_norm": 1.0}]),
    dict(lines=[{"step": 1, "loss": float("inf")}, {"step": 2, "loss": 2.0}]),
    dict(before=runs.result([runs.answer("only before")])),
    dict(before=runs.result([])),
    dict(config={"steps": 3}),
  ],
  ids=str,
)
def test_parts_may_be_missing(tmp_path, parts):
  found = page(runs.write(tmp_path / "a", **parts))
  assert "Not finished: " in found.text
  assert "posttrain chat" not in found.text
  report.summary_table(tmp_path / "a")


def test_a_full_fine_tune_is_chatted_with_by_itself(tmp_path):
  config = dict(runs.CONFIG, adapter=dict(method="none"))
  folder = runs.write(tmp_path / "a", config=config)
  (folder / "model").mkdir()
  text = page(folder).text
  assert f"posttrain chat --model={folder / 'model'}" in text
  assert "every parameter is trained" in text


def test_a_reward_model_scores(tmp_path):
  config = dict(runs.CONFIG, objective=dict(name="reward"), data=dict(train="pairs.jsonl"))
  folder = runs.write(tmp_path / "a", config=config)
  assert "posttrain eval" not in page(folder).text
  (folder / "adapter").mkdir()
  text = page(folder).text
  assert (
    f"posttrain eval --reward={folder / 'adapter'} --data=pairs.jsonl --out=scores.jsonl" in text
  )
  assert "posttrain chat" not in text


def printed(table):
  console = rich.console.Console(file=io.StringIO(), width=100)
  console.print(table)
  return re.sub(r"[^\S\n]+", " ", console.file.getvalue())


def test_the_table_for_the_terminal(folder):
  text = printed(report.summary_table(folder))
  assert "channel before after change" in text
  assert "join 0.0 % (0/3) 100.0 % (3/3) +100.0" in text
  assert "all 16.7 % (1/6) 66.7 % (4/6) +50.0" in text


def test_the_table_without_an_evaluation_or_with_one(tmp_path):
  folder = runs.write(tmp_path / "a", lines=runs.rows(steps=2))
  assert "grad_norm" in printed(report.summary_table(folder))
  runs.write(tmp_path / "a", after=runs.result([runs.answer("Q", "[red]")]))
  text = printed(report.summary_table(folder))
  assert "channel after" in text
  assert "change" not in text
  assert "[red] 100.0 % (1/1)" in text


@pytest.mark.parametrize(
  ("adapter", "fact"),
  [
    (dict(method="vera", r=256, target_modules="all-linear"), "vera, r 256, on all-linear, 5"),
    (
      dict(method="adalora", init_r=24, target_r=16, lora_alpha=32.0, target_modules=["q_proj"]),
      "adalora, init_r 24, target_r 16, lora_alpha 32.0, on q_proj, 5",
    ),
    (dict(method="ia3", target_modules=["k_proj", "v_proj"]), "ia3, on k_proj, v_proj, 5"),
    (dict(method="prompt", num_virtual_tokens=20), "prompt, num_virtual_tokens 20, 5"),
  ],
)
def test_an_adapter_is_told_by_the_options_that_it_has(adapter, fact, tmp_path):
  folder = runs.write(tmp_path / "run", config={**runs.CONFIG, "adapter": adapter})
  (folder / "adapter").mkdir()
  tensors = {
    "base_model.model.vera_lambda_b": ((5,), "float32", lambda: np.zeros(5)),
    "base_model.vera_A": ((4, 8), "float32", lambda: np.zeros((4, 8))),  # drawn, not trained
  }
  files.write_safetensors(folder / "adapter" / "adapter_model.safetensors", tensors)
  assert f"{fact} parameters" in page(folder).text
