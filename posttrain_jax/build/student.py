"""A student made of a model's own layers: the folder that a distillation starts from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from posttrain_jax import adapters
from posttrain_jax.build import export, use
from posttrain_jax.models import hf, shallow
from posttrain_jax.settings import ConfigError


def write(model: str, out: str | Path, *, count: int = 0, kept: Sequence[int] = ()) -> str:
  """Writes a model of some of the layers of another, and says which.

  Args:
    model: a name, a folder, or a run's folder, whose adapter is merged.
    count: of layers, evenly spread; 0 where kept names them.

  Raises:
    ConfigError: the folder is there already, or the model has no such layers.
  """
  folder = Path(out).expanduser()
  if folder.exists():
    raise ConfigError(f"{folder} is there already: name another --out, or remove it")
  if bool(count) == bool(kept):
    raise ConfigError(
      "write how many layers the student has (--layers=15), or which (--keep=0,2,4)"
    )
  used = use.load(model, base="dense")
  total = used.config.num_layers
  if count and not 0 < count <= total:
    raise ConfigError(f"--layers={count}: {model} has {total}; write from 1 to {total}")
  chosen = tuple(kept) or shallow.spread(total, count)
  params = adapters.merge(used.params, used.nodes[0]) if used.nodes else used.params
  try:
    params, config = shallow.of_layers(params, used.config, chosen)
  except ValueError as error:
    raise ConfigError(f"--keep: {error}") from error
  accompany = lambda made: export.accompany(made, used.folder, "tokenizer", used.manner)
  hf.save(folder, params, config, finish=accompany)
  return f"{len(chosen)} of {total} layers: {', '.join(map(str, chosen))}"
