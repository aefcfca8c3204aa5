"""A model on a suite: a result for each item, kept in a journal as it comes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain_jax.core import progress, words
from posttrain_jax.core.journal import Journal
from posttrain_jax.data import questions
from posttrain_jax.data.errors import RowError
from posttrain_jax.evals import asked as asked_lib
from posttrain_jax.evals import likelihood, suite
from posttrain_jax.evals.asked import Asked
from posttrain_jax.evals.likelihood import Scores
from posttrain_jax.evals.samples import Writer
from posttrain_jax.evals.suite import Part, Suite
from posttrain_jax.models import before
from posttrain_jax.rewards import columns as columns_lib
from posttrain_jax.rewards import section
from posttrain_jax.rewards.compared import Compared
from posttrain_jax.rewards.matching import RIGHT
from posttrain_jax.rewards.reward import Reward, Scored
from posttrain_jax.rewards.score import Score
from posttrain_jax.rewards.verifier import Answer
from posttrain_jax.rollout import engine
from posttrain_jax.rollout.requests import Request
from posttrain_jax.rollout.sampling import Sampling
from posttrain_jax.settings import ConfigError

VERSION = 1  # of what results mean
FINISHED = "finished"  # the column that the metric `stops` reads
NO_NUMBERS = "the model's log-probabilities are no numbers"  # why a score is missing: of the model, not of its judge
# what of a header may differ between two measurements that compare
NAMES = ("model", "weights", "counts")
BLOCK = 32  # items of texts and choices between two looks at the journal


@dataclasses.dataclass(frozen=True)
class Result:
  """What a model did with an item.

  value: of a text its bits, lower is better; else a score, higher is better; None where it is missing, for `reason`.
  size: of a text its bytes; else 1.
  answers: what it wrote; of a choice, the one that it took.
  right: of several answers, how many are right.
  """

  id: str
  group: str
  value: float | None
  size: float = 1.0
  answers: tuple[str, ...] = ()
  reason: str = ""
  right: int | None = None


@dataclasses.dataclass(frozen=True)
class Measured:
  """header: what the results are of, as `identity` has it.  results: {part: of each item, in the order of rows}."""

  header: Mapping[str, Any]
  results: Mapping[str, Sequence[Result]]

  @property
  def name(self) -> str:
    return self.header["model"]


def read(path: str | Path) -> Measured:
  """What `measure` kept.

  Raises:
    ConfigError: the file is none of its, or not whole.
  """
  path = Path(path)
  if not path.is_file():
    raise ConfigError(f"{path}: there is no such measurement")
  journal = Journal(path)
  if not _is_header(journal.header):
    raise ConfigError(f"{path} is no measurement of `posttrain regress`")
  there = _collected(journal, journal.header["counts"])
  for name, results in there.items():
    if None in results:
      raise ConfigError(f"{path} is not whole: {name} has not all of its items; measure it again")
  return Measured(journal.header, {n: [r for r in rs if r is not None] for n, rs in there.items()})


def _is_header(value: Any) -> bool:
  """Whether it has what a comparison reads of it; `check_alike` says what of it differs."""
  if not isinstance(value, dict) or not {"version", "model", "weights"} <= value.keys():
    return False
  counts = value.get("counts")
  return isinstance(counts, dict) and all(type(n) is int and n >= 0 for n in counts.values())


def measure(
  writer: Writer,
  wanted: Suite,
  *,
  model: str,
  weights: str,
  path: Path,
  seed: int = 0,
  rows: int = 16,
  unsafe_code: bool = False,
  beside: Mapping[str, Any] | None = None,
) -> Measured:
  """The result of every item; goes on where the same measurement was ended.

  Args:
    model, weights: what it is called, and a name for what it is.
    path: of the journal.
    seed: of answers that are drawn.
    rows: answers that are written at once.
    unsafe_code: run programs that the model wrote where nothing isolates them.
    beside: the header of the measurement that it will be compared with.

  Raises:
    ConfigError: the file is of another measurement, a metric does not suit its rows, or it would not compare.
    RowError: a row has no prompt, no room for an answer, or an expected answer that cannot be compared with.
  """
  longest = writer.config.max_length - before.slots(writer.params)
  each = [asked_lib.of(part, writer, longest) for part in wanted.parts]
  rewards = {
    a.part.name: reward(a.part, a.questions, unsafe_code)
    for a in each
    if a.part.kind == suite.ANSWERS
  }
  header = identity(writer, each, model, weights, seed)
  if beside is not None:
    check_alike(beside, header)
  path.parent.mkdir(parents=True, exist_ok=True)
  _check(path, header)
  with Journal(path).begin(header) as journal:
    there = _collected(journal, header["counts"])
    left = {name: [i for i, one in enumerate(rs) if one is None] for name, rs in there.items()}
    _likely(writer, [a for a in each if a.part.name not in rewards], left, journal)
    _written(
      writer, [a for a in each if a.part.name in rewards], rewards, left, journal, seed, rows
    )
  return read(path)


def check(wanted: Suite, *, unsafe_code: bool = False) -> None:
  """Raises what `measure` would of rows and metrics by themselves: before a model is read."""
  for part in wanted.parts:
    if part.kind == suite.ANSWERS:
      reward(part, [questions.of(row, None) for row in part.rows], unsafe_code)


def identity(
  writer: Writer, each: Sequence[Asked], model: str, weights: str, seed: int
) -> dict[str, Any]:
  """What results are of.  Two measurements compare where nothing differs but what is in NAMES."""
  texts = [writer.tokenizer.decode([at]) for at in writer.ends]
  return {
    "version": VERSION,
    "model": model,
    "weights": weights,
    "counts": {one.part.name: len(one.part.rows) for one in each},
    "rows": {one.part.name: one.part.digest for one in each},
    "prompts": {one.part.name: one.digest(writer.tokenizer) for one in each},
    "template": "none" if writer.template is None else suite.digest(writer.template.text),
    "ends": sorted(texts),
    "seed": seed,
  }


def obstacles(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
  """What keeps two measurements from being compared, in words."""
  differing = [n for n in one if n not in NAMES and one.get(n) != other.get(n)]
  said = {
    "version": "they were measured by versions of this program that mean other things",
    "rows": "the suite's rows or settings differ in {}",
    "prompts": "the texts that the models were given differ in {}",
    "template": "the chat templates differ",
    "ends": "answers end with other tokens",
    "seed": "answers were drawn with other seeds",
  }
  names = lambda n: ", ".join(
    part
    for part in {**one[n], **other.get(n, {})}
    if one[n].get(part) != other.get(n, {}).get(part)
  )
  return [
    said.get(n, f"{n} differs").format(names(n) if isinstance(one[n], Mapping) else "")
    for n in differing
  ]


def check_alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
  """Raises ConfigError where the measurements of two headers do not compare."""
  if said := obstacles(one, other):
    raise ConfigError(
      f"{one['model']} and {other['model']} are not comparable: {'; '.join(said)}. Have both asked alike:"
      " --template=NAME gives both one chat template, and a kept measurement of the other is to be made anew"
    )


def _check(path: Path, header: Mapping[str, Any]) -> None:
  """Raises ConfigError where what the file holds is of another measurement."""
  there = Journal(path).header if path.exists() else None
  if there is None or there == header:
    return
  if not isinstance(there, dict) or "version" not in there:
    raise ConfigError(f"{path} is there already and no measurement: write another --out")
  if there.get("weights") != header["weights"]:
    what = f"of {there.get('model')}, other weights"
  else:
    what = "; ".join(obstacles(header, there)) or "of other parts"
  raise ConfigError(f"{path} is of another measurement ({what}): write another --out, or remove it")


def _collected(journal: Journal, counts: Mapping[str, int]) -> dict[str, list[Result | None]]:
  found: dict[str, list[Result | None]] = {name: [None] * n for name, n in counts.items()}

  def one(line: Mapping[str, Any]) -> None:
    fields: dict[str, Any] = {**line["result"], "answers": tuple(line["result"]["answers"])}
    found[line["part"]][line["number"]] = Result(**fields)

  for _ in journal.each(one):
    pass
  return found


def _keep(journal: Journal, part: Part, number: int, result: Result) -> None:
  journal.write({"part": part.name, "number": number, "result": dataclasses.asdict(result)})


# Texts and choices


def _likely(
  writer: Writer, each: Sequence[Asked], left: Mapping[str, Sequence[int]], journal: Journal
) -> None:
  scores = Scores(writer.params, writer.config, writer.dtype)
  total = sum(len(left[one.part.name]) for one in each)
  done = 0
  with progress.counter("scoring texts") as count:
    for one in each:
      numbers = left[one.part.name]
      for start in range(0, len(numbers), BLOCK):
        some = numbers[start : start + BLOCK]
        found = iter(scores.of([row for i in some for row in one.marked[i]]))
        for i in some:
          logps = [next(found)[0] for _ in one.marked[i]]
          result = _bits(one, i, logps) if one.part.kind == suite.TEXT else _chosen(one, i, logps)
          _keep(journal, one.part, i, result)
        done += len(some)
        count(done, total)


def _bits(one: Asked, i: int, logps: Sequence[np.ndarray]) -> Result:
  value = likelihood.bits(np.concatenate(logps))
  result = Result(one.part.ids[i], one.part.groups[i], value, float(sum(one.sizes[i])))
  return result if np.isfinite(value) else _numberless(result)


def _chosen(one: Asked, i: int, logps: Sequence[np.ndarray]) -> Result:
  """Right where the right choice has the highest log-probability a byte."""
  row = one.part.rows[i].raw
  rates = [float(np.sum(lp)) / size for lp, size in zip(logps, one.sizes[i])]
  best = int(np.argmax(rates))
  right = best == row["answer"]
  said = "" if right else f"{row['choices'][row['answer']]!r} is less likely"
  result = Result(one.part.ids[i], one.part.groups[i], float(right), reason=said)
  if not np.isfinite(rates).all():
    return _numberless(result)
  return dataclasses.replace(result, answers=(row["choices"][best],))


def _numberless(result: Result) -> Result:
  """The result of a model whose weights overflow: whatever is read off such numbers says nothing."""
  return dataclasses.replace(result, value=None, right=None, reason=NO_NUMBERS)


# Answers


def _stops(prompt: Any, completion: str, example: Mapping[str, Any]) -> Score:
  return Score(1.0, RIGHT) if example[FINISHED] else Score(0.0, "no end")


def reward(part: Part, asked: Sequence[Mapping[str, Any]], unsafe_code: bool = False) -> Reward:
  """What scores the answers of a part, tried on its rows' own.

  Args:
    asked: its rows, as `data.questions` makes them.

  Raises:
    ConfigError: there is no such metric, or rows have not what it reads.
    RowError: an expected answer is not right by the metric, or cannot be compared with.
  """
  metric = part.metric
  spec = {"parts": (metric,)} if isinstance(metric, str) else dict(metric)
  spec = {**spec, "unsafe_code": unsafe_code or bool(spec.get("unsafe_code"))}
  examples = [{**asked_lib.example(question), FINISHED: True} for question in asked]
  origins = [question["origin"] for question in asked]
  columns, partly = columns_lib.of([*zip(examples, origins, strict=True)])
  try:
    made = section.make(spec, columns, partly=partly, given={suite.STOPS: _stops})
  except ConfigError as error:
    raise ConfigError(f"the part {part.name}: {error}") from error
  _try(part, asked, made, examples)
  return made


def _try(
  part: Part,
  asked: Sequence[Mapping[str, Any]],
  made: Reward,
  examples: Sequence[Mapping[str, Any]],
) -> None:
  """Every expected answer, where the metric does nothing but compare with it."""
  if not all(isinstance(p.verifier, Compared) and not p.verifier.within for p in made.parts):
    return
  own = [(q, row) for q, row in zip(asked, examples) if q["gold"] is not None]
  scored = (
    made.score([Answer(q["prompt"], q["gold"], row) for q, row in own]).answers if own else ()
  )
  for (question, _), given in zip(own, scored):
    if not made.is_right(given):
      raise RowError(
        "nothing to compare with",
        question["origin"],
        f"the expected answer {words.shown(question['gold'], 60)} is not right by the metric of {part.name}:"
        f" {_reason(given)}",
        "mend the row, or name another metric",
      )


def _written(
  writer: Writer,
  each: Sequence[Asked],
  rewards: Mapping[str, Reward],
  left: Mapping[str, Sequence[int]],
  journal: Journal,
  seed: int,
  rows: int,
) -> None:
  """Answers of all parts by one engine, so that its programs are compiled once."""
  wanted = [
    (one, i, sample)
    for one in each
    for i in left[one.part.name]
    for sample in range(one.part.samples)
  ]
  if not wanted:
    return
  longest = max(len(one.prompts[i]) + one.part.max_new_tokens for one, i, _ in wanted)
  bound = before.slots(writer.params)
  machine = engine.Engine(
    writer.params,
    writer.config,
    rows=rows,
    length=min(engine.bucket(bound + longest), writer.config.max_length),
    dtype=writer.dtype,
    tokenizer=writer.tokenizer,
  )
  requests = [_request(one, i, sample, writer, seed) for one, i, sample in wanted]
  drawn: dict[tuple[str, int], dict[int, Any]] = {}
  with progress.counter("answering") as count:
    for done, (place, answer) in enumerate(machine.run(requests), 1):
      one, i, sample = wanted[place]
      some = drawn.setdefault((one.part.name, i), {})
      some[sample] = answer
      if len(some) == one.part.samples:
        answers = [some[s] for s in range(one.part.samples)]
        _keep(journal, one.part, i, _scored(one, i, answers, rewards[one.part.name], writer))
      count(done, len(wanted))


def _request(one: Asked, i: int, sample: int, writer: Writer, seed: int) -> Request:
  return Request(
    prompt=one.prompts[i],
    max_new_tokens=one.part.max_new_tokens,
    sampling=Sampling(one.part.temperature),
    stop_tokens=writer.ends,
    seed=seed,
    number=i,
    sample=sample,
  )


def _scored(one: Asked, i: int, drawn: Sequence[Any], made: Reward, writer: Writer) -> Result:
  """The mean score of the answers to an item; missing where one is."""
  question, example = one.questions[i], asked_lib.example(one.questions[i])
  texts = tuple(writer.text(answer.tokens) for answer in drawn)
  answers = [
    Answer(question["prompt"], text, {**example, FINISHED: answer.finished}, answer.tokens, i)
    for text, answer in zip(texts, drawn)
  ]
  scored = made.score(answers).answers
  values = [given.total.value for given in scored]
  known = [value for value in values if value is not None]
  value = sum(known) / len(known) if len(known) == len(values) else None
  outcome = made.outcome()
  right = sum(map(outcome.is_right, scored)) if outcome.has_most and value is not None else None
  result = Result(
    one.part.ids[i],
    one.part.groups[i],
    value,
    answers=texts,
    reason=next(filter(None, map(_reason, scored)), ""),
    right=right,
  )
  return result if all(np.isfinite(a.logps).all() for a in drawn) else _numberless(result)


def _reason(given: Scored) -> str:
  """Why an answer is missing, or not right; "" where nothing is to be said."""
  said = [given.total.reason, *(part.reason for part in given.parts.values())]
  return next((reason for reason in said if reason and reason != RIGHT), "")
