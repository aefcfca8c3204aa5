"""What several sections of a config decide together, decided once."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from posttrain_jax.models.config import ModelConfig
from posttrain_jax.settings import ConfigError

AUTO = "auto"
DTYPE = "dtype"  # in the record of a run: what model.dtype=auto became
HAVE_BFLOAT16 = ("amx_bf16", "avx512_bf16")  # flags of processors that multiply in it


def products(config: ml_collections.ConfigDict, platform: str | None = None) -> Any:
  """The dtype of products, and of a frozen base that is not quantised."""
  return dtype(config.model.dtype, platform)


def dtype(name: str, platform: str | None = None) -> Any:
  """ "auto" is bfloat16 on accelerators and on CPUs that multiply in it, float32 on others."""
  if name != AUTO:
    return jnp.dtype(name)
  in_bfloat16 = not _is_cpu(platform) or processor() is not None
  return jnp.dtype(jnp.bfloat16 if in_bfloat16 else jnp.float32)


def between(products: Any, platform: str | None = None) -> Any:
  """The dtype of what lies between products: theirs, but on a CPU, which adds and moves no bfloat16, float32 for it."""
  return jnp.dtype(jnp.float32) if products == jnp.bfloat16 and _is_cpu(platform) else products


def _is_cpu(platform: str | None) -> bool:
  return (platform or jax.default_backend()) == "cpu"


@functools.cache
def processor() -> str | None:
  """The flag by which this machine's processor says that it multiplies in bfloat16; None where it says none."""
  path = Path("/proc/cpuinfo")
  return bfloat16_flag(path.read_text(errors="replace")) if path.exists() else None


def bfloat16_flag(cpuinfo: str) -> str | None:
  """The first of `HAVE_BFLOAT16` among the flags of /proc/cpuinfo.

  >>> bfloat16_flag("model name : x\\nflags : fpu avx512_bf16 amx_bf16 amx_tile"), bfloat16_flag("flags : avx512f")
  ('amx_bf16', None)
  """
  lines = (line.partition(":") for line in cpuinfo.splitlines())
  flags = {flag for name, _, said in lines if name.strip() == "flags" for flag in said.split()}
  return next((flag for flag in HAVE_BFLOAT16 if flag in flags), None)


def recorded(record: Mapping[str, Any]) -> Any:
  """The dtype of products that a run's record tells; before records told it, auto was float32 on every CPU."""
  name = record.get(DTYPE) or record["config"]["model"]["dtype"]
  return jnp.dtype(jnp.float32) if name == AUTO and _is_cpu(None) else dtype(name)


def told(asked: str, chosen: Any, is_begun: bool) -> str | None:
  """A sentence on the products that model.dtype=auto has become on a CPU; None where there is nothing to say."""
  if asked != AUTO or not _is_cpu(None):
    return None
  name, flag = jnp.dtype(chosen).name, processor()
  if is_begun:
    return f"{name} products, as this run began"
  if flag is None:
    return f"{name} products: this CPU has neither {' nor '.join(HAVE_BFLOAT16)}"
  return f"{name} products: this CPU has {flag}; --config.model.dtype=float32 for full precision"


def attention(config: ml_collections.ConfigDict) -> str:
  """What is to compute attention, "auto" for what the device has."""
  return config.model.get("attention", AUTO)  # runs of older versions have none


def context(config: ml_collections.ConfigDict) -> int:
  """How many devices share each row."""
  return config.mesh.get("context", 1)  # runs of older versions have none


def trains_as_it_scores(adapter_config: Any) -> bool:
  """Whether a training step computes what a measurement does: without dropout, and with one attention."""
  return adapter_config is None or not (
    adapter_config.lora_dropout or adapter_config.attention_group
  )


def remat(config: ml_collections.ConfigDict) -> str:
  """What the backward pass recomputes; "auto" is what measured fastest on CPU, and not yet elsewhere."""
  return "names" if config.model.remat == "auto" else config.model.remat


def balance(config: ml_collections.ConfigDict, model: ModelConfig) -> float:
  """The weight of the loss that spreads tokens over experts.

  Raises:
    ConfigError: the model has none.
  """
  # runs of older versions have no such field
  weight = float(config.model.router_aux_loss_coef if "router_aux_loss_coef" in config.model else 0)
  if weight and not model.experts:
    raise ConfigError(
      f"model.router_aux_loss_coef={weight}: {config.model.name} is no mixture of experts; write 0.0"
    )
  return weight


def micro_batches(config: ml_collections.ConfigDict, devices: Collection[jax.Device]) -> int:
  """How many parts a step takes its batch in: batch.accumulate; its rows where online an adapter trains on a CPU.

  There a row of several answers costs the same by itself (SmolLM2-135M, 4 rows of 704 tokens: 21.9 s of processor time
  for 22.2 together), and one whose answers agree needs no backward pass (`objectives.Objective.teaches`): 8.5 for 21.9.
  """
  is_cpu = len(devices) == 1 and all(device.platform == "cpu" for device in devices)
  by_row = is_cpu and "online" in config and not is_full(config)
  return config.batch.rows if by_row else config.batch.accumulate


def epochs(config: ml_collections.ConfigDict) -> float | None:
  """The passes over the data that say how long the run is; None where steps do."""
  return config.epochs if "epochs" in config else None  # runs of older versions have none


def best_metric(config: ml_collections.ConfigDict) -> str:
  """The held-out metric, without eval_, whose best step the run gives; "" where it gives the last."""
  named = config.eval.best if "best" in config.eval else ""  # runs of older versions have none
  return named.removeprefix("eval_") or ("loss" if named or _stops_early(config) else "")


def _stops_early(config: ml_collections.ConfigDict) -> bool:
  return "stop_after" in config.eval and config.eval.stop_after > 0


def is_full(config: ml_collections.ConfigDict) -> bool:
  """Whether the parameters themselves train: full fine-tuning."""
  return config.adapter.method == "none"


def base_on_host(config: ml_collections.ConfigDict) -> bool:
  """Whether the layers of the base, frozen or trained, stay in the host's memory."""
  frozen = "offload" in config.model and config.model.offload == "layers"
  return frozen or (is_full(config) and trained_on_host(config))


def trained_on_host(config: ml_collections.ConfigDict) -> bool:
  """Whether what trains in the layers stays in the host's memory, with its gradient."""
  return config.optimizer.offload == "params"


def earlier(config: ml_collections.ConfigDict) -> str:
  """The folder of the adapter that the run starts from; "" for none."""
  return config.model.get("adapter") or ""  # runs of older versions have no such field


def goes_on(config: ml_collections.ConfigDict) -> bool:
  """Whether that adapter is trained further; where it is not, a fresh one is trained over it."""
  return bool(earlier(config)) and config.model.get("adapter_use", "trained") == "trained"


def has_score(config: ml_collections.ConfigDict) -> bool:
  """Whether the model has a score head beside its own: a reward model, or a sum with a reward's loss."""
  o = config.objective
  return o.name == "reward" or (o.name == "preference" and "reward" in o.losses)


def writes(config: ml_collections.ConfigDict) -> bool:
  """Whether the loss reads what the model would write, and so needs its head for logits beside any for scores."""
  o = config.objective
  if o.name == "reward":
    return "sft_weight" in o and bool(o.sft_weight)  # runs of older versions have none
  return o.name != "preference" or {*o.losses} != {"reward"}


def asks(config: ml_collections.ConfigDict) -> bool:
  """Whether the run writes answers before and after training."""
  e = config.eval
  return bool(e.task or grades(config) or ("samples" in e and e.samples))


def grades(config: ml_collections.ConfigDict) -> str:
  """The metrics that the run grades answers with, "" for none; runs of older versions have none."""
  return config.eval.metric if "metric" in config.eval else ""


def has_companions(config: ml_collections.ConfigDict) -> bool:
  """Whether each row brings another prompt's answer, from which KTO estimates its KL."""
  o = config.objective
  if o.name == "kto":
    return o.estimate_kl
  return o.name == "preference" and "kto" in o.losses


def has_reference(config: ml_collections.ConfigDict) -> bool:
  """Whether the config says where a reference policy comes from."""
  return "reference" in config.objective


def caches_reference(config: ml_collections.ConfigDict) -> bool:
  """Whether the reference's log-probabilities are computed once, before training."""
  return has_reference(config) and config.objective.cache_reference


def compares_with_base(config: ml_collections.ConfigDict) -> bool:
  """Whether the reference is the base that the policy started from."""
  return not has_reference(config) or config.objective.reference == "base"


def compares_with_start(config: ml_collections.ConfigDict) -> bool:
  """Whether a policy that stays is compared with, and is the one that the run starts as."""
  return has_reference(config) and compares_with_base(config) and not follows(config)


def follows(config: ml_collections.ConfigDict) -> bool:
  """Whether the reference is a copy of the policy that follows it (TR-DPO), part of the state."""
  return "sync_every" in config.objective and config.objective.sync_every > 0


def is_mixture(source: str) -> bool:
  """Whether data.train names several sources, as `a.jsonl*0.7+b.jsonl*0.3`."""
  return "*" in source


def mixture(text: str) -> dict[str, float]:
  """{source: fraction} of a data.train that is a mixture.

  Raises:
    ConfigError: it is written otherwise, or names a source twice, however its path is spelt.
  """
  fractions: dict[str, float] = {}
  spelt: dict[str, str] = {}
  for part in text.split("+"):
    name, _, fraction = part.rpartition("*")
    path = Path(name).expanduser()
    key = str(path.resolve()) if path.is_file() else name
    if key in spelt:
      raise ConfigError(
        f"data.train={text!r}: {spelt[key]!r} is named twice: write it once with the sum of its fractions"
      )
    try:
      fractions[name] = float(fraction)
    except ValueError:
      raise ConfigError(f"data.train={text!r}: write a mixture as FIRST*0.7+SECOND*0.3") from None
    spelt[key] = name
  return fractions


def teacher(config: ml_collections.ConfigDict) -> str:
  """The model that the run distils; "" for none."""
  return config.objective.get("teacher") or ""  # most objectives have none


def keeps_teacher(config: ml_collections.ConfigDict) -> bool:
  """Whether the teacher's most likely tokens are computed once, before training."""
  return config.objective.name == "distil" and config.objective.top_k > 0


def gold_rows(config: ml_collections.ConfigDict) -> int:
  """Rows of an online update that are answers of the data; the others the policy writes."""
  return config.online.get("gold_rows", 0)  # runs of older versions have none


def asked_rows(config: ml_collections.ConfigDict) -> int:
  """Rows of an online update whose prompts the policy answers."""
  return config.batch.rows - gold_rows(config)
