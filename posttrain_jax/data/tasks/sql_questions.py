"""Questions dealt to splits: a held-out question pairs what training never paired.

The pairs (ask, where) of each grid are dealt by diagonals, so that every ask and every condition is trained.  Values
are held out as well: the names, capitals, mountains, thresholds and LIMITs of the test split occur in no training
question.
Languages, currencies and continents are shared, there being few.
"""

import dataclasses
import itertools
import random
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence

from posttrain_jax.data.tasks.sql_grids import GRIDS, JOIN, NUMBERS, PERS, PLURALS, Ask, Where

SPLITS = ("train", "eval", "test")
CHANNELS = ("lookup", "filter", "count", "aggregate", "order", "group", "join")
# Eight diagonals of a grid: five train, one is for looking at during development, two are the test.
DIAGONALS = ("test", "train", "train", "eval", "train", "test", "train", "train")
MAX_ROWS = 60  # of a gold result
MAX_MISSES = 2000  # unfair or repeated questions in a row before a channel counts as exhausted


@dataclasses.dataclass(frozen=True)
class Question:
  """One question, its gold query, and the queries that tell whether it is a fair one."""

  text: str
  gold: str
  channel: str
  combination: tuple[str, ...]  # grid, ask, conditions
  rows: str  # SELECT COUNT(*) of what it is asked of
  needs: int  # the fewest rows that make the question sensible
  weaker: tuple[str, ...]  # gold with one condition left out: each must answer differently
  tied: tuple[str, ...]  # gold with ties broken one way and the other: both must answer alike


def _makes_sense(grid: str, ask: Ask, where: Where) -> bool:
  asked, filtered = ask.key, {c.key for c in where.conditions}
  if grid == "lookup":
    if asked in ("height", "country"):
      return "peak" in filtered
    return (
      "peak" not in filtered
      and not {asked} & filtered
      and not (asked == "name" and "peak of country" in filtered)
    )
  if grid == "group":  # a HAVING over filtered rows is more than one sentence should carry
    return not (asked.startswith("HAVING") and filtered)
  return {"currencies": "currency", "languages": "language"}.get(asked) not in filtered


def combinations(split: str) -> dict[str, list[tuple[str, Ask, Where]]]:
  """The (grid, ask, where) of a split by channel; every split has its own.

  >>> {split: sum(map(len, combinations(split).values())) for split in SPLITS}
  {'train': 485, 'eval': 99, 'test': 192}
  """
  by_channel: dict[str, list[tuple[str, Ask, Where]]] = {channel: [] for channel in CHANNELS}
  for grid, (asks, wheres) in GRIDS.items():
    for i, ask in enumerate(asks):
      columns = [j for j, where in enumerate(wheres) if _makes_sense(grid, ask, where)]
      for j in columns:
        # What can be asked in one way only is trained, or its half would never be seen.
        if split == (DIAGONALS[(i + j) % len(DIAGONALS)] if len(columns) > 1 else "train"):
          channel = "join" if wheres[j].source == JOIN and grid != "lookup" else ask.channel
          by_channel[channel].append((grid, ask, wheres[j]))
  return by_channel


def held_names(names: Sequence[str], split: str) -> list[str]:
  """Six of ten names train, one is for development, three are the test's."""
  places = dict(train=(1, 2, 4, 5, 7, 8), eval=(9,), test=(0, 3, 6))[split]
  return [name for i, name in enumerate(names) if i % 10 in places]


def _sql(ask: Ask, where: Where, filters: Sequence[str], tail: str) -> str:
  select = ", ".join(filter(None, (where.by, ask.select)))
  sql = f"SELECT {select} FROM {where.source}"
  if filters:
    sql += " WHERE " + " AND ".join(filters)
  return sql + (f" GROUP BY {where.by}" if where.by else "") + tail


def question(
  rng: random.Random, split: str, grid: str, ask: Ask, where: Where, pools: dict[str, list[str]]
) -> Question:
  """One question of a combination, its values and wording drawn from `rng`."""
  values = [
    rng.choice(NUMBERS[c.pool][split] if c.pool in NUMBERS else pools[c.pool])
    for c in where.conditions
  ]
  number = rng.choice(NUMBERS[ask.number][split]) if ask.number else 0
  phrases = [rng.choice(c.phrases).format(v) for c, v in zip(where.conditions, values)]
  filters = [c.sql.format(v) for c, v in zip(where.conditions, values)]
  frame = rng.choice(ask.frames)
  names = dict(by=rng.choice(PERS).format(where.by), plural=PLURALS[where.by]) if where.by else {}
  # Asked of all rows there is no phrase, and split() closes the gap it leaves.
  text = " ".join(frame.format(" ".join(phrases), n=number, **names).split())
  tail = ask.tail.format(n=number)
  gold = _sql(ask, where, filters, tail)
  key = "peak" if grid == "mountain" else "name"
  ordered = " ORDER BY " in tail
  ends = [
    tail.replace(" LIMIT", f", {key}{way} LIMIT") if "LIMIT" in tail else f"{tail}, {key}{way}"
    for way in ("", " DESC")
  ]
  return Question(
    text=text,
    gold=gold,
    channel="join" if where.source == JOIN and grid != "lookup" else ask.channel,
    combination=(grid, ask.key, *where.key),
    rows=f"SELECT COUNT(*) FROM {where.source}"
    + (" WHERE " + " AND ".join(filters) if filters else ""),
    needs=1 if grid == "lookup" else (number + 1 if "LIMIT" in ask.tail else 2),
    weaker=tuple(
      _sql(ask, where, filters[:i] + filters[i + 1 :], tail) for i in range(len(filters))
    ),
    tied=tuple(_sql(ask, where, filters, end) for end in ends) if ordered else (),
  )


def cycle(rng: random.Random, split: str, channel: str) -> Iterator[tuple[str, Ask, Where]]:
  """The combinations of a channel without end, each once before any twice, in random order."""
  choices = combinations(split)[channel]
  while True:
    yield from rng.sample(choices, len(choices))


def channel_quotas(n: int) -> dict[str, int]:
  """n shared out over the channels: joins and grids of many combinations get more.

  >>> channel_quotas(100)
  {'lookup': 14, 'filter': 13, 'count': 10, 'aggregate': 16, 'order': 17, 'group': 14, 'join': 16}
  """
  weights = dict(zip(CHANNELS, (14, 13, 10, 16, 17, 14, 16)))
  reached = list(itertools.accumulate(weights.values()))
  shares = [n * end // reached[-1] for end in reached]
  return dict(zip(CHANNELS, (b - a for a, b in itertools.pairwise([0, *shares]))))


def _fair(question: Question, facts: sqlite3.Connection, twin: sqlite3.Connection) -> bool:
  """Whether it has an answer, and another on the twin, needs each condition for it, and leaves no tie to chance."""
  answer, other = (db.execute(question.gold).fetchall() for db in (facts, twin))
  if answer == other:  # or a query that says the answer would be right
    return False
  for rows in (answer, other):
    if not 0 < len(rows) <= MAX_ROWS or any(None in row for row in rows):
      return False
  if facts.execute(question.rows).fetchone()[0] < question.needs:
    return False
  if any(facts.execute(weaker).fetchall() == answer for weaker in question.weaker):
    return False
  return all(
    len({tuple(db.execute(query)) for query in question.tied}) <= 1 for db in (facts, twin)
  )


def _pools(facts: sqlite3.Connection, split: str) -> dict[str, list[str]]:
  """The values of each column that questions of a split may name."""

  def column(query):
    return [row[0] for row in facts.execute(query)]

  names = held_names(column("SELECT name FROM country ORDER BY name"), split)
  ranges = column("SELECT country FROM mountain GROUP BY country HAVING COUNT(*) > 1")
  pools = dict(
    name=names,
    capital=held_names(column("SELECT capital FROM country ORDER BY name"), split),
    peak=held_names(column("SELECT peak FROM mountain ORDER BY peak"), split),
    country=[name for name in names if name in ranges],
  )
  for shared in ("continent", "language", "currency"):
    pools[shared] = column(f"SELECT {shared} FROM country GROUP BY 1 HAVING COUNT(*) > 1")
  return pools


def draw(
  split: str, n: int, seed: int, facts: sqlite3.Connection, twin: sqlite3.Connection
) -> list[Question]:
  """n fair questions of a split, no two of the same text, in random order."""
  rng, pools = random.Random(f"{split} {seed}"), _pools(facts, split)
  # No result may be common, or a query that says one constant would often be right.
  at_most = max(2, n // 100)
  texts, results, questions = set(), Counter(), []
  for channel, quota in channel_quotas(n).items():
    combinations = cycle(rng, split, channel)
    wanted, misses = len(questions) + quota, 0
    while len(questions) < wanted:
      if misses > MAX_MISSES:
        missing = f"{wanted - len(questions)} of {quota} for {channel!r}"
        raise ValueError(
          f"the {split} split has no {n} questions with seed {seed}: {missing} missing; ask for fewer"
        )
      asked = question(rng, split, *next(combinations), pools)
      result = repr(facts.execute(asked.gold).fetchall())
      if asked.text in texts or results[result] >= at_most or not _fair(asked, facts, twin):
        misses += 1
        continue
      misses = 0
      texts.add(asked.text)
      results[result] += 1
      questions.append(asked)
  rng.shuffle(questions)
  return questions
