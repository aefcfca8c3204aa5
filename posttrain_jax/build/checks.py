"""Checks across the sections of a config, made before anything is read: by training, evaluation and planning alike."""

from __future__ import annotations

from collections.abc import Callable

import jax
import ml_collections

from posttrain_jax import settings
from posttrain_jax.build import adapter, decisions, elsewhere, methods, tools
from posttrain_jax.data import answers, chat
from posttrain_jax.evals import graders, meanings, tasks
from posttrain_jax.rewards import named
from posttrain_jax.rewards.reward import TOTAL
from posttrain_jax.settings import ConfigError, fields

Config = ml_collections.ConfigDict
# kinds of rows that an objective learns from
READS = {
  "sft": ("text",),
  "preference": ("pairs", "triples", "prompts"),
  "kto": ("labels", "pairs", "triples"),
  "reward": ("pairs", "outcomes", "steps"),
  "grouped": ("scored", "prompts"),
  "distil": ("text", "prompts"),
}


def check(config: Config) -> None:
  """Raises ConfigError for the first value outside its domain, or the first sections that do not fit one another."""
  fields.check_values(settings.plain(config))
  sections(config)
  graders.load(decisions.grades(config) if decisions.asks(config) else "")
  if jax.process_count() > 1 and (why := alone(config)):
    raise ConfigError(why)


def sections(config: Config) -> None:
  """Raises ConfigError for the first sections that do not fit one another.

  It reads no file and asks for no device: what launches a run or starts it in another process may know before it.
  """
  for check_one in CHECKS:
    check_one(config)


def alone(config: Config) -> str:
  """Why a run of this config is one process; "" where it may be several."""
  if not decisions.asks(config):
    return ""
  return (
    f"eval.{_asking(config)} generates text in one process; run `posttrain eval` afterwards instead"
  )


def _asking(config: Config) -> str:
  return next(name for name in ("task", "metric", "samples") if config.eval.get(name))


def _best(config: Config) -> None:
  if not decisions.best_metric(config):
    return
  if not config.eval.every:
    counts = config.eval.stop_after > 0
    what = "stop_after counts" if counts else f"best={config.eval.best} chooses among"
    raise ConfigError(
      f"eval.{what} evaluations, and eval.every=0 leaves the last alone: write --config.eval.every=N steps"
    )
  name = decisions.best_metric(config)
  if not meanings.better(config.objective.name, name):
    known = meanings.ranked(config.objective.name)
    raise ConfigError(
      f"eval.best={name}: nothing says which way of it is better, with objective.name={config.objective.name!r};"
      f" of held-out metrics there are {', '.join(known)}"
    )


def _frozen_base(config: Config) -> None:
  if decisions.is_full(config) and config.model.base != "dense":
    raise ConfigError(
      f"base={config.model.base} is frozen: train an adapter on it (adapter=lora), or write base=dense"
    )


def _offload(config: Config) -> None:
  base = "offload" in config.model and config.model.offload == "layers"
  if base and decisions.is_full(config):
    raise ConfigError(
      "model.offload=layers is for a frozen base; in full fine-tuning write optimizer.offload=params"
    )
  trained = decisions.trained_on_host(config)
  if trained and "adalora" in config.adapter.method.split("+"):
    raise ConfigError(
      "optimizer.offload=params: adalora changes its parameters beside the optimizer's update; write state"
    )
  if (base or trained) and decisions.remat(config) == "none":
    field = "optimizer.offload=params" if trained else "model.offload=layers"
    raise ConfigError(
      f"{field} with model.remat=none would keep every layer on the device for the backward pass; "
      "write another remat"
    )


def _kind(config: Config) -> None:
  name, kind = config.objective.name, config.data.kind
  if kind not in READS[name]:
    raise ConfigError(
      f"data.kind={kind!r}: objective.name={name!r} reads rows of {' or '.join(READS[name])}"
    )


def _truncate(config: Config) -> None:
  d = config.data
  known = chat.TRUNCATE if d.kind == "text" else answers.TRUNCATE
  if d.truncate not in known:
    whole = "" if d.kind == "text" else ", since answers are kept whole"
    raise ConfigError(
      f"data.truncate={d.truncate!r}: known are {', '.join(known)} for rows of {d.kind}{whole}"
    )


def _mixture(config: Config) -> None:
  d = config.data
  if not decisions.is_mixture(d.train):
    return
  decisions.mixture(d.train)
  if d.replay:
    raise ConfigError(
      "data.replay goes beside one source: name its data as a part of the mixture, with its fraction"
    )
  if not d.eval and d.eval_rows:
    raise ConfigError(
      "data.train is a mixture: name held-out rows with data.eval, or set data.eval_rows to 0"
    )
  if d.limit:
    raise ConfigError("data.limit cuts one source; a mixture is cut by its fractions")


def _shifted_attention(config: Config) -> None:
  adapter_config = adapter.described(config)
  if adapter_config is None or not adapter_config.attention_group:
    return
  if config.data.kind != "text" and config.data.share_prompt:
    raise ConfigError(
      "data.share_prompt: shifted attention (attention_group) has no room for a shared prompt; write false"
    )
  if decisions.context(config) != 1:
    raise ConfigError(
      f"mesh.context={config.mesh.context}: shifted attention (attention_group) reads rows in their order, which a"
      " context axis cuts; write --config.mesh.context=1 or --config.adapter.longlora.attention_group=0"
    )
  if not adapter_config.in_weights:
    raise ConfigError(
      f"adapter={adapter_config.method}: a soft prompt or prefix is seen by every token, which groups of shifted"
      " attention are there to prevent; write one of them alone, or --config.adapter.longlora.attention_group=0"
    )


def _following_reference(config: Config) -> None:
  if not decisions.follows(config):
    return
  if config.objective.cache_reference or not decisions.compares_with_base(config):
    raise ConfigError(
      "objective.sync_every: a reference that follows the policy cannot be computed beforehand or be another model;"
      " write --config.objective.cache_reference=false --config.objective.reference=base"
    )


def _answers(config: Config) -> None:
  if not decisions.asks(config):
    return
  e = config.eval
  what = _asking(config)
  if not decisions.writes(config):
    raise ConfigError(
      f"eval.{what}: this run trains scores of answers, and writes none; leave it out, or train the model's own words"
      " too with --config.objective.sft_weight above 0"
    )
  if e.task and e.task not in tasks.TASKS and what == "task" and not decisions.grades(config):
    raise ConfigError(
      f"eval.task={e.task!r} is no built-in task ({', '.join(tasks.TASKS)}), and nothing says how answers to such rows"
      " are graded: write --config.eval.metric=exact (or contained, json, number, FILE.py:name)"
    )


def _online(config: Config) -> None:
  """What a run that writes its own batches has no place for."""
  is_online = "online" in config
  if is_online != (config.data.kind == "prompts"):
    raise ConfigError(
      f"data.kind={config.data.kind!r}: rows of prompts are answered by the run itself, which configs/rl.py describes;"
      " write --config=rl:data=..."
    )
  if not is_online:
    return
  d, o = config.data, config.objective
  for field in ("eval", "replay"):
    if d[field]:
      raise ConfigError(
        f"data.{field}={d[field]!r}: a run that writes its own answers reads prompts alone; ask held-out ones by"
        " eval.task"
      )
  if d.eval_rows or d.packing:
    which = "packing" if d.packing else "eval_rows"
    raise ConfigError(f"data.{which} is not for prompts: leave it as configs/rl.py has it")
  if decisions.is_mixture(d.train):
    raise ConfigError("data.train: prompts come from one source; write them into one file")
  if o.get("cache_reference"):
    raise ConfigError(
      "objective.cache_reference: answers that are yet to be written have no log-probabilities to cache; write false"
    )
  elsewhere.check(config)
  scored = (*config.reward.parts, *config.reward.gates, *config.holdout_reward.parts)
  if "environment" in scored and not tools.is_on(config):
    raise ConfigError(
      "reward.parts: environment is what an answer's environment gave itself, and this run has none; write"
      " environment=sql (python, or FILE.py:Class) after the config's colon, or another verifier"
    )
  part, titles = config.online.outcome, named.titles((*config.reward.parts, *config.reward.gates))
  if part not in ("", TOTAL, *titles, *titles.values()):
    raise ConfigError(
      f"online.outcome={part!r}: the reward has the parts {', '.join(titles.values())}; {TOTAL} is the reward itself"
    )
  if o.name == "preference":
    methods.check_pairs(config)
    return
  if "importance" in o and not 0 <= o.importance_low < o.importance_high:
    raise ConfigError("objective.importance_low must be below objective.importance_high")
  if o.name == "grouped":
    methods.check_advantage(config)
  if o.get("advantage") == "max_rl" and (field := _may_be_negative(config.online)):
    raise ConfigError(
      f"online.{field}: advantage=max_rl divides by the mean reward, which this may make negative; write"
      f" --config.{_NEVER_NEGATIVE[field]}"
    )
  if config.online.storage != "auto" and o.get("importance") == "none":
    raise ConfigError(
      f"online.storage={config.online.storage}: answers are then drawn from another distribution than the one that"
      " learns; write --config.objective.importance=token too, which weighs each token by the ratio of the two"
    )


# of config.online what may make a reward negative: what to write in its place
_NEVER_NEGATIVE = {
  "kl_in_reward": "objective.kl_weight",
  "cut_penalty": "online.mask_cut=true",
  "unparsed": "online.unparsed=0.0",
}


def _may_be_negative(online: Config) -> str:
  """The field that may make a reward negative whose parts are not; "" where none does."""
  is_so = lambda field, value: value < 0 if field == "unparsed" else value > 0
  # runs of older versions lack some
  return next((field for field in _NEVER_NEGATIVE if is_so(field, online.get(field, 0.0))), "")


def _distillation(config: Config) -> None:
  """What a run with a teacher, or with rows of two sources, needs."""
  o, online = config.objective, config.get("online")
  if o.name == "distil":
    if not decisions.teacher(config):
      raise ConfigError(
        "objective.teacher is empty: name the model to learn from, as --config=distil:teacher=NAME_OR_FOLDER"
      )
    if online is not None and o.top_k:
      raise ConfigError(
        f"objective.top_k={o.top_k} is computed once and kept with the data, and a run that writes its own answers has"
        " others in each batch: write top_k=0, where the teacher stands beside the student"
      )
    if online is not None and online.kl_in_reward:
      raise ConfigError("online.kl_in_reward: this run has no reward to take it off; write 0.0")
  if online is None:
    return
  if online.dynamic and not config.reward.parts:
    raise ConfigError(
      "online.dynamic replaces groups whose answers have one outcome, and nothing scores them here; write false"
    )
  if online.dynamic and online.samples < 2:
    raise ConfigError(
      "online.dynamic replaces groups whose answers agree, and one answer agrees with itself; write"
      " online.samples=2 or more, or online.dynamic=false"
    )
  gold = decisions.gold_rows(config)
  if gold and tools.is_on(config):
    raise ConfigError(
      f"online.gold_rows={gold}: answers of the run have several turns, and the data's own have one and know nothing of"
      " its tools; write 0, or fine-tune on conversations with calls first"
    )
  if gold >= config.batch.rows:
    raise ConfigError(
      f"online.gold_rows={gold} leaves no row of batch.rows={config.batch.rows} for answers of the policy's own; lower"
      " it, or distil off policy (on_policy=0)"
    )
  weight = o.get("sft_weight") or 0.0
  if (weight and not gold) or (gold and not weight and o.name == "grouped"):
    raise ConfigError(
      f"online.gold_rows={gold} and objective.sft_weight={weight}: the data's own answers are rows with a weight; write"
      " both above 0, or neither"
    )


def _accumulation(config: Config) -> None:
  if config.batch.rows % config.batch.accumulate:
    raise ConfigError(
      f"batch.rows={config.batch.rows} does not split into batch.accumulate={config.batch.accumulate} micro-batches;"
      f" write a multiple of {config.batch.accumulate}"
    )


CHECKS: tuple[Callable[[Config], None], ...] = (
  _best,
  _frozen_base,
  _offload,
  _kind,
  _truncate,
  _mixture,
  _shifted_attention,
  _following_reference,
  _answers,
  _online,
  _distillation,
  _accumulation,
)
