"""SQL by execution: other words for a query are right, wrong ones say why, and no answer harms the verifier."""

import re
import sqlite3
import time

import pytest

from posttrain_jax.data.tasks import sql as task
from posttrain_jax.rewards import sql
from posttrain_jax.rewards.score import Score

FRANCE = "SELECT capital FROM country WHERE name = 'France'"
ASIA = "SELECT name, population FROM country WHERE continent = 'Asia'"


@pytest.fixture(scope="module")
def facts():
  return task.database()


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_gold_scores_as_right_and_no_constant_does(split, facts):
  for q in task.examples(split, n=40):
    assert sql.score(f"```sql\n{q['gold']};\n```", q["gold"]) == Score(1.0, "ok")
    rows = facts.execute(q["gold"]).fetchall()
    said = " UNION ALL ".join("SELECT " + ", ".join(repr(v) for v in row) for row in rows[:20])
    assert not sql.score(said, q["gold"]).value, q


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
  assert sql.score(answer, gold) == Score(1.0, "ok")


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
  assert sql.score(answer, gold) == Score(0.0, reason)


def test_duplicates_count_and_order_counts_only_where_gold_orders(facts):
  pair = "SELECT 1 AS a UNION ALL SELECT 2"
  assert sql.score("SELECT 2 AS a UNION ALL SELECT 1", pair, connection=facts).value
  assert not sql.score(
    "SELECT 2 AS a UNION ALL SELECT 1", pair + " ORDER BY a", connection=facts
  ).value
  assert not sql.score(pair + " UNION ALL SELECT 2", pair, connection=facts).value
  assert not sql.score("VALUES (1), (1), (2)", "VALUES (1), (2), (2)", connection=facts).value


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
  assert not result.value
  assert result.reason.startswith(reason)


def test_a_given_connection_is_left_as_it_was(tmp_path):
  with task.database(tmp_path / "facts.db") as connection:
    limit = connection.getlimit(sqlite3.SQLITE_LIMIT_LENGTH)
    for answer, _ in HOSTILE.values():
      assert not sql.score(answer, FRANCE, connection=connection).value
    assert sql.score("SELECT 'Paris'", FRANCE, connection=connection).value  # no twin to tell
    assert connection.getlimit(sqlite3.SQLITE_LIMIT_LENGTH) == limit
    assert connection.execute("SELECT COUNT(*) FROM country").fetchone()[0] > 100
    connection.execute("DELETE FROM country")  # the owner may still write
  assert sorted(p.name for p in tmp_path.iterdir()) == ["facts.db"]


def test_many_steps_are_too_slow_on_any_machine(monkeypatch):
  monkeypatch.setattr(sql, "BUILT_IN", sql.Bounds(seconds=20))
  started = time.thread_time()
  assert sql.score(NUMBERED + "SELECT COUNT(*) FROM t", FRANCE).reason == "too slow"
  assert time.thread_time() - started < 2


def test_slow_steps_meet_the_clock(monkeypatch):
  monkeypatch.setattr(sql, "BUILT_IN", sql.Bounds(steps=10**12, seconds=0.05))
  assert sql.score(NUMBERED + "SELECT COUNT(*) FROM t", FRANCE).reason == "too slow"


def test_evaluate_counts_by_channel_and_reason():
  examples = task.examples("test", n=40)
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


# Rows with databases of their own

SHOP = "CREATE TABLE sale (day TEXT, price REAL); INSERT INTO sale VALUES ('2024-02-03', 2.5), ('2024-03-01', 4);"
MARCH = "SELECT SUM(price) FROM sale WHERE strftime('%m', day) = '03'"


def test_a_row_has_its_own_script():
  row = dict(gold=MARCH, schema=SHOP)
  assert sql.sql("", "```sql\nSELECT price FROM sale WHERE day >= '2024-03'\n```", row).value == 1
  assert sql.sql("", "SELECT price FROM sale", row) == Score(0.0, "wrong result")
  assert sql.sql("", "ATTACH '/tmp/never.db' AS x", row) == Score(0.0, "not read-only")


def test_a_row_names_a_file_that_is_only_read(tmp_path):
  path = tmp_path / "shop ?.db"  # a name that means something in an address
  with sqlite3.connect(path) as connection:
    connection.executescript(SHOP)
  connection.close()
  before = path.read_bytes()
  row = dict(gold=MARCH, database=str(path))
  assert sql.sql("", MARCH, row).value == 1
  assert sql.sql("", "DELETE FROM sale", row) == Score(0.0, "not read-only")
  assert path.read_bytes() == before
  assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
  ("row", "reason"),
  [
    ({}, "no `gold`"),
    (dict(gold=MARCH, schema="CREATE TABLE"), "schema fails: incomplete input"),
    (dict(gold=MARCH, schema="ATTACH '/tmp/never.db' AS x"), "schema fails: not authorized"),
    (dict(gold=MARCH, schema="CREATE TABLE other (x)"), "gold query fails .*no such table"),
    (dict(gold=MARCH, database="/nowhere/shop.db"), "not there: /nowhere/shop.db"),
    (dict(gold="SELECT name FROM country WHERE 0"), "returns no row"),
  ],
)
def test_a_row_that_cannot_be_scored_is_missing(row, reason):
  score = sql.sql("", MARCH, row)
  assert score.value is None
  assert re.search(reason, score.reason)


def test_the_reward_and_the_evaluation_are_one_place(facts):
  (row,) = task.examples("test", n=1)
  assert (
    sql.sql(row["prompt"], row["gold"], row)
    == sql.score(row["gold"], row["gold"])
    == Score(1.0, "ok")
  )
