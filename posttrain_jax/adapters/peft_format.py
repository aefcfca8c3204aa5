"""Adapters as PEFT's folders, both ways: `adapter_config.json` and `adapter_model.safetensors`.

The tensors are the truth for which modules are adapted and at what rank; a config that says otherwise is an error.
A head tied to an adapted embedding keeps to the base embedding, here as in PEFT; `ensure_weight_tying`, under which it
would follow, is refused.  A folder is input: known keys are read, others refused, nothing is imported or unpickled.

PEFT has one type in a folder.  An adapter of several methods is the folder of the first, in which each of the others
has one under its method's name, as PEFT lays several adapters out: each is a valid adapter of PEFT by itself, and
`load` reads them together.

Each PEFT type has a codec, which says what its keys and tensors are: a new one is a file in `codecs/` and a line here.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from posttrain_jax.adapters.bind import paths
from posttrain_jax.adapters.codecs import adalora, fused, ia3, lora, naming, standing, vera
from posttrain_jax.adapters.codecs.codec import Codec, Folder, check_keys
from posttrain_jax.adapters.combination import AnyConfig, parts_of, together
from posttrain_jax.adapters.config import OPTIONS, AdapterConfig
from posttrain_jax.core import files, shards, tree, words
from posttrain_jax.core.weight import Adapted
from posttrain_jax.models import before, decoder, fetch
from posttrain_jax.models.config import ModelConfig

log = logging.getLogger(__name__)

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
# ours: what the adapter was made for; PEFT rejects keys that it does not know
RECORD = "posttrain.json"
UNDER = "under"  # the folder, inside another's, of the adapter that it stands on: `adapters.over`
BASE_NAME = "base_name"  # in the record: the built-in model that it was made for, whose weights are not the hub's
HEADER_BYTES, CONFIG_BYTES = 32 * 2**20, 4 * 2**20  # larger ones are not read

SCORE = "score/weight"  # the head of a reward model

CODECS: tuple[Codec, ...] = (lora.CODEC, vera.CODEC, adalora.CODEC, ia3.CODEC, *standing.CODECS)


def save(
  folder: str | Path,
  adapter: Any,
  config: AnyConfig,
  model_config: ModelConfig,
  *,
  base_name: str | None = None,
  finish: Callable[[Path], None] = lambda folder: None,
) -> None:
  """A folder that PEFT loads to the same modules, ranks and scales; written whole or not at all.

  `posttrain.json` beside PEFT's two files holds the fingerprint of the base.

  Args:
    adapter: the tree that `adapters.init` made.
    config: what it was made from; its patterns are kept where they describe the ranks and scales that the adapter has.
    base_name: hub name or path of the base, or of a built-in one; in the folder it is what PEFT finds it by, a hub name
      or an absolute path.
    finish: called with the folder before it is there for others, to lay more into it.
  """
  first, *others = parts_of(config)
  trees = _apart(adapter, (first, *others), model_config)
  with files.publish(folder) as new:
    record = dict(with_methods=[other.method for other in others]) if others else {}
    _write(new, trees[0], first, model_config, base_name, record)
    for other, part_nodes in zip(others, trees[1:]):
      (new / other.method).mkdir()
      _write(new / other.method, part_nodes, other, model_config, base_name, {})
    finish(new)


def _apart(
  adapter: Any, parts: Sequence[AdapterConfig], model_config: ModelConfig
) -> list[dict[str, Any]]:
  """The nodes of each part; a reward's head is written with every one, since PEFT wants it in each."""
  if len(parts) == 1:
    return [adapter]
  params, nodes = decoder.abstract(model_config), tree.flatten(adapter)
  paths_by_part = [[path for path in paths(params, part) if path in nodes] for part in parts]
  if unknown := sorted(set(nodes) - {path for part_paths in paths_by_part for path in part_paths}):
    raise ValueError(f"adapter at {', '.join(unknown)}: none of its configs has a node there")
  head = [SCORE] if SCORE in nodes else []
  return [
    tree.unflatten({path: nodes[path] for path in dict.fromkeys([*part_paths, *head])})
    for part_paths in paths_by_part
  ]


def _write(
  folder: Path,
  adapter: Any,
  config: AdapterConfig,
  model_config: ModelConfig,
  base_name: str | None,
  record: dict[str, Any],
) -> None:
  """PEFT's two files and our record of one method."""
  codec = _codec(config.method)
  written = codec.write(adapter, config, model_config)
  record = dict(format=1, base=_identity(model_config), **written.record, **record)
  if base_name in fetch.BUILT_IN:
    record[BASE_NAME] = base_name
  described = dict(
    peft_type=codec.peft_type,
    task_type="SEQ_CLS" if model_config.scores else "CAUSAL_LM",
    auto_mapping=None,
    base_model_name_or_path=None if base_name is None else fetch.lasting_name(base_name),
    revision=None,
    inference_mode=True,
    **written.described,
  )
  as_stored = lambda array: (array.shape, str(array.dtype), lambda: array)
  stored = {name: as_stored(array) for name, array in written.tensors.items()}
  files.write_safetensors(folder / TENSORS, stored)
  files.write_json(folder / CONFIG, described)
  files.write_json(folder / RECORD, record)


def load(folder: str | Path, params: Any, model_config: ModelConfig) -> tuple[Any, AnyConfig]:
  """(adapter, config) of a folder that PEFT or `save` wrote, its factors in float32.

  The folder of an adapter that has a name of its own may be given by its parent.

  Raises:
    FileNotFoundError: there is no adapter in the folder.
    ValueError: the file is cut short or pickled, asks for what we do not compute, or does not fit the base; the message
      names the file and the key, tensor or module.
  """
  path = locate(Path(folder))
  if (path / UNDER).is_dir() and not _is_bound(params):
    raise ValueError(
      f"{path} stands on the adapter in its folder {UNDER}, and on the base alone it is of no use; merge both into one"
      " model first (posttrain export --merge of its run)"
    )
  others = _read_record(path / RECORD, model_config).get("with_methods", [])
  if not isinstance(others, list):
    raise ValueError(f"{path / RECORD}: with_methods={words.shown(others)} is no list of methods")
  if unknown := [name for name in others if name not in tuple(OPTIONS)]:
    raise ValueError(
      f"{path / RECORD}: with_methods names {words.shown(unknown[0])}, which is no method"
    )
  nodes, config = _read(path, params, model_config)
  configs = [config]
  for name in others:
    part_nodes, config = _read(path / name, params, model_config)
    if repeated := [at for at in part_nodes if at in nodes and at != SCORE]:
      raise ValueError(f"{path} and its folder {name} both adapt {repeated[0]}")
    nodes |= part_nodes
    saved = [name for name in config.modules_to_save if name not in configs[0].modules_to_save]
    configs.append(config.replace(modules_to_save=tuple(saved)))
  return tree.unflatten(nodes), together(configs)


def _is_bound(params: Any) -> bool:
  """Whether an adapter is bound to params already."""
  leaves = tree.flatten(params)
  stands = before.PROMPT in leaves or before.PREFIX in leaves
  return stands or any(isinstance(leaf, Adapted) for leaf in leaves.values())


def _read(
  path: Path, params: Any, model_config: ModelConfig
) -> tuple[dict[str, Any], AdapterConfig]:
  """({path: node}, config) of one folder."""
  record = _read_record(path / RECORD, model_config)
  described = _read_json(path / CONFIG)
  codecs = {codec.peft_type: codec for codec in CODECS}
  kind = described.get("peft_type")
  if kind not in tuple(codecs):
    raise ValueError(
      f"{path / CONFIG}: peft_type={words.shown(kind)} is not supported; supported: {', '.join(codecs)}"
    )
  codec = codecs[kind]
  if model_config.experts:
    try:
      described = fused.without(described)
    except ValueError as error:
      raise ValueError(f"{path / CONFIG}: {error}") from None
  # those of modules_to_save are asked for when the tensors are there
  check_keys({**described, "modules_to_save": None}, codec.keys, path / CONFIG)
  tensors, others = naming.of_text(_read_tensors(path / TENSORS))
  if others:
    log.info("%s: %d modules left unread (this is the text model)", path, len(others))
  if model_config.experts:
    tensors, described = fused.apart(tensors, described, params, model_config.family)
  class_names = naming.of_tensors(tensors, codec.wrapped, model_config.family)
  folder = Folder(path, tensors, described, record, class_names, others)
  return codec.read(folder, params, model_config)


def base_of(folder: str | Path) -> str | None:
  """The name of the base that an adapter's folder says it is for: a built-in model's, the hub's or a path."""
  below = Path(folder) / UNDER
  if below.is_dir():
    return base_of(below)
  record = Path(folder) / RECORD
  said = _read_json(record).get(BASE_NAME) if record.exists() else None
  return said or _read_json(Path(folder) / CONFIG).get("base_model_name_or_path")


def _codec(method: str) -> Codec:
  codecs = [codec for codec in CODECS if method in codec.methods]
  if not codecs:
    known = ", ".join(method for codec in CODECS for method in codec.methods)
    raise ValueError(f"method={method!r} has no form in PEFT's files; those that have: {known}")
  return codecs[0]


def fingerprint(model_config: ModelConfig) -> str:
  """A digest of the shapes of the base; heads, which merging may untie and a reward model changes, do not count."""
  shapes = {path: spec.shape for path, spec in tree.items(decoder.specs(model_config))}
  for head in ("lm_head/weight", "score/weight"):
    shapes.pop(head, None)
  return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:16]


def _identity(model_config: ModelConfig) -> dict:
  return dict(
    fingerprint=fingerprint(model_config),
    family=model_config.family,
    num_layers=model_config.num_layers,
    hidden_size=model_config.hidden_size,
    vocab_size=model_config.vocab_size,
  )


def locate(folder: Path) -> Path:
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


def _read_record(path: Path, model_config: ModelConfig) -> dict:
  """Our record of what the adapter was made for, {} where PEFT wrote the folder."""
  if not path.exists():
    return {}
  record, identity = _read_json(path), _identity(model_config)
  made_for = record.get("base")
  if not isinstance(made_for, dict) or made_for.get("fingerprint") != identity["fingerprint"]:
    raise ValueError(
      f"{path}: the adapter was made for a base of {words.shown(made_for, 200)}, this base is {identity}"
    )
  return record


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
  """Every tensor of the file by name, in float32; each a floating-point one and finite."""
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
      return {name: _tensor(path, name, f) for name in f.keys()}  # noqa: SIM118, it is no dict
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"{path} cannot be read: {error}; it may be cut short, fetch it again"
    ) from error


def _tensor(path: Path, name: str, file: Any) -> np.ndarray:
  stored = file.get_slice(name).get_dtype()
  if stored not in shards.FLOATS:
    raise ValueError(
      f"{path}: tensor {name!r} is {stored}, not one of {', '.join(shards.FLOATS)}; save the adapter unquantised"
    )
  try:
    return files.narrowed(name, file.get_tensor(name), "float32")
  except ValueError as error:
    raise ValueError(f"{path}: tensor {error}; it was damaged, or its run went astray") from None
