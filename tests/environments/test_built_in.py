"""The database as an environment and Python as a tool: what they say, and what they leave alone."""

import sqlite3

import pytest

from posttrain_jax.environments import named, shapes
from posttrain_jax.environments.python import python
from posttrain_jax.environments.sql import Database
from posttrain_jax.rewards import sandbox
from posttrain_jax.settings import ConfigError


def opened(**row):
  database = Database()
  database.reset(**row)
  return database


def test_the_database_of_the_task_is_looked_at_and_asked():
  database = opened(prompt="?", gold="SELECT 1")
  assert database.tables().startswith("CREATE TABLE country (name TEXT")
  assert database.query("SELECT capital FROM country WHERE name = 'France'") == "Paris"
  assert database.query("SELECT name FROM country WHERE name = 'Nowhere'") == "no rows"


def test_a_long_result_is_cut_and_null_is_said():
  database = opened(schema="CREATE TABLE t (x, y); " + "INSERT INTO t VALUES (1, NULL);" * 11)
  said = database.query("SELECT * FROM t").splitlines()
  assert said[0] == "1 | NULL"
  assert len(said) == 9
  assert said[-1] == "and 3 more rows"


@pytest.mark.parametrize(
  ("query", "says"),
  [
    ("DROP TABLE country", "not read-only"),
    ("SELEKT 1", "syntax error"),
    ("SELECT load_extension('x')", "function not allowed|not valid"),
    ("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT sum(i) FROM n", "too slow"),
  ],
)  # fmt: skip
def test_a_query_reads_within_bounds_and_an_error_is_told(query, says):
  database = opened()
  with pytest.raises(ValueError, match=says):
    database.query(query)
  said, failed = shapes.called(database.query, {"sql": query})
  assert failed
  assert "error" in said
  assert database.query("SELECT count(*) FROM country") != "0"


def test_each_row_has_its_own_database_and_its_file_stays(tmp_path):
  path = tmp_path / "own.db"
  with sqlite3.connect(path) as made:
    made.execute("CREATE TABLE mine (x)")
  before = path.read_bytes()
  database = opened(database=str(path))
  assert database.tables() == "CREATE TABLE mine (x)"
  database.reset(schema="CREATE TABLE other (y)")
  assert database.tables() == "CREATE TABLE other (y)"
  assert path.read_bytes() == before


@pytest.mark.skipif(not sandbox.probe().isolation, reason=sandbox.probe().sentence)
def test_python_says_what_was_printed_and_what_went_wrong():
  run = python()
  assert run("print(6 * 7)") == "42"
  assert run("x = 1") == "nothing was printed"
  assert run("print(1)\n1 / 0").splitlines() == ["1", "ZeroDivisionError: division by zero"]
  assert "seconds" in run("while True: pass") or "time" in run("while True: pass")


def test_a_name_that_is_nothing_is_refused(tmp_path):
  with pytest.raises(ConfigError, match="there is no 'sqll'; built in are sql, python, or one"):
    named.check("sqll", ())
  with pytest.raises(ConfigError, match=r"online.tools: there is no 'sql'"):
    named.check("", ("sql",))
  with pytest.raises(ConfigError, match="is not there"):
    named.check(f"{tmp_path}/none.py:Env", ())


def test_other_code_is_another_environment(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text("x = 1")
  first = named.digest(f"{path}:Env", ())
  path.write_text("x = 2")
  assert named.digest(f"{path}:Env", ()) != first
  assert named.digest("sql", ("python",)) == ""
