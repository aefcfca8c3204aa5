"""config.model.attention: what computes it on which device, and the reason that is said."""

import pathlib

import pytest

from posttrain_jax import settings
from posttrain_jax.build import attention, checks
from posttrain_jax.settings import ConfigError
from tests import tiny

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
ALONE = ("data.packing=false", "model.dtype=bfloat16", "model.attention=cudnn")


def chosen(platform, name, *fields, model=None):
  config = settings.load(f"{CONFIGS}/{name}", [f"--config.{field}" for field in fields])
  return attention.chosen(config, model or tiny.config(), platform)


@pytest.mark.parametrize(
  ("platform", "name", "fields", "by", "why"),
  [
    ("cpu", "sft.py", (), "xla", "there is no other on cpu"),
    ("tpu", "sft.py", (), "splash", "the kernel of tpu"),
    ("tpu", "sft.py", ("mesh.context=4",), "splash", "the kernel of tpu"),
    ("tpu", "sft.py", ("model.attention=xla",), "xla", "as asked"),
    ("tpu", "sft.py", ("model.attention=splash",), "splash", "as asked"),
    ("tpu", "sft.py:adapter=prompt", (), "xla", "not splash: a row's documents share what adap"),
    ("tpu", "preference.py", (), "xla", "not splash: answers in a row share their prompt"),
    ("tpu", "preference.py", ("data.share_prompt=false",), "splash", "the kernel of tpu"),
    ("gpu", "sft.py", ALONE[:2], "xla", "cudnn has not been tried"),
    ("gpu", "sft.py", ALONE, "cudnn", "as asked"),
  ],
)
def test_the_choice_and_why(platform, name, fields, by, why):
  found, reason = chosen(platform, name, *fields)
  assert found == by
  assert reason.startswith(why)


def test_cudnn_has_no_soft_cap_and_no_large_heads():
  capped = tiny.config("gemma2", attn_logit_softcapping=50.0, query_pre_attn_scalar=16, head_dim=16)
  wide = tiny.config(head_dim=136)
  for model, says in ((capped, "it has no soft-cap"), (wide, "heads of 136 dimensions")):
    with pytest.raises(ConfigError, match=says):
      chosen("gpu", "sft.py", *ALONE, model=model)


@pytest.mark.parametrize(
  ("platform", "fields", "says"),
  [
    ("cpu", ("model.attention=splash",), "splash: cpu has xla; write auto"),
    ("tpu", ("model.attention=cudnn",), "cudnn: tpu has xla and splash; write auto"),
    ("gpu", ("model.attention=cudnn", "data.packing=true"), "no documents within a row"),
    ("gpu", (*ALONE, "model.dtype=float32"), "it has half precision"),
    ("gpu", (*ALONE, "mesh.context=2"), "it takes queries in order"),
  ],
)
def test_what_cannot_be_had_is_refused(platform, fields, says):
  with pytest.raises(ConfigError, match=says):
    chosen(platform, "sft.py", *fields)


def test_shifted_attention_is_refused_where_rows_are_cut():
  config = settings.load(f"{CONFIGS}/sft.py:adapter=longlora", ["--config.mesh.context=2"])
  with pytest.raises(
    ConfigError, match=r"mesh.context=2: shifted attention .* reads rows in their"
  ):
    checks.check(config)


def test_runs_of_older_versions_have_neither_field():
  config = settings.load(f"{CONFIGS}/sft.py")
  with config.unlocked():
    del config.model.attention, config.mesh.context
  assert attention.chosen(config, tiny.config(), "gpu")[0] == "xla"
  assert attention.chosen(config, tiny.config(), "tpu") == ("splash", "the kernel of tpu")
  checks.check(config)
