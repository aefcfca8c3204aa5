"""config.objective: the loss, and what it reads of the other sections."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from posttrain_jax import objectives
from posttrain_jax.build import adapter, attention, critic, decisions
from posttrain_jax.build.model import Model
from posttrain_jax.losses import distillation
from posttrain_jax.objectives import Scorer

Config = ml_collections.ConfigDict
# of config.objective, what is not a field of the objective that the section names
OTHER = (
  "name",
  "losses",
  "loss",
  "advantage",
  "sft_weight",
  "teacher",
  "teacher_base",
  "teacher_weight",
)
REFERENCE = ("reference", "reference_base", "cache_reference")
SUMMED = ("kto", "reward")  # of a preference's losses, those that are objectives of their own


def make(
  config: Config,
  model: Model,
  channels: Sequence[str],
  platform: str | None = None,
  *,
  teacher: tuple[Scorer, int | None] | None = None,
) -> Scorer:
  """The objective that config.objective names; a model planned without files has no tokenizer.

  Args:
    platform: of the devices that compute it; None: the default one.
    teacher: how the config's teacher reads a batch, and the tokens that both know; see `build.teacher`.
  """
  how = _how(config, model, platform)
  if config.objective.name == "sft":
    parts: Parts = (("rows", _supervised(model, channels, how), 1.0),)
  elif config.objective.name == "distil":
    parts = _distilled(config, model, how, teacher)
  else:
    parts = _PARTS[config.objective.name](config, model, how)
  if "sft_weight" in config.objective and config.objective.sft_weight:
    imitation = (
      _supervised(model, channels, how)
      if config.data.kind == "text"
      else objectives.Imitation(model.config, kind=config.data.kind, **how)
    )
    parts = (*parts, ("sft", imitation, float(config.objective.sft_weight)))
  if weight := decisions.balance(config, model.config):
    parts = (*parts, ("balance", objectives.Balance(model.config, **how), weight))
  is_one = len(parts) == 1 and parts[0][2] == 1
  loss = parts[0][1] if is_one else objectives.Sum(model.config, parts=parts, **how)
  if not critic.has(config):
    return loss
  as_it_scores = decisions.trains_as_it_scores(adapter.described(config))
  return critic.beside_actor(config, loss, how, as_it_scores=as_it_scores)


def _supervised(model: Model, channels: Sequence[str], how: Mapping[str, Any]) -> Scorer:
  special = () if model.tokenizer is None else model.tokenizer.all_special_ids
  return objectives.Sft(
    model.config,
    channels=tuple(channels),
    special_tokens=tuple(sorted(set(special))),
    markers=() if model.tokenizer is None else markers(model.tokenizer),
    **how,
  )


# What marks the end of a turn, a call of a tool and its result, and the thinking before an answer, in any template.
MARKERS = {
  "end_of_turn": re.compile(
    r"im_end|eot|eom_id|end_of_turn|end_of_text|endoftext|^</s>$|^<eos>$|^<\|end\|>$", re.IGNORECASE
  ),
  "tool": re.compile(r"tool|function_call|python_tag", re.IGNORECASE),
  "think": re.compile(r"think", re.IGNORECASE),
}


def markers(tokenizer: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
  """(kind, tokens) of the vocabulary's own tokens that are markers; kinds without any are left out."""
  added = tokenizer.get_added_vocab()
  kinds = {
    kind: {i for text, i in added.items() if pattern.search(text)}
    for kind, pattern in MARKERS.items()
  }
  if tokenizer.eos_token_id is not None:
    kinds["end_of_turn"].add(tokenizer.eos_token_id)
  return tuple((kind, tuple(sorted(tokens))) for kind, tokens in kinds.items() if tokens)


def _how(config: Config, model: Model, platform: str | None) -> dict[str, Any]:
  """How a batch becomes scores: what all objectives have."""
  adapter_config = adapter.described(config)
  return dict(
    dtype=model.dtype,
    products=None if model.products == model.dtype else model.products,
    remat=decisions.remat(config),
    attention_group=0 if adapter_config is None else adapter_config.attention_group,
    attention_by=attention.chosen(config, model.config, platform)[0],
  )


def _own(config: Config) -> dict[str, Any]:
  """The fields of config.objective that are the objective's own."""
  return {
    field: value for field, value in config.objective.items() if field not in (*OTHER, *REFERENCE)
  }


def _compared(config: Config) -> dict[str, bool]:
  is_base, goes_on = decisions.compares_with_base(config), decisions.goes_on(config)
  adapter_config = adapter.described(config)
  starts_there = adapter_config is None or adapter_config.starts_as_its_base
  if adapter_config is not None and goes_on:  # the reference has the adapter, too
    starts_there = not (adapter_config.lora_dropout or adapter_config.attention_group)
  return {"own_base": is_base, "starts_there": is_base and starts_there}


Parts = tuple[tuple[str, Scorer, float], ...]


def _preference(config: Config, model: Model, how: Mapping[str, Any]) -> Parts:
  o, compared = config.objective, _compared(config)
  losses = {name: float(weight) for name, weight in o.losses.items()}
  pairs = tuple((name, weight) for name, weight in losses.items() if name not in SUMMED)
  parts: list[tuple[str, Scorer, float]] = []
  answers = 3 if config.data.kind == "triples" else 2
  if pairs:
    main = objectives.Preference(
      model.config, losses=pairs, answers=answers, **_own(config), **how, **compared
    )
    parts.append(("preference", main, 1.0))
  if "kto" in losses:
    follower = dict(sync_every=o.sync_every, sync_mix=o.sync_mix)
    kto = objectives.Labelled(model.config, beta=o.beta, **follower, **how, **compared)
    parts.append(("kto", kto, losses["kto"]))
  if "reward" in losses:
    reward = objectives.Reward(model.config, kind="pairs", answers=answers, **how)
    parts.append(("reward", reward, losses["reward"]))
  return tuple(parts)


def _labelled(config: Config, model: Model, how: Mapping[str, Any]) -> Parts:
  main = objectives.Labelled(model.config, **_own(config), **how, **_compared(config))
  return (("kto", main, 1.0),)


def _reward(config: Config, model: Model, how: Mapping[str, Any]) -> Parts:
  main = objectives.Reward(model.config, kind=config.data.kind, **_own(config), **how)
  return (("reward", main, 1.0),)


def _grouped(config: Config, model: Model, how: Mapping[str, Any]) -> Parts:
  adapter_config = adapter.described(config)
  main = objectives.Grouped(
    model.config,
    trains_as_it_scores=decisions.trains_as_it_scores(adapter_config),
    loss_name=config.objective.loss,
    starts_there=_compared(config)["starts_there"],
    teacher_weight=config.objective.teacher_weight if decisions.teacher(config) else 0.0,
    **{"max_length": config.data.length} | _own(config) | _online(config),
    **how,
  )
  if "online" in config and decisions.gold_rows(config):
    return (("grouped", objectives.Written(model.config, part=main, **how), 1.0),)
  return (("grouped", main, 1.0),)


def _distilled(
  config: Config, model: Model, how: Mapping[str, Any], teacher: tuple[Scorer, int | None] | None
) -> Parts:
  o = config.objective
  assert teacher is not None
  reader, vocab = teacher
  main = objectives.Distilled(
    model.config,
    divergence=distillation.Loss(o.loss, o.get("mixture", 0.5)),
    temperature=o.temperature,
    teacher=None if decisions.keeps_teacher(config) else reader,
    vocab=vocab,
    **how,
  )
  return (("distil", main, 1.0),)


def _online(config: Config) -> dict[str, Any]:
  """Of answers that the policy writes itself: whose log-probabilities are the old ones, and what they are of."""
  if "online" not in config:
    return {}
  o = config.online
  old = "batch" if o.minibatches * o.passes > 1 else "policy"
  length = {"max_length": o.max_new_tokens}  # the longest answer, of constant_length
  return {"old": old, "temperature": o.temperature, "kl_in_reward": o.kl_in_reward, **length}


_PARTS: Mapping[str, Callable[[Config, Model, Mapping[str, Any]], Parts]] = {
  "preference": _preference,
  "reward": _reward,
  "kto": _labelled,
  "grouped": _grouped,
}
NAMES = ("sft", "distil", *_PARTS)  # of config.objective.name
