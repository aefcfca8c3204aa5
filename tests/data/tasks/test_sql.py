"""The SQL task: fair questions, splits that share nothing, a verifier that survives any answer."""

import functools
import hashlib
import json
import pathlib
import sqlite3
import subprocess
import sys
import time
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
def test_every_gold_scores_as_right_and_no_constant_does(split, facts):
  for q in questions(split)[:40]:
    assert sql.score(f"```sql\n{q.gold};\n```", q.gold) == sql.Score(True, "ok")
    rows = facts.execute(q.gold).fetchall()
    said = " UNION ALL ".join("SELECT " + ", ".join(repr(v) for v in row) for row in rows[:20])
    assert not sql.score(said, q.gold).correct, q


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


# The verifier


@pytest.mark.parametrize(
  ("text", "wanted"),
  [
    ("SELECT 1", "SELECT 1"),
    ("  SELECT 1 ;  ", "SELECT 1"),
    ("```sql\nSELECT 1;\n```", "SELECT 1"),
    ("```SQL\nSELECT 1\n```\nThis counts.", "SELECT 1"),
    ("```\nSELECT 1\n```", "SELECT 1"),
    ("```sql\nSELECT 1", "SELECT 1"),
    ("Here it is:\n```sqlite\nSELECT 1;\n```", "SELECT 1"),
    ("SELECT 1; DROP TABLE country", "SELECT 1"),
    ("SELECT ';' AS a; SELECT 2", "SELECT ';' AS a"),
    ("", ""),
    (";", ""),
    ("```", "```"),
  ],
)
def test_extract(text, wanted):
  assert sql.extract(text) == wanted


@pytest.mark.parametrize(
  ("answer", "gold"),
  [
    (FRANCE, FRANCE),
    ("select c.capital from country as c where c.name like 'FRANCE'", FRANCE),
    (ASIA + " ORDER BY area", ASIA),
    (
      "WITH a AS (SELECT * FROM country) SELECT name, population FROM a WHERE continent = 'Asia'",
      ASIA,
    ),
    ("SELECT SUM(1.0) FROM country", "SELECT COUNT(*) FROM country"),
    ("SELECT SUM(area) / COUNT(area) FROM country", "SELECT AVG(area) FROM country"),
    (
      "SELECT name FROM country WHERE area = (SELECT MAX(area) FROM country)",
      "SELECT name FROM country ORDER BY area DESC LIMIT 1",
    ),
  ],
)
def test_other_words_for_the_same_query_are_right(answer, gold):
  assert sql.score(answer, gold) == sql.Score(True, "ok")


@pytest.mark.parametrize(
  ("answer", "gold", "reason"),
  [
    ("SELECT capital FROM country WHERE name = 'Spain'", FRANCE, "wrong result"),
    ("SELECT 'Paris'", FRANCE, "wrong result"),
    ("SELECT 'Paris' FROM country WHERE name = 'France'", FRANCE, "wrong result"),
    ("SELECT population, name FROM country WHERE continent = 'Asia'", ASIA, "wrong result"),
    (ASIA + " UNION ALL " + ASIA, ASIA, "wrong result"),
    ("SELECT CAST(COUNT(*) AS TEXT) FROM country", "SELECT COUNT(*) FROM country", "wrong result"),
    ("SELECT COUNT(*) * 1.00001 FROM country", "SELECT COUNT(*) FROM country", "wrong result"),
    ("SELECT NULL", FRANCE, "wrong result"),
    ("SELECT capital FROM country WHERE 0", FRANCE, "wrong result"),
    (ASIA + " ORDER BY population", ASIA + " ORDER BY population DESC", "wrong result"),
    ("Paris is the capital of France.", FRANCE, 'syntax error: near "Paris": syntax error'),
    ("SELECT", FRANCE, "syntax error: incomplete input"),
    ("SELECT town FROM country", FRANCE, "not valid: no such column: town"),
    ("", FRANCE, "no query"),
    ("-- only a comment", FRANCE, "wrong result"),
  ],
)
def test_wrong_answers_say_why(answer, gold, reason):
  assert sql.score(answer, gold) == sql.Score(False, reason)


def test_duplicates_count_and_order_counts_only_where_gold_orders(facts):
  pair = "SELECT 1 AS a UNION ALL SELECT 2"
  assert sql.score("SELECT 2 AS a UNION ALL SELECT 1", pair, connection=facts).correct
  assert not sql.score(
    "SELECT 2 AS a UNION ALL SELECT 1", pair + " ORDER BY a", connection=facts
  ).correct
  assert not sql.score(pair + " UNION ALL SELECT 2", pair, connection=facts).correct
  assert not sql.score("VALUES (1), (1), (2)", "VALUES (1), (2), (2)", connection=facts).correct


@pytest.mark.parametrize(
  ("query", "ordered"),
  [
    ("SELECT a FROM t ORDER BY a", True),
    ("SELECT a FROM t order  by a LIMIT 1", True),
    ("SELECT a FROM (SELECT a FROM t ORDER BY (a + (1)))", False),
    ("SELECT a FROM t WHERE b = 'ORDER BY'", False),
  ],
)
def test_only_an_outer_order_by_orders(query, ordered):
  assert sql._is_ordered(query) is ordered


def test_rows_match_within_rounding_wherever_sorting_puts_them():
  third, nearly = 0.1 + 0.2, 0.3
  assert sql._same_rows([(third, "a"), (nearly, "b")], [(third, "b"), (nearly, "a")], ordered=False)
  assert not sql._same_rows(
    [(third, "a"), (nearly, "a")], [(third, "b"), (nearly, "a")], ordered=False
  )
  assert not sql._same_rows([(1,)], [(1, 1)], ordered=False)
  assert sql._same_rows([(None, b"x")], [(None, b"x")], ordered=False)


@pytest.mark.parametrize(
  ("gold", "message"),
  [
    ("SELECT name FROM country WHERE 0", "returns no row"),
    ("SELECT town FROM country", "the gold query fails .*no such column"),
  ],
)
def test_a_useless_gold_is_refused(gold, message):
  with pytest.raises(ValueError, match=message):
    sql.score(FRANCE, gold)


NUMBERED = "WITH RECURSIVE t(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM t) "
DOUBLED = "WITH RECURSIVE t(s) AS (SELECT 'x' UNION ALL SELECT s || s FROM t) "
HOSTILE = {
  "endless recursion": (NUMBERED + "SELECT COUNT(*) FROM t", "too slow"),
  "endless rows": (NUMBERED + "SELECT i FROM t", "too many rows"),
  "cartesian product": (
    "SELECT COUNT(*) FROM country a, country b, country c, country d",
    "too slow",
  ),
  "cartesian rows": ("SELECT a.* FROM country a, country b, country c", "too many rows"),
  "wide rows": ("SELECT " + "name, " * 50 + "name FROM country", "not valid: too many columns"),
  "sorted product": (
    "SELECT a.name FROM country a, country b, country c ORDER BY b.area, c.area",
    "too slow",
  ),
  "printf": ("SELECT printf('%.*c', 1000000000, 'x')", "function not allowed: printf"),
  "randomblob": ("SELECT randomblob(1000000000)", "function not allowed: randomblob"),
  "zeroblob": ("SELECT zeroblob(1000000000)", "function not allowed: zeroblob"),
  "doubling": (DOUBLED + "SELECT MAX(LENGTH(s)) FROM t", "too large"),
  "concatenation": ("SELECT group_concat(a.name) FROM country a, country b", "too large"),
  "random": ("SELECT random()", "function not allowed: random"),
  "clock": ("SELECT CURRENT_TIMESTAMP", "function not allowed: current_timestamp"),
  "extension": ("SELECT load_extension('/tmp/x.so')", "function not allowed: load_extension"),
  "readfile": ("SELECT readfile('/etc/passwd')", "not valid: no such function"),
  "drop": ("DROP TABLE country", "not read-only"),
  "delete": ("DELETE FROM country", "not read-only"),
  "returning": ("UPDATE country SET name = 'x' RETURNING name", "not read-only"),
  "create": ("CREATE TABLE x AS SELECT * FROM country", "not read-only"),
  "temporary": ("CREATE TEMP TABLE country(name)", "not read-only"),
  "trigger": (
    "CREATE TRIGGER x AFTER INSERT ON country BEGIN DELETE FROM country; END;",
    "not read-only",
  ),
  "pragma": ("PRAGMA query_only = 0", "not read-only"),
  "pragma function": ("SELECT * FROM pragma_table_info('country')", "not read-only"),
  "attach": ("ATTACH DATABASE '/tmp/never.db' AS x", "not read-only"),
  "vacuum": ("VACUUM INTO '/tmp/never.db'", "not read-only"),
  "transaction": ("BEGIN EXCLUSIVE", "not read-only"),
  "two statements": ("SELECT 1; DROP TABLE country;", "wrong result"),
  "nul": ("SELECT 1\0; DROP TABLE country", "syntax error"),
  "lone surrogate": ("SELECT '\ud800'", "wrong result"),
  "broken utf-8": ("SELECT CAST(x'ff' AS TEXT)", "not valid"),
  "blob": ("SELECT x'ff'", "wrong result"),
  "infinity": ("SELECT 9e999, -9e999", "wrong result"),
  "deep nesting": ("SELECT " + "(" * 900 + "1" + ")" * 900, "not valid"),
  "deep expression": ("SELECT " + "-" * 1 + "+".join(["1"] * 500), "not valid"),
  "long query": ("SELECT '" + "x" * 100_000 + "'", "too large"),
  "many semicolons": ("SELECT '" + ";" * 100_000, "too large"),
  "many fences": ("```" * 30_000, "too large"),
  "binds": ("SELECT ?", "not valid"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_answer_harms_or_delays_the_verifier(name):
  answer, reason = HOSTILE[name]
  started = time.thread_time()
  result = sql.score(answer, FRANCE)
  assert time.thread_time() - started < 0.5
  assert not result.correct
  assert result.reason.startswith(reason)


def test_a_given_connection_is_left_as_it_was(tmp_path):
  with sql.database(tmp_path / "facts.db") as connection:
    limit = connection.getlimit(sqlite3.SQLITE_LIMIT_LENGTH)
    for answer, _ in HOSTILE.values():
      assert not sql.score(answer, FRANCE, connection=connection).correct
    assert sql.score("SELECT 'Paris'", FRANCE, connection=connection).correct  # no twin to tell
    assert connection.getlimit(sqlite3.SQLITE_LIMIT_LENGTH) == limit
    assert connection.execute("SELECT COUNT(*) FROM country").fetchone()[0] > 100
    connection.execute("DELETE FROM country")  # the owner may still write
  assert sorted(p.name for p in tmp_path.iterdir()) == ["facts.db"]


def test_many_steps_are_too_slow_on_any_machine(monkeypatch):
  monkeypatch.setattr(sql, "MAX_SECONDS", 20)
  started = time.thread_time()
  assert sql.score(NUMBERED + "SELECT COUNT(*) FROM t", FRANCE).reason == "too slow"
  assert time.thread_time() - started < 2


def test_slow_steps_meet_the_clock(monkeypatch):
  monkeypatch.setattr(sql, "MAX_STEPS", 10**12)
  monkeypatch.setattr(sql, "MAX_SECONDS", 0.05)
  assert sql.score(NUMBERED + "SELECT COUNT(*) FROM t", FRANCE).reason == "too slow"


def test_evaluate_counts_by_channel_and_reason():
  examples = sql.examples("test", n=40)
  answers = [e["gold"] for e in examples]
  first = next(i for i, e in enumerate(examples) if e["channel"] == "join")
  answers[first] = "no SQL"
  report = sql.evaluate(answers, examples)
  joins = sum(e["channel"] == "join" for e in examples)
  assert report["accuracy"] == pytest.approx(39 / 40)
  assert (report["correct"], report["n"]) == (39, 40)
  assert report["channels"]["join"] == {"correct": joins - 1, "total": joins}
  assert sum(c["total"] for c in report["channels"].values()) == 40
  assert report["reasons"] == {"ok": 39, "syntax error": 1}
  with pytest.raises(ValueError, match="one answer per example"):
    sql.evaluate(answers[1:], examples)
