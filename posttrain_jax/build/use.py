"""A model as it was trained, ready to be used: the one road to it for evaluation, chat, pairs and judges.

What an adapter was trained on and with stands in its folder (`runs.manner`), or in the config of the run that it lies
in: the base as it was stored, the chat template and its tokenizer, the system message.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from posttrain_jax import adapters, settings
from posttrain_jax.adapters import layout, over, peft_format
from posttrain_jax.build import adapter as adapter_lib
from posttrain_jax.build import decisions
from posttrain_jax.core import files, progress, tree
from posttrain_jax.data import chat, templates
from posttrain_jax.data.templates import Template
from posttrain_jax.evals.samples import Writer
from posttrain_jax.models import decoder, fetch, hf, quantised, rotary
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.rollout import engine, requests
from posttrain_jax.rollout import storage as stores
from posttrain_jax.rollout.sampling import Sampling
from posttrain_jax.rollout.speaker import Speaker
from posttrain_jax.runs import manner as manners
from posttrain_jax.runs import record
from posttrain_jax.runs.manner import Manner
from posttrain_jax.settings import ConfigError

log = logging.getLogger(__name__)
OWN, NONE = "tokenizer", "none"  # names of a template: the tokenizer's own, or text as it is


@dataclasses.dataclass(frozen=True)
class Used:
  """A base with the adapters that were trained on it, and what belongs to them."""

  name: str  # of the base
  folder: Path  # of the base
  params: Any  # the base's, with the frozen adapter bound that the adapter stands on
  config: ModelConfig
  nodes: Sequence[Any]  # of each adapter; () for none
  tokenizer: Any
  template: templates.Template | None  # None: text as it is
  manner: Manner
  dtype: Any  # of what lies between products
  storage: str  # of the base's matrices: "dense", or a type of `quant.STORAGES`
  bare: Any  # the base's parameters, without what the adapter stands on
  products: Any  # their dtype, and the base's

  @property
  def bound(self) -> Any:
    """The parameters that were trained: the base with its one adapter bound, as training computes with it."""
    return adapters.bind(self.params, self._node()) if self.nodes else self.params

  def written(self, storage: str = stores.AUTO) -> Any:
    """The same for writing text, with matrices that will be kept as `storage` says (`rollout.storage`).

    Raises:
      ConfigError: it was trained to score answers alone, and what it writes is noise.
    """
    self.check_writes()
    rounded = storage != stores.AUTO
    return (
      adapters.settled(self.params, self._node(), rounded=rounded) if self.nodes else self.params
    )

  @property
  def members(self) -> list[Any]:
    """The bound parameters of each of several adapters."""
    return [adapters.bind(self.params, node) for node in self.nodes]

  @property
  def ends(self) -> tuple[int, ...]:
    """Every id that ends a turn or a text."""
    return ends(self.config, self.tokenizer, self.template, self.folder)

  def check_writes(self) -> None:
    """Raises where it was trained to score answers alone; a line where nobody says how it was trained."""
    if not self.config.scores or self.manner.writes:
      return
    what = f"{self.name}{' with its adapter' if self.nodes else ''} is a reward model"
    if self.manner.writes is None and (self.nodes or self.config.writes):
      log.warning(
        "%s, which may have been trained to score answers alone: what it writes may be noise", what
      )
      return
    raise ConfigError(
      f"{what}, trained to score answers and not to write them: `posttrain eval --reward=DIR --data=FILE` scores with"
      " it; to chat, name the base alone, or train with --config.objective.sft_weight above 0"
    )

  def _node(self) -> Any:
    if len(self.nodes) > 1:
      raise ConfigError("--adapter: answers are drawn from one adapter")
    return self.nodes[0]


def found(model: str | None, adapter: str | None) -> tuple[str, Path, list[Path]]:
  """(the model's name, its folder, the adapters' folders), before anything of them is read; a run is what it produced.

  Raises:
    ConfigError, ValueError, OSError: as `load`, where there is none.
  """
  if model is not None and adapter is None and manners.is_run(model):
    model, adapter = produced(Path(model).expanduser())
  names = adapter.split(",") if adapter else []
  homes = [peft_format.locate(Path(name).expanduser()) for name in names]
  name = model or _base_of(homes)
  return name, fetch.resolve(name), homes


def load(
  model: str | None = None,
  adapter: str | None = None,
  *,
  base: str | None = None,
  template: str | None = None,
  manner: Manner | None = None,
  dtype: str | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> Used:
  """A model by its name or folder, a run by its folder, an adapter by its own; several adapters with commas between.

  What is decided by what the adapter was trained on is logged in a line.

  Args:
    model: None for the base that the adapter names.
    base: how the base's matrices are stored; None: as they were when the adapter was trained.
    template: a chat template's name, `tokenizer` for the tokenizer's own, `none` for text as it is; None: what was
      trained with.
    manner: how it was trained, where its folder does not say.
    dtype: of products, as config.model.dtype names it; None: as it was trained.
    mesh: over which the base is laid out, matrix by matrix as it is read; None: on one device.

  Raises:
    ConfigError: neither model nor adapter, or adapters that were trained on bases stored unlike.
  """
  if model is not None and adapter is None and manners.is_run(model):
    manner = manner or of_run(Path(model).expanduser())
  name, folder, homes = found(model, adapter)
  manner = _manner([*homes] or [folder], manner)
  storage = base or manner.storage
  products = decisions.dtype(dtype or manner.dtype)
  with progress.phase(f"reading {name}"):
    place = functools.partial(layout.place, mesh=mesh)
    params, config = hf.load(folder, dtype=products, storage=storage, place=place)
    if homes:
      params, config = scoring(homes[0], params, config)
    bare = params
    params, loaded = _loaded(homes, params, config)
  lengths = {adapter_config.context_length for _, adapter_config in loaded}
  if len(lengths) > 1:
    named = ",".join(map(str, homes))
    raise ConfigError(f"{named}: the adapters are made for contexts of different lengths")
  config = rotary.stretched(config, max(lengths, default=0))
  if homes:
    _say_base(folder, homes[0], storage, manner)
  tokenizer, spoken = _speech(folder, homes, template, manner)
  if template is not None:  # who names a template wants it spoken
    manner = dataclasses.replace(manner, chat=template != NONE)
  nodes = [node for node, _ in loaded]
  kept = _stored(bare)
  dtype = decisions.between(products)
  return Used(
    str(name), folder, params, config, nodes, tokenizer, spoken, manner, dtype, kept, bare, products
  )


def _loaded(
  homes: Sequence[Path], params: Any, config: ModelConfig
) -> tuple[Any, Sequence[over.Level]]:
  """(the base with what the adapter stands on bound, each adapter with its config)."""
  each = [over.load(home, params, config) for home in homes]
  below = [home for home, levels in zip(homes, each) if len(levels) > 1]
  if below and len(homes) > 1:
    raise ConfigError(
      f"--adapter: {below[0]} stands on another adapter, and several answer on one base: name it alone, or merge it"
      " (posttrain export --merge)"
    )
  return over.bound(params, each[0][:-1] if each else ()), [levels[-1] for levels in each]


def ends(
  config: ModelConfig, tokenizer: Any, template: Template | None, folder: Path
) -> tuple[int, ...]:
  """Every id that ends a turn or a text, in rising order."""
  stops = {*engine.stop_tokens(config, tokenizer, folder)}
  end = None if template is None else templates.end_of_turn(tokenizer, template)
  if end is not None and end < config.vocab_size:
    stops.add(end)
  return tuple(sorted(stops))


def writer(used: Used, storage: str = stores.AUTO) -> Writer:
  """What draws answers, with matrices that will be kept as `storage` says.

  Raises:
    ConfigError: it was trained to score answers alone.
  """
  return Writer(
    used.written(storage), used.config, used.tokenizer, used.template, used.ends, used.dtype
  )


def speaker(
  used: Used,
  *,
  system: str | None = None,
  sampling: Sampling,
  max_new_tokens: int,
  storage: str = "auto",
  stop_strings: tuple[str, ...] = (),
  min_new_tokens: int = 0,
) -> tuple[Speaker, str | None]:
  """(what turns a conversation into its next turn, its system message: the one given, else the one trained with).

  Raises:
    ConfigError: a system message for a model that has no template to put it into.
    ValueError: a stop string that the tokenizer cannot make.
  """
  requests.check_strings(stop_strings, used.tokenizer)
  spoken = used.template if used.manner.chat else None
  if spoken is None and system:
    raise ConfigError(
      f"{used.name} has no chat template, so a system message has no place; "
      f"give a template: {', '.join(templates.NAMED)}"
    )
  if used.template is None:
    log.info("%s has no chat template: it continues each line as text", used.name)
  elif spoken is None:
    log.info(
      "%s was trained on text without a chat template: it continues each line (--template=%s speaks its own)",
      used.name,
      OWN,
    )
  elif system is None and used.manner.system:
    system = used.manner.system
    log.info("system message: the one of its training, %r (--system='' leaves it out)", system)
  ready = engine.prepare(used.written(storage), used.config, storage)
  made = Speaker(
    ready,
    used.config,
    used.tokenizer,
    spoken,
    used.ends,
    sampling,
    max_new_tokens,
    used.dtype,
    stop_strings,
    min_new_tokens,
  )
  return made, None if spoken is None else system


def _stored(params: Any) -> str:
  """How matrices are kept, by the names of `quant.STORAGES`; a folder may have some plain and others of one type."""
  kinds = (type(leaf) for _, leaf in tree.items(params) if isinstance(leaf, quantised.TYPES))
  return next((kind.__name__.lower() for kind in kinds), quantised.DENSE)


def produced(workdir: Path) -> tuple[str | None, str | None]:
  """(model, adapter) that a run has exported; a ConfigError where there is none yet."""
  config = record.config(workdir)
  if (workdir / "adapter").exists():
    return config["model"]["name"], str(workdir / "adapter")
  if (workdir / "model").exists():
    return str(workdir / "model"), None
  raise ConfigError(
    f"{workdir} holds neither adapter/ nor model/: the run has exported nothing yet; run its train command again"
  )


def of_run(workdir: Path) -> Manner:
  """What a run's config says of how it trained, for what it exported before it said so itself."""
  return manner_of(settings.restored(record.config(workdir)))


def manner_of(config: ml_collections.ConfigDict, *, is_chat: bool = False) -> Manner:
  """How a config trains.

  Args:
    is_chat: whether its rows were conversations, whatever config.data.chat makes of strings.
  """
  described = adapter_lib.described(config)
  return manners.of(
    settings.plain(config),
    changes_base=described is not None and described.changes_base,
    chat=is_chat or config.data.get("chat", True),
    writes=decisions.writes(config),
  )


def _manner(homes: Sequence[Path], given: Manner | None) -> Manner:
  """Of the folders' own record, or of the run that they lie in."""
  each = []
  for home in homes:
    inside = manners.is_run(home.parent) and home.name.startswith(("adapter", "model"))
    each.append(
      manners.read(home) or given or (of_run(home.parent) if inside else None) or Manner()
    )
  if len({one.storage for one in each}) > 1:
    raise ConfigError(
      "--adapter: the adapters were trained on bases stored unlike ("
      + ", ".join(f"{home}: {one.storage}" for home, one in zip(homes, each))
      + "); name them one by one, or write --base"
    )
  return each[0]


def _base_of(homes: Sequence[Path]) -> str:
  if not homes:
    raise ConfigError("write --model=NAME_OR_DIR, --adapter=DIR or --workdir=DIR")
  name = peft_format.base_of(homes[0])
  if not name or not isinstance(name, str):
    raise ConfigError(
      f"{homes[0] / peft_format.CONFIG} names no base: write its name or folder there, as base_model_name_or_path, or"
      " --model=NAME_OR_DIR where the command has that"
    )
  return name


def scores(home: Path) -> bool:
  """Whether an adapter trained a head for scores beside it."""
  described = files.read_json(home / peft_format.CONFIG)
  saved = described.get("modules_to_save")
  return isinstance(saved, list) and "score" in saved


def scoring(home: Path, params: Any, config: ModelConfig) -> tuple[Any, ModelConfig]:
  """(params, config) of an adapter's base; where the adapter trained a score head, with one beside that for logits."""
  if config.scores or not scores(home):
    return params, config
  return decoder.scored(jax.random.key(0), params, config, writes=True)


def _say_base(folder: Path, home: Path, storage: str | None, manner: Manner) -> None:
  if storage not in (None, "dense"):
    how = "as the adapter was trained on it" if storage == manner.storage else "as --base asks"
    log.info("base: %s in %s, %s (%s)", folder, storage, how, home)
  if storage != manner.storage and manner.storage is not None:
    log.info(
      "base: the adapter %s was trained on it in %s, which is not what it is used on",
      home,
      manner.storage,
    )


def _speech(
  folder: Path, homes: Sequence[Path], name: str | None, manner: Manner
) -> tuple[Any, templates.Template | None]:
  """(tokenizer, template), of the adapter's folder first."""
  home = homes[0] if homes else folder
  own = home if (home / "tokenizer.json").exists() else folder
  tokenizer = chat.load_tokenizer(own)
  if name == NONE:
    return tokenizer, None
  written = home / "chat_template.jinja"
  if name is None and own != home and written.exists():
    name = str(written)
  template = of(tokenizer, name or manner.template or OWN)
  if homes and template is not None and name in (None, str(written)):
    _say_template(folder, template, home)
  return tokenizer, template


def speech(
  folder: Path, home: Path, name: str | None = None
) -> tuple[Any, templates.Template | None, Manner]:
  """(tokenizer, template, manner) of an adapter in `home` on the base in `folder`.

  name: of a template, as for `load`.
  """
  manner = manner_at(home)
  tokenizer, template = _speech(folder, [home], name, manner)
  if name is not None:
    manner = dataclasses.replace(manner, chat=name != NONE)
  return tokenizer, template, manner


def tokenizer_folder(folder: Path, home: Path | None) -> Path:
  """Where the tokenizer is: beside the adapter in `home`, else in the base's folder."""
  return home if home is not None and (home / "tokenizer.json").exists() else folder


def manner_at(home: Path) -> Manner:
  """How an adapter was trained: by its folder, or by the run that it lies in."""
  return _manner([home], None)


def of(tokenizer: Any, name: str) -> templates.Template | None:
  """The chat template of that name, or with "tokenizer" the tokenizer's own; None where it has none."""
  if name != OWN:
    return chat.template(tokenizer, name)
  return chat.template(tokenizer) if tokenizer.chat_template else None


def _say_template(folder: Path, template: templates.Template, home: Path) -> None:
  """A line where what the adapter speaks is not what the base does."""
  tokenizer = chat.load_tokenizer(folder)
  with_base = chat.template(tokenizer).text if tokenizer.chat_template else None
  if with_base != template.text:
    log.info("chat template: that of the adapter %s, which is not the base's", home)
