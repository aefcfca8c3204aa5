"""The SQL task: fair questions, splits that share nothing, a verifier that survives any answer."""

import functools
import hashlib
import json
import pathlib
import sqlite3
import subprocess
import sys
from collections import Counter

import pytest

from posttrain_jax.data.tasks import sql, sql_questions

SPLITS = ("train", "eval", "test")
FRANCE = "SELECT capital FROM country WHERE name = 'France'"
ASIA = "SELECT name, population FROM country WHERE continent = 'Asia'"


@functools.cache
def questions(split):
  return sql._questions(split, sql.SIZES[split], 0)


@pytest.fixture(scope="module")
def facts():
  return sql.database()


@pytest.fixture(scope="module")
def twin():
  return sql.database(twin=True)


# The tables


def test_each_mountain_lies_in_a_country_of_the_table(facts):
  orphans = "SELECT peak FROM mountain WHERE country NOT IN (SELECT name FROM country)"
  assert facts.execute(orphans).fetchall() == []
  assert facts.execute("SELECT COUNT(*) FROM country").fetchone()[0] > 100
  assert facts.execute("SELECT COUNT(*) FROM mountain").fetchone()[0] > 80


@pytest.mark.parametrize("column", ["country.name", "country.capital", "mountain.peak"])
def test_names_are_unique_plain_and_filled(facts, column):
  table, _, name = column.partition(".")
  names = [row[0] for row in facts.execute(f"SELECT {name} FROM {table}")]
  assert len(set(names)) == len(names)
  assert all(n and n.isascii() and "'" not in n for n in names)


@pytest.mark.parametrize(
  ("table", "column", "low", "high"),
  [
    ("country", "population", 0.05, 1500),
    ("country", "area", 0.2, 17_200),
    ("country", "joined", 1945, 2011),
    ("mountain", "height", 1000, 8849),
  ],
)
def test_numbers_are_stored_as_numbers_of_the_stated_unit(facts, table, column, low, high):
  kinds = {row[0] for row in facts.execute(f"SELECT typeof({column}) FROM {table}")}
  assert kinds in ({"real"}, {"integer"})
  assert (
    facts.execute(
      f"SELECT COUNT(*) FROM {table} WHERE {column} NOT BETWEEN {low} AND {high}"
    ).fetchone()[0]
    == 0
  )


def test_the_twin_has_the_same_names_and_other_facts(facts, twin):
  for table, (key, *others) in sql.COLUMNS.items():
    names = [set(c.execute(f"SELECT {key} FROM {table}")) for c in (facts, twin)]
    assert names[0] == names[1]
    for column in others:
      pairs = [set(c.execute(f"SELECT {key}, {column} FROM {table}")) for c in (facts, twin)]
      assert len(pairs[0] & pairs[1]) < len(pairs[1]) / 3, column


def test_a_database_file_is_written_once(tmp_path):
  sql.database(tmp_path / "facts.db").close()
  with sqlite3.connect(f"file:{tmp_path / 'facts.db'}?mode=ro", uri=True) as again:
    assert again.execute(FRANCE).fetchall() == [("Paris",)]
  with pytest.raises(FileExistsError, match="name a new file"):
    sql.database(tmp_path / "facts.db")


# The questions


@pytest.mark.parametrize("split", SPLITS)
def test_every_gold_answers_and_needs_each_condition(split, facts, twin):
  for q in questions(split):
    rows, other = (c.execute(q.gold).fetchall() for c in (facts, twin))
    assert rows, q
    assert other, q
    assert not any(None in row for row in rows + other), q
    assert "{" not in q.text + q.gold, q
    assert all(facts.execute(weaker).fetchall() != rows for weaker in q.weaker), q


@pytest.mark.parametrize("split", SPLITS)
def test_no_gold_result_hangs_on_a_tie(split, facts, twin):
  ordered = [q for q in questions(split) if "ORDER BY" in q.gold]
  assert ordered
  for q in ordered:
    assert len(q.tied) == 2
    for connection in (facts, twin):
      assert {tuple(connection.execute(t)) for t in q.tied} == {tuple(connection.execute(q.gold))}


@pytest.mark.parametrize("split", SPLITS)
def test_no_result_is_common(split, facts):
  results = Counter(repr(facts.execute(q.gold).fetchall()) for q in questions(split))
  assert results.most_common(1)[0][1] <= max(2, len(questions(split)) // 100)


@pytest.mark.parametrize("split", SPLITS)
def test_questions_are_distinct_and_of_every_channel(split):
  texts = [q.text for q in questions(split)]
  assert len(set(texts)) == len(texts) == sql.SIZES[split]
  assert Counter(q.channel for q in questions(split)) == sql_questions.channel_quotas(
    sql.SIZES[split]
  )


def test_splits_share_no_question_whatever_the_seeds():
  texts = {s: {q.text for q in questions(s)} for s in SPLITS}
  texts["train"] |= {e["question"] for e in sql.examples("train", n=300, seed=7)}
  assert not texts["train"] & texts["test"]
  assert not texts["train"] & texts["eval"]
  assert not texts["eval"] & texts["test"]


def test_held_out_combinations_are_never_trained_and_their_parts_are():
  trained = {q.combination for q in questions("train")}
  # A part is a half or a condition of the same table: ("country", "AVG(area)"), ("country", "continent").
  parts = {(c[0], part) for c in trained for part in c[1:]}
  for split in ("eval", "test"):
    held = {q.combination for q in questions(split)}
    assert not held & trained
    assert {(c[0], part) for c in held for part in c[1:]} <= parts


@pytest.mark.parametrize("split", ["eval", "test"])
def test_held_out_names_and_numbers_are_never_trained(split):
  for pool in sql_questions.NUMBERS.values():
    assert not set(pool["train"]) & set(pool[split])
  names = [row[0] for row in sql.database().execute("SELECT name FROM country")]
  trained = " ".join(q.gold for q in questions("train"))
  held = [n for n in names if any(f"= '{n}'" in q.gold for q in questions(split))]
  assert held
  assert not [n for n in held if f"= '{n}'" in trained]


def test_examples_are_prompt_and_completion():
  (example,) = sql.examples("test", n=1)
  assert [m["role"] for m in example["prompt"]] == ["system", "user"]
  assert example["prompt"][1]["content"] == example["question"]
  assert example["completion"] == [{"role": "assistant", "content": example["gold"]}]
  assert example["channel"] in sql_questions.CHANNELS
  for table, columns in sql.COLUMNS.items():
    assert f"{table}(" in example["prompt"][0]["content"]
    assert all(column in example["prompt"][0]["content"] for column in columns)


def test_unknown_split_and_impossible_size_say_what_there_is(monkeypatch):
  with pytest.raises(ValueError, match="no split 'dev'; there are train, eval, test"):
    sql.examples("dev")
  monkeypatch.setattr(sql_questions, "MAX_MISSES", 0)
  with pytest.raises(
    ValueError, match=r"has no 200 questions with seed 0: .* for 'lookup' missing; ask for fewer"
  ):
    sql.examples("eval", n=200)


def test_seeds_differ_and_processes_agree():
  program = (
    "import hashlib, json; from posttrain_jax.data.tasks import sql; "
    "print(hashlib.sha256(json.dumps(sql.examples('test', n=60, seed=3)).encode()).hexdigest())"
  )
  environment = {
    "PYTHONHASHSEED": "12345",
    "PYTHONPATH": str(pathlib.Path(sql.__file__).parents[3]),
  }
  done = subprocess.run(
    [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
  )
  here = json.dumps(sql.examples("test", n=60, seed=3)).encode()
  assert done.stdout.strip() == hashlib.sha256(here).hexdigest()
  assert json.dumps(sql.examples("test", n=60, seed=4)).encode() != here
