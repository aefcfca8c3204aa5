"""config.data: what rows become before they are batches."""

import math

import ml_collections
import numpy as np
import pytest

from posttrain_jax.build import data, decisions
from posttrain_jax.build.model import Model
from posttrain_jax.data import chat, loader
from posttrain_jax.data.errors import RowError
from posttrain_jax.evals import judge
from posttrain_jax.settings import ConfigError
from tests import tiny
from tests.objectives import batches

NAN = math.nan
SCORES = [(1.0, 0.0, 0.5, NAN), (2.0, 2.0), (0.1 + 0.2, 0.3, 0.3), (NAN, 3.0), (4.0, 1.0, 1.0)]
# by hand: mean of a group's scores, deviation by n - 1, one answer against the mean of the others
CENTRED = [(0.5, -0.5, 0.0, 0.0), (0, 0), (0, 0, 0), (0, 0), (2.0, -1.0, -1.0)]
DEVIATIONS = [0.5, 0.0, 0.0, 0.0, math.sqrt(3)]


def given(how, scores=SCORES):
  """The groups, each with its advantages."""
  sizes = tuple(map(len, scores))
  each = iter(scores)
  groups = batches.groups(len(scores), sizes, score=lambda rng, n: next(each))
  config = ml_collections.ConfigDict({"objective": {"advantage": how}})
  return data.with_advantages(config, groups)


def divided(by):
  return [tuple(x / (d + 1e-4) for x in row) for row, d in zip(CENTRED, by)]


@pytest.mark.parametrize(
  ("how", "expected"),
  [
    ("none", CENTRED),
    ("group", divided(DEVIATIONS)),
    ("batch", divided([np.nanstd(np.concatenate(SCORES), ddof=1)] * 5)),
    ("leave_one_out", [(0.75, -0.75, 0, 0), (0, 0), (0, 0, 0), (0, 0), (3.0, -1.5, -1.5)]),
  ],
)
def test_advantages_of_ragged_groups(how, expected):
  """One with an answer that has no score, two that agree, one within rounding, one with a single score."""
  for group, wanted, deviation in zip(given(how), expected, DEVIATIONS, strict=True):
    assert group.values["advantage"] == pytest.approx(wanted, rel=1e-5)
    assert group.values["deviation"] == pytest.approx((deviation,) * group.count, rel=1e-6)


def test_a_group_of_one_answer_is_refused():
  with pytest.raises(ValueError, match="over others to its prompt"):
    given("group", [(1.0, 0.0), (1.0,)])


@pytest.mark.parametrize(
  "text", ["P*0.5+P*0.5", "a.jsonl*0.7+a.jsonl*0.5+B*0.5", "x/../b*0.5+b*0.5"]
)
def test_a_source_of_a_mixture_is_named_once(text, tmp_path, monkeypatch):
  """A second fraction of the same data took the first one's place."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "b").touch()
  (tmp_path / "x").mkdir()
  with pytest.raises(ConfigError, match=r"named twice: write it once with the sum"):
    decisions.mixture(text)
  assert decisions.mixture("a*0.7+b*0.3") == {"a": 0.7, "b": 0.3}


def given_rows(tmp_path, kind, train, **settings):
  """(config, model): rows are written to files of the settings' names."""
  config = ml_collections.ConfigDict(
    dict(
      seed=0,
      steps=1,
      model=dict(base="dense"),
      adapter=dict(method="none"),
      objective=dict(name="reward"),
      data=dict(
        dict(
          kind=kind, eval="", eval_rows=0, limit=0, columns={}, chat=True, system=None, length=64
        ),
        truncate="error",
        on_error="raise",
        share_prompt=True,
        replay="",
        replay_columns={},
        replay_fraction=0.5,
        replay_by="tokens",
        train_on="assistant",
      ),
    )
  )
  for name, rows in dict(train=train, **settings).items():
    is_rows = isinstance(rows, list)
    with config.ignore_type():
      path = tmp_path / f"{name}.jsonl"
      config.data[name] = str(tiny.write_jsonl(path, rows)) if is_rows else rows
  tokenizer = tiny.tokenizer()
  used = Model(tmp_path, None, tiny.config(), tokenizer, chat.template(tokenizer), None)
  return config, used


def labelled(*labels):
  return [dict(prompt=f"q{i}", completion="a", label=label) for i, label in enumerate(labels)]


BOTH, GOOD = labelled(True, False, True), labelled(True, True)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(train=GOOD), r"all 2 completions of the training rows \(data.train=.*objective.name=sft"),
    (dict(train=BOTH, eval=GOOD), r"all 2 completions of the held-out rows \(data.eval=.*leave"),
    (dict(train=BOTH, eval_rows=1), r"of the held-out rows \(data.eval_rows=1 of .*name rows of"),
    (dict(train=BOTH, eval=tiny.rows(2)), r"^data.eval: .*eval.jsonl:1: 'prompt_completion' rows"),
    (dict(train=BOTH, eval="gone.jsonl"), r"^data.eval: gone.jsonl does not exist"),
    (dict(train=BOTH, replay=tiny.rows(2)), r"^data.replay: .*replay.jsonl:1: 'prompt_completion'"),
    (dict(train=tiny.rows(2), replay=BOTH), r"^\S*train.jsonl:1: 'prompt_completion' rows"),
  ],
)
def test_what_is_wrong_with_a_source_is_said_with_its_role(settings, message, tmp_path):
  with pytest.raises((ValueError, OSError), match=message):
    data.read(*given_rows(tmp_path, "outcomes", **settings))


def test_classes_may_stand_in_a_file_each(tmp_path):
  good, bad = (tiny.write_jsonl(tmp_path / f"{x}.jsonl", labelled(x)) for x in (True, False))
  config, used = given_rows(tmp_path, "outcomes", f"{good}*0.5+{bad}*0.5")
  assert len(data.read(config, used).examples) == 2


PAIRS = [dict(prompt=f"q{i}", chosen="yes", rejected="no") for i in range(64)]
SMALL = {
  "text": [dict(prompt=f"q{i}", completion="a") for i in range(700)],
  "pairs": PAIRS,
  "labels": labelled(*[i % 3 == 0 for i in range(64)]),
}


@pytest.mark.parametrize(
  ("kind", "count", "held_out"),
  [
    *(("text", count, held_out) for count, held_out in ((1, 0), (2, 0), (5, 0), (20, 2), (64, 6))),
    *(("pairs", count, held_out) for count, held_out in ((1, 0), (5, 0), (20, 2), (64, 6))),
    *(("labels", count, held_out) for count, held_out in ((2, 0), (19, 0), (20, 2), (64, 6))),
    ("text", 700, 64),
  ],
)
def test_where_nobody_says_how_many_a_tenth_is_held_out(kind, count, held_out, tmp_path):
  """Of 60 rows, 64 could not be held out; of 5, none says anything.  Labels have both classes on both sides."""
  config, used = given_rows(tmp_path, kind, SMALL[kind][:count], eval_rows=None)
  if kind == "labels":
    config.objective = ml_collections.ConfigDict(dict(name="kto", estimate_kl=True))
  rows = data.read(config, used)
  assert (len(rows.examples), len(rows.eval)) == (count - held_out, held_out)
  assert (f"a tenth of {count} is too few" in " ".join(rows.notes)) == (not held_out)
  assert "reads 'prompt' as the prompt" in rows.reads[0]
  batches = loader.Loader(rows.train, batch_size=8, length=64)
  assert [next(batches)["tokens"].shape for _ in range(3)] == [(8, 64)] * 3


def test_one_class_of_two_rows_is_not_held_out(tmp_path):
  config, used = given_rows(tmp_path, "outcomes", labelled(True, *[False] * 29), eval_rows=None)
  assert len(data.read(config, used).eval) == 0
  told = dict(train=SMALL["text"][:4], eval_rows=4)
  with pytest.raises(
    ConfigError, match=r"eval_rows=4 would leave nothing of the 4 rows .*leave it out"
  ):
    data.read(*given_rows(tmp_path, "text", **told))


def test_advice_for_a_row_that_is_too_long_fits_the_command(tmp_path):
  """Training has settings that cut rows; an evaluation of a file has none."""
  config, used = given_rows(tmp_path, "text", [dict(prompt="q" * 200, completion="a")])
  with pytest.raises(RowError, match=r"train.jsonl:1: .*data.truncate="):
    data.read(config, used)
  for length in (64, 1000):  # of the row, and of the model's positions
    config.data.length = length
    with pytest.raises(
      RowError, match=r"train.jsonl:1: .*; shorten the row, or leave it out"
    ) as told:
      data.evaluated(config, used, config.data.train)
    assert "truncate" not in str(told.value)
  reward = judge.Judge({"layers": {"self_attn": {}}}, used.config, used.tokenizer, used.template)
  with pytest.raises(RowError, match=r"train.jsonl:1: .*128 positions; shorten the row, or leave"):
    reward.encode(reward.read(config.data.train))


def drawn(end, **changes):
  row = {
    "prompt": [{"role": "user", "content": "say"}],
    "completion": [{"role": "assistant", "content": "hello"}],
    "completion_ids": [*tiny.tokenizer()("hello")["input_ids"], end],
    "finished": True,
  }
  return [row | changes] * 4


@pytest.mark.parametrize("end", [258, 256])
def test_a_drawn_answer_ends_in_any_token_that_ends_what_the_model_writes(tmp_path, end):
  """The template's end of turn is one of them; what was drawn is what is trained."""
  (tmp_path / "generation_config.json").write_text('{"eos_token_id": [256, 258]}')
  (first, *_) = data.read(*given_rows(tmp_path, "text", drawn(end))).examples
  assert first.tokens[first.mask].tolist() == drawn(end)[0]["completion_ids"]


def test_a_drawn_answer_without_an_end_teaches_no_stop(tmp_path):
  with pytest.raises(ValueError, match="would not learn to stop"):
    data.read(*given_rows(tmp_path, "text", drawn(256)))  # the model does not stop at it
  cut = drawn(
    tiny.tokenizer()("!")["input_ids"][0],
    completion=[{"role": "assistant", "content": "hello!"}],
    finished=False,
  )
  assert all(example.is_cut for example in data.read(*given_rows(tmp_path, "text", cut)).examples)
