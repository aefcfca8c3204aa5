"""A tiny model on a suite: texts, choices and answers, kept as they come."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.data import chat
from posttrain_jax.data.errors import RowError
from posttrain_jax.evals import likelihood, measure, suite, verdicts
from posttrain_jax.evals.samples import Writer
from posttrain_jax.models import decoder
from posttrain_jax.settings import ConfigError
from tests import tiny

PARTS = [
  {"name": "text", "kind": "text", "rows": "text.jsonl"},
  {"name": "pick", "kind": "choice", "rows": "pick.jsonl"},
  {
    "name": "say",
    "kind": "answers",
    "rows": "say.jsonl",
    "metric": "contained",
    "max_new_tokens": 4,
  },
  {"name": "end", "kind": "answers", "rows": "say.jsonl", "metric": "stops", "max_new_tokens": 4},
]
TEXTS = ["Some words of no weight. " * 9, "short é"]  # the first is longer than the model
PICK = {"prompt": "1", "choices": ["one", "a long one"], "answer": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  folder = tmp_path_factory.mktemp("suite")
  tiny.write_jsonl(folder / "text.jsonl", [{"text": text} for text in TEXTS])
  tiny.write_jsonl(folder / "pick.jsonl", [PICK])
  tiny.write_jsonl(
    folder / "say.jsonl", [{"prompt": f"say {i}", "completion": "2"} for i in range(3)]
  )
  (folder / suite.FILE).write_text(json.dumps({"name": "small", "parts": PARTS}))
  return folder


@pytest.fixture(scope="module")
def writer():
  config = tiny.config()
  tokenizer = tiny.tokenizer()
  params = decoder.init(jax.random.key(0), config, std=tiny.STD)
  return Writer(params, config, tokenizer, chat.template(tokenizer), (258,))


def run(writer, place, path, **how):
  return measure.measure(
    writer, suite.load(str(place)), model="tiny", weights="w", path=path, rows=2, **how
  )


@pytest.fixture(scope="module")
def measured(writer, place, tmp_path_factory):
  path = tmp_path_factory.mktemp("measured") / "side.jsonl"
  return run(writer, place, path), path


def nats(writer, tokens, start):
  """-log p of each token from `start` on, by the logits of one pass over all of them."""
  tokens = jnp.asarray([tokens])
  logps = jax.nn.log_softmax(decoder.forward(writer.params, tokens, writer.config)[0], axis=-1)
  return -np.asarray(jnp.take_along_axis(logps[:-1], tokens[0, 1:, None], axis=-1)[:, 0])[
    start - 1 :
  ]


def test_bits_per_byte_score_every_token_once_with_what_the_model_can_read_before_it(
  writer, measured
):
  found = measured[0].results["text"]
  start = likelihood.start_of(writer.tokenizer)
  for text, result in zip(TEXTS, found):
    ids = writer.tokenizer(text, add_special_tokens=False)["input_ids"]
    total, longest = 0.0, writer.config.max_length
    for at in range(0, len(ids), longest):
      end = min(len(ids), at + longest)
      seen = [start, *ids[:end]][max(0, end - longest) :]
      total += nats(writer, seen, len(seen) - (end - at)).sum()
    assert result.value == pytest.approx(total / math.log(2), rel=1e-5)
    assert result.size == len(text.encode())


def test_a_choice_is_the_likeliest_a_byte(writer, measured):
  (result,) = measured[0].results["pick"]
  prompt = "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n"
  encode = lambda text: writer.tokenizer(text, add_special_tokens=False)["input_ids"]
  begun = encode(prompt)
  rates = [nats(writer, begun + encode(c), len(begun)).sum() / len(c) for c in PICK["choices"]]
  best = int(np.argmin(rates))
  assert result.answers == (PICK["choices"][best],)
  assert result.value == float(best == 0)


def test_answers_are_scored_and_their_ends_too(measured):
  said, ended = measured[0].results["say"], measured[0].results["end"]
  assert [one.answers for one in said] == [one.answers for one in ended], "greedy ones, alike"
  assert {one.value for one in said} <= {0.0, 1.0}
  assert {one.id for one in said} == {"say.jsonl:1", "say.jsonl:2", "say.jsonl:3"}


def test_a_model_that_overflows_has_no_score_of_anything(writer, place, measured, tmp_path):
  """An empty answer is no refusal, and the first of several choices no choice."""
  params = {
    **writer.params,
    "norm": {"weight": jnp.full_like(writer.params["norm"]["weight"], 3e38)},
  }
  side = run(dataclasses.replace(writer, params=params), place, tmp_path / "side.jsonl")
  for results in side.results.values():
    assert {(one.value, one.reason) for one in results} == {(None, measure.NO_NUMBERS)}
  found = verdicts.compare(suite.load(str(place)), measured[0], side)
  assert found.dropped == ["text", "pick", "say", "end"]


def test_a_measurement_goes_on_where_it_was_ended(writer, place, measured, monkeypatch):
  whole, path = measured
  lines = path.read_bytes().splitlines(keepends=True)
  half = path.with_name("half.jsonl")
  half.write_bytes(b"".join(lines[:3]) + lines[3][:20])
  with pytest.raises(ConfigError, match=r"half\.jsonl is not whole"):
    measure.read(half)
  kept = []
  written = measure._keep
  monkeypatch.setattr(measure, "_keep", lambda *a: (kept.append(a[1].name), written(*a)))
  assert run(writer, place, half) == whole
  assert len(kept) == len(lines) - 3


def test_a_measurement_of_something_else_is_not_written_over(writer, place, measured):
  _, path = measured
  with pytest.raises(
    ConfigError, match=r"of another measurement .answers were drawn with other seeds"
  ):
    run(writer, place, path, seed=1)
  with pytest.raises(ConfigError, match="there is no such measurement"):
    measure.read(path.with_name("none.jsonl"))


@pytest.mark.parametrize("counts", [None, 5, {"sums": "x"}, {"sums": -1}])
def test_a_file_of_something_else_is_no_measurement(counts, tmp_path):
  other = tmp_path / "other.jsonl"
  header = {"version": 1, "model": "a", "weights": "b", "counts": counts}
  for line in (header, {**header, "counts": {}, "model": None} if counts else {"a": 1}):
    line = {name: value for name, value in line.items() if value is not None}
    other.write_text(json.dumps(line) + "\n")
    with pytest.raises(ConfigError, match="is no measurement"):
      measure.read(other)


def test_another_template_is_seen(writer, place, measured):
  asked = suite.load(str(place))
  bare = Writer(writer.params, writer.config, writer.tokenizer, None, writer.ends)
  each = [measure.asked_lib.of(part, bare, 128) for part in asked.parts]
  header = measure.identity(bare, each, "tiny", "w", 0)
  assert "the chat templates differ" in measure.obstacles(measured[0].header, header)


def test_an_expected_answer_that_the_metric_cannot_read_is_named(writer, tmp_path):
  tiny.write_jsonl(
    tmp_path / "rows.jsonl",
    [{"prompt": "1", "completion": "1"}, {"prompt": "2", "completion": "two"}],
  )
  part = {"name": "sums", "kind": "answers", "rows": "rows.jsonl", "metric": "number"}
  for described, said in (
    (part, "rows.jsonl:2"),
    ({**part, "metric": "numbr"}, "did you mean number"),
  ):
    (tmp_path / suite.FILE).write_text(json.dumps({"parts": [described]}))
    with pytest.raises((RowError, ConfigError), match=said):
      run(writer, tmp_path, tmp_path / "x.jsonl")
  tiny.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "x" * 200, "completion": "1"}])
  (tmp_path / suite.FILE).write_text(json.dumps({"parts": [part]}))
  with pytest.raises(RowError, match=r"rows.jsonl:1: its prompt has \d+ tokens"):
    run(writer, tmp_path, tmp_path / "x.jsonl")


def test_rows_that_are_too_long_or_begin_with_a_mark_are_no_rows(writer):
  scores = likelihood.Scores(writer.params, writer.config)
  for row in (([1, 2], [True, True]), ([1, 2], [False]), ([1] * 200, [False] * 200)):
    with pytest.raises(ValueError, match="a row of"):
      scores.of([row])
