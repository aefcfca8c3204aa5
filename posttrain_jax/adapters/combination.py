"""Several methods in one trained adapter, each with a config and paths of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from posttrain_jax.adapters.config import AdapterConfig


@dataclasses.dataclass(frozen=True)
class Combination:
  """Several methods in one trained adapter, at paths apart: a soft prompt with LoRA, say.

  It is asked as an AdapterConfig is; `parts_of` gives the configs of either.
  """

  parts: tuple[AdapterConfig, ...]

  def __post_init__(self):
    methods = [part.method for part in self.parts]
    if len(methods) < 2 or len(set(methods)) < len(methods):
      raise ValueError(
        f"{'+'.join(methods) or 'no method'}: a combination is of two methods or more, each once; for other ranks of "
        "some modules write rank_pattern"
      )
    if sum(part.changes_base for part in self.parts) > 1:
      starts = [part.method for part in self.parts if part.changes_base]
      raise ValueError(
        f"{' and '.join(starts)} each start with a part of the base; of one adapter only one can"
      )

  @property
  def method(self) -> str:
    return "+".join(part.method for part in self.parts)

  @property
  def starting(self) -> AdapterConfig | None:
    """The part that starts with a part of the base, if one does."""
    return next((part for part in self.parts if part.changes_base), None)

  @property
  def changes_base(self) -> bool:
    return self.starting is not None

  @property
  def starts_as_its_base(self) -> bool:
    return all(part.starts_as_its_base for part in self.parts)

  @property
  def in_weights(self) -> bool:
    return all(part.in_weights for part in self.parts)

  @property
  def lora_dropout(self) -> float:
    """The largest of its parts'."""
    return max(part.lora_dropout for part in self.parts)

  @property
  def attention_group(self) -> int:
    return max(part.attention_group for part in self.parts)

  @property
  def context_length(self) -> int:
    return max(part.context_length for part in self.parts)

  @property
  def modules_to_save(self) -> tuple[str, ...]:
    return tuple(name for part in self.parts for name in part.modules_to_save)

  @property
  def prompt_tuning_init_text(self) -> str | None:
    texts = [part.prompt_tuning_init_text for part in self.parts]
    return next((text for text in texts if text is not None), None)

  def for_layers(self, layers: int) -> Combination:
    return Combination(tuple(part.for_layers(layers) for part in self.parts))


AnyConfig = AdapterConfig | Combination


def parts_of(config: AnyConfig | Sequence[AdapterConfig]) -> tuple[AdapterConfig, ...]:
  """The configs of an adapter, method by method: one for most."""
  if isinstance(config, AdapterConfig):
    return (config,)
  return config.parts if isinstance(config, Combination) else tuple(config)


def together(parts: Sequence[AdapterConfig]) -> AnyConfig:
  """The config of an adapter that has those parts."""
  return parts[0] if len(parts) == 1 else Combination(tuple(parts))
