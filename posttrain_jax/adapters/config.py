"""What to adapt and how: PEFT's names where PEFT has them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

ALL_LINEAR = "all-linear"
WHERE = ("method", "target_modules", "exclude_modules", "layers_to_transform")
RANKED = (*WHERE, "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora")
WHOLE = "modules_to_save"  # every method has it
LORA = (*RANKED, "depth_ranks", "init_lora_weights", "use_dora", "loftq_iter", WHOLE)
# method -> the options that it reads; another one away from its default is an error
OPTIONS: dict[str, tuple[str, ...]] = {
  "lora": LORA,
  "dora": LORA,
  "pissa": LORA,
  "olora": LORA,
  "loftq": LORA,
  "longlora": (*LORA, "attention_group", "context_length"),
  "vera": (*WHERE, "r", "lora_dropout", "d_initial", "projection_prng_key", WHOLE),
  "adalora": (
    *(*WHERE, "lora_alpha", "lora_dropout", "init_r", "target_r", "tinit", "tfinal", "deltaT"),
    *("beta1", "beta2", "orth_reg_weight", "total_step", WHOLE),
  ),
  "ia3": (*WHERE, "feedforward_modules", WHOLE),
  "prompt": (
    "method",
    "num_virtual_tokens",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    WHOLE,
  ),
  "prefix": ("method", "num_virtual_tokens", WHOLE),
}
STANDING = ("prompt", "prefix")  # stand before every text, and are no change of a weight
# Methods that are LoRA with one option set: what the name means.
MEANINGS: dict[str, dict[str, Any]] = {
  "dora": {"use_dora": True},
  "pissa": {"init_lora_weights": "pissa"},
  "olora": {"init_lora_weights": "olora"},
  "loftq": {"init_lora_weights": "loftq"},
}
# True: a uniform, b zero; "gaussian": a normal(0, 1/r), b zero; "zero_a": a zero, b uniform;
# the others start from the base's own matrix and take what they hold out of it
INITS = (True, "gaussian", "zero_a", "pissa", "olora", "loftq")

# normal(0, 1); the embeddings of tokens drawn from the vocabulary; those of prompt_tuning_init_text, over and over
PROMPT_INITS = ("RANDOM", "SAMPLE_VOCAB", "TEXT")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
  """The options of an adapter; a PEFT `adapter_config.json` maps onto it key by key.

  Modules are named as in Hugging Face files, layer by layer: `layers.3.self_attn.q_proj`, `embed_tokens`, `lm_head`.
  """

  method: str = "lora"
  r: int = 8  # rank
  lora_alpha: float = 8  # the update is scaled by lora_alpha / r
  lora_dropout: float = 0.0  # of the adapter's input, in training
  # "all-linear" (every matrix of the layers), a regular expression over whole names, or name endings
  target_modules: str | tuple[str, ...] = ALL_LINEAR
  exclude_modules: str | tuple[str, ...] = ()
  layers_to_transform: tuple[int, ...] | None = None  # None: every layer
  # name ending or regex -> rank
  rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
  # ranks of the first and the last layer, linear between; what rank_pattern matches keeps to it; (): r everywhere
  depth_ranks: tuple[int, ...] = ()
  alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
  use_rslora: bool = False  # scale by lora_alpha / sqrt(r)
  # one of INITS, or "pissa_niter_N": PiSSA by N subspace iterations
  init_lora_weights: bool | str = True
  use_dora: bool = False  # LoRA of the direction, with a trained magnitude of each output (DoRA)
  loftq_iter: int = 1  # rounds of quantisation and SVD
  modules_to_save: tuple[str, ...] = ()  # name endings of what trains whole beside the adapter
  # LongLoRA: tokens of a group of the shifted attention in training; 0: full attention
  attention_group: int = 0
  # LongLoRA: tokens of a context that positions are interpolated to; 0: the model's own
  context_length: int = 0
  d_initial: float = 0.1  # VeRA: the start of its lambda_d
  projection_prng_key: int = 0  # VeRA: the seed of its frozen projections
  init_r: int = 12  # AdaLoRA: rank at the start, and on average at the end
  target_r: int = 8
  tinit: int = 0  # AdaLoRA: steps before pruning, steps after it, steps from one to the next
  tfinal: int = 0
  deltaT: int = 1
  beta1: float = 0.85  # AdaLoRA: of the moving averages of importance and of its uncertainty
  beta2: float = 0.85
  orth_reg_weight: float = 0.5  # AdaLoRA: of the orthogonality of its factors in the loss
  total_step: int | None = None  # AdaLoRA: of the budget's schedule; None: the run's
  feedforward_modules: str | tuple[str, ...] = ("down_proj",)  # (IA)3: scaled at their input
  num_virtual_tokens: int = 20  # of a soft prompt or prefix
  prompt_tuning_init: str = "RANDOM"  # one of PROMPT_INITS
  prompt_tuning_init_text: str | None = None

  def __post_init__(self):
    self._check_options()
    if self.r < 1:
      raise ValueError(f"r={self.r}: the rank must be at least 1")
    if not 0.0 <= self.lora_dropout < 1.0:
      raise ValueError(f"lora_dropout={self.lora_dropout} must be in [0, 1)")
    if self.init_lora_weights not in INITS and not self.pissa_iterations:
      known = ", ".join(map(repr, INITS))
      raise ValueError(
        f"init_lora_weights={self.init_lora_weights!r}: write one of {known}, or 'pissa_niter_16'"
      )
    object.__setattr__(self, "depth_ranks", tuple(self.depth_ranks))
    if self.depth_ranks and (len(self.depth_ranks) != 2 or min(self.depth_ranks) < 1):
      raise ValueError(
        f"depth_ranks={self.depth_ranks}: write the ranks of the first and the last layer, such as (4, 64)"
      )
    for pattern, rank in self.rank_pattern.items():
      if rank < 1:
        raise ValueError(
          f"rank_pattern[{pattern!r}]={rank}: the rank must be at least 1; "
          "to leave modules out, name them in exclude_modules"
        )
    for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
      if not math.isfinite(alpha):
        raise ValueError(
          f"lora_alpha and the values of alpha_pattern must be finite, found {alpha}"
        )
    for name in ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"):
      if isinstance(vars(self)[name], list | set):
        object.__setattr__(self, name, tuple(sorted(vars(self)[name])))
    layers = self.layers_to_transform
    layers = (layers,) if isinstance(layers, int) else tuple(layers or ()) or None
    object.__setattr__(self, "layers_to_transform", layers)
    self._check_expressions()
    self._check_standing()

  def _check_options(self):
    """The method exists, its name means what the options say, and every option that is set is one it reads."""
    if self.method not in OPTIONS:
      raise ValueError(f"unknown adapter method {self.method!r}; known: {', '.join(OPTIONS)}")
    for option, meant in MEANINGS.get(self.method, {}).items():
      default = AdapterConfig.__dataclass_fields__[option].default
      value = vars(self)[option]
      if value not in (default, meant) and not str(value).startswith(f"{meant}_niter_"):
        raise ValueError(f"method={self.method!r} means {option}={meant!r}, found {value!r}")
      if value == default:
        object.__setattr__(self, option, meant)
    for field in dataclasses.fields(self):
      if field.name in OPTIONS[self.method]:
        continue
      factory = field.default_factory
      default = field.default if factory is dataclasses.MISSING else factory()
      if vars(self)[field.name] != default:
        raise ValueError(
          f"{field.name}={vars(self)[field.name]!r}: the method {self.method!r} has no such option; "
          f"it reads {', '.join(OPTIONS[self.method][1:])}"
        )

  @property
  def pissa_iterations(self) -> int:
    """Subspace iterations of PiSSA's fast SVD; 0: exact, or no PiSSA."""
    match = re.fullmatch(r"pissa_niter_([1-9]\d*)", str(self.init_lora_weights))
    return int(match[1]) if match else 0

  @property
  def starting(self) -> AdapterConfig | None:
    """The config that starts with a part of the base, itself or None."""
    return self if self.changes_base else None

  @property
  def starts_as_its_base(self) -> bool:
    """Whether a fresh adapter leaves what training computes as it was."""
    return not (self.lora_dropout or self.attention_group or not self.in_weights)

  @property
  def in_weights(self) -> bool:
    """Whether merged weights can hold all of it: a soft prompt or a prefix is in no weight."""
    return self.method not in STANDING

  @property
  def changes_base(self) -> bool:
    """True where the adapter starts with a part of the base, which is taken out of it."""
    return self.init_lora_weights not in (True, "gaussian", "zero_a")

  def _check_standing(self):
    """Options of soft prompts, prefixes and LongLoRA."""
    if self.num_virtual_tokens < 1:
      raise ValueError(f"num_virtual_tokens={self.num_virtual_tokens} must be at least 1")
    if self.prompt_tuning_init not in PROMPT_INITS:
      raise ValueError(
        f"prompt_tuning_init={self.prompt_tuning_init!r}: write one of {', '.join(PROMPT_INITS)}"
      )
    if (self.prompt_tuning_init == "TEXT") != (self.prompt_tuning_init_text is not None):
      raise ValueError(
        f"prompt_tuning_init={self.prompt_tuning_init!r}, prompt_tuning_init_text={self.prompt_tuning_init_text!r}: "
        "TEXT goes with a text, and a text with TEXT"
      )
    if self.attention_group < 0 or self.attention_group == 1:
      raise ValueError(
        f"attention_group={self.attention_group}: write at least 2 tokens, or 0 for full attention"
      )
    if self.context_length < 0:
      raise ValueError(f"context_length={self.context_length} must not be negative")

  def _check_expressions(self):
    expressions = [
      ("target_modules", self.target_modules),
      ("exclude_modules", self.exclude_modules),
      *[("rank_pattern", pattern) for pattern in self.rank_pattern],
      *[("alpha_pattern", pattern) for pattern in self.alpha_pattern],
    ]
    for option, expression in expressions:
      try:
        re.compile(expression if isinstance(expression, str) else "")
      except re.error as error:
        raise ValueError(f"{option}: {expression!r} is no regular expression: {error}") from None

  def for_layers(self, layers: int) -> AdapterConfig:
    """This config for a model of so many layers: depth_ranks as a rank_pattern."""
    if not self.depth_ranks:
      return self
    by_depth = depth_ranks(*self.depth_ranks, layers)
    return self.replace(rank_pattern={**self.rank_pattern, **by_depth}, depth_ranks=())

  def rank(self, module: str) -> int:
    if self.depth_ranks:
      raise ValueError("depth_ranks are of a model of known depth: ask config.for_layers(layers)")
    return int(_by_pattern(self.rank_pattern, module, self.r))

  def scale(self, module: str) -> float:
    """lora_alpha / rank (rsLoRA: / sqrt(rank)) of one module."""
    rank, alpha = self.rank(module), _by_pattern(self.alpha_pattern, module, self.lora_alpha)
    return alpha / rank**0.5 if self.use_rslora else alpha / rank

  def targets(self, module: str) -> bool:
    """True where this expanded module name is to be adapted; as in PEFT a full name counts whatever the layers."""
    if _matches(self.exclude_modules, module):
      return False
    if isinstance(self.target_modules, tuple) and full_name(module) in self.target_modules:
      return True
    layer = re.match(r"layers\.(\d+)\.", module)
    if self.layers_to_transform is not None and (
      layer is None or int(layer[1]) not in self.layers_to_transform
    ):
      return False
    if self.target_modules == ALL_LINEAR:
      return layer is not None
    return _matches(self.target_modules, module)

  def replace(self, **changes: Any) -> AdapterConfig:
    return dataclasses.replace(self, **changes)


def depth_ranks(first: int, last: int, layers: int) -> dict[str, int]:
  """A rank_pattern from `first` at the first of so many layers to `last` at the last, linear and rounded.

  >>> list(depth_ranks(4, 64, 3).values())
  [4, 34, 64]
  """
  step = (last - first) / max(layers - 1, 1)
  return {rf"layers\.{i}\..*": round(first + step * i) for i in range(layers)}


def full_name(module: str) -> str:
  """What transformers and PEFT call a module: all but the heads live inside `model`.

  >>> full_name("layers.3.mlp.up_proj"), full_name("lm_head")
  ('model.layers.3.mlp.up_proj', 'lm_head')
  """
  return module if module in ("lm_head", "score") else f"model.{module}"


def _matches(wanted: str | tuple[str, ...], module: str) -> bool:
  """A string is a regular expression over the whole name, with or without `model.`; a tuple holds name endings."""
  names = (full_name(module), module)
  if isinstance(wanted, str):
    return bool(wanted) and any(re.fullmatch(wanted, name) for name in names)
  return any(f".{names[0]}".endswith(f".{ending}") for ending in wanted)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
  """The value of the first pattern that the name is, or ends with after a dot (PEFT's rule)."""
  for pattern, value in patterns.items():
    if re.match(rf"(.*\.)?({pattern})$", full_name(module)):
      return value
  return default
