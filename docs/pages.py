"""Tables that are made of the code: every field of a config, and what other tools call it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from posttrain_jax import settings
from posttrain_jax.configs import common, grouped, rl
from posttrain_jax.settings import fields, listing, names

SECTIONS = {
  "": "The run",
  "model": "Model",
  "data": "Data",
  "batch": "Batch",
  "optimizer": "Optimizer",
  "objective": "Objective",
  "reward": "What scores them",
  "holdout_reward": "A second score",
  "online": "Answers that the run writes",
  "critic": "PPO's critic",
  "adapter": "Adapter",
  "eval": "Evaluation",
  "checkpoint": "Checkpoints",
  "log": "Trackers",
  "mesh": "Mesh",
}


MADE = "<!-- made of the code by docs/pages.py; `make docs` makes it anew -->"


def write(folder: Path) -> None:
  """Writes the tables anew into the pages of the folder, each after the line that says so."""
  for page, table in tables().items():
    path = folder / page
    path.write_text(made(path.read_text(), table))


def tables() -> dict[str, str]:
  """The table that each page ends in."""
  return {"fields.md": "\n".join(field_tables()), "coming_from.md": "\n".join(name_table())}


def made(page: str, table: str) -> str:
  """The page with the table in the place of what stood after the line."""
  before, _, _ = page.partition(MADE)
  return f"{before}{MADE}\n\n{table.strip()}\n"


def configs() -> Iterator[tuple[str, dict[str, object]]]:
  """(what is written after --config=, its fields) of configs that together have every field."""
  adapters = [f"sft:adapter={name}" for name in common.ADAPTERS[1:]]
  optimizers = [f"sft:optimizer={name}" for name in common.OPTIMIZERS]
  losses = [f"preference:loss={name}" for name in fields.LOSSES_OF_PAIRS]
  methods = [f"grouped:method={name}" for name in grouped.METHODS]
  online = [f"rl:method={name}" for name in rl.METHODS]
  for config in ("sft", *adapters, *optimizers, *losses, "kto", "reward", *methods, *online):
    yield config, dict(fields.items(settings.load(config, ()).to_dict()))


def field_tables() -> Iterator[str]:
  """A section each: a line a field with the value that the first config has that knows it."""
  defaults: dict[str, tuple[object, str]] = {}
  for config, values in configs():
    for name, value in values.items():
      defaults.setdefault(name, (value, config))
  ordered = [name for section in SECTIONS for name in fields.FIELDS if _section(name) == section]
  for section, title in SECTIONS.items():
    yield from ("", f"## {title}", "", "| field | value | meaning |", "|---|---|---|")
    for name in ordered:
      if _section(name) == section:
        value, config = defaults.get(name, ("", ""))
        place = "" if config in ("sft", "") else f" in `{config}`"
        shown = f"`{listing.written(value)}`{place}"
        yield f"| `{name}` | {_cell(shown)} | {_cell(listing.meaning(name))} |"


def name_table() -> Iterator[str]:
  """A line for each name of another tool: what is written here."""
  yield from ("| there | here |", "|---|---|")
  here = {**{name: f"`--config.{field}=`" for name, field in names.SAME.items()}, **names.INSTEAD}
  for name in sorted(here):
    yield f"| `{name}` | {_cell(here[name])} |"


def _section(name: str) -> str:
  return name.rpartition(".")[0]


def _cell(text: str) -> str:
  return text.replace("|", "\\|")
