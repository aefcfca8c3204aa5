"""From a resolved config to the pieces of a run: model, data, adapter, objective, optimizer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from posttrain_jax import adapters
from posttrain_jax.adapters import peft_format
from posttrain_jax.core import memory, sharding, tree
from posttrain_jax.data import answers, chat, loader, mixture, schema
from posttrain_jax.losses import advantage
from posttrain_jax.models import decoder, fetch, hf, rotary
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.optim import build, offload
from posttrain_jax.train import comparisons, distributed, objectives, reference, start
from posttrain_jax.train.objectives import Frozen, Scorer
from posttrain_jax.train.settings import ConfigError

TASKS = ("sql",)  # built-in data sets that come with splits of their own


@dataclasses.dataclass(frozen=True)
class Model:
  """A base on its devices, and what belongs to it."""

  folder: Path
  params: Any
  config: ModelConfig
  tokenizer: Any
  template: Any  # None for a base model that has no chat template
  dtype: Any  # of the computation
  started: start.Start | None = None  # where the adapter starts with a part of the base


@dataclasses.dataclass(frozen=True)
class Data:
  """Encoded examples; `skipped` says in words what was left out, "" for nothing."""

  train: Any  # a sequence of examples, or a mixture
  eval: Sequence[Any]
  channels: tuple[str, ...]
  skipped: str

  @property
  def first(self) -> chat.Example:
    return (self.train.examples if isinstance(self.train, mixture.Mixture) else self.train)[0]


def mesh(config: ml_collections.ConfigDict) -> jax.sharding.Mesh | None:
  """The mesh of config.mesh over every device; None on a single one."""
  if jax.device_count() == 1:
    return None
  made = sharding.mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
  shares = made.shape["data"] * made.shape["fsdp"]
  for field, rows, unit in (
    ("batch.rows", config.batch.rows, shares * config.batch.accumulate),
    ("eval.rows", config.eval.rows, shares),
  ):
    if rows % unit:
      raise ConfigError(
        f"{field}={rows}: the mesh {dict(made.shape)} splits the rows of each micro-batch over data x fsdp; "
        f"write a multiple of {unit}, or a larger mesh.tensor"
      )
  return made


def compute_dtype(name: str) -> Any:
  """bfloat16 on accelerators and float32 on CPU for "auto", else the dtype named."""
  if name == "auto":
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  return jnp.dtype(name)


def model(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh | None = None) -> Model:
  """The base of config.model: read and quantised matrix by matrix, placed on its devices leaf by leaf."""
  folder = fetch.resolve(config.model.name)
  dtype = compute_dtype(config.model.dtype)
  trained = config.adapter.method == "none"
  if trained and config.model.base != "dense":
    raise ConfigError(
      f"base={config.model.base} is frozen: train an adapter on it (adapter=lora), or write base=dense"
    )
  place = functools.partial(_place, mesh=mesh, on_host=offload_mode(config) == "params")
  chosen = adapter_config(config)
  started = None
  if chosen is not None and chosen.changes_base:
    key = jax.random.key(config.seed)
    started = start.plan(key, chosen, hf.read_config(folder), config.model.base)
  # what the optimizer updates is float32; a frozen base is stored as it is computed with
  params, model_config = hf.load(
    folder,
    dtype=jnp.float32 if trained else dtype,
    storage=config.model.base if started is None else "dense",
    place=place if started is None else started.begin(place),
  )
  if config.objective.name == "reward":
    params, model_config = _with_score(config, params, model_config, mesh)
  tokenizer = chat.load_tokenizer(folder)
  if len(tokenizer) > model_config.vocab_size:
    raise ConfigError(
      f"the tokenizer of {folder} has {len(tokenizer)} tokens, the model's embedding {model_config.vocab_size} rows"
    )
  name = config.model.template
  own = name == "tokenizer"
  template = (
    None if own and not tokenizer.chat_template else chat.template(tokenizer, None if own else name)
  )
  if chosen is not None:
    model_config = rotary.stretched(model_config, chosen.context_length)
  return Model(folder, params, model_config, tokenizer, template, dtype, started)


def _with_score(config, params, model_config, mesh):
  """A language model gets a new score head; a reward model keeps its own, which has one score."""
  if not model_config.scores:
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    params, model_config = decoder.scored(key, params, model_config)
    placed_head = _place("score/weight", params["score"]["weight"], mesh=mesh)
    return {**params, "score": {"weight": placed_head}}, model_config
  if model_config.scores != 1:
    raise ConfigError(
      f"{config.model.name} has {model_config.scores} scores a token; a reward is one number"
    )
  return params, model_config


def _place(path: str, leaf: Any, *, mesh: jax.sharding.Mesh | None, on_host: bool = False) -> Any:
  if on_host and path.startswith("layers/"):
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    where = device if mesh is None else sharding.named(mesh, *_spec(path, leaf))
    return jax.make_array_from_callback(leaf.shape, memory.host(where), lambda at: leaf[at])
  return jax.tree.map(jnp.asarray, leaf) if mesh is None else placed(path, leaf, mesh)


def _spec(path, leaf):
  return sharding.spec_for(path, decoder.RULES), leaf.shape


def placed(path: str, leaf: Any, mesh: jax.sharding.Mesh) -> Any:
  """A parameter, plain or any weight, laid out as `decoder.RULES` say for its path."""
  spec = sharding.spec_for(path, decoder.RULES)
  return _laid_out(leaf, spec, mesh)


def placed_adapter(adapter: Any, mesh: jax.sharding.Mesh | None) -> Any:
  """An adapter laid out by its base's axes."""
  if mesh is None:
    return adapter
  rules = [*decoder.RULES, *adapters.RULES]
  return tree.unflatten(
    (path, _laid_out(node, sharding.spec_for(path, rules), mesh))
    for path, node in tree.items(adapter)
  )


def _laid_out(leaf, spec, mesh):
  specs = leaf.partition_specs(spec) if hasattr(leaf, "partition_specs") else spec

  def put(x, spec):
    host = np.asarray(x)
    where = sharding.named(mesh, spec, host.shape)
    # each process holds the whole array on its host and gives the shards that are its own
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

  return jax.tree.map(put, leaf, specs)


def data(config: ml_collections.ConfigDict, model: Model) -> Data:
  """config.data read, checked and encoded.

  Raises:
    RowError: a row that cannot be used, with its file and line.
    ConfigError: settings that do not fit one another.
  """
  d = config.data
  train, skipped = _sources(d, d.train, "train", model)
  if d.limit:
    train = _limited(train, d.limit)
  held_out: Sequence[Any]
  if d.eval or d.train in TASKS:
    held_out, more = _encoded(d, d.eval or d.train, "eval", model, d.columns)
    skipped += more
    held_out = held_out[: d.eval_rows] if d.eval_rows else held_out
  elif d.eval_rows:
    if isinstance(train, mixture.Mixture):
      raise ConfigError(
        "data.train is a mixture: name held-out rows with data.eval, or set data.eval_rows to 0"
      )
    if len(train) <= d.eval_rows:
      raise ConfigError(
        f"data.eval_rows={d.eval_rows} would leave nothing of the {len(train)} rows to train on; "
        "lower it or name data.eval"
      )
    train, held_out = train[: -d.eval_rows], train[-d.eval_rows :]
  else:
    held_out = ()
  if d.replay:
    general, more = _encoded(d, d.replay, "train", model, d.replay_columns)
    skipped += more
    train = mixture.replay(train, general, d.replay_fraction, by=d.replay_by, seed=config.seed)
  if d.kind == "scored":
    train, held_out = (with_advantages(config, each) for each in (train, held_out))
  examples = train.examples if isinstance(train, mixture.Mixture) else train
  if model.template is not None and d.kind != "steps":
    chat.assert_end_of_turn_trained(examples, model.tokenizer, model.template)
  channels = loader.channel_names(examples, held_out)
  return Data(train, held_out, channels, "; ".join(map(str, skipped)))


def with_advantages(
  config: ml_collections.ConfigDict, examples: Sequence[answers.Answers]
) -> Sequence[answers.Answers]:
  """Groups of scored answers with the advantage of each, as config.objective.advantage says."""
  how = config.objective.advantage
  known = ("group", "batch", "none", "leave_one_out")
  if how not in known:
    raise ConfigError(f"objective.advantage={how!r}: known are {', '.join(known)}")
  if not examples:
    return examples
  scores = [jnp.asarray(example.values["score"], jnp.float32) for example in examples]
  if how == "leave_one_out":
    found = [advantage.leave_one_out(each) for each in scores]
  elif how == "batch":
    # one deviation over the data: what is in an optimizer batch is not known yet
    centred = [advantage.group_relative(each, scale="none") for each in scores]
    deviation = np.nanstd(np.concatenate(scores), ddof=1)
    found = [each / (deviation + advantage.EPSILON) for each in centred]
  else:
    found = [advantage.group_relative(each, scale=how) for each in scores]
  spread = [[float(np.nan_to_num(np.nanstd(each, ddof=1)))] * len(each) for each in scores]
  examples = answers.with_values(examples, "deviation", spread)
  return answers.with_values(examples, "advantage", [each.tolist() for each in found])


def _sources(d, text, split, model):
  """One source, or a mixture of several: `a.jsonl*0.7+b.jsonl*0.3`, fractions of the tokens."""
  if "*" not in text:
    return _encoded(d, text, split, model, d.columns)
  sources, fractions, skipped = {}, {}, []
  for part in text.split("+"):
    name, _, fraction = part.rpartition("*")
    try:
      fractions[name] = float(fraction)
    except ValueError:
      raise ConfigError(f"data.train={text!r}: write a mixture as FIRST*0.7+SECOND*0.3") from None
    sources[name], more = _encoded(d, name, split, model, d.columns)
    skipped += more
  return mixture.Mixture(sources, fractions, by="tokens"), skipped


def _encoded(d, source, split, model, mapping):
  """(examples, [what was skipped])."""
  rows = schema.read(
    source,
    split=split,
    on_error=d.on_error,
    columns=columns(mapping),
    chat=bool(d.chat and model.template is not None),
    system=d.system if d.chat and model.template is not None else None,
  )
  how: dict[str, Any] = dict(max_length=d.length, truncate=d.truncate, on_error=d.on_error)
  if d.kind == "text":
    examples = chat.encode_all(rows, model.tokenizer, model.template, **how)
  else:
    how |= dict(kind=d.kind, share=d.share_prompt)
    examples = answers.encode_all(list(rows), model.tokenizer, model.template, **how)
  skipped = [f"{source}: {part}" for part in (rows.skipped, examples.skipped) if len(part)]
  return examples.examples, skipped


def columns(mapping: ml_collections.ConfigDict) -> dict[str, str | list[str]] | None:
  """config.data.columns as `schema.read` takes it; None where it is empty."""
  plain = mapping.to_dict()
  return {name: list(v) if isinstance(v, tuple) else v for name, v in plain.items()} or None


def _limited(train, limit):
  if isinstance(train, mixture.Mixture):
    raise ConfigError("data.limit cuts one source; a mixture is cut by its fractions")
  return train[:limit]


def adapter_config(config: ml_collections.ConfigDict) -> adapters.AdapterConfig | None:
  """The AdapterConfig of config.adapter; None for full fine-tuning."""
  fields = {name: _option(name, value) for name, value in config.adapter.items()}
  if config.objective.name == "reward" and fields["method"] != "none":
    if "modules_to_save" not in fields:
      raise ConfigError(
        f"adapter={fields['method']}: a reward model trains its score head whole, for which this method has no place;"
        " write adapter=lora or another of its kind"
      )
    fields["modules_to_save"] = (*fields["modules_to_save"], "score")
  if fields["method"] == "adalora":  # its schedule ends with the run, and its file says when
    fields.setdefault("total_step", config.steps)
  return None if fields["method"] == "none" else adapters.AdapterConfig(**fields)


def _option(name: str, value: Any) -> Any:
  """A config field as AdapterConfig takes it."""
  if isinstance(value, ml_collections.ConfigDict):
    return value.to_dict()
  if name == "init_lora_weights":
    return True if value == "uniform" else value
  return None if name in ("layers_to_transform", "prompt_tuning_init_text") and not value else value


def split(
  config: ml_collections.ConfigDict, model: Model, mesh: jax.sharding.Mesh | None
) -> tuple[Any, Any, Frozen, adapters.AdapterConfig | None]:
  """(trainable, carried, frozen, adapter config) at the start of a run."""
  chosen = adapter_config(config)
  other = None
  if config.objective.get("reference") and not caches_reference(config):
    own = config.objective.reference == "base"
    if not own:
      other = reference_params(config, model, mesh)
    elif chosen is None and not config.objective.get(
      "sync_every", 0
    ):  # what trains is donated from step to step
      other = jax.tree.map(jnp.copy, model.params)
  if chosen is None:
    return model.params, None, Frozen(reference=other), None
  text = chosen.prompt_tuning_init_text
  params, adapter = adapters.init(
    jax.random.key(config.seed),
    model.params,
    chosen,
    started=None if model.started is None else model.started.nodes,
    text_tokens=None if text is None else model.tokenizer(text)["input_ids"],
    model=model.config,
  )
  trainable, carried = tree.partition(placed_adapter(adapter, mesh))
  return (
    trainable,
    carried,
    Frozen(params, reference=other),
    chosen.for_layers(model.config.num_layers),
  )


def resumed(
  config: ml_collections.ConfigDict,
  model: Model,
  frozen: Frozen,
  nodes: Mapping[str, Any],
  mesh: jax.sharding.Mesh | None,
) -> Frozen:
  """frozen with the base that a checkpoint's nodes, {path: node}, were made beside."""
  if model.started is None or model.started.agrees(nodes):
    return frozen
  place = functools.partial(_place, mesh=mesh)
  params, _ = hf.load(
    model.folder, dtype=model.dtype, storage="dense", place=model.started.resume(nodes, place)
  )
  return dataclasses.replace(frozen, params=params)


def _starts_as_its_base(chosen: adapters.AdapterConfig | None) -> bool:
  """Whether a fresh adapter leaves what training computes as it was; full fine-tuning starts there, too."""
  return chosen is None or not (
    chosen.lora_dropout or chosen.attention_group or chosen.method in ("prompt", "prefix")
  )


def objective(
  config: ml_collections.ConfigDict, model: Model, channels: Sequence[str]
) -> objectives.Objective:
  """The objective that config.objective names; a model planned without files has no tokenizer."""
  o = config.objective
  special = () if model.tokenizer is None else model.tokenizer.all_special_ids
  chosen = adapter_config(config)
  how: dict[str, Any] = dict(
    dtype=model.dtype,
    remat=remat(config),
    attention_group=0 if chosen is None else chosen.attention_group,
  )
  own = {
    field: value
    for field, value in o.items()
    if field not in ("name", "losses", "loss", "advantage", *REFERENCE)
  }
  own_base = o.get("reference", "base") == "base"
  compared = {"own_base": own_base, "starts_there": own_base and _starts_as_its_base(chosen)}
  made = {
    "sft": lambda: objectives.Sft(
      model.config, channels=tuple(channels), special_tokens=tuple(sorted(set(special))), **how
    ),
    "preference": lambda: comparisons.Preference(
      model.config,
      losses=tuple((name, float(weight)) for name, weight in o.losses.items()),
      answers=3 if config.data.kind == "triples" else 2,
      **own,
      **how,
      **compared,
    ),
    "reward": lambda: comparisons.Reward(model.config, kind=config.data.kind, **own, **how),
    "kto": lambda: comparisons.Labelled(model.config, **own, **how, **compared),
    "grouped": lambda: comparisons.Grouped(
      model.config, loss_name=o.loss, max_length=config.data.length, **own, **how
    ),
  }
  if o.name not in made:
    raise ConfigError(f"objective.name={o.name!r}: known are {', '.join(made)}")
  found = made[o.name]()
  if o.get("sync_every", 0):
    if config.adapter.method != "none":
      raise ConfigError(
        "objective.sync_every: an adapter's reference is its base, which stays; write 0"
      )
    if o.cache_reference or o.reference != "base":
      raise ConfigError(
        "objective.sync_every: a reference that follows the policy cannot be computed beforehand or be another model;"
        " write --config.objective.cache_reference=false --config.objective.reference=base"
      )
  if how["attention_group"] and config.data.kind != "text" and config.data.share_prompt:
    raise ConfigError(
      "data.share_prompt: shifted attention (attention_group) has no room for a shared prompt; write false"
    )
  return found


# of config.objective, about where the reference comes from and not about the loss
REFERENCE = ("reference", "reference_base", "cache_reference")


def caches_reference(config: ml_collections.ConfigDict) -> bool:
  """Whether the reference's log-probabilities are computed once, before training."""
  return bool(config.objective.get("cache_reference", False)) and jax.process_count() == 1


def reference_params(
  config: ml_collections.ConfigDict, model: Model, mesh: jax.sharding.Mesh | None
) -> Any:
  """The parameters of config.objective.reference: the base, the base with an adapter folder, or another model."""
  name = config.objective.reference
  if name == "base":
    if model.started is None:
      return model.params
    return adapters.original(
      model.params, placed_adapter(tree.unflatten(model.started.nodes.items()), mesh)
    )
  folder = Path(name).expanduser()
  if (folder / "adapter_config.json").exists():
    adapter, _ = peft_format.load(folder, model.params, model.config)
    return adapters.bind(model.params, placed_adapter(adapter, mesh))
  place = functools.partial(_place, mesh=mesh)
  storage = config.objective.reference_base
  params, found = hf.load(fetch.resolve(name), dtype=model.dtype, storage=storage, place=place)
  if found.vocab_size != model.config.vocab_size:
    raise ConfigError(
      f"objective.reference={name}: its vocabulary has {found.vocab_size} tokens, the model's"
      f" {model.config.vocab_size}; a reference scores the same tokens"
    )
  shape = lambda c: (c.num_layers, c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim)
  if shape(found) != shape(model.config):
    raise ConfigError(
      f"objective.reference={name}: it is of another shape than the model; the reference is a policy of the same family"
    )
  return params


def with_reference(
  config: ml_collections.ConfigDict,
  model: Model,
  data: Data,
  objective: objectives.Objective,
  mesh: jax.sharding.Mesh | None,
  say: Any,
) -> Data:
  """data with the reference's log-probabilities, where they are to be computed once."""
  wanted = isinstance(objective, Scorer) and objective.needs_reference
  if not (wanted and caches_reference(config)):
    if wanted and config.objective.cache_reference:
      say("reference: computed at each step, since several processes keep no cache")
    return data
  params = reference_params(config, model, mesh)
  score = functools.partial(
    reference.scored,
    scorer=objective,
    params=params,
    cache=fetch.cache() / "reference",
    mesh=mesh,
    say=say,
  )
  return dataclasses.replace(
    data, train=score(data.train), eval=score(data.eval) if data.eval else ()
  )


def with_blank_reference(
  config: ml_collections.ConfigDict,
  batch: Mapping[str, Any],
  objective: objectives.Objective,
) -> Mapping[str, Any]:
  """A batch of the shapes that `with_reference` gives, for a program that is compiled and not run."""
  if not (isinstance(objective, Scorer) and objective.needs_reference and caches_reference(config)):
    return batch
  blank = {**batch, "reference": np.zeros(batch["tokens"].shape, np.float32)}
  if "companion" in batch:
    blank["companion"] = with_blank_reference(config, batch["companion"], objective)
  return blank


def remat(config: ml_collections.ConfigDict) -> str:
  """What the backward pass recomputes; "auto" is what measured fastest on CPU, and not yet elsewhere."""
  name = config.model.remat
  if name == "auto":
    return "names"
  if name not in decoder.REMAT:
    raise ConfigError(f"model.remat={name!r}: known are auto, {', '.join(decoder.REMAT)}")
  return name


def optimizer(
  config: ml_collections.ConfigDict, model: ModelConfig
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  o = config.optimizer
  return build.build(
    o.name,
    lr=o.lr,
    steps=config.steps,
    warmup=o.warmup,
    schedule=o.schedule,
    weight_decay=o.weight_decay,
    clip=o.clip or None,
    b1=o.b1,
    b2=o.b2,
    eps=o.eps,
    rank=o.rank,
    update_gap=o.update_gap,
    scale=o.scale,
    projection=o.projection,
    target=o.target,
    embeddings_in_float32=o.embeddings_in_float32,
    loraplus_lr_ratio=o.loraplus_lr_ratio or None,
    loraplus_lr_embedding=o.loraplus_lr_embedding,
    offloaded=offload_mode(config) != "none",
    axes={path: spec.axes for path, spec in tree.items(decoder.specs(model))},
    head_dim=model.head_dim,
  )


def offload_mode(config: ml_collections.ConfigDict) -> str:
  """config.optimizer.offload, checked against the rest of the config."""
  mode = config.optimizer.offload
  if mode not in offload.MODES:
    raise ConfigError(f"optimizer.offload={mode!r}: known are {', '.join(offload.MODES)}")
  if mode == "params" and config.adapter.method != "none":
    raise ConfigError(
      "optimizer.offload=params is for full fine-tuning, where parameters are what is updated; write state"
    )
  if mode == "params" and remat(config) == "none":
    raise ConfigError(
      "optimizer.offload=params with model.remat=none would keep every layer on the device for the backward pass; "
      "write another remat"
    )
  return mode


def batches(
  config: ml_collections.ConfigDict, data: Data, mesh: jax.sharding.Mesh | None
) -> loader.Loader:
  """The resumable stream of this process's share of the optimizer batches."""
  return loader.Loader(
    data.train,
    batch_size=config.batch.rows,
    length=config.data.length,
    packing=config.data.packing,
    seed=config.seed,
    shard=distributed.shard(mesh),
    accumulate=config.batch.accumulate,
    channels=data.channels,
  )
