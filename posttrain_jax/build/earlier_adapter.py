"""config.model.adapter: an adapter that was trained before; it goes on being trained, or is frozen under a fresh one.

What its folder decides is put into the config before anything else reads that: the shape of what goes on, the template
and the system message that it was trained with.  The config in a run's record is the run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from posttrain_jax import adapters, settings
from posttrain_jax.adapters import layout, over, peft_format
from posttrain_jax.adapters.bind import modules
from posttrain_jax.adapters.config import OPTIONS
from posttrain_jax.build import adapter as adapter_lib
from posttrain_jax.build import decisions, use
from posttrain_jax.data import schema, turns
from posttrain_jax.evals import tasks
from posttrain_jax.models import decoder, fetch, hf
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.runs import manner as manners
from posttrain_jax.runs import record
from posttrain_jax.settings import ConfigError

log = logging.getLogger(__name__)

STARTED = "started_from"  # in the record of a run: which adapter it was
WHAT = "--config.model.adapter"
FRESH = "--config.model.adapter_use=frozen trains a fresh adapter over it"
# of an adapter's options, those of its training: the config's where they are written by hand
OF_TRAINING = (
  *("lora_dropout", "attention_group", "tinit", "tfinal", "deltaT", "beta1", "beta2"),
  "orth_reg_weight",
)
# how a fresh one would have begun, and when its schedule ends: of no meaning for one that is there
OF_ITS_START = ("prompt_tuning_init", "prompt_tuning_init_text", "loftq_iter", "total_step")
UNSET: Mapping[str, Any] = {"layers_to_transform": ()}


@dataclasses.dataclass(frozen=True)
class Earlier:
  """The adapter of config.model.adapter on its base, with those that it stands on itself."""

  under: tuple[over.Level, ...]  # frozen, lowest first
  goes_on: over.Level | None  # what is trained further; None where all of it is frozen


def home(config: ml_collections.ConfigDict) -> Path | None:
  """The folder of the adapter that a run starts from; None where it starts from none.

  Raises:
    ConfigError: there is none in the folder named.
  """
  name = decisions.earlier(config)
  if not name:
    return None
  folder = Path(name).expanduser()
  if manners.is_run(folder):
    inside = folder / "adapter"
    if not inside.is_dir():
      raise ConfigError(f"model.adapter={name}: {_without_adapter(folder)}")
    folder = inside
  if (folder / "config.json").exists() and not (folder / peft_format.CONFIG).exists():
    raise ConfigError(
      f"model.adapter={name}: this is a model's folder; write model={name} after the config's colon, and leave"
      " model.adapter out"
    )
  try:
    return peft_format.locate(folder).absolute()
  except (FileNotFoundError, ValueError) as error:
    raise ConfigError(
      f"model.adapter={name}: {error}; name an adapter's or a run's folder"
    ) from error


def _without_adapter(folder: Path) -> str:
  if (folder / "model").is_dir():
    return (
      f"this run trained the whole model; write model={folder / 'model'} after the config's colon, and leave"
      " model.adapter out"
    )
  return "this run has exported nothing yet; run its train command again to finish it"


def fingerprint(config: ml_collections.ConfigDict) -> dict[str, str] | None:
  """{folder, digest of its files} of the adapter that a run starts from, for its record; None without one."""
  where = home(config)
  if where is None:
    return None
  digest = hashlib.sha256()
  for path in sorted(where.rglob(peft_format.CONFIG)) + sorted(where.rglob(peft_format.TENSORS)):
    if path.relative_to(where).parts[:-1] == () or path.parent.name in _parts():
      digest.update(path.read_bytes())
  return {"folder": str(where), "sha256": digest.hexdigest()}


def _parts() -> tuple[str, ...]:
  """The folders inside an adapter's that are of it: of its other methods, and of what it stands on."""
  return (peft_format.UNDER, *OPTIONS)


def check_same(folder: Path, config: ml_collections.ConfigDict) -> None:
  """Raises where a run that is under way began from another adapter than its folder holds now.

  Raises:
    ConfigError: the adapter's files have changed.
  """
  if not record.is_begun(folder):
    return
  written = (record.read_json(folder / record.CONFIG) or {}).get(STARTED)
  found = fingerprint(config)
  if (written or {}).get("sha256") != (found or {}).get("sha256"):
    raise ConfigError(
      f"model.adapter={decisions.earlier(config)}: its files are not those that the run in {folder} began from; put"
      " them back, or name another --workdir"
    )


# --- the config ------------------------------------------------------------------------------------------------------


def settled(
  config: ml_collections.ConfigDict,
  given: Sequence[str] = (),
  *,
  shape: Callable[[str], ModelConfig] | None = None,
) -> tuple[ml_collections.ConfigDict, list[str]]:
  """(the config with what the folder of config.model.adapter decides, what is to be said of that).

  Args:
    given: fields that were written by hand, which the folder does not change.
    shape: a model's name -> its config, for a plan, which reads no rows; None for that of its folder.

  Raises:
    ConfigError: no adapter there, one of another base, or what cannot be trained further as config.adapter says.
  """
  where = home(config)
  if where is None:
    return config, []
  is_planned = shape is not None  # without rows
  shape = shape or (lambda name: hf.read_config(fetch.resolve(name)))
  model_config = _with_score(config, shape(config.model.name))
  levels = _shapes(where, config.model.name, model_config)
  theirs = levels[-1][1]
  config = settings.restored(config.to_dict())
  config.model.adapter = str(where)
  notes: list[str] = []
  if decisions.goes_on(config):
    notes += _take_shape(config, theirs, given, where, model_config)
    notes.insert(0, f"adapter: the {_described(theirs)} of {where} goes on being trained")
  else:
    _check_over(config, theirs)
    notes.append(f"adapter: over the {_described(theirs)} of {where}, which stays as it is")
  notes += [] if is_planned else _take_manner(config, where, given)
  notes += _base_notes(config, where)
  return config.lock(), notes


def _with_score(config: ml_collections.ConfigDict, model_config: ModelConfig) -> ModelConfig:
  if not decisions.has_score(config) or model_config.scores:
    return model_config
  return dataclasses.replace(model_config, scores=1, writes=decisions.writes(config))


def _shapes(where: Path, name: str, model_config: ModelConfig) -> tuple[over.Level, ...]:
  try:
    return over.shapes(where, model_config)
  except (ValueError, KeyError, OSError) as error:
    named = peft_format.base_of(where)
    is_other = named not in (None, "", name)
    other = f"; it names {named} as its base, and this run has model={name}" if is_other else ""
    raise ConfigError(f"model.adapter: {error}{other}") from error


def _described(theirs: adapters.AnyConfig) -> str:
  ranks = [part.r for part in adapters.parts_of(theirs) if "r" in OPTIONS[part.method]]
  return f"{theirs.method}{f' of rank {ranks[0]}' if ranks else ''}"


def _check_over(config: ml_collections.ConfigDict, theirs: adapters.AnyConfig) -> None:
  """A fresh adapter is there to be trained over the frozen one, and can be."""
  if decisions.is_full(config):
    raise ConfigError(
      "model.adapter_use=frozen trains a fresh adapter over the frozen one, and adapter=none has none: write"
      " adapter=lora after the config's colon; to train the whole model, merge first (posttrain export --merge) and"
      " name that as model"
    )
  fresh = adapter_lib.described(config)
  assert fresh is not None
  if fresh.changes_base:
    raise ConfigError(
      f"adapter={fresh.method}: its start is taken out of a base of plain matrices, and this one has a frozen adapter:"
      " write adapter=lora or adapter=dora, or merge first (posttrain export --merge) and name that as model"
    )
  if not fresh.in_weights and not theirs.in_weights:
    raise ConfigError(
      f"adapter={fresh.method}: what stands before a text does not nest over a {theirs.method}; write adapter=lora, or"
      f" leave model.adapter_use out to go on with it"
    )


def _take_shape(
  config: ml_collections.ConfigDict,
  theirs: adapters.AnyConfig,
  given: Sequence[str],
  where: Path,
  model_config: ModelConfig,
) -> list[str]:
  """Puts the options of the adapter that goes on into config.adapter; says which gave way."""
  method = config.adapter.method
  if method not in ("none", theirs.method):
    raise ConfigError(
      f"adapter={method}: the adapter in {where} is a {theirs.method}, and goes on as one: write"
      f" adapter={theirs.method} after the config's colon; {FRESH}"
    )
  names = [name for names in modules(decoder.abstract(model_config)).values() for name in names]
  parts = adapters.parts_of(theirs)
  gave_way: list[str] = []
  config.adapter = section = ml_collections.ConfigDict(
    config.adapter.to_dict(), allow_dotted_keys=True
  )
  section.method = theirs.method
  for part in parts:
    here, prefix = section, "adapter"
    if len(parts) > 1:
      prefix = f"adapter.{part.method}"
      here = section.setdefault(part.method, ml_collections.ConfigDict(allow_dotted_keys=True))
    for option in OPTIONS[part.method]:
      if option == "method" or (option in OF_ITS_START and option not in here):
        continue
      name = f"{prefix}.{option}"
      said, held = here.get(option), _value(option, vars(part)[option])
      if option in OF_ITS_START:
        held = {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": ""}.get(option, said)
      elif name in given and option in OF_TRAINING:
        continue
      elif not _same(part, option, said, names):
        if name in given:
          raise ConfigError(
            f"{name}={_plain(said)!r}: the adapter in {where} has {_plain(held)!r}, and what goes on being trained"
            f" keeps its shape: write --config.{name}={_plain(held)}, or leave it out; {FRESH}"
          )
        if method != "none":
          gave_way.append(f"{name} {_plain(said)} -> {_plain(held)}")
      with here.ignore_type():
        here[option] = (
          ml_collections.ConfigDict(held, allow_dotted_keys=True)
          if isinstance(held, dict)
          else held
        )
  return [f"as the adapter has it: {', '.join(gave_way)}"] if gave_way else []


def _value(option: str, value: Any) -> Any:
  """As a config's section writes what AdapterConfig holds."""
  if option == "init_lora_weights" and value is True:
    return "uniform"
  if value is None:
    return UNSET.get(option, "")
  return dict(value) if isinstance(value, Mapping) else value


def _plain(value: Any) -> Any:
  value = value.to_dict() if isinstance(value, ml_collections.ConfigDict) else value
  return tuple(value) if isinstance(value, list) else value


def _same(part: adapters.AdapterConfig, option: str, said: Any, names: Sequence[str]) -> bool:
  """Whether an option written so is what the adapter has: the same modules, at the same ranks and scales."""
  if option in OF_ITS_START or option == "init_lora_weights":
    return True
  if _plain(said) == _plain(_value(option, vars(part)[option])):
    return True
  effect = lambda one: [
    (one.targets(name), one.targets(name) and (one.rank(name), one.alpha(name))) for name in names
  ]
  try:
    method = {
      "method": part.method,
      option: _plain(said) or None if option == "layers_to_transform" else _plain(said),
    }
    other = part.replace(**method)
    return option in ("target_modules", "exclude_modules", "layers_to_transform") and effect(
      other
    ) == effect(part)
  except (TypeError, ValueError):
    return False


def _take_manner(config: ml_collections.ConfigDict, where: Path, given: Sequence[str]) -> list[str]:
  """Template and system message of the adapter's training, where the config names none."""
  manner = use.manner_at(where)
  notes = []
  template = _template(where, manner)
  if template and config.model.template == use.OWN and "model.template" not in given:
    config.model.template = template
    notes.append(f"chat template: {template}, with which the adapter was trained")
  if manner.system and _takes_system(config, given):
    with config.data.ignore_type():
      config.data.system = manner.system
    notes.append(
      f"system message: that of the adapter's training, {manner.system!r} (--config.data.system='' leaves it out)"
    )
  return notes


def _template(where: Path, manner: manners.Manner) -> str | None:
  """The template that the adapter was trained with, where no tokenizer beside it holds it."""
  beside = where / "chat_template.jinja"
  if beside.exists() and not (where / "tokenizer.json").exists():
    return str(beside)
  return manner.template


def _takes_system(config: ml_collections.ConfigDict, given: Sequence[str]) -> bool:
  d = config.data
  if d.get("system") is not None or "data.system" in given or not d.get("chat", True):
    return False
  if not d.train or d.train in tasks.TASKS or decisions.is_mixture(d.train):
    return False
  from posttrain_jax.build import (
    data as data_lib,
  )  # which reads rows for a model, and that starts from here

  try:
    mapping = data_lib.columns(d.columns)
    rows = schema.read(d.train, columns=mapping, on_error="skip", kinds=data_lib.KINDS[d.kind])
    return bool(len(rows)) and turns.in_strings(rows, d.train)
  except (ValueError, OSError):
    return False  # what is wrong with them is said where they are read to be trained on


def _base_notes(config: ml_collections.ConfigDict, where: Path) -> list[str]:
  """What of the base is not as the adapter's training had it."""
  notes = []
  storage, named = use.manner_at(where).storage, peft_format.base_of(where)
  if storage not in (None, config.model.base):
    notes.append(
      f"base: {config.model.base}, and the adapter was trained on it in {storage}; base={storage} after the config's"
      " colon is what it was trained on"
    )
  if named and fetch.lasting_name(named) != fetch.lasting_name(config.model.name):
    notes.append(
      f"base: {config.model.name}, and the adapter names {named}: it fits by its shape; where that is another model,"
      f" write model={named} after the config's colon"
    )
  return notes


# --- the base --------------------------------------------------------------------------------------------------------


def read(
  config: ml_collections.ConfigDict,
  params: Any,
  model_config: ModelConfig,
  mesh: jax.sharding.Mesh | None,
) -> Earlier | None:
  """The adapter that a run starts from, on its devices; None where it starts from none."""
  where = home(config)
  if where is None:
    return None
  with settings.section("model.adapter"):
    levels = over.load(where, params, model_config)
  placed = tuple((layout.laid_out(nodes, mesh), theirs) for nodes, theirs in levels)
  if decisions.goes_on(config):
    return Earlier(placed[:-1], placed[-1])
  return Earlier(placed, None)


def under_as_shapes(
  config: ml_collections.ConfigDict, model_config: ModelConfig
) -> tuple[over.Level, ...]:
  """What stands frozen under the adapter that trains, as shapes; () for nothing."""
  where = home(config)
  if where is None:
    return ()
  levels = _shapes(where, config.model.name, model_config)
  return levels[:-1] if decisions.goes_on(config) else levels


def policy(
  config: ml_collections.ConfigDict,
  params: Any,
  model_config: ModelConfig,
  mesh: jax.sharding.Mesh | None,
) -> Any:
  """The policy that a run starts as: the base, or the base with the adapter of config.model.adapter bound.

  Its arrays are its own: what trains is donated from step to step.
  """
  earlier = read(config, params, model_config, mesh)
  if earlier is None:
    return params
  return over.bound(params, [*earlier.under, *([earlier.goes_on] if earlier.goes_on else [])])
