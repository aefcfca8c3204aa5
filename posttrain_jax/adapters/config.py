"""What to adapt and how: PEFT's names where PEFT has them."""

from __future__ import annotations

import dataclasses
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from posttrain_jax.core import patterns, words

ALL_LINEAR = "all-linear"
HEADS = ("lm_head", "score")  # outside `model`
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

LARGEST = 2**20  # of ranks, tokens and layers: memory is taken for them before any tensor is seen
# fields that are whole numbers -> the least and the most
WHOLE_NUMBERS: dict[str, tuple[int, int]] = {
  **dict.fromkeys(("r", "init_r", "target_r", "num_virtual_tokens", "loftq_iter"), (1, LARGEST)),
  **dict.fromkeys(("attention_group", "context_length"), (0, 2**31 - 1)),
  **dict.fromkeys(("tinit", "tfinal", "total_step"), (0, 2**31 - 1)),
  "deltaT": (1, 2**31 - 1),
  "projection_prng_key": (-(2**31), 2**32 - 1),
}
NUMBERS = ("lora_alpha", "lora_dropout", "d_initial", "beta1", "beta2", "orth_reg_weight")
SWITCHES = ("use_rslora", "use_dora")
NAMES = ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
  """The options of an adapter; a PEFT `adapter_config.json` maps onto it key by key.

  Modules are named as in Hugging Face files, layer by layer: `layers.3.self_attn.q_proj`, `embed_tokens`, `lm_head`.
  """

  method: str = "lora"
  r: int = 8  # rank
  lora_alpha: float = 8  # the update is scaled by lora_alpha / r
  lora_dropout: float = 0.0  # of the adapter's input, in training
  # "all-linear" (every matrix of the layers but a router of experts), a regular expression over whole names, or endings
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
    self._check_kinds()
    self._check_options()
    if not 0.0 <= self.lora_dropout < 1.0:
      raise ValueError(f"lora_dropout={self.lora_dropout} must be in [0, 1)")
    if self.init_lora_weights not in INITS and not self.pissa_iterations:
      known = ", ".join(map(repr, INITS))
      raise ValueError(
        f"init_lora_weights={words.shown(self.init_lora_weights)}: write one of {known}, or 'pissa_niter_16'"
      )
    self._check_expressions()
    self._check_standing()

  def _check_kinds(self):
    """Every field is of its kind and size, and lists become tuples: what follows compares and counts."""
    for name, (least, most) in WHOLE_NUMBERS.items():
      if not (name == "total_step" and self.total_step is None):
        _check_whole(name, vars(self)[name], least, most)
    for name in NUMBERS:
      _check_number(name, vars(self)[name])
    for name in SWITCHES:
      if not isinstance(vars(self)[name], bool):
        raise ValueError(f"{name}={words.shown(vars(self)[name])}: write true or false")
    if not isinstance(self.depth_ranks, list | tuple) or len(self.depth_ranks) not in (0, 2):
      raise ValueError(
        f"depth_ranks={words.shown(self.depth_ranks)}: write the ranks of the first and the last layer, such as (4, 64)"
      )
    for rank in self.depth_ranks:
      _check_whole("depth_ranks", rank, 1, LARGEST)
    object.__setattr__(self, "depth_ranks", tuple(self.depth_ranks))
    for name in ("rank_pattern", "alpha_pattern"):
      table = vars(self)[name]
      if not isinstance(table, Mapping) or not all(isinstance(key, str) for key in table):
        raise ValueError(f"{name}={words.shown(table)} is no table of names and numbers")
    for pattern, rank in self.rank_pattern.items():
      hint = "; to leave modules out, name them in exclude_modules"
      _check_whole(f"rank_pattern[{words.shown(pattern)}]", rank, 1, LARGEST, hint)
    for pattern, alpha in self.alpha_pattern.items():
      _check_number(f"alpha_pattern[{words.shown(pattern)}]", alpha)
    for name in NAMES:
      object.__setattr__(self, name, _names(name, vars(self)[name]))
    layers = self.layers_to_transform
    layers = (layers,) if isinstance(layers, numbers.Integral) else layers
    if layers is not None and not isinstance(layers, list | tuple | set):
      raise ValueError(
        f"layers_to_transform={words.shown(layers)}: write a list of layers, such as [0, 1]"
      )
    for layer in layers or ():
      _check_whole("layers_to_transform", layer, 0, LARGEST)
    object.__setattr__(self, "layers_to_transform", tuple(layers or ()) or None)

  def _check_options(self):
    """The method exists, its name means what the options say, and every option that is set is one it reads."""
    if self.method not in tuple(OPTIONS):
      raise ValueError(
        f"unknown adapter method {words.shown(self.method)}; known: {', '.join(OPTIONS)}"
      )
    for option, meant in MEANINGS.get(self.method, {}).items():
      default = AdapterConfig.__dataclass_fields__[option].default
      value = vars(self)[option]
      if value not in (default, meant) and not str(value).startswith(f"{meant}_niter_"):
        raise ValueError(
          f"method={self.method!r} means {option}={meant!r}, found {words.shown(value)}"
        )
      if value == default:
        object.__setattr__(self, option, meant)
    for field in dataclasses.fields(self):
      if field.name in OPTIONS[self.method]:
        continue
      factory = field.default_factory
      default = field.default if factory is dataclasses.MISSING else factory()
      if vars(self)[field.name] != default:
        raise ValueError(
          f"{field.name}={words.shown(vars(self)[field.name])}: the method {self.method!r} has no such option; "
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
    if self.prompt_tuning_init not in PROMPT_INITS:
      raise ValueError(
        f"prompt_tuning_init={words.shown(self.prompt_tuning_init)}: write one of {', '.join(PROMPT_INITS)}"
      )
    if (self.prompt_tuning_init == "TEXT") != (self.prompt_tuning_init_text is not None):
      raise ValueError(
        f"prompt_tuning_init={words.shown(self.prompt_tuning_init)}, "
        f"prompt_tuning_init_text={words.shown(self.prompt_tuning_init_text)}: "
        "TEXT goes with a text, and a text with TEXT"
      )
    if self.attention_group == 1:
      raise ValueError(
        f"attention_group={self.attention_group}: write at least 2 tokens, or 0 for full attention"
      )

  def _check_expressions(self):
    expressions = [
      ("target_modules", self.target_modules),
      ("exclude_modules", self.exclude_modules),
      ("feedforward_modules", self.feedforward_modules),
      *[("rank_pattern", pattern) for pattern in self.rank_pattern],
      *[("alpha_pattern", pattern) for pattern in self.alpha_pattern],
    ]
    for option, expression in expressions:
      try:
        patterns.check(expression if isinstance(expression, str) else "")
      except ValueError as error:
        raise ValueError(f"{option}: {error}") from None

  def for_layers(self, layers: int) -> AdapterConfig:
    """This config for a model of so many layers: depth_ranks as a rank_pattern."""
    if not self.depth_ranks:
      return self
    by_depth = depth_ranks(*self.depth_ranks, layers)
    return self.replace(rank_pattern={**self.rank_pattern, **by_depth}, depth_ranks=())

  # `called`: what the model's class calls the module, where that is not `full_name(module)`

  def rank(self, module: str, called: str | None = None) -> int:
    if self.depth_ranks:
      raise ValueError("depth_ranks are of a model of known depth: ask config.for_layers(layers)")
    return int(_by_pattern(self.rank_pattern, called or full_name(module), self.r))

  def alpha(self, module: str, called: str | None = None) -> float:
    return _by_pattern(self.alpha_pattern, called or full_name(module), self.lora_alpha)

  def scale(self, module: str) -> float:
    """lora_alpha / rank (rsLoRA: / sqrt(rank)) of one module."""
    rank, alpha = self.rank(module), self.alpha(module)
    return alpha / rank**0.5 if self.use_rslora else alpha / rank

  def targets(self, module: str, called: str | None = None) -> bool:
    """True where this expanded module name is to be adapted; as in PEFT a full name counts whatever the layers."""
    names = (full_name(module), module) if called is None else (called,)
    if _matches(self.exclude_modules, names):
      return False
    if isinstance(self.target_modules, tuple) and names[0] in self.target_modules:
      return True
    layer = re.match(r"layers\.(\d+)\.", module)
    if self.layers_to_transform is not None and (
      layer is None or int(layer[1]) not in self.layers_to_transform
    ):
      return False
    if self.target_modules == ALL_LINEAR:
      return layer is not None and not module.endswith(".mlp.gate")
    return _matches(self.target_modules, names)

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
  return module if module in HEADS else f"model.{module}"


def is_saved(called: str, endings: Sequence[str]) -> bool:
  """PEFT's rule of `modules_to_save`: a name ends so, the module's own or that of a block that it lies in.

  >>> is_saved("model.layers.3.mlp.up_proj", ["mlp"]), is_saved("model.layers.3.mlp.up_proj", ["up"])
  (True, False)
  """
  parts = called.split(".")
  names = [".".join(parts[: i + 1]) for i in range(len(parts))]
  return any(name.endswith(tuple(endings)) for name in names)


def picks(wanted: str | tuple[str, ...], called: str) -> bool:
  """PEFT's rule: a string is a regular expression over the whole name, a tuple holds name endings."""
  return _matches(wanted, (called,))


def fits(pattern: str, called: str) -> bool:
  """PEFT's rule for the keys of its patterns: what the name is, or ends with after a dot."""
  return patterns.fullmatch(rf"(.*\.)?({pattern})", called)


def _matches(wanted: str | tuple[str, ...], names: tuple[str, ...]) -> bool:
  """As `picks`; an expression may match any of the names, which are of one module."""
  if isinstance(wanted, str):
    return bool(wanted) and any(patterns.fullmatch(wanted, name) for name in names)
  return any(f".{names[0]}".endswith(f".{ending}") for ending in wanted)


def _by_pattern(table: Mapping[str, Any], called: str, default: Any) -> Any:
  return next((value for pattern, value in table.items() if fits(pattern, called)), default)


def _check_whole(name: str, value: Any, least: int, most: int, hint: str = "") -> None:
  if isinstance(value, bool) or not isinstance(value, numbers.Integral):
    raise ValueError(f"{name}={words.shown(value)}: write a whole number")
  if not least <= value <= most:
    raise ValueError(f"{name}={words.shown(value)}: write a number from {least} to {most}{hint}")


def _check_number(name: str, value: Any) -> None:
  if isinstance(value, bool) or not isinstance(value, int | float | np.number):
    raise ValueError(f"{name}={words.shown(value)}: write a number")
  if not -1e30 <= value <= 1e30:  # of a NaN neither
    raise ValueError(f"{name}={words.shown(value)}: write a finite number, of at most 1e30")


def _names(name: str, value: Any) -> str | tuple[str, ...]:
  if isinstance(value, str) and name != "modules_to_save":
    return value
  if not isinstance(value, list | tuple | set) or not all(isinstance(x, str) for x in value):
    raise ValueError(f"{name}={words.shown(value)}: write a list of names")
  return tuple(sorted(value)) if isinstance(value, list | set) else value
