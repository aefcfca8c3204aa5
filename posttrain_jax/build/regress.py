"""Two models, or a base and the stages after it, on a suite: measured, compared, written down."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from posttrain_jax import settings
from posttrain_jax.build import data as data_lib
from posttrain_jax.build import evaluation, use
from posttrain_jax.build.model import Model
from posttrain_jax.core import files, tree
from posttrain_jax.core.journal import Journal
from posttrain_jax.data import questions, schema
from posttrain_jax.evals import gate, measure, stages, suite, verdicts
from posttrain_jax.evals.measure import Measured
from posttrain_jax.evals.samples import Writer
from posttrain_jax.evals.suite import Part, Suite
from posttrain_jax.evals.verdicts import Comparison
from posttrain_jax.runs import manner as manners
from posttrain_jax.runs import record
from posttrain_jax.settings import ConfigError

log = logging.getLogger(__name__)
OWN, INSIDE = "regress", "suite"  # of `posttrain regress`, and of eval.suite, in a run's folder
TRAINED = "trained"  # the part of what a run held out
KEPT = ".jsonl"  # a side that is a measurement of before


@dataclasses.dataclass(frozen=True)
class Wanted:
  """What `posttrain regress` is asked.

  before, after: models by name or folder, runs, MODEL+ADAPTER, adapters, or measurements that were kept; several
    after are stages in their order.  before "": what the run `after` began with.
  out: "": in the run that `after` is, else nowhere.
  trained: rows of what was trained for; "": those that a run held out.
  """

  before: str
  after: Sequence[str]
  suite: str
  out: str = ""
  template: str | None = None
  base: str | None = None
  limit: int = 0
  trained: str = ""
  seed: int = 0
  rows: int = 16
  unsafe_code: bool = False


@dataclasses.dataclass(frozen=True)
class Found:
  """comparison: of the last stage with what was before.  page: None where nothing is kept.

  over: what `gate` shows of several stages; None for one.
  """

  comparison: Comparison
  page: Path | None
  over: dict[str, Any] | None


def run(wanted: Wanted) -> Found:
  """Measures every side, one model at a time, and compares.

  Raises:
    ConfigError: a side is nothing that can be measured, or the sides do not compare.
    RowError: a row of the suite cannot be used; named with file and line.
  """
  if not wanted.after:
    raise ConfigError(
      "write --after=NAME_OR_DIR: what is compared, a run, a model or MODEL+ADAPTER"
    )
  asked = suite.load(wanted.suite, limit=wanted.limit)
  measure.check(asked, unsafe_code=wanted.unsafe_code)
  before = wanted.before or _began_with(wanted.after[0])
  for side in (before, *wanted.after):  # before the first of them is measured, which takes minutes
    _check_there(side)
  trained = [_trained(wanted, side, stage) for stage, side in enumerate(wanted.after, 1)]
  asked = asked.with_parts([part for parts in trained for part in parts])
  with _folder(wanted) as folder:
    sides = [("before", before)] + [
      (f"after-{i}" if len(wanted.after) > 1 else "after", side)
      for i, side in enumerate(wanted.after, 1)
    ]
    measured: list[Measured] = []
    for name, side in sides:
      first = measured[0].header if measured else None
      measured.append(_measured(wanted, asked, side, folder / f"{name}{KEPT}", first))
    found = verdicts.compare(asked, measured[0], measured[-1])
    over = _over(asked, measured, trained) if len(measured) > 2 else None
    if not _is_kept(wanted):
      return Found(found, None, over)
    files.write_json(folder / verdicts.RESULTS, {**found.as_json(), "stages": over})
    return Found(found, gate.write(folder, found, over), over)


def _is_kept(wanted: Wanted) -> bool:
  return bool(wanted.out) or manners.is_run(wanted.after[-1])


@contextlib.contextmanager
def _folder(wanted: Wanted) -> Generator[Path]:
  """Where measurements are kept, in a folder that is gone afterwards where nobody named one."""
  if _is_kept(wanted):
    folder = Path(wanted.out or Path(wanted.after[-1]) / OWN).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    return
  log.info("nothing is kept: --out=DIR keeps every answer, and goes on where it was ended")
  with tempfile.TemporaryDirectory() as scratch:
    yield Path(scratch)


def _began_with(side: str) -> str:
  """What a run was trained from."""
  if not manners.is_run(side):
    raise ConfigError("write --before=NAME_OR_DIR: what --after is compared with")
  config = record.config(Path(side).expanduser())["model"]
  return "+".join(str(config[name]) for name in ("name", "adapter") if config.get(name))


def parted(side: str) -> tuple[str | None, str | None]:
  """(model, adapter) of a side: MODEL+ADAPTER, an adapter's folder, or a model.

  >>> parted("smollm2"), parted("smollm2+runs/a/adapter")
  (('smollm2', None), ('smollm2', 'runs/a/adapter'))
  """
  path = Path(side).expanduser()
  if (path / "adapter_config.json").exists():
    return None, side
  if "+" in side and not path.exists():
    model, _, adapter = side.partition("+")
    return model, adapter
  return side, None


def _check_there(side: str) -> None:
  """Raises what reading it would, where there is none."""
  if side.endswith(KEPT):
    measure.read(side)
  else:
    use.found(*parted(side))


def _used(wanted: Wanted, side: str) -> use.Used:
  model, adapter = parted(side)
  return use.load(model, adapter, base=wanted.base, template=wanted.template)


def _measured(
  wanted: Wanted, asked: Suite, side: str, path: Path, beside: Mapping[str, Any] | None
) -> Measured:
  if side.endswith(KEPT):
    kept = measure.read(side)
    if beside is not None:
      measure.check_alike(beside, kept.header)
    return kept
  used = _used(wanted, side)
  used.check_writes()
  log.info("measuring %s", side)
  return measure.measure(
    use.writer(used),
    asked,
    model=side,
    weights=tree.digest((used.params, list(used.nodes)))[:16],
    path=path,
    seed=wanted.seed,
    rows=wanted.rows,
    unsafe_code=wanted.unsafe_code,
    beside=beside,
  )


# What was trained for


def _trained(wanted: Wanted, side: str, stage: int) -> list[Part]:
  """The rows of what was trained for, a part for each channel; of several stages one for each stage."""
  name = TRAINED if len(wanted.after) == 1 else f"{TRAINED} in stage {stage}"
  if wanted.trained:
    if len(wanted.after) > 1:
      raise ConfigError("--trained names rows of one stage, and --after several: leave it out")
    kinds = data_lib.KINDS["text"]
    rows = list(schema.read(wanted.trained, split="eval", kinds=kinds))
    return _by_channel(name, rows, limit=wanted.limit)
  if not manners.is_run(side):
    return []
  rows = held_out(Path(side).expanduser(), _used(wanted, side))
  return _by_channel(name, rows, is_one=len(wanted.after) > 1, limit=wanted.limit)


def held_out(folder: Path, used: use.Used) -> list[schema.Row]:
  """The rows that a run held out, where they are imitated."""
  config = settings.restored(record.config(folder))
  if config.data.kind != "text":
    return []
  model = evaluation.as_model(used, used.params)
  rows = data_lib.evaluated(config, model)
  if data_lib.TRAINED_ON in rows.notes:
    log.info("%s held no rows out, so the gain on what it was trained for is not told", folder)
    return []
  return data_lib.held_out_rows(config, model, rows.eval)


def _by_channel(
  name: str, rows: Sequence[schema.Row], *, is_one: bool = False, limit: int = 0
) -> list[Part]:
  """A part for each channel, or one for all; its rows are at most so many, 0 for all."""
  channels: dict[str, list[schema.Row]] = {}
  for row in rows:
    channel = None if is_one else row.fields.get("channel")
    channels.setdefault(channel or questions.NO_CHANNEL, []).append(row)
  titled = lambda channel: name if channel == questions.NO_CHANNEL else f"{name}/{channel}"
  return [
    Part(titled(channel), suite.TEXT, tuple(some[: limit or None]), trained=True)
    for channel, some in channels.items()
  ]


# In a run


def of_run(config: ml_collections.ConfigDict, model: Model, data: data_lib.Data) -> Suite | None:
  """What config.eval.suite measures, with the rows that the run holds out; None where it names none.

  Raises:
    ConfigError: there is no such suite, or nothing to compare with afterwards.
  """
  name = config.eval.get("suite", "")  # runs of older versions have none
  if not name:
    return None
  if not config.eval.before:
    raise ConfigError(
      "eval.suite tells what was forgotten since before training: leave eval.before=True"
    )
  if jax.process_count() > 1:
    raise ConfigError(
      "eval.suite is measured by one process; measure with `posttrain regress --after=RUN`"
    )
  asked = suite.load(name, limit=config.eval.suite_limit)
  measure.check(asked)
  if config.data.kind != "text" or not data.eval:
    return asked
  rows = data_lib.held_out_rows(config, model, data.eval)
  return asked.with_parts(_by_channel(TRAINED, rows, limit=config.eval.suite_limit))


def described(asked: Suite) -> str:
  """
  >>> described(suite.load("core", limit=1))
  '13 parts, 13 items'
  """
  return f"{len(asked.parts)} parts, {sum(len(part.rows) for part in asked.parts)} items"


def measured_in(
  folder: Path, when: str, step: int, asked: Suite, model: Model, params: Any
) -> Measured:
  """The suite of a run's state, kept in its folder; one of another step makes way.

  params: as for `rollout.engine.Engine`.
  """
  path, weights = folder / INSIDE / f"{when}{KEPT}", f"step {step}"
  if path.exists() and (Journal(path).header or {}).get("weights") != weights:
    path.unlink()
  writer = Writer(params, model.config, model.tokenizer, model.template, model.ends, model.dtype)
  return measure.measure(writer, asked, model=f"{when} training", weights=weights, path=path)


def compared_in(folder: Path, asked: Suite) -> Comparison:
  """What became of the suite in a run, written in its folder."""
  inside = folder / INSIDE
  sides = [measure.read(inside / f"{when}{KEPT}") for when in ("before", "after")]
  found = verdicts.compare(asked, *sides)
  files.write_json(inside / verdicts.RESULTS, {**found.as_json(), "stages": None})
  gate.write(inside, found)
  return found


# Stages


def _over(
  asked: Suite, measured: Sequence[Measured], trained: Sequence[Sequence[Part]]
) -> dict[str, Any]:
  """Every part after every stage, what was forgotten, and the transfer between stages."""
  results = [_levels(asked, one) for one in measured]
  shown = lambda value: gate.NONE if value is None else f"{value:+.3f}"
  level = lambda row, name: gate.NONE if name not in row else f"{row[name]:.3f}"
  rows = [
    [
      part.name,
      *(level(row, part.name) for row in results),
      shown(stages.forgetting(results, part.name)),
    ]
    for part in asked.parts
  ]
  tasks = [parts[0].name for parts in trained if parts]
  said = "Higher is better, so bits per byte stand below 0. Forgotten: the best of earlier stages minus the last."
  if len(tasks) == len(measured) - 1:
    backward = stages.backward_transfer(results[1:], tasks)
    forward = stages.forward_transfer(results[0], results[1:], tasks)
    said += f" Backward transfer {shown(backward)}, forward transfer {shown(forward)}, of what each stage trained for."
  heads = ["part", "before", *(f"stage {i}" for i in range(1, len(measured))), "forgotten"]
  return dict(heads=heads, rows=rows, note=said)


def _levels(asked: Suite, one: Measured) -> dict[str, float]:
  """{part: its mean}, higher is better; without parts of which every item is missing."""
  means = {p.name: verdicts.estimate(p, one.results[p.name])["mean"] for p in asked.parts}
  sign = {p.name: -1 if p.kind == suite.TEXT else 1 for p in asked.parts}
  return {name: sign[name] * mean for name, mean in means.items() if mean is not None}
