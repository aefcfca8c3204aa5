"""What a sweep came to: a table, `summary.{csv,json,png}`, and a page with the points' curves on each other."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.box
import rich.console
import rich.measure
import rich.table
import rich.text

from posttrain_jax.core import files
from posttrain_jax.evals import compare, figures, meanings, online, report, verdicts

# What is compared: the first that finished points have and that is of one thing in all of them; else the first that is
# no loss, which across betas (or data) says nothing of which point is better.
METRICS = (
  "accuracy/after",
  "eval_rewards/accuracies",
  "eval_accuracy",
  "eval_loss",
  "eval_rewards/margins",
  "eval_mean_token_accuracy",
  "eval_kl",
  "rewards/accuracies",
  "accuracy",
  "loss",
  "mean_token_accuracy",
  "rewards/margins",
  "kl",
)
ANSWERED = ("pass@1", "reward")  # of runs that write their own answers; their loss says nothing
BESIDE = "eval_kl"  # what an accuracy was bought with


def write(
  rows: Sequence[Mapping[str, Any]],
  swept: Sequence[str],
  configs: Sequence[Mapping[str, Any]],
  workdir: Path,
  metric: str | None,
  console: rich.console.Console,
) -> bool:
  """The summary files, the page and the table; False when the metric asked for does not exist.

  Args:
    rows: one dict a point: point, status, values (what the sweep says of it), steps, metrics.
    swept: the arguments and fields in which the points differ.
    configs: the points' resolved configs.
  """
  files.write_json(workdir / "summary.json", rows)
  files.write_text(workdir / "summary.csv", _csv(rows))
  known = dict.fromkeys(itertools.chain.from_iterable(row["metrics"] for row in rows))
  shown_metric = metric or _compared(known, configs)
  console.print(
    _table(rows, swept, _columns(known, shown_metric), _best(rows, shown_metric, configs), console)
  )
  if metric is not None and known and metric not in known:
    message = f"no finished point has a metric {metric!r}; they have {', '.join(known)}"
    console.print(rich.text.Text(message), style="red")
    return False
  for sentence in _explained(known, shown_metric, configs):
    console.print(rich.text.Text(sentence))
  shown = [{**row["values"], **row["metrics"]} for row in rows if shown_metric in row["metrics"]]
  if shown_metric is not None and shown:
    figures.save_png(figures.sweep(shown, swept, shown_metric), workdir / "summary.png")
  finished = [workdir / row["point"] for row in rows if row["status"] == "finished"]
  if finished:
    page = compare.write(compare.read(finished), workdir / report.COMPARISON)
    console.print(rich.text.Text(f"curves and answers side by side: {page}"), soft_wrap=True)
  return True


def _compared(known, configs) -> str | None:
  """The first of METRICS, or of the points' scores, that compares between them; else the first that is not a loss."""
  scores = [name for name in known if meanings.SCORE.covers(meanings.base(name))]
  is_online = compare.kind_of(configs) == meanings.ONLINE
  ordered = (METRICS[0], *scores, *(ANSWERED if is_online else ()), *METRICS[1:])
  there = [n for n in ordered if n in known and not (is_online and "loss" in n)]
  fair = (name for name in there if not meanings.obstacles(name, configs))
  unfair = (name for name in there if "loss" not in name)
  return next(fair, next(unfair, None))


def _columns(known, metric) -> list[str]:
  """The metric, and beside an accuracy the KL that it was bought with."""
  if metric is None:
    return []
  beside = [BESIDE] if "accurac" in metric and BESIDE in known else []
  paid = [verdicts.CHANGE] if verdicts.CHANGE in known and metric != verdicts.CHANGE else []
  return [metric, *beside, *paid]


def _explained(known, metric, configs) -> list[str]:
  """What the compared metric means, and which do not compare."""
  if metric is None:
    losses = [name for name in known if meanings.base(name) == "loss"]
    fields = meanings.obstacles(losses[0], configs) if losses else []
    differ = f": the points differ in {', '.join(fields)}" if fields else ""
    return (
      [f"nothing that the points have compares between them{differ}; --metric=NAME shows one"]
      if known
      else []
    )
  kind = compare.kind_of(configs)
  fields, way = meanings.obstacles(metric, configs), meanings.better(kind, metric)
  if fields:
    return [
      f"{metric} is shown, not ranked: the points differ in {', '.join(fields)}, so it is not of one thing"
    ]
  meaning = (
    "" if metric.startswith(meanings.ANSWERS) else f" {meanings.meaning(kind, metric).meaning}"
  )
  if kind == meanings.ONLINE and online.is_of_answers(metric):
    meaning += " The mean of the run's last fifth."
  return [
    f"{metric}: {f'{way} is better, * is the best.' if way else 'neither way is better.'}{meaning}"
  ]


def _csv(rows) -> str:
  columns = {
    kind: list(dict.fromkeys(name for row in rows for name in row[kind]))
    for kind in ("values", "metrics")
  }
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(["point", "status", *columns["values"], "steps", *columns["metrics"]])
  for row in rows:
    values = [row["values"].get(name, "") for name in columns["values"]]
    metrics = [row["metrics"].get(name, "") for name in columns["metrics"]]
    writer.writerow([row["point"], row["status"], *values, row["steps"], *metrics])
  return text.getvalue()


def _table(rows, swept, metrics, best, console) -> rich.table.Table:
  """A row a point, in as many columns as the terminal has room for; else the point's fields stand in one."""
  heads = _heads(swept)
  wide = _rows_table(
    rows, best, [*heads.values()], lambda row: [_shown(row, f) for f in swept], metrics
  )
  anything = console.options.update(width=10_000)
  if rich.measure.Measurement.get(console, anything, wide).maximum <= console.width:
    return wide
  point = lambda row: [", ".join(f"{heads[f]}={_shown(row, f)}" for f in swept)]
  return _rows_table(rows, best, ["point"], point, metrics)


def _rows_table(rows, best, heads, cells, metrics) -> rich.table.Table:
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
  for name in heads:
    justify = "left" if name == "point" else "right"
    table.add_column(rich.text.Text(name), justify=justify, overflow="fold")
  table.add_column("status")
  for name in ["steps", *metrics]:
    table.add_column(rich.text.Text(name), justify="right", overflow="fold")
  for i, row in enumerate(rows):
    values = [row["metrics"].get(name) for name in metrics]
    shown = ["" if value is None else f"{value:.4g}" for value in values]
    if i == best:
      shown[0] += " *"
    texts = [*cells(row), row["status"], f"{row['steps']:,}", *shown]
    table.add_row(*map(rich.text.Text, texts), style="bold" if i == best else None)
  return table


def _shown(row, field) -> str:
  return str(row["values"].get(field, ""))


def _heads(swept) -> dict[str, str]:
  """Fields by their last names where those differ.

  >>> _heads(["adapter.r", "optimizer.lr"]), _heads(["data.train", "batch.train"])
  ({'adapter.r': 'r', 'optimizer.lr': 'lr'}, {'data.train': 'data.train', 'batch.train': 'batch.train'})
  """
  last = [name.rpartition(".")[2] for name in swept]
  return dict(zip(swept, last if len(set(last)) == len(last) else swept))


def _best(rows, metric, configs) -> int | None:
  """The row to print bold, where one way is better and the points' values are of one thing."""
  if metric is None or meanings.obstacles(metric, configs):
    return None
  return meanings.best(
    compare.kind_of(configs), metric, [row["metrics"].get(metric) for row in rows]
  )
