"""Rejection sampling: a model answers prompts several times, a reward scores the answers, and a file keeps the best."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain_jax.build import data as data_lib
from posttrain_jax.build import evaluation, questions, scoring, traces, use
from posttrain_jax.core import files, progress
from posttrain_jax.core.journal import Journal
from posttrain_jax.data import chat, held_out, schema
from posttrain_jax.data import questions as questions_lib
from posttrain_jax.evals import keeping, samples, tasks
from posttrain_jax.evals.keeping import Keep, Summary
from posttrain_jax.evals.samples import Drawn, Plan, Question, Sample
from posttrain_jax.rewards import columns as columns_lib
from posttrain_jax.rewards import section, selftest
from posttrain_jax.rewards.reward import Reward, Scored
from posttrain_jax.rewards.verifier import Answer
from posttrain_jax.rollout import requests
from posttrain_jax.rollout.address import Address
from posttrain_jax.rollout.sampling import Sampling
from posttrain_jax.settings import ConfigError

log = logging.getLogger(__name__)
ASKS = ("prompt", "prompt_completion", "messages")  # what a row is taken for that could be several
GROUPS = 16  # prompts whose answers are scored together, and are then paid for


@dataclasses.dataclass(frozen=True)
class Wanted:
  """What `posttrain sample` is asked for.

  reward: the section that scores, as `scoring.spec` makes it; without parts the task's own scores.
  columns: of the data, as config.data.columns: {"prompt": "question"}.
  right: the score from which on an answer is right; None: the highest outcome there is (`Reward.outcome`).
  max_new_tokens: 0: what the task needs, or a quarter more than the longest expected answer.
  """

  out: Path
  task: str
  data: str
  samples: int
  keep: Keep
  reward: Mapping[str, Any]
  sampling: Sampling
  columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  right: float | None = None
  max_new_tokens: int = 0
  seed: int = 0
  rows: int = 32
  limit: int = 0
  storage: str = "auto"
  stop_strings: tuple[str, ...] = ()
  min_new_tokens: int = 0

  @property
  def scored_by(self) -> Mapping[str, Any]:
    """The section of the reward; a built-in task has a verifier of its name."""
    own = {} if self.reward.get("parts") else {"parts": (self.task,)}
    return {**self.reward, **own}


def write(wanted: Wanted, load: Callable[[], use.Used | Address]) -> Summary:
  """Writes the scored answers that are kept; goes on where the same command was ended before.

  Args:
    load: the model, or where it is, after what the command says has been checked.

  Raises:
    ConfigError: another command wrote the file, nothing scores the answers, or a verifier cannot tell right from wrong.
    RowError: a row has no prompt, or one that leaves no room for an answer.
  """
  _check(wanted)
  source, asked, longest = _who_answers_what(load(), wanted)
  with scoring.told_of_files(wanted.scored_by):
    columns, partly = columns_lib.of([(example(q), q["origin"]) for q in asked])
    reward = scoring.of(wanted.scored_by, columns, partly=partly)
  with scoring.told_of_files(wanted.scored_by):
    for sentence in selftest.check(reward, _references(asked, source.tokenizer)):
      log.info(sentence)
  right = _right(wanted, reward)
  _check_right(wanted.keep, right, reward)
  plan = _plan(wanted, longest)
  if isinstance(source, traces.Remote):
    source.check(plan)
  prompts, weights = source.prompts(asked), source.weights
  identity = _identity(wanted, source, plan, prompts, asked, weights)
  wanted.out.parent.mkdir(parents=True, exist_ok=True)
  _check_out(wanted.out, identity)
  with Journal(_journal(wanted.out)).begin(identity) as journal:
    drawn = _drawn(journal, source, prompts, plan)
    groups = _scored(journal, reward, asked, drawn, plan)
  lines, summary = _chosen(wanted, asked, groups, right, weights)
  if not lines:
    there = wanted.out.exists()
    before = f" ({wanted.out} is as an earlier command left it)" if there else ""
    what = "no prompt gave a pair" if wanted.keep.rule == keeping.PAIRS else "no answer is kept"
    raise ConfigError(f"{what}{before}:\n{summary}")
  files.write_text(wanted.out, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in lines))
  if right is None:
    log.info("no pass@k: nothing says which score is right; write --right=SCORE")
  return summary


def _chosen(
  wanted: Wanted,
  asked: Sequence[Question],
  groups: Sequence[Sequence[Sample]],
  right: keeping.Right | None,
  weights: str,
) -> tuple[list[dict[str, Any]], Summary]:
  """(the rows that are written, what the answers came to)."""
  if wanted.keep.rule == keeping.PAIRS:
    pairs = [
      keeping.paired(group, right, has_gold=question["gold"] is not None)
      for question, group in zip(asked, groups, strict=True)
    ]
    rows = [
      _pair(question, pair, wanted.seed, weights)
      for question, (pair, _) in zip(asked, pairs)
      if pair is not None
    ]
    return rows, keeping.summary(groups, pairs, right)
  some = [keeping.kept(wanted.keep, group, right) for group in groups]
  rows = [_row(asked[s.drawn.number], s, wanted.seed, weights) for one in some for s in one.samples]
  return rows, keeping.summary(groups, some, right)


def _check(wanted: Wanted) -> None:
  """What can be said before a model is read."""
  if bool(wanted.task) == bool(wanted.data):
    raise ConfigError("write --task=NAME (a built-in task) or --data=SOURCE (rows of yours)")
  if wanted.task and wanted.task not in tasks.TASKS:
    raise ConfigError(f"--task={wanted.task}: there are {', '.join(tasks.TASKS)}")
  if wanted.data and not wanted.reward.get("parts"):
    raise ConfigError(
      "--data needs --reward, which says how good an answer is: a verifier such as number or exact, a function of yours"
      " as FILE.py:name, a reward model's folder, or several with commas between"
    )
  if wanted.right is not None and not math.isfinite(wanted.right):
    raise ConfigError(
      f"--right={wanted.right}: the score from which on an answer is right, a number"
    )
  if wanted.limit < 0:
    raise ConfigError(f"--limit={wanted.limit}: a count of prompts, or 0 for all")
  if wanted.max_new_tokens < 0:
    raise ConfigError(f"--max_new_tokens={wanted.max_new_tokens}: a count, or 0")
  _plan(wanted, longest=1)


def _plan(wanted: Wanted, longest: int) -> Plan:
  return Plan(
    wanted.samples,
    longest,
    wanted.sampling,
    wanted.seed,
    wanted.rows,
    wanted.storage,
    wanted.stop_strings,
    wanted.min_new_tokens,
  )


def _right(wanted: Wanted, reward: Reward) -> keeping.Right | None:
  """What says whether an answer is right; None where nothing does."""
  if wanted.right is not None:
    return keeping.from_on(wanted.right)
  outcome = reward.outcome()
  return outcome.is_right if outcome.has_most else None


def _check_right(keep: Keep, right: keeping.Right | None, reward: Reward) -> None:
  if keep.rule == keeping.ALL_RIGHT and right is None:
    endless = [p.name for p in reward.outcome().parts if not (p.gate or p.has_ends)]
    ranges = json.dumps({"ranges": {name: [0, 1] for name in endless}})
    raise ConfigError(
      f"--keep={keeping.ALL_RIGHT}: {' and '.join(endless)} has no highest score, so nothing says which answers are"
      " right; write --right=SCORE, or --keep=best, top:K or above:X, or say what its scores lie within: a verifier of"
      f" yours `-> bool`, or in --reward=FILE.json, as {ranges}"
    )


def _who_answers_what(
  loaded: use.Used | Address, wanted: Wanted
) -> tuple[traces.Source, list[Question], int]:
  """(who answers, the questions, the most tokens of an answer)."""
  if isinstance(loaded, Address):
    return traces.Remote(loaded), *_asked_of_address(wanted)
  requests.check_strings(wanted.stop_strings, loaded.tokenizer)
  return traces.Local(loaded, wanted.storage), *_asked(loaded, wanted)


def _asked_of_address(wanted: Wanted) -> tuple[list[Question], int]:
  """`_asked` where nobody knows the tokens: how many an answer may have is to be said."""
  longest = wanted.max_new_tokens or (tasks.TASKS[wanted.task].max_new_tokens if wanted.task else 0)
  if not longest:
    raise ConfigError(
      "--address: the tokens of a model behind an address are unknown here, and so is how many an answer needs; write"
      " --max_new_tokens=N"
    )
  asked = _of_task(wanted) if wanted.task else _of_rows(wanted, True, None, None)
  if not asked:
    raise ConfigError(f"{wanted.data or wanted.task} has no rows")
  return asked, longest


def _of_task(wanted: Wanted) -> list[Question]:
  task = tasks.TASKS[wanted.task]
  return [
    dict(row, row=row, origin=f"{task.name}/train:{i}")
    for i, row in enumerate(task.examples("train", n=wanted.limit or None), 1)
  ]


def _of_rows(wanted: Wanted, as_turns: bool, system: str | None, tokenizer: Any) -> list[Question]:
  with data_lib.told_of_columns():
    rows = schema.read(
      wanted.data, columns=wanted.columns or None, chat=as_turns, system=system, kinds=ASKS
    )
  asked: list[Question] = [questions_lib.of(row, tokenizer) for row in rows]
  return list(held_out.limited(asked, wanted.limit, seed=0)) if wanted.limit else asked


def _asked(used: use.Used, wanted: Wanted) -> tuple[list[Question], int]:
  """(the questions, the most tokens of an answer).

  Raises:
    RowError: there is no prompt in a row, or no room behind one.
  """
  config = evaluation.described(used, wanted.task or wanted.data, wanted.columns).unlock()
  model = evaluation.as_model(used, used.bound)
  asked: list[Question]
  if wanted.task:
    asked = _of_task(wanted)
    longest = wanted.max_new_tokens or tasks.TASKS[wanted.task].max_new_tokens
  else:
    longest = wanted.max_new_tokens
    as_turns = bool(config.data.chat and model.template is not None)
    system = config.data.system if as_turns else None
    asked = _of_rows(wanted, as_turns, system, used.tokenizer)
  if not asked:
    raise ConfigError(f"{wanted.data or wanted.task} has no rows")
  config.eval.max_new_tokens = longest
  return asked, questions.longest(config, model, asked, True, "--max_new_tokens")


def example(question: Question) -> dict[str, Any]:
  """What a verifier is given of a question: its row, and the expected answer as `gold` where there is one."""
  row = dict(question["row"])
  if question["gold"] is not None:
    row.setdefault("gold", question["gold"])
  return row


def _references(asked: Sequence[Question], tokenizer: Any) -> list[Answer]:
  """The first rows with their own right answers, "" where a row does not say."""
  some = [(q["prompt"], example(q)) for q in asked[: selftest.PAIRS]]
  return [section.reference(prompt, row, tokenizer) for prompt, row in some]


def _identity(
  wanted: Wanted,
  source: traces.Source,
  plan: Plan,
  prompts: Sequence[Any],
  asked: Sequence[Question],
  weights: str,
) -> dict[str, Any]:
  """What answers and scores depend on, under the names of the options; how the model is called is not of it."""
  return json.loads(
    json.dumps(
      {
        "model": weights,
        "prompts": _digest([prompts, source.depends()]),
        "rows": _digest([example(question) for question in asked]),
        "reward": wanted.scored_by,
        "verifiers": scoring.sources(wanted.scored_by),
        "n": plan.samples,
        **dataclasses.asdict(plan.sampling),
        "max_new_tokens": plan.max_new_tokens,
        "min_new_tokens": plan.min_new_tokens,
        "stop": plan.stop_strings,
        "seed": plan.seed,
        "batch_size": plan.rows,
        "storage": plan.storage,
      }
    )
  )


def _digest(value: Any) -> str:
  text = json.dumps(value, sort_keys=True, default=str)
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _journal(out: Path) -> Path:
  """The file beside the one that is written, with every answer and its scores."""
  return out.with_name(f"{out.name}.answers")


def _check_out(out: Path, identity: Mapping[str, Any]) -> None:
  """Raises ConfigError where another command wrote what is there."""
  path = _journal(out)
  header = Journal(path).header
  if out.exists() and header is None:  # no such file, an empty one, or half a line
    raise ConfigError(
      f"{out} is there already, and no {path.name} beside it says what wrote it: write another --out, or remove it"
    )
  there = identity if header is None else header
  differ = [name for name in {**there, **identity} if there.get(name) != identity.get(name)]
  if differ:
    told = "; ".join(
      f"{name}: {there.get(name)} there, {identity.get(name)} now" for name in differ
    )
    raise ConfigError(
      f"{path} is of another command ({told}): write another --out, or remove {path.name} and {out.name}"
    )


def _drawn(
  journal: Journal, source: traces.Source, prompts: Sequence[Any], plan: Plan
) -> list[list[Drawn]]:
  def read(line: Mapping[str, Any]) -> Drawn | None:
    if "scored" in line:
      return None
    number, sample = line["answer"]
    if not (0 <= number < len(prompts) and 0 <= sample < plan.samples):
      raise ValueError(f"there is no answer {sample} to a prompt {number}")
    text = line["text"] if "text" in line else source.text(line["ids"])
    is_stopped = line.get(chat.ENDED) == chat.STRING
    return Drawn(number, sample, line["ids"], text, line["finished"], is_stopped)

  there = [one for one in journal.each(read) if one is not None]
  every = {(one.number, one.sample): one for one in there}
  total = len(prompts) * plan.samples
  if every:
    log.info("%d of %d answers are there already", len(every), total)
  if len(every) == total:
    return _in_order(every, len(prompts), plan)
  with progress.counter("answering") as count:
    for one in source.draw(prompts, plan, every.keys()):
      at = (one.number, one.sample)
      said = {} if one.tokens else {"text": one.text}  # of an address, which tells no tokens
      journal.write(
        {"answer": at, "ids": one.tokens, **said, "finished": one.finished, **_end(one)}
      )
      every[at] = one
      count(len(every), total)
  return _in_order(every, len(prompts), plan)


def _in_order(
  every: Mapping[tuple[int, int], Drawn], prompts: int, plan: Plan
) -> list[list[Drawn]]:
  return [[every[i, s] for s in range(plan.samples)] for i in range(prompts)]


def _scored(
  journal: Journal,
  reward: Reward,
  asked: Sequence[Question],
  drawn: Sequence[Sequence[Drawn]],
  plan: Plan,
) -> list[list[Sample]]:
  def read(line: Mapping[str, Any]) -> tuple[int, list[Scored]] | None:
    if "scored" not in line:
      return None
    scores = [reward.renamed(Scored.from_json(one)) for one in line["scores"]]
    if len(scores) != plan.samples:
      raise ValueError(f"{len(scores)} scores of {plan.samples} answers")
    return line["scored"], scores

  every = dict(pair for pair in journal.each(read) if pair is not None)
  left = [i for i in range(len(drawn)) if i not in every]
  with progress.counter("scoring") as count:
    for start in range(0, len(left), GROUPS):
      some = left[start : start + GROUPS]
      flat = [one for i in some for one in drawn[i]]
      given = samples.score(reward, asked, flat, example)
      for place, i in enumerate(some):
        group = given[place * plan.samples : (place + 1) * plan.samples]
        every[i] = [sample.scored for sample in group]
        journal.write({"scored": i, "scores": [one.as_json() for one in every[i]]})
      count(len(every), len(drawn))
  return [
    [Sample(one, given) for one, given in zip(group, every[i], strict=True)]
    for i, group in enumerate(drawn)
  ]


def _end(drawn: Drawn) -> dict[str, str]:
  """What is said of an answer that no token of its own ends."""
  return {chat.ENDED: chat.STRING} if drawn.is_stopped else {}


def _said(question: Question, text: str) -> Any:
  """An answer as the prompt is: a string to a string, else a message."""
  return text if isinstance(question["prompt"], str) else [{"role": "assistant", "content": text}]


def _row(question: Question, sample: Sample, seed: int, weights: str) -> dict[str, Any]:
  """A row that fine-tuning reads: prompt and completion, the tokens that were drawn, and what is known of them."""
  drawn, scored = sample.drawn, sample.scored
  missing = {name: given.reason for name, given in scored.parts.items() if given.is_missing}
  return {
    "prompt": question["prompt"],
    "completion": _said(question, drawn.text),
    **({chat.IDS: drawn.tokens} if drawn.tokens else {}),
    "score": sample.score,
    "parts": {name: given.value for name, given in scored.parts.items()},
    **({"missing": missing} if missing else {}),
    "finished": drawn.finished,
    **_end(drawn),
    "weights": weights,
    "seed": seed,
    "number": drawn.number,
    "sample": drawn.sample,
    **questions_lib.carried(question),
  }


def _pair(question: Question, pair: keeping.Pair, seed: int, weights: str) -> dict[str, Any]:
  """A row that preference objectives read, and what is known of its answers; null of the expected one."""
  chosen, rejected = pair.chosen, pair.rejected
  return {
    "prompt": question["prompt"],
    "chosen": _said(question, question["gold"] if chosen is None else chosen.drawn.text),
    "rejected": _said(question, rejected.drawn.text),
    "score_chosen": None if chosen is None else chosen.score,
    "score_rejected": rejected.score,
    "weights": weights,
    "seed": seed,
    "number": rejected.drawn.number,
    "samples": [None if chosen is None else chosen.drawn.sample, rejected.drawn.sample],
    **questions_lib.carried(question),
  }
