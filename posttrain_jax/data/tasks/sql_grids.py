"""The grids of the SQL task: what can be asked x which rows it can be asked of, in SQL and in words.

An ask is "the average population", a where is "countries in Asia that use the euro"; both carry their SQL and several
wordings, and any ask of a table goes with (nearly) any where of it.  `sql_questions` deals the pairs to the splits.
"""

import dataclasses
from collections.abc import Sequence

JOIN = "mountain JOIN country ON mountain.country = country.name"

# Numbers that a question may name, per split: a test question never names a trained one.
NUMBERS = {
  "population": dict(
    train=(2, 3, 5, 10, 12, 20, 30, 40, 50, 60, 80, 100, 200),
    eval=(6, 35, 90),
    test=(4, 8, 15, 25, 45, 70),
  ),
  "area": dict(
    train=(20, 30, 50, 100, 150, 200, 300, 400, 500, 700, 1000, 2000),
    eval=(80, 350, 900),
    test=(40, 120, 250, 450, 600, 800, 1500),
  ),
  "joined": dict(
    train=(1950, 1955, 1957, 1960, 1962, 1964, 1970, 1972, 1975, 1980, 1990, 1992),
    eval=(1958, 1974, 1985),
    test=(1947, 1956, 1961, 1965, 1977, 1991),
  ),
  "height": dict(
    train=(2000, 2500, 3000, 3500, 4000, 4500, 5000, 6000, 7000, 8000),
    eval=(3200, 5200, 7600),
    test=(2700, 3700, 4300, 5500, 6500, 7500),
  ),
  "limit": dict(train=(2, 3, 5, 6), eval=(7,), test=(4, 8)),
  "countries": dict(train=(2, 3, 5, 10), eval=(6,), test=(4, 8)),
  "total population": dict(train=(50, 100, 200, 300, 500), eval=(120,), test=(80, 150, 400)),
  "total area": dict(train=(500, 1000, 2000, 5000, 8000), eval=(1500,), test=(800, 3000, 6000)),
  "average population": dict(train=(5, 10, 20, 30, 50), eval=(12,), test=(8, 15, 40)),
}


@dataclasses.dataclass(frozen=True)
class Ask:
  """What is wanted: `select` and `tail` are SQL, `frames` are sentences with a {} for the rows meant."""

  key: str
  channel: str
  select: str
  frames: Sequence[str]
  tail: str = ""
  number: str = ""  # the pool of NUMBERS that fills {n} in tail and frames


@dataclasses.dataclass(frozen=True)
class Condition:
  """Which rows: `sql` and `phrases` have a {} for a value of `pool` (a column, or a key of NUMBERS)."""

  key: str
  sql: str
  phrases: Sequence[str]
  pool: str


@dataclasses.dataclass(frozen=True)
class Where:
  """A conjunction of conditions, and the rows it is taken from; `by` is the GROUP BY column, if any."""

  conditions: tuple[Condition, ...]
  source: str = "country"
  by: str = ""

  @property
  def key(self) -> tuple[str, ...]:
    return (*([f"by {self.by}"] if self.by else []), *(c.key for c in self.conditions))


def _superlatives(table: str, column: str, most: Sequence[str], least: Sequence[str]) -> list[Ask]:
  name, noun, one = (
    ("peak", "mountains", "mountain") if table == "mountain" else ("name", "countries", "country")
  )
  asks = []
  largest, smallest = ("highest", "lowest") if table == "mountain" else ("largest", "smallest")
  for direction, words, first in (("DESC", most, largest), ("ASC", least, smallest)):
    order = f" ORDER BY {column} {direction}"
    asks += [
      Ask(
        f"first {column} {direction}",
        "order",
        name,
        [f"Which of the {noun} {{}} has the {w}?" for w in words]
        + [f"Find the {one} with the {w} among {noun} {{}}." for w in words]
        + [f"Among the {noun} {{}}, which one has the {w}?" for w in words],
        order + " LIMIT 1",
      ),
      Ask(
        f"top {column} {direction}",
        "order",
        name,
        [f"Which {{n}} of the {noun} {{}} have the {w}?" for w in words]
        + [f"Name the {{n}} {noun} with the {w} among those {{}}." for w in words],
        order + " LIMIT {n}",
        "limit",
      ),
      Ask(
        f"sorted {column} {direction}",
        "order",
        name,
        [
          f"Sort the {noun} {{}} by {column}, {first} first.",
          f"List the {noun} {{}} by {column}, starting with the {first}.",
          f"Rank {noun} {{}} by {column} from the {first}.",
        ],
        order,
      ),
    ]
  return asks


WORDS = {
  "AVG": ("average", "mean"),
  "SUM": ("total", "combined"),
  "MAX": ("largest", "maximum"),
  "MIN": ("smallest", "minimum"),
}


def _aggregate(function: str, column: str, noun: str) -> Ask:
  frames = [
    f"{start} the {w} {column} of {end}"
    for w in WORDS[function]
    for start, end in (
      ("What is", f"{noun} {{}}?"),
      ("Give me", f"the {noun} {{}}."),
      ("Compute", f"all {noun} {{}}."),
    )
  ]
  frames += [f"For {noun} {{}}, what is the {w} {column}?" for w in WORDS[function]]
  return Ask(f"{function}({column})", "aggregate", f"{function}({column})", frames)


def _count(noun: str) -> Ask:
  frames = [
    f"How many {noun} {{}} are there?",
    f"Count the {noun} {{}}.",
    f"What is the number of {noun} {{}}?",
  ]
  return Ask("COUNT(*)", "count", "COUNT(*)", [*frames, f"Give me the count of {noun} {{}}."])


def _lists(key: str, select: str, things: str) -> Ask:
  frames = [f"List the {things} {{}}.", f"Name all {things} {{}}.", f"What are the {things} {{}}?"]
  return Ask(key, "filter", select, [*frames, f"Show me the {things} {{}}."])


LOOKUPS = [
  Ask(column, "lookup", column, frames)
  for column, frames in {
    "capital": [
      "What is the capital of {}?",
      "Tell me the capital city of {}.",
      "Which city is the capital of {}?",
    ],
    "continent": [
      "On which continent is {}?",
      "What continent does {} belong to?",
      "Name the continent of {}.",
    ],
    "population": [
      "What is the population of {}?",
      "How many people live in {}?",
      "Give the population of {}.",
    ],
    "area": ["What is the area of {}?", "How large is {}?", "Tell me the area of {}."],
    "currency": [
      "What is the currency of {}?",
      "Which currency does {} use?",
      "What money is used in {}?",
    ],
    "language": [
      "What is the language of {}?",
      "Which language is spoken in {}?",
      "What language do they speak in {}?",
    ],
    "joined": [
      "When did {} join the UN?",
      "In which year did {} join the UN?",
      "Since when is {} in the UN?",
    ],
    "name": ["What is the name of {}?", "Name {}.", "What is {} called?"],
    "height": ["How high is {}?", "What is the height of {}?", "Tell me the height of {}."],
    "country": ["In which country is {}?", "Where is {}?", "Which country has {}?"],
  }.items()
]
# "SELECT height ... WHERE peak" is asked of the mountain itself, the rest of a country, named in three ways.
PEAK = Condition("peak", "peak = '{}'", ["{}", "the mountain {}"], "peak")
NAMINGS = [
  Where((Condition("name", "name = '{}'", ["{}", "the country {}"], "name"),)),
  Where(
    (
      Condition(
        "capital",
        "capital = '{}'",
        [
          "the country whose capital is {}",
          "the country with the capital {}",
          "the country governed from {}",
        ],
        "capital",
      ),
    )
  ),
  Where(
    (
      Condition(
        "peak of country",
        "peak = '{}'",
        [
          "the country where {} is",
          "the country with the mountain {}",
          "the country that {} lies in",
        ],
        "peak",
      ),
    ),
    JOIN,
  ),
]

CONDITIONS = {
  c.key: c
  for c in (
    Condition(
      "continent",
      "continent = '{}'",
      ["in {}", "located in {}", "on the continent {}"],
      "continent",
    ),
    Condition(
      "language",
      "language = '{}'",
      ["that speak {}", "where {} is spoken", "whose language is {}"],
      "language",
    ),
    Condition(
      "currency",
      "currency = '{}'",
      ["that use the {}", "whose currency is the {}", "paying with the {}"],
      "currency",
    ),
    Condition(
      "population >",
      "population > {}",
      [
        "with more than {} million people",
        "with over {} million people",
        "with a population above {} million",
      ],
      "population",
    ),
    Condition(
      "population <",
      "population < {}",
      [
        "with fewer than {} million people",
        "with a population below {} million",
        "with under {} million people",
      ],
      "population",
    ),
    Condition(
      "area >",
      "area > {}",
      [
        "larger than {} thousand km2",
        "with an area above {} thousand km2",
        "with over {} thousand km2 of land",
      ],
      "area",
    ),
    Condition(
      "area <",
      "area < {}",
      [
        "smaller than {} thousand km2",
        "with an area below {} thousand km2",
        "with under {} thousand km2 of land",
      ],
      "area",
    ),
    Condition(
      "joined <",
      "joined < {}",
      [
        "that joined the UN before {}",
        "in the UN since before {}",
        "that entered the UN earlier than {}",
      ],
      "joined",
    ),
    Condition(
      "joined >",
      "joined > {}",
      [
        "that joined the UN after {}",
        "that entered the UN later than {}",
        "in the UN only since after {}",
      ],
      "joined",
    ),
  )
}
MOUNTAIN_CONDITIONS = {
  "country": Condition(
    "country", "country = '{}'", ["in {}", "located in {}", "that lie in {}"], "country"
  ),
  "height >": Condition(
    "height >", "height > {}", ["higher than {} m", "above {} m", "taller than {} meters"], "height"
  ),
  "height <": Condition(
    "height <",
    "height < {}",
    ["lower than {} m", "below {} m", "that do not reach {} meters"],
    "height",
  ),
} | {
  # A mountain is "in countries that speak Spanish"; only continents are said of it directly.
  key: dataclasses.replace(
    c, phrases=c.phrases if key == "continent" else [f"in countries {p}" for p in c.phrases]
  )
  for key, c in CONDITIONS.items()
}


def _wheres(
  conditions: dict[str, Condition], keys: Sequence[str], source: str = "country", by: str = ""
):
  return [
    Where(tuple(conditions[part] for part in key.split(" & ") if part), source, by) for key in keys
  ]


COUNTRY_ASKS = [
  _lists("name", "name", "countries"),
  _lists("capital", "capital", "capitals of countries"),
  _lists("currencies", "DISTINCT currency", "currencies of countries"),
  _lists("languages", "DISTINCT language", "languages of countries"),
  _count("countries"),
  *(_aggregate(f, c, "countries") for c in ("population", "area") for f in WORDS),
  *_superlatives(
    "country",
    "population",
    ("largest population", "most people"),
    ("smallest population", "fewest people"),
  ),
  *_superlatives("country", "area", ("largest area", "most land"), ("smallest area", "least land")),
]
COUNTRY_WHERES = _wheres(CONDITIONS, list(CONDITIONS)) + _wheres(
  CONDITIONS,
  [f"continent & {key}" for key in CONDITIONS if key != "continent"]
  + [f"language & {key}" for key in ("population >", "area >", "joined <")],
)
MOUNTAIN_ASKS = [
  _lists("peak", "peak", "mountains"),
  _count("mountains"),
  *(_aggregate(f, "height", "mountains") for f in ("AVG", "MAX", "MIN")),
  *_superlatives(
    "mountain", "height", ("greatest height", "highest peak"), ("smallest height", "lowest peak")
  ),
]
MOUNTAIN_WHERES = _wheres(
  MOUNTAIN_CONDITIONS, ["country", "height >", "height <"], "mountain"
) + _wheres(
  MOUNTAIN_CONDITIONS,
  [
    *(key for key in CONDITIONS if key != "joined >"),
    "continent & height >",
    "continent & height <",
  ],
  JOIN,
)


def _per(function: str, column: str) -> Ask:
  frames = [f"What is the {w} {column} of countries {{}} {{by}}?" for w in WORDS[function]]
  frames += [f"Give me the {w} {column} of countries {{}} {{by}}." for w in WORDS[function]]
  return Ask(f"{function}({column})", "group", f"{function}({column})", frames)


def _having(aggregate: str, pool: str, having: str) -> Ask:
  frames = [
    f"Which {{plural}} have {having}?",
    f"List the {{plural}} with {having}.",
    f"Find {{plural}} with {having}.",
  ]
  return Ask(f"HAVING {aggregate}", "group", "", frames, f" HAVING {aggregate} > {{n}}", pool)


GROUP_ASKS = [
  Ask(
    "COUNT(*)",
    "group",
    "COUNT(*)",
    [
      "How many countries {} are there {by}?",
      "Count the countries {} {by}.",
      "Give me the number of countries {} {by}.",
    ],
  ),
  *(_per(f, c) for c in ("population", "area") for f in ("AVG", "SUM", "MAX")),
  _having("COUNT(*)", "countries", "more than {n} countries"),
  _having("SUM(population)", "total population", "a total population above {n} million"),
  _having("SUM(area)", "total area", "a total area above {n} thousand km2"),
  _having("AVG(population)", "average population", "an average population above {n} million"),
]
PLURALS = {"continent": "continents", "language": "languages", "currency": "currencies"}
PERS = ("per {}", "for each {}", "by {}", "grouped by {}")
GROUP_WHERES = [
  where
  for by in PLURALS
  for where in _wheres(
    CONDITIONS, ["", "population >", "population <", "area >", "joined <"], by=by
  )
]
GRIDS = {
  "lookup": (LOOKUPS, [*NAMINGS, Where((PEAK,), "mountain")]),
  "country": (COUNTRY_ASKS, COUNTRY_WHERES),
  "mountain": (MOUNTAIN_ASKS, MOUNTAIN_WHERES),
  "group": (GROUP_ASKS, GROUP_WHERES),
}
