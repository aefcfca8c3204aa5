"""`posttrain sample`: answers, scored and kept, which fine-tuning reads as they are."""

import argparse
import dataclasses
import json

import pytest

from posttrain_jax.__main__ import main
from posttrain_jax.build import sampling as sampling_lib
from posttrain_jax.build import use
from posttrain_jax.commands import common
from posttrain_jax.data import chat, schema
from posttrain_jax.evals import keeping, samples
from posttrain_jax.evals.samples import Drawn
from posttrain_jax.rollout.sampling import Sampling
from posttrain_jax.settings import ConfigError
from tests import tiny

N = 4
VERIFIERS = """
def first(prompt, completion, example):
  return float(completion[:1] == example["gold"][:1])

def short(prompt, completion, example):
  return -len(completion)

def of_id(completions, id, **columns):
  return [0.5 if i % 3 else None for i in id]

def fails(prompt, completion, example):
  if completion != example["gold"] and example["id"] == 1:
    raise KeyError("x")
  return float(completion == example["gold"])

def reads_more(completions, level, **columns):
  return [0.0] * len(completions)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  folder = tmp_path_factory.mktemp("sample")
  tiny.tiny_model_folder(folder / "model")
  items = [{"prompt": f"say {i % 4}", "completion": "ab"[i % 2], "id": i} for i in range(4)]
  tiny.write_jsonl(folder / "rows.jsonl", items)
  tiny.write_jsonl(folder / "math.jsonl", [{"question": "1 + 1", "answer": "a", "level": 1}] * 2)
  mixed = [{"answer": "1"}, {"level": 1, "tests": ["assert f"]}]
  tiny.write_jsonl(folder / "mixed.jsonl", [{"prompt": "1?", **beside} for beside in mixed])
  tiny.write_jsonl(folder / "texts.jsonl", [{"text": "nothing is asked"}])
  tiny.write_jsonl(folder / "long.jsonl", [{"prompt": "x" * 200, "completion": "b"}] + items)
  (folder / "mine.py").write_text(VERIFIERS)
  return folder


@pytest.fixture(scope="module")
def used(place):
  return use.load(str(place / "model"))


@pytest.fixture
def written(monkeypatch):
  """The model's words, in the order of questions and answers, and which of them it was asked for."""
  tokenizer, asked = tiny.tokenizer(), []

  def draw(writer, prompts, plan, done=()):
    said = ("a", "b", "a", "ab")
    left = [(i, s) for i in range(len(prompts)) for s in range(plan.samples) if (i, s) not in done]
    for number, sample in reversed(left):  # they are whole in no order
      text = said[sample % len(said)]
      asked.append((number, sample))
      end = "" if sample == 3 else "<|im_end|>"
      yield Drawn(number, sample, tokenizer(text + end)["input_ids"], text, bool(end))

  monkeypatch.setattr(samples, "draw", draw)
  return asked


def wanted(place, out, **changes):
  keep = keeping.parse(changes.pop("keep", "all_right"), changes.pop("per_prompt", 0))
  values = dict(
    out=place / out if isinstance(out, str) else out,
    task="",
    data=str(place / "rows.jsonl"),
    samples=N,
    keep=keep,
    reward={"parts": ("exact",)},
    sampling=Sampling(),
    max_new_tokens=8,
  )
  return sampling_lib.Wanted(**(values | changes))


def rows_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_right_answers_are_right_however_long(place, used, written, tmp_path):
  """pass@k and what is kept are of the outcome, and the score is of all parts."""
  short = {"length": {"longest": 1, "soft": 1}}
  reward = {"parts": ("exact", "length"), "weights": (1.0, 0.25), "options": short}
  one = sampling_lib.write(wanted(place, tmp_path / "a.jsonl"), lambda: used)
  other = sampling_lib.write(wanted(place, tmp_path / "b.jsonl", reward=reward), lambda: used)
  assert other.mean < one.mean
  assert (other.passes, other.kept) == (one.passes, one.kept)
  assert {row["score"] for row in rows_of(tmp_path / "b.jsonl")} == {0.75}


def test_what_is_right_is_kept_once_with_all_that_is_known_of_it(place, used, written, tmp_path):
  summary = sampling_lib.write(wanted(place, tmp_path / "a.jsonl"), lambda: used)
  rows = rows_of(tmp_path / "a.jsonl")
  assert [(row["number"], row["sample"]) for row in rows] == [(0, 0), (1, 1), (2, 0), (3, 1)]
  assert rows[0]["completion"] == [{"role": "assistant", "content": "a"}]
  assert rows[0]["prompt"] == [{"role": "user", "content": "say 0"}]
  assert rows[0]["completion_ids"] == tiny.tokenizer()("a<|im_end|>")["input_ids"]
  assert (rows[0]["score"], rows[0]["parts"], rows[0]["finished"]) == (1.0, {"exact": 1.0}, True)
  assert rows[0]["weights"] == rows[1]["weights"]
  assert len(rows[0]["weights"]) == 16
  # of four answers two, or one, are right
  assert summary.passes == {1: 3 / 8, 2: pytest.approx((5 / 6 + 1 / 2) / 2), 4: 1.0}
  assert (summary.none_right, summary.kept) == (0, 4)
  assert summary.left_out == {
    keeping.SAME: 4,
    keeping.CUT: 4,
    keeping.RULED_OUT: 4,
  }


@pytest.mark.parametrize("cut_at", [1, 300, 700, 1500, -1])
def test_a_command_that_was_killed_goes_on_to_the_same_file(place, used, written, tmp_path, cut_at):
  whole = tmp_path / "whole.jsonl"
  sampling_lib.write(wanted(place, whole, keep="all"), lambda: used)
  journal = tmp_path / "whole.jsonl.answers"
  paid = journal.read_bytes()
  left = tmp_path / "left.jsonl.answers"
  left.write_bytes(paid[:cut_at])
  lines = [json.loads(line) for line in paid[:cut_at].splitlines(keepends=True)[:-1]]
  done = {tuple(line["answer"]) for line in lines if "answer" in line}
  written.clear()
  sampling_lib.write(wanted(place, tmp_path / "left.jsonl", keep="all"), lambda: used)
  assert (tmp_path / "left.jsonl").read_bytes() == whole.read_bytes()
  assert not done & set(written)
  assert len(written) == 16 - len(done)


def test_another_rule_keeps_others_of_the_same_answers(place, used, written, tmp_path):
  out = tmp_path / "a.jsonl"
  for keep, per_prompt, count in (
    ("all", 0, 12),  # of four answers three are unlike
    ("all", 2, 8),
    ("best", 0, 4),
    ("top:2", 0, 8),
    ("above:0.5", 0, 4),
    ("all_right", 0, 4),
  ):
    sampling_lib.write(wanted(place, out, keep=keep, per_prompt=per_prompt), lambda: used)
    assert len(rows_of(out)) == count, keep
  assert len(written) == 16  # once


def test_another_command_is_told_apart(place, used, written, tmp_path):
  out = tmp_path / "a.jsonl"
  sampling_lib.write(wanted(place, out), lambda: used)
  with pytest.raises(ConfigError, match=r"of another command \(seed: 0 there, 1 now\)"):
    sampling_lib.write(wanted(place, out, seed=1), lambda: used)
  with pytest.raises(ConfigError, match=r"\(n: 4 there, 5 now; temperature: 1.0 there, 0.5 now\)"):
    sampling_lib.write(
      wanted(place, out, samples=5, sampling=Sampling(temperature=0.5)), lambda: used
    )
  with pytest.raises(
    ConfigError, match=r"\(min_new_tokens: 0 there, 2 now; stop: \[\] there, \['b'\] now"
  ):
    sampling_lib.write(wanted(place, out, min_new_tokens=2, stop_strings=("b",)), lambda: used)
  (tmp_path / "b.jsonl").write_text("mine\n")
  with pytest.raises(ConfigError, match=r"is there already, and no b\.jsonl\.answers"):
    sampling_lib.write(wanted(place, tmp_path / "b.jsonl"), lambda: used)
  assert (tmp_path / "b.jsonl").read_text() == "mine\n"


def test_missing_scores_are_counted_with_their_reasons_and_never_0(place, used, written, tmp_path):
  own = {"parts": (f"{place / 'mine.py'}:fails",), "untested": (f"{place / 'mine.py'}:fails",)}
  summary = sampling_lib.write(
    wanted(place, tmp_path / "a.jsonl", reward=own, right=1.0, keep="all"), lambda: used
  )
  (((part, why), times),) = summary.missing.items()
  assert (part, times) == ("mine.py:fails", 3)
  assert why.startswith("raised KeyError, as: ")
  assert summary.scored == 13
  lost = [row for row in rows_of(tmp_path / "a.jsonl") if row["score"] is None]
  assert {row["number"] for row in lost} == {1}
  assert all("raised KeyError" in row["missing"]["mine.py:fails"] for row in lost)
  assert "3 answers have no score" in str(summary)


def test_a_reward_without_a_highest_score_says_nothing_of_right(place, used, written, tmp_path):
  own = f"{place / 'mine.py'}:short"
  spec = {"parts": (own,), "untested": (own,)}
  told = r"mine\.py:short has no highest .*; write --right=SCORE, or --keep=best.*\"ranges\": \{\"mine\.py:short\": \["
  with pytest.raises(ConfigError, match=told):
    sampling_lib.write(wanted(place, tmp_path / "a.jsonl", reward=spec), lambda: used)
  summary = sampling_lib.write(
    wanted(place, tmp_path / "a.jsonl", reward=spec, keep="best"), lambda: used
  )
  assert (summary.passes, summary.kept) == ({}, 4)
  assert {row["sample"] for row in rows_of(tmp_path / "a.jsonl")} == {0}  # of equal ones the first


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    (dict(samples=0), "0 answers to each prompt: draw at least 1"),
    (dict(data="", task="sums"), "--task=sums: there are sql"),
    (dict(data=""), "write --task=NAME"),
    (dict(reward={}), "--data needs --reward"),
    (dict(data="texts.jsonl"), "which asks nothing that could be answered"),
    (dict(data="long.jsonl", reward={"parts": ("exact",)}),
     r"; leave out the row, or take a model that reads more$"),
    (dict(max_new_tokens=120),
     "lower --max_new_tokens=120, or leave out the 4 of 4 rows of which that is so, or take a model that reads more$"),
    (dict(reward={"parts": ("gym",)}), "reads the column 'gym', which the data does not have"),
    (dict(reward={"parts": ("mine.py:reads_more",)}), "reads the column 'level'"),
    (dict(limit=-1), "--limit=-1"),
    (dict(data="mixed.jsonl", reward={"parts": ("number",)}),
     r"number reads the column 'answer', which not all rows have; the first without it is .*mixed.jsonl:2$"),
    (dict(data="mixed.jsonl", reward={"parts": ("mine.py:reads_more",)}),
     r"reads the column 'level', which not all rows have; the first without it is .*mixed.jsonl:1$"),
    (dict(data="mixed.jsonl", reward={"parts": ("python",)}), r"'tests', which not all rows have; .*mixed.jsonl:1$"),
  ],
)  # fmt: skip
def test_what_cannot_be_asked_is_told_before_anything_is_written(
  place, used, written, tmp_path, changes, said
):
  if changes.get("data"):
    changes = {**changes, "data": str(place / changes["data"])}
  parts = changes.get("reward", {}).get("parts", ())
  if parts and parts[0].startswith("mine"):
    changes = {**changes, "reward": {"parts": (str(place / parts[0]),)}}
  with pytest.raises(ValueError, match=said):
    sampling_lib.write(wanted(place, tmp_path / "a.jsonl", **changes), lambda: used)
  assert not written
  assert not list(tmp_path.iterdir())


def test_prompts_alone_in_columns_of_any_name(place, used, written, tmp_path):
  asked = dict(data=str(place / "math.jsonl"), keep="best")
  with pytest.raises(ValueError, match="write --columns=prompt=question --columns=completion"):
    sampling_lib.write(wanted(place, tmp_path / "a.jsonl", **asked), lambda: used)
  sampling_lib.write(
    wanted(place, tmp_path / "a.jsonl", columns={"prompt": "question"}, **asked), lambda: used
  )
  (row, other) = rows_of(tmp_path / "a.jsonl")
  assert row["prompt"] == [{"role": "user", "content": "1 + 1"}]
  assert (row["score"], other["number"]) == (1.0, 1)


@pytest.mark.parametrize("right", [float("nan"), float("inf")])
def test_a_right_score_is_a_number(place, tmp_path, right):
  with pytest.raises(ConfigError, match=r"--right=(nan|inf): the score from which on"):
    sampling_lib.write(wanted(place, tmp_path / "a.jsonl", right=right, keep="all"), None)


@pytest.mark.parametrize("line", ["5", "null", '["answer"]'])
def test_a_journal_of_other_lines_is_told(place, used, written, tmp_path, line):
  out = tmp_path / "a.jsonl"
  sampling_lib.write(wanted(place, out), lambda: used)
  with (tmp_path / "a.jsonl.answers").open("a") as file:
    file.write(line + "\n")
  with pytest.raises(ValueError, match=r"a.jsonl.answers:\d+ is no object of JSON: remove"):
    sampling_lib.write(wanted(place, out), lambda: used)


@pytest.mark.parametrize(
  ("line", "said"),
  [
    ({"answer": [0, 0]}, "has no 'ids'"),
    ({"answer": [0], "ids": [1], "finished": True}, "cannot be read"),
    ({"answer": [99, 0], "ids": [1], "finished": True}, r"cannot be read \(there is no answer 0"),
    ({"scored": 0}, "has no 'scores'"),
    ({"scored": 0, "scores": []}, r"cannot be read \(0 scores of"),
    ({"scored": 0, "scores": [{"parts": {}}] * 3}, "has no 'total'"),
  ],
)
def test_a_line_of_a_journal_that_lacks_something_is_told(
  place, used, written, tmp_path, line, said
):
  out = tmp_path / "a.jsonl"
  sampling_lib.write(wanted(place, out), lambda: used)
  with (tmp_path / "a.jsonl.answers").open("a") as file:
    file.write(json.dumps(line) + "\n")
  with pytest.raises(ValueError, match=rf"a.jsonl.answers:\d+ {said}.*: remove the file"):
    sampling_lib.write(wanted(place, out), lambda: used)


def test_a_file_beside_an_emptied_journal_is_not_written_over(place, used, written, tmp_path):
  out = tmp_path / "a.jsonl"
  sampling_lib.write(wanted(place, out), lambda: used)
  kept = out.read_text()
  (tmp_path / "a.jsonl.answers").write_text("")
  with pytest.raises(ConfigError, match=r"no a.jsonl.answers beside it says what wrote it"):
    sampling_lib.write(wanted(place, out, seed=1), lambda: used)
  assert out.read_text() == kept


def test_a_rule_that_keeps_nothing_leaves_the_file_of_another_and_says_so(
  place, used, written, tmp_path
):
  out = tmp_path / "a.jsonl"
  with pytest.raises(ConfigError, match="no answer is kept:\n"):
    sampling_lib.write(wanted(place, out, keep="above:2"), lambda: used)
  sampling_lib.write(wanted(place, out), lambda: used)
  edited = "".join(out.read_text().splitlines(keepends=True)[:1])  # by hand, made by no rule
  out.write_text(edited)
  with pytest.raises(ConfigError, match=r"no answer is kept \(.*a.jsonl is as an earlier command"):
    sampling_lib.write(wanted(place, out, keep="above:2"), lambda: used)
  assert out.read_text() == edited


def test_no_answer_that_is_kept_is_an_error_that_counts(place, used, written, tmp_path):
  with pytest.raises(ConfigError, match=r"no answer is kept:\n16 answers to 4 prompts"):
    sampling_lib.write(wanted(place, tmp_path / "a.jsonl", keep="above:1"), lambda: used)
  assert not (tmp_path / "a.jsonl").exists()


def test_fine_tuning_takes_the_tokens_that_were_drawn(place, used, tmp_path):
  ids = [*tiny.tokenizer()("hello")["input_ids"]]
  apart = [ids[0], *ids[1:]]
  row = {
    "prompt": [{"role": "user", "content": "say"}],
    "completion": [{"role": "assistant", "content": "hello"}],
    "completion_ids": [*apart, 258],
    "score": 1.0,
    "finished": True,
  }
  (example,) = chat.encode_all(
    schema.read([row]).rows, used.tokenizer, used.template, max_length=64
  )
  assert example.tokens[example.mask].tolist() == [*apart, 258]
  plain = chat.encode_all(
    schema.read([{k: row[k] for k in ("prompt", "completion")}]).rows,
    used.tokenizer,
    used.template,
    max_length=64,
  )[0]
  assert (
    example.tokens[~example.mask].tolist() == plain.tokens[: int((~example.mask).sum())].tolist()
  )
  cut = {**row, "completion_ids": apart, "finished": False}
  (example,) = chat.encode_all(
    schema.read([cut]).rows, used.tokenizer, used.template, max_length=64
  )
  assert example.tokens[example.mask].tolist() == apart
  assert example.is_cut
  stopped = {**row, "completion_ids": apart, "ended": "stop_string"}
  for template, ending in ((used.template, 258), (None, used.tokenizer.eos_token_id)):
    rows = [stopped if template else {**stopped, "prompt": "say", "completion": "hello"}]
    (example,) = chat.encode_all(schema.read(rows).rows, used.tokenizer, template, max_length=64)
    assert example.tokens[example.mask].tolist() == [*apart, ending]
    assert not example.is_cut
  for ids, said in (
    ([1, 2], "row 0: its completion_ids say"),
    ([], "expected a list of token ids"),
  ):
    with pytest.raises(ValueError, match=said):
      chat.encode_all(
        schema.read([{**row, "completion_ids": ids}]).rows,
        used.tokenizer,
        used.template,
        max_length=64,
      )


def test_answers_of_the_engine_stay_the_same_whatever_is_done_already(used):
  """Also with fewer of them under way at once."""
  writer = use.writer(used)
  prompts = [[1, 5, 9], [7] * 6, [3]]
  plan = samples.Plan(3, 6, Sampling(), seed=2, rows=4)
  whole = {(d.number, d.sample): d for d in samples.draw(writer, prompts, plan)}
  done = {(0, 1), (2, 2), (1, 0), (1, 1), (1, 2)}
  rest = {(d.number, d.sample): d for d in samples.draw(writer, prompts, plan, done=done)}
  assert rest == {at: d for at, d in whole.items() if at not in done}
  assert len(whole) == 9


def test_how_answers_are_drawn_and_end_is_of_the_command(place, used, tmp_path):
  """chat and sample read the same options, and each changes what is written or is refused."""
  parser = argparse.ArgumentParser()
  common.add_drawing(parser, temperature=1.0)
  parser.add_argument("--max_new_tokens", type=int, default=8)
  read = lambda *flags: common.drawing(parser.parse_args(flags))
  drawn = read("--stop=a", "--stop=\n", "--repetition_penalty=1.3", "--top_k=5", "--min_p=0.1")
  assert drawn == dict(
    sampling=Sampling(1.0, 5, 1.0, 0.1, 1.3), stop_strings=("a", "\n"), min_new_tokens=0
  )
  with pytest.raises(ValueError, match=r"--min_new_tokens=9: from 0 to --max_new_tokens=8"):
    read("--min_new_tokens=9")
  writer, prompts = use.writer(used), [[1, 5, 9], [7] * 6]
  plan = samples.Plan(3, 12, Sampling(), seed=2, rows=4)
  free = [d.text for d in samples.draw(writer, prompts, plan)]
  letter = next(text[3] for text in free if len(text) > 6)
  stopped = list(samples.draw(writer, prompts, dataclasses.replace(plan, stop_strings=(letter,))))
  assert all(d.finished for d in stopped if letter in d.text)
  assert all(d.is_stopped == (letter in d.text) for d in stopped)
  assert any(letter in d.text for d in stopped)
  assert sum(len(d.tokens) for d in stopped) < 6 * 12
  with pytest.raises(ValueError, match="cannot make the stop string"):
    sampling_lib.write(wanted(place, tmp_path / "c.jsonl", stop_strings=("\ud800",)), lambda: used)
  assert not list(tmp_path.glob("c.jsonl*"))


def test_the_command_from_a_model_to_a_file_that_trains(place, tmp_path, capsys):
  out = tmp_path / "made" / "own.jsonl"
  own = f"{place / 'mine.py'}:first"
  flags = [
    "sample",
    f"--model={place / 'model'}",
    f"--data={place / 'rows.jsonl'}",
    f"--reward={own}",
    "--columns=prompt=prompt",
    "--columns=completion=completion",
    "--n=2",
    "--keep=all",
    "--max_new_tokens=4",
    "--batch_size=4",
    "--stop=b",
    "--repetition_penalty=1.1",
    f"--out={out}",
  ]
  assert main(flags) == 0
  told = capsys.readouterr().out
  assert told.splitlines()[-1] == f"written: {out}"
  assert "8 answers to 4 prompts" in told
  rows = rows_of(out)
  assert len(rows) == 8
  train = [
    "train",
    f"--config=sft:model={place / 'model'},data={out}",
    "--config.steps=1",
    "--config.eval.every=0",
    "--config.data.length=64",
    f"--workdir={tmp_path / 'run'}",
    "--dry_run",
  ]
  assert main(train) == 0
  assert "8 examples" in capsys.readouterr().out
  assert main([*flags[:4], "--n=0", f"--out={tmp_path / 'b.jsonl'}"]) == 1
  assert "0 answers to each prompt: draw at least 1" in capsys.readouterr().err


def test_pairs_are_a_form_of_what_was_drawn(place, used, written, tmp_path, capsys):
  """Answers that are there already are not drawn again, and a pair has no right answer on its worse side."""
  out = tmp_path / "a.jsonl"
  sampling_lib.write(wanted(place, out), lambda: used)
  drawn = len(written)
  told = sampling_lib.write(wanted(place, out, keep="pairs"), lambda: used)
  assert len(written) == drawn
  rows = rows_of(out)
  assert (told.kept, told.gold) == (len(rows), 0) == (4, 0)
  for row, question in zip(rows, rows_of(place / "rows.jsonl"), strict=True):
    gold = question["completion"]
    assert row["chosen"] == [{"role": "assistant", "content": gold}]
    assert row["rejected"][0]["content"] != gold
    assert (row["score_chosen"], row["score_rejected"]) == (1.0, 0.0)
  with pytest.raises(ValueError, match="one pair at most"):
    wanted(place, out, keep="pairs", per_prompt=2)
  right = wanted(place, tmp_path / "b.jsonl", keep="pairs", right=-1.0)
  with pytest.raises(ConfigError, match="no prompt gave a pair"):
    sampling_lib.write(right, lambda: used)
