"""How a model was trained, as far as whoever uses it must know; it stands in the folder that holds the model.

`posttrain.json` of an adapter's or a model's folder has it under `use`; a run that wrote none has it in its config.
The tokenizer and the chat template stand beside it, in the files that every other library reads, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain_jax import quant
from posttrain_jax.core import files
from posttrain_jax.runs import record

RECORD, USE = "posttrain.json", "use"
DTYPES = ("auto", "float32", "bfloat16", "float16")
TYPES = {
  "storage": (str, type(None)),
  "dtype": (str,),
  "system": (str, type(None)),
  "chat": (bool,),
  "template": (str, type(None)),
  "writes": (bool, type(None)),
}


@dataclasses.dataclass(frozen=True)
class Manner:
  """storage: how the base's matrices were kept, "dense" or a type of `quant.STORAGES`; None: as its files have them.

  dtype: of products, as config.model.dtype names it.
  system: the message that stood before every prompt in strings.
  chat: whether a prompt and an answer in strings were turns of a chat template.
  template: a chat template's name, where the folder does not hold the template itself.
  writes: whether it was trained to write text, and not to score it alone; None: nobody said so.
  """

  storage: str | None = None
  dtype: str = "auto"
  system: str | None = None
  chat: bool = True
  template: str | None = None
  writes: bool | None = None


def of(config: Mapping[str, Any], *, changes_base: bool, chat: bool, writes: bool) -> Manner:
  """That of a run's config.

  changes_base: whether the adapter took its start out of the base: what is exported belongs to the base as it came.
  """
  model, data = config["model"], config["data"]
  full = config["adapter"]["method"] == "none"
  template = model.get("template", "tokenizer")
  return Manner(
    storage=None if full else "dense" if changes_base else model.get("base"),
    dtype=model.get("dtype", "auto"),
    system=data.get("system") if data.get("chat", True) else None,
    chat=chat,
    template=None if template == "tokenizer" else template,
    writes=writes,
  )


def write(folder: Path, manner: Manner) -> None:
  """Adds it to the record of a folder."""
  path = folder / RECORD
  old = files.read_json(path) if path.exists() else {"format": 1}
  files.write_json(path, {**old, USE: dataclasses.asdict(manner)})


def read(folder: str | Path) -> Manner | None:
  """That of an adapter's or a model's folder; None where nobody wrote it.

  Raises:
    ValueError: what stands there is no manner of ours; the message names the file and the field.
  """
  path = Path(folder) / RECORD
  said = files.read_json(path).get(USE) if path.exists() else None
  if said is None:
    return None
  if not isinstance(said, Mapping):
    raise ValueError(f"{path}: {USE!r} is {type(said).__name__}, expected an object")
  for name, value in said.items():
    if name not in TYPES:
      raise ValueError(f"{path}: {USE}.{name} is unknown; known are {', '.join(TYPES)}")
    if not isinstance(value, TYPES[name]):
      raise ValueError(f"{path}: {USE}.{name}={value!r} is of another type than is written there")
  manner = Manner(**said)
  storages = (None, "dense", *quant.STORAGES)
  if manner.storage not in storages:
    raise ValueError(
      f"{path}: {USE}.storage={manner.storage!r}: known are {', '.join(storages[1:])}"
    )
  if manner.dtype not in DTYPES:
    raise ValueError(f"{path}: {USE}.dtype={manner.dtype!r}: known are {', '.join(DTYPES)}")
  return manner


def is_run(folder: str | Path) -> bool:
  """Whether a folder is a run's, and no model's, whose `config.json` is another."""
  path = Path(folder).expanduser() / record.CONFIG
  return path.is_file() and isinstance(files.read_json(path).get("config"), dict)
