"""Adapters as PEFT's folders, both ways: `adapter_config.json` and `adapter_model.safetensors`.

The tensors are the truth for which modules are adapted and at what rank; a config that says otherwise is an error.
A head tied to an adapted embedding keeps to the base embedding, here as in PEFT; `ensure_weight_tying`, under which it
would follow, is refused.  A folder is input: known keys are read, others refused, nothing is imported or unpickled.
"""

from __future__ import annotations

import collections
import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from posttrain_jax.adapters import lora
from posttrain_jax.adapters.bind import base, modules
from posttrain_jax.adapters.config import AdapterConfig, full_name
from posttrain_jax.core import files, tree, weight
from posttrain_jax.models import decoder
from posttrain_jax.models.config import ModelConfig

log = logging.getLogger(__name__)

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
RECORD = (
  "posttrain.json"  # ours: what the adapter was made for; PEFT rejects keys that it does not know
)
HEADER_BYTES, CONFIG_BYTES = 32 * 2**20, 4 * 2**20  # larger ones are not read

METHODS = {"LORA": "lora"}  # PEFT's peft_type -> AdapterConfig.method
# The tensors of one adapted module, all stored transposed: what a linear layer and an embedding call them.
NAMES = {
  "a": ("lora_A.weight", "lora_embedding_A"),
  "b": ("lora_B.weight", "lora_embedding_B"),
}

# Keys of adapter_config.json that are fields of AdapterConfig: the JSON types they may have.
FIELDS: dict[str, tuple[type, ...]] = {
  "r": (int,),
  "lora_alpha": (int, float),
  "lora_dropout": (int, float),
  "target_modules": (str, list, type(None)),
  "exclude_modules": (str, list, type(None)),
  "layers_to_transform": (int, list, type(None)),
  "rank_pattern": (dict, type(None)),
  "alpha_pattern": (dict, type(None)),
  "use_rslora": (bool,),
  "init_lora_weights": (bool, str),
}
# Keys that change nothing in what a finished adapter computes.
UNREAD = (
  "auto_mapping",  # names a class to import: never
  "base_model_name_or_path",  # an adapter fits by shapes and fingerprint, not by name
  "eva_config",
  "inference_mode",
  "loftq_config",
  "megatron_core",
  "peft_type",
  "peft_version",
  "qalora_group_size",
  "revision",
  "runtime_config",
)
# Keys that we do not compute: the values that switch them off, PEFT's default first.
OFF: dict[str, tuple[Any, ...]] = {
  "alora_invocation_tokens": (None,),
  "arrow_config": (None,),
  "bias": ("none",),
  "corda_config": (None,),
  "ensure_weight_tying": (False,),
  "fan_in_fan_out": (False,),
  "kasa_config": (None,),
  "layer_replication": (None, []),
  "layers_pattern": (None, "", [], "layers", ["layers"]),  # our families' only list of layers
  "lora_bias": (False,),
  "lora_ga_config": (None,),
  "megatron_config": (None,),
  "modules_to_save": (None, []),
  "monteclora_config": (None,),
  "target_parameters": (None, []),
  "task_type": (None, "CAUSAL_LM"),
  "trainable_token_indices": (None, [], {}),
  "use_bdlora": (None,),
  "use_dora": (False,),
  "use_qalora": (False,),
  "velora_config": (None,),
}
# PEFT's initialisations that leave the base as it is, and what they are called here.
INITS = {True: True, False: True, "gaussian": "gaussian", "eva": True}


def save(
  folder: str | Path,
  adapter: Any,
  config: AdapterConfig,
  model_config: ModelConfig,
  *,
  base_name: str | None = None,
) -> None:
  """A folder that PEFT loads to the same modules, ranks and scales; written whole or not at all.

  Each module is stored at its effective rank, and where that is 0 not at all.  `posttrain.json` beside PEFT's two files
  holds the fingerprint of the base.

  Args:
    adapter: the tree that `adapters.init` made.
    config: what it was made from; its patterns are kept where they describe the ranks and scales that the adapter has.
    base_name: hub name or path of the base, for PEFT to find it.
  """
  names_at = modules(decoder.abstract(model_config))
  pairs, scales = _collect(adapter, names_at, model_config)
  ranks = {name: a.shape[1] for name, (a, _) in pairs.items()}
  tensors = {}
  for name, pair in pairs.items():
    for field, array in zip(("a", "b"), pair):
      key = f"base_model.model.{full_name(name)}.{NAMES[field][name == 'embed_tokens']}"
      make = lambda array=array: array.T
      tensors[key] = (array.shape[::-1], str(array.dtype), make)
  described = dict(
    peft_type="LORA",
    task_type="CAUSAL_LM",
    auto_mapping=None,
    base_model_name_or_path=base_name,
    revision=None,
    inference_mode=True,
    lora_dropout=config.lora_dropout,
    bias="none",
    fan_in_fan_out=False,
    modules_to_save=None,
    init_lora_weights=config.init_lora_weights,
    use_rslora=config.use_rslora,
    **_targets(list(pairs), [name for names in names_at.values() for name in names]),
    **_patterns(config, ranks, scales),
  )
  with files.publish(folder) as new:
    files.write_safetensors(new / TENSORS, tensors)
    files.write_json(new / CONFIG, described)
    files.write_json(new / RECORD, dict(format=1, base=_identity(model_config)))


def load(folder: str | Path, params: Any, model_config: ModelConfig) -> tuple[Any, AdapterConfig]:
  """(adapter, config) of a folder that PEFT or `save` wrote, its factors in float32.

  The folder of an adapter that has a name of its own may be given by its parent.

  Raises:
    FileNotFoundError: there is no adapter in the folder.
    ValueError: the file is cut short or pickled, asks for what we do not compute, or does not fit the base; the message
      names the file and the key, tensor or module.
  """
  folder = _locate(Path(folder))
  path = folder / TENSORS
  _check_record(folder / RECORD, model_config)
  names_at = modules(params)
  known = [name for names in names_at.values() for name in names]
  found = collections.defaultdict(dict)
  for key, array in _read_tensors(path).items():
    name, field = _parse(key, known, path)
    if field == "base":
      _check_stored_base(name, array, params, path)
    elif field in found[name]:
      raise ValueError(f"{path}: two tensors {NAMES[field][0]} for the module {name!r}")
    else:
      found[name][field] = array.T
  config = _read_config(folder / CONFIG, list(found))
  adapter = {}
  for at, names in names_at.items():
    if any(name in found for name in names):
      adapter[at] = _node(base(params, at), names, found, config, path)
  _check_targets(config, known, found, folder)
  return tree.unflatten(adapter), config


def fingerprint(model_config: ModelConfig) -> str:
  """A digest of the shapes of the base; the head, which merging may untie, does not count."""
  shapes = {path: spec.shape for path, spec in tree.items(decoder.specs(model_config))}
  shapes.pop("lm_head/weight", None)
  return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def _collect(adapter, names_at, model_config):
  """({module: (a, b)}, {module: scale}) of every module that has a rank."""
  params = decoder.abstract(model_config)
  pairs, scales = {}, {}
  for path, node in tree.items(adapter):
    if not isinstance(node, lora.LoRA):
      raise ValueError(f"{path}: PEFT's format is written for LoRA, found {type(node).__name__}")
    if path not in names_at:
      raise ValueError(f"adapter: {tree.unknown(path, names_at, 'matrix of the model')}")
    shape = weight.shape(base(params, path))
    found = (*node.a.shape[:-1], node.b.shape[-1])
    if found != shape:
      raise ValueError(f"adapter at {path} fits a base of {found}, model_config says {shape}")
    for name, pair, scale in zip(names_at[path], node.split(), np.atleast_1d(node.scale)):
      if pair[0].shape[1]:
        pairs[name], scales[name] = pair, scale
  if not pairs:
    raise ValueError("the adapter has rank 0 everywhere: there is nothing to write")
  return pairs, scales


def _patterns(config: AdapterConfig, ranks: Mapping[str, int], scales: Mapping[str, Any]) -> dict:
  """r, lora_alpha and the patterns that give PEFT these ranks and scales: the user's own where they do.

  The first pattern that matches wins, and PEFT sorts them when it saves: what depends on their order is written out.
  """
  config = config.replace(
    rank_pattern=dict(sorted(config.rank_pattern.items())),
    alpha_pattern=dict(sorted(config.alpha_pattern.items())),
  )
  if all(
    config.rank(name) == rank and np.float32(config.scale(name)) == scales[name]
    for name, rank in ranks.items()
  ):
    return dict(
      r=config.r,
      lora_alpha=config.lora_alpha,
      rank_pattern=dict(config.rank_pattern),
      alpha_pattern=dict(config.alpha_pattern),
    )
  power = 0.5 if config.use_rslora else 1
  alphas = {name: _alpha(scales[name], rank**power) for name, rank in ranks.items()}
  r, alpha = _commonest(ranks), _commonest(alphas)
  return dict(
    r=r,
    lora_alpha=alpha,
    rank_pattern={_anchored(name): rank for name, rank in ranks.items() if rank != r},
    alpha_pattern={_anchored(name): value for name, value in alphas.items() if value != alpha},
  )


def _alpha(scale: np.float32, divisor: float) -> float:
  """The shortest alpha with alpha / divisor == scale in float32."""
  exact = float(scale) * divisor
  rounded = (round(exact, digits) for digits in range(9))
  return next((alpha for alpha in rounded if np.float32(alpha / divisor) == scale), exact)


def _commonest(values: Mapping[str, Any]) -> Any:
  return collections.Counter(values.values()).most_common(1)[0][0]


def _anchored(name: str) -> str:
  return f"^{re.escape(full_name(name))}"


def _targets(adapted: Sequence[str], known: Sequence[str]) -> dict:
  """target_modules, and layers where it takes them, that make PEFT adapt these modules of all it knows and no other."""
  short = lambda name: name.rpartition(".")[2]
  kinds = {short(name) for name in adapted}
  everywhere = dict(layers_to_transform=None, layers_pattern=None)
  if {name for name in known if short(name) in kinds} == set(adapted):
    return dict(everywhere, target_modules=sorted(kinds))
  layered = [name for name in adapted if name.startswith("layers.")]
  layers = sorted({int(name.split(".")[1]) for name in layered})
  apart = [full_name(name) for name in adapted if name not in layered]
  kinds = {short(name) for name in layered}
  if len(layered) == len(kinds) * len(layers):
    targets = sorted(kinds) + apart  # to PEFT a full name counts in spite of layers_to_transform
    return dict(layers_to_transform=layers, layers_pattern="layers", target_modules=targets)
  return dict(everywhere, target_modules=[full_name(name) for name in adapted])


def _identity(model_config: ModelConfig) -> dict:
  return dict(
    fingerprint=fingerprint(model_config),
    family=model_config.family,
    num_layers=model_config.num_layers,
    hidden_size=model_config.hidden_size,
    vocab_size=model_config.vocab_size,
  )


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def _locate(folder: Path) -> Path:
  """The folder itself or, where PEFT put a named adapter one level deeper, that one."""
  if (folder / CONFIG).exists():
    return folder
  inner = [path.parent for path in sorted(folder.glob(f"*/{CONFIG}"))]
  if len(inner) == 1:
    log.info("%s holds one adapter: %s", folder, inner[0].name)
    return inner[0]
  if inner:
    names = ", ".join(path.name for path in inner)
    raise ValueError(f"{folder} holds several adapters ({names}); give the folder of one of them")
  raise FileNotFoundError(f"{folder / CONFIG} does not exist: {folder} is not an adapter's folder")


def _read_json(path: Path) -> dict:
  if path.stat().st_size > CONFIG_BYTES:
    raise ValueError(f"{path} is larger than {CONFIG_BYTES} bytes: it is no adapter's config")
  return files.read_json(path)


def _check_record(path: Path, model_config: ModelConfig) -> None:
  if not path.exists():
    return
  recorded, own = _read_json(path).get("base"), _identity(model_config)
  if not isinstance(recorded, dict) or recorded.get("fingerprint") != own["fingerprint"]:
    raise ValueError(f"{path}: the adapter was made for a base of {recorded}, this base is {own}")


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
  """Every tensor of the file by name, in float32."""
  if not path.exists():
    if (path.parent / PICKLED).exists():
      raise ValueError(
        f"{path.parent / PICKLED} is pickled, and reading a pickle runs what it holds; "
        "load it with peft and save it again with safe_serialization=True"
      )
    raise FileNotFoundError(f"{path} does not exist")
  with path.open("rb") as f:
    header = int.from_bytes(f.read(8), "little")
  if header > HEADER_BYTES:
    raise ValueError(
      f"{path} claims a header of {header:,} bytes: it is cut short or no safetensors file"
    )
  try:
    with safetensors.safe_open(path, "np") as f:
      names = f.keys()
      return {name: f.get_tensor(name).astype(np.float32) for name in names}
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"{path} cannot be read: {error}; it may be cut short, fetch it again"
    ) from error


def _parse(key: str, known: Sequence[str], path: Path) -> tuple[str, str]:
  """(module, field of the node) of a tensor's name; field "base" for a matrix of the base that PEFT stored along.

  What stands before the module differs with the model class that was trained and with torch.compile.
  """
  module = re.sub(r"^(base_model\.model\.)?((_orig_mod|model|language_model)\.)*", "", key)
  for field, names in NAMES.items():
    for is_embedding, tensor in enumerate(names):
      name = module.removesuffix(f".{tensor}")
      if name != module and is_embedding == (name == "embed_tokens"):
        if name not in known:
          raise ValueError(f"{path}: tensor {key!r}: {tree.unknown(name, known, 'module')}")
        return name, field
  stored = re.fullmatch(r"(embed_tokens|lm_head)\.(base_layer\.)?weight", module)
  if stored:
    return stored[1], "base"
  expected = ", ".join(name for names in NAMES.values() for name in names)
  raise ValueError(f"{path}: unknown tensor {key!r}; an adapted module has {expected}")


def _check_stored_base(name: str, array: np.ndarray, params: Any, path: Path) -> None:
  """PEFT stores the embedding and the head beside an adapter of the embedding: they must be the base's own."""
  matrix = base(params, f"{name}/weight")
  own = np.asarray(weight.dense(matrix), np.float32)
  own = own.T if name == "lm_head" else own
  if array.shape != own.shape:
    raise ValueError(
      f"{path} holds a resized {name} of {array.shape}, the base has {own.shape}; "
      "merge the adapter with peft and load the merged model"
    )
  # Rounding to bfloat16 moves a matrix by 0.2 % of its norm, 4 bits by 10 %; another model's is further away.
  limit = 0.01 if tree.nbytes(matrix) > tree.size(matrix) else 0.15
  distance = np.linalg.norm(array - own) / max(np.linalg.norm(own), 1e-30)
  if not distance < limit:
    raise ValueError(
      f"{path} holds a {name} of its own that differs from the base's by {distance:.1%} of its norm: "
      "the adapter belongs to another base, or was saved with trained embeddings"
    )


def _node(matrix, names, found, config, path) -> lora.LoRA:
  """The LoRA of one weight's modules, absent ones at rank 0."""
  rows, columns = weight.shape(matrix)[-2:]
  pairs, scales = [], []
  for name in names:
    if name not in found:
      pairs.append((np.zeros((rows, 0), np.float32), np.zeros((0, columns), np.float32)))
      scales.append(0.0)
      continue
    pairs.append(_pair(name, found[name], rows, columns, config.rank(name), path))
    scales.append(config.scale(name))
  stacked = len(weight.shape(matrix)) == 3
  return lora.join(pairs, scales, stacked=stacked, dropout=config.lora_dropout)


def _pair(name, tensors, rows, columns, rank, path):
  is_embedding = name == "embed_tokens"
  for field, shape in (("a", (rows, rank)), ("b", (rank, columns))):
    tensor = NAMES[field][is_embedding]
    if field not in tensors:
      raise ValueError(f"{path}: the module {name!r} has no {tensor}")
    if tensors[field].shape != shape:
      raise ValueError(
        f"{path}: {tensor} of {name!r} has shape {tensors[field].shape[::-1]}, expected {shape[::-1]}: "
        f"rank {rank} by {CONFIG}, on a base of {columns} x {rows}"
      )
  return tensors["a"], tensors["b"]


def _read_config(path: Path, adapted: Sequence[str]) -> AdapterConfig:
  raw = _read_json(path)
  if raw.get("peft_type") not in tuple(METHODS):
    raise ValueError(
      f"{path}: peft_type={raw.get('peft_type')!r} is not supported; supported: {', '.join(METHODS)}"
    )
  for key, value in raw.items():
    _check_key(key, value, path)
  fields = {key: raw[key] for key in FIELDS if raw.get(key) is not None}
  fields.setdefault("target_modules", [full_name(name) for name in adapted])
  if raw.get("init_lora_weights") is not None:
    fields["init_lora_weights"] = INITS[raw["init_lora_weights"]]
  try:
    return AdapterConfig(method=METHODS[raw["peft_type"]], **fields)
  except (TypeError, ValueError) as error:
    raise ValueError(f"{path}: {error}") from error


def _check_key(key: str, value: Any, path: Path) -> None:
  if key in FIELDS:
    if not isinstance(value, FIELDS[key]):
      wanted = " or ".join(kind.__name__ for kind in FIELDS[key])
      raise ValueError(f"{path}: {key}={value!r} is a {type(value).__name__}, expected {wanted}")
    if key == "init_lora_weights" and value not in INITS:
      raise ValueError(
        f"{path}: {key}={value!r} is not supported: it moves a part of the base into the adapter; "
        "export it from peft as plain LoRA (path_initial_model_for_weight_conversion)"
      )
  elif key in OFF:
    if value not in OFF[key]:
      raise ValueError(
        f"{path}: {key}={value!r} is not supported; PEFT's default is {OFF[key][0]!r}"
      )
  elif key not in UNREAD and value not in (None, False, [], {}):
    raise ValueError(f"{path}: unknown key {key}={value!r}; what it does is not supported")


def _check_targets(config, known, found, folder) -> None:
  """The config targets what the tensors adapt."""
  targeted = {name for name in known if config.targets(name)}
  for missing, holds, lacks in (
    (targeted - set(found), CONFIG, TENSORS),
    (set(found) - targeted, TENSORS, CONFIG),
  ):
    if missing:
      names = ", ".join(sorted(missing)[:5])
      raise ValueError(
        f"{folder}: {holds} adapts {len(missing)} modules that {lacks} does not: {names}"
      )
