"""What a model's class calls its modules; PEFT's files hold such names, tensors and config alike.

| class | `layers.0.mlp.up_proj` is |
|---|---|
| ...ForCausalLM, ...ForSequenceClassification | `model.layers.0.mlp.up_proj` |
| Gemma3ForConditionalGeneration, and its classifier | `model.language_model.layers.0.mlp.up_proj` |
| the same, of transformers before 4.52 | `language_model.model.layers.0.mlp.up_proj` |
| ...Model, which has no head | `layers.0.mlp.up_proj` |

An expert of Mixtral, `layers.0.mlp.experts.1.up_proj`, is `model.layers.0.block_sparse_moe.experts.1.w3` there.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from posttrain_jax.adapters.config import HEADS
from posttrain_jax.models import names
from posttrain_jax.models.config import ModelConfig

TEXT, PART = "model.", "model.language_model."
# what torch.compile, FSDP and activation checkpointing put into names, wherever they wrap; DDP wraps the whole
WRAPPERS = r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
OUTSIDE = r"(?:module\.|base_model\.model\.)*(?:base_model\.(?!model\.))?(?:module\.)*"
INSIDE = r"(?:(?:model|language_model)\.)*"
UNREAD = r"(?:vision_tower|multi_modal_projector)\."  # of a model whose text model this is


@dataclasses.dataclass(frozen=True)
class Naming:
  """The names of one class: what stands before those of the text model's modules, and before its heads'."""

  inside: str = TEXT
  before_heads: str = ""
  family: str = ""  # whose names of modules those are

  def full(self, module: str) -> str:
    called = f"{self.before_heads if module in HEADS else self.inside}{module}"
    return names.theirs(called, self.family)


def of_model(config: ModelConfig) -> Naming:
  """Those of the class that AutoModelForCausalLM loads the model's folder with."""
  return Naming(PART if config.part_of else TEXT, family=config.family)


def of_tensors(keys: Iterable[str], wrapped: str, family: str) -> Naming:
  """Those of the class that a file's tensors are named by; the usual ones where they name no module.

  Args:
    wrapped: what PEFT itself puts before the class's names for this type.
  """
  places: dict[bool, collections.Counter] = {
    False: collections.Counter(),
    True: collections.Counter(),
  }
  for key in keys:
    name = class_name(key.removeprefix(wrapped))
    module = re.sub(f"^{INSIDE}", "", name)
    inside = name.removesuffix(module)
    is_head = module.split(".")[0] in HEADS
    if is_head or re.match(r"layers\.|embed_tokens\.|norm\.", module):
      places[is_head][inside] += 1
  commonest = lambda counts, usual: counts.most_common(1)[0][0] if counts else usual
  return Naming(commonest(places[False], TEXT), commonest(places[True], ""), family)


def class_name(key: str) -> str:
  """A tensor's name in the model, without what PEFT, torch and several saves in a row put around it.

  >>> class_name("base_model.model.module.model.layers.0.mlp.up_proj.lora_A.weight")
  'model.layers.0.mlp.up_proj.lora_A.weight'
  """
  return re.sub(f"^{OUTSIDE}", "", re.sub(WRAPPERS, "", key))


def bare(key: str) -> str:
  """A tensor's name as it would be in `layers.0.mlp.up_proj`'s model, without the class's part of it.

  >>> bare("base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.weight")
  'layers.0.mlp.up_proj.lora_A.weight'
  """
  return names.ours(re.sub(f"^{INSIDE}", "", class_name(key)))


def of_text(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
  """(the tensors of the text model, the class's names of the others' modules), of a model that also sees."""
  others = {key for key in tensors if re.match(UNREAD, bare(key))}
  names = {re.sub(r"\.(lora|vera|ia3|weight|bias).*", "", class_name(key)) for key in others}
  return {key: x for key, x in tensors.items() if key not in others}, tuple(sorted(names))
