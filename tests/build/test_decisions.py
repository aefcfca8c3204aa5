"""What model.dtype=auto becomes, what is said of it, and what a run that goes on elsewhere does."""

import jax.numpy as jnp
import pytest

from posttrain_jax.build import decisions

INFO = (
  "processor\t: 0\nmodel name\t: A CPU with amx_bf16 in its name\nflags\t\t: fpu {}\nbugs\t\t: x\n"
)


@pytest.fixture
def has(monkeypatch):
  """has(flag): this machine's processor is one with that flag, None for none."""
  return lambda flag: monkeypatch.setattr(decisions, "processor", lambda: flag)


@pytest.mark.parametrize(
  ("flags", "found"),
  [
    ("avx512f avx512_bf16 amx_bf16 amx_tile", "amx_bf16"),
    ("avx512_bf16", "avx512_bf16"),
    ("avx512f amx_tile amx_int8 avx512_bf16x", None),
  ],
)
def test_a_flag_is_read_where_flags_stand(flags, found):
  assert decisions.bfloat16_flag(INFO.format(flags) * 2) == found
  assert decisions.bfloat16_flag("") is None


@pytest.mark.parametrize(
  ("flag", "platform", "products", "between"),
  [
    ("amx_bf16", "cpu", "bfloat16", "float32"),
    (None, "cpu", "float32", "float32"),
    ("amx_bf16", "tpu", "bfloat16", "bfloat16"),
    (None, "tpu", "bfloat16", "bfloat16"),
  ],
)
def test_auto(has, flag, platform, products, between):
  """A plan for a TPU on any host has bfloat16 in both places."""
  has(flag)
  found = decisions.dtype("auto", platform)
  assert (found.name, decisions.between(found, platform).name) == (products, between)
  assert decisions.dtype("float32", platform) == jnp.float32


def test_what_is_said(has):
  has("amx_bf16")
  assert decisions.told("auto", jnp.bfloat16, False) == (
    "bfloat16 products: this CPU has amx_bf16; --config.model.dtype=float32 for full precision"
  )
  assert decisions.told("auto", jnp.float32, True) == "float32 products, as this run began"
  assert decisions.told("float32", jnp.float32, False) is None
  has(None)
  assert decisions.told("auto", jnp.float32, False) == (
    "float32 products: this CPU has neither amx_bf16 nor avx512_bf16"
  )


def test_a_run_goes_on_as_it_began(has):
  """Before records told the dtype, auto was float32 on every CPU."""
  has("amx_bf16")
  record = {"config": {"model": {"dtype": "auto"}}}
  assert decisions.recorded({**record, "dtype": "bfloat16"}) == jnp.bfloat16
  assert decisions.recorded(record) == jnp.float32
  assert decisions.recorded({"config": {"model": {"dtype": "bfloat16"}}}) == jnp.bfloat16
