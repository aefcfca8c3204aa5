"""What every draw must do: run, learn, be the same on one device, go on where it stopped, be read again; or be refused.

A refusal is a ValueError in words before the run's folder is claimed.  Everything else that is raised is a failure.
"""

import json
import os
import pathlib
import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from unittest import mock

import ml_collections
import numpy as np

from tests.compose import draws, folders, road

OURS = "posttrain_jax"  # the folder of what may refuse
PASSED, REFUSED, FAILED = "passed", "refused", "failed"
SMOOTH = ("sgd", "adafactor")  # whose updates are as near to each other as the gradients are
# of a mesh's update to one device's, in norm: where updates are signs of gradients, some lie at a rounding's mercy
UPDATES = {True: 2e-3, False: 0.1}
METRICS = 2e-3  # relative to one device's, or to 0.1 where that is more
VALUES = 1e-3  # relative to those of plain sequences, or to 1 nat where that is more
STARTING = ("pissa", "olora", "loftq")  # adapters that begin with a part of the base
# shares that a rounding moves by a whole pair, and clocks
NOT_COMPARED = ("accurac", "clip_ratio", "per_second", "correct")
CLOCKS = ("per_second", "timing")
# what of the loss is held fixed in its gradient moves from step to step, and the loss with it
DETACHED = ("objective.weighting", "objective.running_shift", "objective.sync_every")


def check(d: draws.Draw, shared: pathlib.Path, scratch: pathlib.Path) -> dict[str, Any]:
  """{"outcome", "why": sentences, "seconds": by stage}."""
  stages = dict(
    values=_values, learn=_learn, **{"one device": _same}, resume=resumes, export=_export
  )
  return checked(d, draws.command(d, shared), stages, shared, scratch)


def checked(
  d: draws.Draw,
  command: tuple[str, Sequence[str]],
  stages: Mapping[str, Callable[..., Iterable[str]]],
  shared: pathlib.Path,
  scratch: pathlib.Path,
) -> dict[str, Any]:
  """As `check`, of a config with its overrides, whose run each stage says what is wrong of."""
  clock = _Clock()
  folder = scratch / "whole"
  try:
    config = road.load(*command)
    whole = _train(config, folder, draws.devices(d), scratch / "cache")
  except Exception as error:
    clock.lap("train")
    claimed = (folder / "config.json").exists()
    # a sentence of ours, and none of a library that was asked for what cannot be
    is_ours = OURS in traceback.extract_tb(error.__traceback__)[-1].filename
    if isinstance(error, ValueError) and str(error) and is_ours and not claimed:
      return {
        "outcome": REFUSED,
        "why": [_plain(str(error), scratch, shared)],
        "seconds": clock.laps,
      }
    why = f"{'after the claim: ' if claimed else ''}{type(error).__name__}: {_plain(str(error), scratch, shared)}"
    return _failed([f"train: {why}"], clock) | {"trace": traceback.format_exc()[-3000:]}
  clock.lap("train")
  wrong, traces = [], []
  for name, what in stages.items():
    try:
      wrong += [f"{name}: {each}" for each in what(d, config, folder, whole, scratch)]
    except Exception as error:
      wrong.append(f"{name}: {type(error).__name__}: {_plain(str(error), scratch, shared)}")
      traces.append(traceback.format_exc()[-3000:])
    clock.lap(name)
  if wrong:
    return _failed(wrong, clock) | {"trace": "\n".join(traces)}
  return {"outcome": PASSED, "why": [], "seconds": clock.laps}


def _failed(wrong: list[str], clock: "_Clock") -> dict[str, Any]:
  return {"outcome": FAILED, "why": wrong, "seconds": clock.laps}


class _Clock:
  """Seconds of each stage."""

  def __init__(self):
    self.laps: dict[str, float] = {}
    self.since = time.monotonic()

  def lap(self, name: str) -> None:
    now = time.monotonic()
    self.laps[name], self.since = round(now - self.since, 2), now


def _plain(text: str, *folders: pathlib.Path) -> str:
  for folder in folders:
    text = text.replace(str(folder), "...")
  return text[:600]


def _train(config, folder, devices, cache) -> road.Result:
  with mock.patch.dict(os.environ, POSTTRAIN_CACHE=str(cache)):
    result = road.train(config, folder, devices)
  if result.code:
    raise RuntimeError(f"exit code {result.code}")
  return result


def lines(folder: pathlib.Path) -> list[dict[str, float]]:
  """The metrics of each training step."""
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return [
    line for line in lines if "grad_norm" in line
  ]  # of pairs that all are tied no loss is told


def _learn(d, config, folder, whole: road.Result, scratch):
  """One update lowers the loss of the same batch; where the loss is no measure, what it stands for rises."""
  first, second = lines(folder)
  bad = [name for line in (first, second) for name, value in line.items() if not np.isfinite(value)]
  if bad:
    yield f"not finite: {', '.join(bad)}"
  if second["skipped"]:
    yield f"{second['skipped']:.0f} updates left out"
  moved = change(whole.trained, whole.first)
  if not moved:
    yield "nothing that is trained moved"
  if whole.programs > 1 and not (d["mixture"] != "none" and not d["packing"]):
    yield f"the step is {whole.programs} programs"
  if d["mixture"] != "none" or any("lora_dropout" in field for field in d["fields"]):
    return  # another batch, or other noise, at each step
  if d["method"].startswith("grouped:") and _is_no_measure(config):
    if config.objective.get("old") == "reference" and _starts_apart(d):
      return  # ratios weigh the answers from the start
    before, after = (_advantage(config, params, d) for params in (whole.start, whole.policy))
    if not after > before:
      yield f"better answers did not become likelier: {before:.6f} -> {after:.6f}"
    return
  if any(field in d["fields"] for field in DETACHED) or d["method"] == "kto":
    before, after = first["rewards/margins"], second["rewards/margins"]
    if not after > before:
      yield f"margins did not rise: {before:.6f} -> {after:.6f}"
    return
  # AdaLoRA's penalty is descended with the loss
  before, after = (line["loss"] + line.get("penalty", 0.0) for line in (first, second))
  if not after < before:
    yield f"the loss did not fall: {before:.7f} -> {after:.7f}"


def _is_no_measure(config) -> bool:
  """Whether the loss's value says nothing: ratios to the policy itself are 1, and some are held fixed."""
  o = config.objective
  return o.loss in ("cispo", "dppo_tv", "dppo_kl") or (o.loss != "reinforce" and o.old == "policy")


def _starts_apart(d) -> bool:
  """Whether the policy is not its reference at the start."""
  apart = set(d["adapter"].split("+")) & {*draws.STANDING, "longlora"}
  return bool(apart) or d["fields"].get("objective.reference", "base") != "base"


def _advantage(config, params, d) -> float:
  """sum of A log pi over the scored answers, per token where the method's loss is."""
  o = config.objective
  per_token = o.loss == "gspo" or (o.loss != "rloo" and o.aggregation == "sequence_mean")
  rows = [folders.ROWS["scored"](i, "") for i in range(8)]
  prompts, answers = [row["prompt"] for row in rows], [row["completions"] for row in rows]
  logps, lengths = road.likelihoods(config, params, prompts, answers)
  scores = np.array([row["scores"] for row in rows])
  advantages = scores - scores.mean(1, keepdims=True)
  if config.objective.advantage == "group":
    advantages = advantages / scores.std(1, ddof=1, keepdims=True)
  return float(np.sum(advantages * (logps / lengths if per_token else logps)))


def _values(d, config, folder, whole: road.Result, scratch):
  """The first step's figures are those of plain sequences, one an answer, under trees read from files."""
  kind = draws.kind_of(d["method"])
  if kind not in ("text", "pairs", "triples", "labels") or d["mixture"] != "none":
    return
  if d["truncate"] != "error" or "longlora" in d["adapter"] or "objective.ld_alpha" in d["fields"]:
    return  # other tokens, or another attention
  if any("lora_dropout" in field for field in d["fields"]):
    return
  first = lines(folder)[0]
  for name, wanted in _wanted(d, config, whole, kind).items():
    if name in first and not abs(first[name] - wanted) <= VALUES * max(abs(wanted), 1.0):
      yield f"{name} is {first[name]:.7g}, by hand {wanted:.7g}"


def _wanted(d, config, whole: road.Result, kind: str) -> dict[str, float]:
  """{metric: value} of the first step."""
  rows = [folders.ROWS[kind](i, "") for i in range(8)]
  prompts = [row["prompt"] for row in rows]
  names = ("chosen", "rejected") if kind in ("pairs", "triples") else ("completion",)
  answers = [[row[name] for name in names] for row in rows]
  logps, lengths = road.likelihoods(config, whole.start, prompts, answers)
  if kind == "text":
    return {"loss": -logps.sum() / lengths.sum()}
  if kind == "labels":
    liked = np.array([row["label"] for row in rows])
    by_side = lambda x: {"chosen": x[liked].mean(), "rejected": x[~liked].mean()}
  else:
    by_side = lambda x: {"chosen": x[:, 0].mean(), "rejected": x[:, 1].mean()}
  values = {f"logps/{side}": value for side, value in by_side(logps).items()}
  starts = set(d["adapter"].split("+")) & set(STARTING) or "pissa" in map(str, d["fields"].values())
  if "objective.cache_reference" not in d["fields"] or (starts and config.model.base != "dense"):
    return values
  drift = logps - road.likelihoods(config, road.reference(config), prompts, answers)[0]
  values |= {f"logps/{side}_drift": value for side, value in by_side(drift).items()}
  if kind == "labels":
    values |= {f"rewards/{side}": config.objective.beta * v for side, v in by_side(drift).items()}
  return values


def change(new: Mapping[str, np.ndarray], old: Mapping[str, np.ndarray]) -> float:
  difference = lambda a, b: np.sum(np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)))
  return float(np.sqrt(sum(difference(new[name], old[name]) for name in old)))


def _same(d, config, folder, whole: road.Result, scratch):
  """On one device the metrics of both steps and the whole update are those on the mesh."""
  if draws.devices(d) == 1:
    return
  if d["family"] in draws.MIXTURES and any("lora_dropout" in field for field in d["fields"]):
    return  # an expert's noise is drawn by block of rows, and devices have blocks of their own
  alone, unsharded = scratch / "alone", ml_collections.ConfigDict(config)
  unsharded.mesh = dict.fromkeys(config.mesh, 1)
  single = _train(unsharded, alone, 1, scratch / "cache-alone")
  apart = change(whole.first, single.first)
  if apart > 1e-5 * _norm(single.first):
    yield f"the start differs by {apart:.2e} from one device's"
  for step, (ours, theirs) in enumerate(zip(lines(folder), lines(alone)), 1):
    for name in theirs:
      if any(part in name for part in NOT_COMPARED):
        continue
      if not abs(ours[name] - theirs[name]) <= METRICS * max(abs(theirs[name]), 0.1):
        yield f"step {step}: {name} is {ours[name]:.7g}, on one device {theirs[name]:.7g}"
  update = {name: whole.trained[name] - whole.first[name] for name in whole.first}
  wanted = {name: single.trained[name] - single.first[name] for name in single.first}
  apart, size = change(update, wanted), _norm(wanted)
  if not apart <= UPDATES[d["optimizer"] in SMOOTH] * size:
    yield f"the update is {apart / size:.1e} of its size from one device's"


def _norm(arrays: Mapping[str, np.ndarray]) -> float:
  return float(np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in arrays.values())))


def resumes(d, config, folder, whole: road.Result, scratch):
  """Stopped after the first step and run again, all that a checkpoint holds is bit for bit the same."""
  again = scratch / "again"
  shutil.copytree(folder, again, ignore=shutil.ignore_patterns("tensorboard", "adapter*", "model*"))
  (again / "done.json").unlink()
  shutil.rmtree(again / "checkpoints" / str(draws.STEPS))
  resumed = _train(config, again, draws.devices(d), scratch / "cache")
  if resumed.state.keys() != whole.state.keys():
    yield "the state has other leaves"
    return
  same = lambda a, b: a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
  differ = [name for name, x in whole.state.items() if not same(resumed.state[name], x)]
  if differ:
    yield f"{len(differ)} of {len(whole.state)} leaves differ, {differ[0]} first"
  was, now = lines(folder)[1], lines(again)[1]
  told = [name for name in {**was, **now} if not any(clock in name for clock in CLOCKS)]
  differ = [name for name in told if was.get(name) != now.get(name)]
  if differ:
    yield f"metrics differ: {', '.join(differ)}"


def _export(d, config, folder, whole: road.Result, scratch):
  """The files that the run left give the outputs of what was trained."""
  storage, trained = config.model.base, whole.policy
  methods = {*d["adapter"].split("+"), *map(str, d["fields"].values())}
  starts = methods & set(STARTING)
  if starts and storage != "dense":
    # written for the base as it was before a start was taken out and the rest was quantised
    storage, trained = "dense", road.onto_original(config, whole.start, whole.policy)
  wanted = road.outputs(config, trained)
  found = road.outputs(config, road.reloaded(config, folder, storage))
  apart = np.max(np.abs(found - wanted)) / np.max(np.abs(wanted))
  # what DoRA and (IA)3 multiply is the base that was trained on, and in the files that as it was before
  near = starts and methods & {"dora", "ia3"} and config.model.base != "dense"
  if not apart <= (0.3 if near else 1e-4):
    yield f"read again, outputs differ by {apart:.1e} of their size"
