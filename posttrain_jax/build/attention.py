"""config.model.attention: what computes attention, and why that."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections

from posttrain_jax.build import adapter, decisions
from posttrain_jax.data import answers
from posttrain_jax.models import cudnn
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.settings import ConfigError

Config = ml_collections.ConfigDict
AUTO, XLA = decisions.AUTO, "xla"
OF_PLATFORM = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}
UNTRIED = (
  "cudnn"  # no GPU has run it yet, and it cannot be compiled without one: only who names it has it
)


def chosen(config: Config, model: ModelConfig, platform: str | None = None) -> tuple[str, str]:
  """(a key of `models.backends.ATTEND`, why).

  Args:
    platform: of the devices that the program is for; None: the default one.

  Raises:
    ConfigError: what the config asks for by name cannot be had.
  """
  platform = platform or jax.default_backend()
  asked, kernel = decisions.attention(config), OF_PLATFORM.get(platform)
  if asked == XLA or (asked == AUTO and kernel is None):
    return XLA, "as asked" if asked == XLA else f"there is no other on {platform}"
  if asked not in (AUTO, kernel):
    raise ConfigError(
      f"model.attention={asked}: {platform} has {' and '.join(filter(None, (XLA, kernel)))}; write auto"
    )
  if asked == AUTO and kernel == UNTRIED:
    return XLA, f"{kernel} has not been tried on a device: model.attention={kernel} asks for it"
  hindrance = _HINDRANCE[OF_PLATFORM[platform]](config, model)
  if hindrance is None:
    return OF_PLATFORM[platform], "as asked" if asked != AUTO else f"the kernel of {platform}"
  if asked != AUTO:
    raise ConfigError(f"model.attention={asked}: {hindrance}; write auto or xla")
  return XLA, f"not {OF_PLATFORM[platform]}: {hindrance}"


def told(config: Config, model: ModelConfig) -> str | None:
  """A sentence on it; None where nobody asked and there is no choice."""
  name, why = chosen(config, model)
  is_plain = decisions.attention(config) == AUTO and jax.default_backend() not in OF_PLATFORM
  return None if is_plain else f"attention: {name} ({why})"


def _shared(config: Config) -> str | None:
  """What several documents of a row see."""
  adapter_config = adapter.described(config)
  if adapter_config is not None and not adapter_config.in_weights:
    return f"a row's documents share what adapter={adapter_config.method} puts before them"
  if config.data.kind in (*answers.SHARING, "prompts") and config.data.share_prompt:
    return "answers in a row share their prompt (data.share_prompt)"
  return None


def _splash(config: Config, model: ModelConfig) -> str | None:
  del model
  return _shared(config)


def _cudnn(config: Config, model: ModelConfig) -> str | None:
  if config.data.kind != "text" or config.data.packing:
    return "its call has no documents within a row (data.packing=false gives each a row)"
  if model.attention_softcap is not None:
    return "it has no soft-cap"
  if model.head_dim % 8 or model.head_dim > cudnn.LARGEST:
    return f"heads of {model.head_dim} dimensions (it has multiples of 8 to {cudnn.LARGEST})"
  if jnp.dtype(decisions.products(config, "gpu")).itemsize != 2:
    return "it has half precision alone (model.dtype=bfloat16)"
  if decisions.context(config) != 1:
    return "it takes queries in order, which mesh.context cuts"
  return _shared(config)


_HINDRANCE: dict[str, Callable[[Config, ModelConfig], str | None]] = {
  "splash": _splash,
  "cudnn": _cudnn,
}
