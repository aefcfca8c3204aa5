"""What a run came to: `report.html` in its folder, and the table for the terminal."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.box
import rich.table
import rich.text
import safetensors

from posttrain_jax.core import files, words
from posttrain_jax.data import questions
from posttrain_jax.evals import (
  curve_advice,
  gate,
  intervals,
  meanings,
  online,
  page,
  panels,
  tasks,
  written,
)
from posttrain_jax.evals.panels import number
from posttrain_jax.runs import manner, record
from posttrain_jax.runs.record import Run, TaskResult

NAME = "report.html"
ALL = "all"
SHOWN = 4  # answers of each kind
LONGEST = 600  # characters of an answer
NONE = "–"

# Files of a run's folder that a reader may want, and what they are called.
FILES = {
  "preference.html": "pairs: margins and what drives them",
  "eval.json": "evaluation",
  "metrics.jsonl": "metrics",
  "config.json": "config",
  record.LOG: "log",
}
COMPARISON = "compare.html"  # of the sweep that the run is a point of
SWEEP = ".sweep.lock"  # in a sweep's folder
BODY = """
<p class="state">{{ state }}</p>
<div class="scroll"><table>
{% for name, value in facts %}
<tr><th>{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table></div>

{% if suite %}
<h2>What was kept and forgotten: <a href="{{ suite.address }}">{{ suite.suite }}</a></h2>
{% for sentence in suite.sentences %}<p class="verdict">{{ sentence }}</p>{% endfor %}
{{ gate.table(suite.table) }}
<details><summary>Items that changed</summary>{{ gate.items(suite.groups) }}</details>
{% endif %}

{% if scores %}
<h2>Scores of answers: {{ scores.where }}</h2>
{% for sentence in scores.verdicts %}<p class="verdict">{{ sentence }}</p>{% endfor %}
<div class="scroll"><table>
<tr><th>metric</th>{% for head in scores.heads %}<th class="number">{{ head }}</th>{% endfor %}</tr>
{% for row in scores.rows %}
<tr><td>{{ row[0] }}</td>{% for cell in row[1:] %}<td class="number">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
<p class="note">{{ scores.note }}</p>
{% endif %}

{% if accuracy %}
<h2>{{ accuracy.title }}{{ accuracy.where }}</h2>
{% if accuracy.verdict %}<p class="verdict">{{ accuracy.verdict }}</p>{% endif %}
<div class="scroll"><table>
<tr><th>channel</th>{% for head in accuracy.heads %}<th class="number">{{ head }}</th>{% endfor %}</tr>
{% for row in accuracy.rows %}
<tr{% if loop.last %} class="all"{% endif %}>\
<td>{{ row[0] }}</td>{% for cell in row[1:] %}<td class="number">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
<p class="note">In brackets: right answers of questions asked; higher is better. {{ accuracy.note }}</p>
<h3>Verdicts</h3>
<div class="scroll"><table>
<tr><th>verdict</th>{% for head in accuracy.verdict_heads %}<th class="number">{{ head }}</th>{% endfor %}</tr>
{% for row in accuracy.verdicts %}
<tr><td>{{ row[0] }}</td>{% for cell in row[1:] %}<td class="number">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endif %}

{% if findings %}
<h2>What the curves say</h2>
<ul class="findings">{% for sentence in findings %}<li>{{ sentence }}</li>{% endfor %}</ul>
{% endif %}
{% if sections %}<p class="note">In the figures, faint lines are single steps, full lines their mean over a \
twentieth of the run, and dots held-out values.</p>{% endif %}
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% if section.panels %}
<div class="panels">{% for p in section.panels %}{{ page.panel(p) }}{% endfor %}</div>
{% endif %}
{% if section.reading and section.panels %}<p><b>How to read them.</b> {{ section.reading }}</p>{% endif %}
<div class="scroll"><table class="values">
<tr><th>last value</th><th class="number">training</th><th class="number">held out</th><th>better</th></tr>
{% for row in section.rows %}
<tr class="value"><td>{{ row.label }} <code class="note">{{ row.name }}</code></td>\
<td class="number">{{ row.train }}</td><td class="number">{{ row.held_out }}</td><td>{{ row.better }}</td></tr>
{% if row.meaning %}<tr><td class="note meaning" colspan="4">{{ row.meaning }}</td></tr>{% endif %}
{% endfor %}
</table></div>
{% endfor %}

{% if groups %}
<h2>Answers</h2>
{% if answers_note %}<p class="note">{{ answers_note }}</p>{% endif %}
{% for group in groups %}
<h3>{{ group.title }}</h3>
{% for one in group.pairs %}{{ page.pair(one) }}{% endfor %}
{% endfor %}
{% endif %}

{% if written_note %}
<h2>What the policy wrote as it learned</h2>
<p class="note">{{ written_note }} All of them are in completions/.</p>
{% for one in written %}
<div class="question"><b>{{ one.prompt }}</b></div>
<div class="pair">
{% for answer in one.answers %}
<div><span class="note">{{ answer.when }}</span><pre>{{ answer.text }}</pre></div>
{% endfor %}
</div>
{% endfor %}
{% endif %}

<h2>Commands</h2>
{% if use %}<p class="note">Use the result:</p>
<pre>{{ use }}</pre>{% endif %}
{% if command %}<p class="note">This run was started with</p>
<pre>{{ command }}</pre>{% endif %}
{% if config %}<details><summary>Resolved config</summary>
<pre>{{ config }}</pre></details>{% endif %}
"""

FILES |= {record.BEFORE: "answers before training", record.AFTER: "answers after training"}
# (right before, right after) -> what became of the answer, in the order of the page.
KINDS = {
  (False, True): "Wrong before, right after",
  (True, False): "Right before, wrong after",
  (False, False): "Wrong before and after",
  (True, True): "Right before and after",
}
CHANGES = ("Better after", "Worse after", "As before")
UNGRADED = "Held-out prompts"


def write(workdir: str | Path, *, done: Mapping[str, Any] | None = None) -> Path:
  """`report.html` of a run: what there is of facts, accuracy, curves, answers, and the command that uses it.

  Args:
    done: what done.json will hold, for a run that writes its report first and that file last.

  Raises:
    FileNotFoundError: the folder holds no run.
  """
  run = record.read(workdir)
  run = run if done is None else dataclasses.replace(run, done=done)
  note, written_ = written.over_steps(run.folder)
  html = page.render(
    BODY,
    title=run.folder.absolute().name,
    links=links(run.folder),
    state=_state(run),
    facts=_facts(run),
    accuracy=_accuracy(run),
    scores=_scores(run),
    suite=gate.of_run(run.folder),
    macros={"gate": gate.MACROS},
    answers_note=_answers_note(run),
    findings=curve_advice.read(run),
    sections=panels.sections(run),
    groups=_groups(run),
    written=[_shortened(one) for one in written_],
    written_note=note,
    use=use_command(run),
    command=run.record.get("command"),
    config=_json(run.record.get("config")),
  )
  path = run.folder / NAME
  files.write_text(path, html)
  return path


def links(folder: Path) -> list[tuple[str, str]]:
  """(name, address) of what stands beside the report: other pages, files, the sweep's comparison."""
  beside = [(name, file) for file, name in FILES.items() if (folder / file).exists()]
  if (folder.absolute().parent / SWEEP).exists():
    beside.append(("all points of the sweep", f"../{COMPARISON}"))
  return beside


def summary_table(workdir: str | Path) -> rich.table.Table:
  """Accuracy before and after with counts, by channel and overall; without an evaluation, the last metrics."""
  run = record.read(workdir)
  accuracy, scores = _accuracy(run), _scores(run)
  if scores is None and accuracy is None and online.is_one(run):
    return _table(["metric", "first fifth", "last fifth"], online.rows(run))
  if scores is not None:
    return _table(["metric", *scores["heads"]], scores["brief"])
  if accuracy is None:
    return _table(
      ["metric", "last value"], [(k, number(v)) for k, v in sorted(run.final().items())]
    )
  return _table(["channel", *accuracy["heads"]], accuracy["rows"], last="bold")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, last: str | None = None):
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
  for i, head in enumerate(heads):
    table.add_column(head, justify="right" if i else "left")
  for i, row in enumerate(rows, 1):
    if i == len(rows) and last:
      table.add_section()
    # Text: a channel called [red] is a name, not markup.
    table.add_row(*map(rich.text.Text, row), style=last if i == len(rows) else None)
  return table


def use_command(run: Run) -> str | None:
  """The command that talks to what the run made, or scores with a reward model; None before there is something."""
  name = run.field("model.name")
  if run.field("objective.name") == "reward":
    result = next((p for p in (run.folder / "adapter", run.folder / "model") if p.is_dir()), None)
    scored = [f"--reward={result}", f"--data={run.field('data.train')}", "--out=scores.jsonl"]
    return None if result is None else shlex.join(["posttrain", "eval", *scored])
  if (run.folder / "adapter").is_dir() and name is not None:
    options = [f"--model={name}", f"--adapter={run.folder / 'adapter'}"]
  elif (run.folder / "model").is_dir():
    options = [f"--model={run.folder / 'model'}"]
  else:
    return None
  template, task = run.field("model.template"), run.field("data.train")
  carried = manner.read(run.folder / "adapter") or manner.read(run.folder / "model")
  if template not in (None, "tokenizer") and carried is None:
    options.append(f"--template={template}")
  # without it the prompts are not those of training
  system = tasks.TASKS[task].system if task in tasks.TASKS else run.field("data.system")
  if system:
    options.append(f"--system={system}")
  return shlex.join(["posttrain", "chat", *options])


# Facts


def _state(run: Run) -> str:
  """How far the run is, what its result is of, and what changed on its way."""
  changes = [*map(_former, run.history), *map(_rescored, run.rescored)]
  return " ".join([_how_far(run), *_given(run), *changes])


def _how_far(run: Run) -> str:
  wanted = run.field("steps")
  if run.done is None:
    return f"Not finished: {run.steps:,} steps done" + (f" of {wanted:,}." if wanted else ".")
  early = run.done.get("ended_early")
  if early is None:
    return f"Finished after {run.steps:,} steps."
  return (
    f"Finished after {run.steps:,} of {early['of']:,} steps, since {early['after']} evaluations had brought no better"
    f" {run.done['best']['metric'] if 'best' in run.done else 'value'}."
  )


def _given(run: Run) -> list[str]:
  if run.done is None or run.given_step in (None, run.steps):
    return []
  best = run.done["best"]
  return [
    f"What was exported is of step {best['step']:,}, the best one ({best['metric']} {number(best['value'])}), and so"
    " are answers after training; curves go on to the last step."
  ]


def _former(former: Mapping[str, Any]) -> str:
  return (
    f"Up to step {former['step']:,} it was a run of {former['steps']:,} steps; from there on the learning rate follows"
    " the new number."
  )


def _rescored(change: Mapping[str, Any]) -> str:
  return (
    f"After step {change['step']:,} answers were scored by another {', '.join(change['changed'])}: rewards before and"
    " after are not of one scale."
  )


def _facts(run: Run) -> list[tuple[str, str]]:
  seconds, tokens = ((run.done or {}).get(name) for name in ("seconds", "tokens"))
  speed = run.series("tokens_per_second")[1]
  facts = {
    "Came to": online.came_to(run) if online.is_one(run) else None,
    "Model": _model(run),
    "Adapter": _adapter(run),
    "Trained": run.record.get("trainable"),
    "Data": _data(run),
    "Objective": panels.objective(run),
    "Scored by": online.scored_by(run),
    "Second score": online.scored_by(run, "holdout_reward"),
    "Answers": online.samples(run),
    "Optimizer": _optimizer(run),
    "Time": None if seconds is None else _duration(seconds),
    "Tokens": f"{tokens:,}" if tokens else None,
    "Speed": f"{sorted(speed)[len(speed) // 2]:,.0f} tokens per second (median)" if speed else None,
    "Commit": run.record.get("commit"),
    "Versions": ", ".join(f"{k} {v}" for k, v in (run.record.get("versions") or {}).items()),
  }
  return [(name, str(value)) for name, value in facts.items() if value]


def _model(run: Run) -> str | None:
  name, base = run.field("model.name"), run.field("model.base")
  return (
    f"{name}, frozen matrices in {base.upper()}" if name and base not in (None, "dense") else name
  )


# Options that say how large an adapter is, of whichever method.
SIZES = ("r", "init_r", "target_r", "lora_alpha", "num_virtual_tokens")


def _adapter(run: Run) -> str | None:
  method = run.field("adapter.method")
  if method in (None, "none"):
    return method and "none: every parameter is trained"
  parts = [_method(name, options) for name, options in run.adapters().items()]
  count = sum(map(parameters, (run.folder / "adapter").rglob("adapter_model.safetensors")))
  stored = [f"{count:,} parameters"] if count else []
  return ", ".join([" + ".join(parts), *stored])


def _method(name: str, options: Mapping[str, Any]) -> str:
  """One method of an adapter, as large as it is and where."""
  sizes = [f"{key} {options[key]}" for key in SIZES if options.get(key) is not None]
  targets = options.get("target_modules")
  return ", ".join([name, *sizes, *([f"on {_words(targets)}"] if targets else [])])


def _words(value: Any) -> str:
  return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def parameters(path: Path) -> int:
  """Numbers in an adapter's file, of which only the header is read; 0 where there is no file.

  VeRA's projections are not among them: they are frozen, and random.
  """
  if not path.exists():
    return 0
  with safetensors.safe_open(path, "np") as f:
    names = [name for name in f.keys() if not name.startswith("base_model.vera_")]  # noqa: SIM118
    return sum(math.prod(f.get_slice(name).get_shape()) for name in names)


def _data(run: Run) -> str | None:
  train, replay = run.field("data.train"), run.field("data.replay")
  if train and replay:
    share, unit = run.field("data.replay_fraction"), run.field("data.replay_by")
    return f"{train}, with {share:.0%} of the {unit} from {replay}"
  return train


def _optimizer(run: Run) -> str | None:
  name, rows = run.field("optimizer.name"), run.field("batch.rows")
  if name is None:
    return None
  rate = f", peak learning rate {run.field('optimizer.lr')}"
  return f"{name}{rate}" + (f", {rows} rows a batch" if rows else "")


def _duration(seconds: float) -> str:
  """
  >>> _duration(59.6), _duration(725), _duration(7325)
  ('1 min 00 s', '12 min 05 s', '2 h 02 min')
  """
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours} h {minutes:02} min"
  return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _json(value: Any) -> str | None:
  return None if value is None else json.dumps(value, indent=2, ensure_ascii=False)


# Accuracy and scores


def told(result: TaskResult, when: str) -> list[str]:
  """A line for each metric, for the terminal."""
  cut = (
    f"; {result.cut} of {result.total} cut at {result.max_new_tokens} tokens" if result.cut else ""
  )
  if problems := [answer["problem"] for answer in result.answers if answer.get("problem")]:
    which = f"{len(problems)} of {result.total} ended before an answer"
    cut += f"; {which}, the first by {words.shown(problems[0], 200)}"
  if not result.scores:
    return [f"answers {when} training: {result.total} written{cut}"]
  lines = [
    f"{name} {when} training: {panels.counted(score)}" for name, score in result.scores.items()
  ]
  return [*lines[:-1], lines[-1] + cut]


def graded(run: Run) -> dict[str, float]:
  """{"eval_score/METRIC": its mean after training}, for done.json: what sweeps and comparisons read."""
  scores = {} if run.after is None else run.after.scores
  return {f"eval_score/{name}": score["mean"] for name, score in scores.items()}


def _results(run: Run) -> dict[str, TaskResult]:
  """What is known of {"before", "after"}, of answers that somebody graded."""
  results = {"before": run.before, "after": run.after}
  return {when: r for when, r in results.items() if r is not None and r.is_graded}


def _scores(run: Run) -> dict[str, Any] | None:
  """Each metric before and after; None where there is a built-in task's own alone, which `_accuracy` shows."""
  known = _results(run)
  if not known or all({*result.scores} <= {result.task} for result in known.values()):
    return None
  some = next(iter(known.values()))
  names = list(dict.fromkeys(name for result in known.values() for name in result.scores))
  compared = len(known) == 2
  changes = {name: _change(name, **known) for name in names} if compared else {}
  return dict(
    where=f"{some.total:,} questions, {some.task}",
    heads=[*known, *(["change"] if compared else [])],
    rows=[
      [
        name,
        *(_shown(r.scores.get(name)) for r in known.values()),
        *([changes[name][0]] if compared else []),
      ]
      for name in names
    ],
    brief=[
      [
        name,
        *(_shown(r.scores.get(name), sure=False) for r in known.values()),
        *([changes[name][0]] if compared else []),
      ]
      for name in names
    ],
    verdicts=[sentence for _, sentence in changes.values() if sentence],
    note=f"{meanings.SCORE.meaning} In brackets: right answers of questions asked, and 95 % intervals"
    " (Wilson's for right and wrong, else the normal one of the mean). The change is taken question by question.",
  )


def _shown(score: Mapping[str, Any] | None, *, sure: bool = True) -> str:
  if score is None:
    return NONE
  is_share = score["right"] is not None
  value = (lambda x: f"{100 * x:.1f}") if is_share else number
  counted = f"{score['right']}/{score['count']}" if is_share else f"{score['count']} answers"
  is_known = sure and score["low"] is not None
  between = f"; {value(score['low'])} to {value(score['high'])}" if is_known else ""
  return f"{value(score['mean'])}{' %' if is_share else ''} ({counted}{between})"


def _change(name: str, before: TaskResult, after: TaskResult) -> tuple[str, str]:
  """(a cell, a sentence) of what became of a metric on the questions that were asked twice."""
  was = {_key(a): a["scores"][name] for a in before.answers if name in a["scores"]}
  pairs = [
    (was[_key(a)], a["scores"][name])
    for a in after.answers
    if name in a["scores"] and _key(a) in was
  ]
  if not pairs:
    return NONE, ""
  change = intervals.change([a for a, _ in pairs], [b for _, b in pairs])
  is_share = after.scores[name]["right"] is not None
  scale, unit = (100, " points") if is_share else (1, "")
  signed = lambda x: f"{scale * x:+.1f}" if is_share else f"{x:+.3g}"
  between = ""
  if change["low"] is not None:
    if is_share:
      change |= dict(low=max(change["low"], -1), high=min(change["high"], 1))
    chance = ": it may be chance" if change["low"] <= 0 <= change["high"] else ""
    between = f" (95 % interval {signed(change['low'])} to {signed(change['high'])}{chance})"
  moved = f"{signed(change['mean'])}{unit}"
  sentence = (
    f"{name}: {_brief(before.scores[name])} before, {_brief(after.scores[name])} after,"
    f" {moved}{between}."
  )
  return moved, sentence


def _brief(score: Mapping[str, Any]) -> str:
  return f"{100 * score['mean']:.1f} %" if score["right"] is not None else number(score["mean"])


def _key(answer: Mapping[str, Any]) -> tuple[Any, ...]:
  """What tells one question from another."""
  return answer["question"], answer["gold"], answer.get("origin")


def _accuracy(run: Run) -> dict[str, Any] | None:
  known = {
    when: r
    for when, r in _results(run).items()
    if r.is_share and (not r.scores or r.task in r.scores or len(r.by_channel) > 1)
  }
  if not known:
    return None
  some = next(iter(known.values()))
  compared = len(known) == 2
  names = sorted({name for result in known.values() for name in result.by_channel})
  return dict(
    title="Execution accuracy" if some.task in tasks.TASKS else "Right answers by channel",
    where=f": {some.task}, {some.split} split" if some.task in tasks.TASKS else "",
    heads=[*known, *(["change"] if compared else [])],
    rows=[_row(name, list(known.values())) for name in [*names, ALL]],
    note=_note(known),
    verdict=_sentence(*known.values()) if compared else None,
    verdict_heads=list(known),
    verdicts=[
      (reason, *(str(result.reasons.get(reason, 0)) for result in known.values()))
      for reason in dict.fromkeys(r for result in known.values() for r in result.reasons)
    ],
  )


def _row(name: str, results: Sequence[TaskResult]) -> list[str]:
  counts = [
    (result.correct, result.total) if name == ALL else result.by_channel.get(name, (0, 0))
    for result in results
  ]
  cells = [name, *(_share(*pair) for pair in counts)]
  if len(results) == 1:
    return cells
  (a, n), (b, m) = counts
  return [*cells, f"{100 * (b / m - a / n):+.1f}" if n and m else NONE]


def _share(correct: int, total: int) -> str:
  return f"{100 * correct / total:.1f} % ({correct}/{total})" if total else NONE


def _sentence(before: TaskResult, after: TaskResult) -> str:
  points = 100 * (after.accuracy - before.accuracy)
  return (
    f"{_share(before.correct, before.total)} before, {_share(after.correct, after.total)} after: "
    f"{points:+.1f} points."
  )


def _note(results: Mapping[str, TaskResult]) -> str:
  ranges = {
    when: intervals.wilson(result.correct, result.total) for when, result in results.items()
  }
  shown = ", ".join(
    f"{100 * low:.1f} to {100 * high:.1f} % {when}" for when, (low, high) in ranges.items()
  )
  return f"95 % intervals of the whole (Wilson): {shown}."


# Answers


def _groups(run: Run) -> list[dict[str, Any]]:
  most = max(SHOWN, run.field("eval.samples") or 0)
  if run.before is None or run.after is None:
    one = run.after or run.before
    when = "after" if run.after else "before"
    return [] if one is None else _one_sided(one, when, most)
  asked = {_key(a): a for a in run.before.answers}
  pairs = [
    {"before": asked[_key(after)], "after": after}
    for after in run.after.answers
    if _key(after) in asked
  ]
  kinds: dict[str, list] = {}
  for pair in pairs:
    kinds.setdefault(_kind(pair["before"], pair["after"]), []).append(pair)
  order = [*KINDS.values(), *CHANGES, UNGRADED]
  return [_group(kind, kinds[kind], most) for kind in order if kind in kinds]


def _kind(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
  """What became of an answer: by right and wrong, by the first metric where that is no share, or by nothing."""
  if after["correct"] is None or before["correct"] is None:
    return UNGRADED
  was, now = (next(iter((a.get("scores") or {"": 0}).values())) for a in (before, after))
  if {was, now} <= {0, 1}:
    return KINDS[before["correct"], after["correct"]]
  return CHANGES[0] if now > was else CHANGES[1] if now < was else CHANGES[2]


def _answers_note(run: Run) -> str:
  """How they were made: what a reader must know of what he compares."""
  results = [result for result in (run.before, run.after) if result is not None]
  if not results or not results[-1].max_new_tokens or results[-1].task in tasks.TASKS:
    return ""
  last = results[-1]
  cut = f"; {last.cut} of {last.total} were cut there" if last.cut else ""
  return (
    "First the prompt, then the expected answer, then what the model wrote: greedily, with at most"
    f" {last.max_new_tokens} tokens (eval.max_new_tokens){cut}."
  )


def _one_sided(result: TaskResult, when: str, most: int) -> list[dict[str, Any]]:
  groups = []
  titles = ((True, f"Right {when}"), (False, f"Wrong {when}"), (None, UNGRADED))
  for correct, title in titles:
    some = [{when: answer} for answer in result.answers if answer["correct"] is correct]
    groups += [_group(title, some, most)] if some else []
  return groups


def _group(title: str, pairs: list[dict[str, Mapping[str, Any]]], most: int) -> dict[str, Any]:
  shown = _varied(pairs, most)
  return dict(
    title=f"{title}: {len(pairs):,}" + (f", {len(shown)} of them" if shown != pairs else ""),
    pairs=[_pair(pair) for pair in shown],
  )


def _varied(
  pairs: list[dict[str, Mapping[str, Any]]], most: int
) -> list[dict[str, Mapping[str, Any]]]:
  """The first few, of as many channels as there are."""
  nth: dict[str, int] = {}
  order = []
  for place, pair in enumerate(pairs):
    channel = next(iter(pair.values()))["channel"]
    nth[channel] = nth.get(channel, 0) + 1
    order.append((nth[channel], place))
  return [pairs[place] for _, place in sorted(order)[:most]]


def _pair(pair: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  some = next(iter(pair.values()))
  return dict(
    question=some["question"],
    channel="" if some["channel"] == questions.NO_CHANNEL else some["channel"],
    gold=NONE if some["gold"] is None else _cut(some["gold"]),
    answers=[
      dict(when=when, correct=a["correct"], reason=panels.reason(a), text=_cut(a["answer"]))
      for when, a in pair.items()
    ],
  )


def _shortened(one: Mapping[str, Any]) -> dict[str, Any]:
  answers = [{**answer, "text": _cut(answer["text"])} for answer in one["answers"]]
  return {"prompt": _cut(one["prompt"]), "answers": answers}


def _cut(text: str) -> str:
  return text if len(text) <= LONGEST else text[:LONGEST] + " …"
