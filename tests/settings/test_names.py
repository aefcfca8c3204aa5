"""A name that is no field here leads to the field that was meant."""

import pathlib
import re

import pytest

from posttrain_jax import settings
from posttrain_jax.settings import ConfigError, fields, names

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def refused(config, override):
  with pytest.raises(ConfigError) as error:
    settings.load(str(CONFIGS / config), [f"--config.{override}"])
  return str(error.value)


@pytest.mark.parametrize(
  ("override", "field"),
  [
    ("learning_rate=1e-4", "optimizer.lr"),
    ("training.learning_rate=1e-4", "optimizer.lr"),
    ("optimizer.learning_rate=1e-4", "optimizer.lr"),
    ("max_seq_length=64", "data.length"),
    ("max_length=64", "data.length"),
    ("sequence_len=64", "data.length"),
    ("lora_r=8", "adapter.r"),
    ("lora_target_modules=q_proj", "adapter.target_modules"),
    ("warmup_ratio=0.1", "optimizer.warmup"),
    ("lr_scheduler_type=linear", "optimizer.schedule"),
    ("max_grad_norm=1.0", "optimizer.clip"),
    ("adam_beta1=0.9", "optimizer.b1"),
    ("gradient_accumulation_steps=4", "batch.accumulate"),
    ("eval_steps=10", "eval.every"),
    ("save_steps=10", "checkpoint.every"),
    ("logging_steps=10", "log_every"),
    ("sample_packing=true", "data.packing"),
    ("rank=8", "adapter.r"),
  ],
)
def test_another_tools_name_is_told_as_it_is_written_here(override, field):
  name, _, value = override.partition("=")
  assert f"unknown config key {name!r}: here it is {field}; write --config.{field}={value}" == (
    refused("sft.py", override)
  )


@pytest.mark.parametrize(
  ("override", "said"),
  [
    ("load_best_model_at_end=true", "--config.eval.best=loss"),
    ("per_device_train_batch_size=4", "--config.batch.rows=N"),
    ("micro_batch_size=4", "--config.batch.rows=N"),
    ("output_dir=out", "--workdir=DIR"),
    ("load_in_4bit=true", "--config=FILE:base=nf4"),
    ("warmup_steps=10", "--config.optimizer.warmup=0.05"),
  ],
)
def test_a_name_whose_values_differ_here_says_what_to_write(override, said):
  assert said in refused("sft.py", override)


@pytest.mark.parametrize(
  ("override", "said"),
  [
    (
      "learning_rte=1e-4",
      "'learning_rate'? here it is optimizer.lr; write --config.optimizer.lr=1e-4",
    ),
    ("gradient_accumulation=4", "here it is batch.accumulate"),
    ("num_train_epoch=3", "here it is epochs"),
    ("per_device_train_batchsize=4", "--config.batch.rows=N"),
  ],
)
def test_another_tools_name_that_is_misspelt_is_told_too(override, said):
  assert said in refused("sft.py", override)


@pytest.mark.parametrize(
  ("config", "override", "field"),
  [
    ("sft.py", "lr=1", "optimizer.lr"),
    ("sft.py", "weight_decay=0.1", "optimizer.weight_decay"),
    ("sft.py", "lora_alpha=8", "adapter.lora_alpha"),
    ("sft.py", "lora_dropout=0.1", "adapter.lora_dropout"),
    ("sft.py", "model.length=8", "data.length"),
    ("sft.py", "optim.lr=1", "optimizer.lr"),
    ("sft.py", "packin=true", "data.packing"),
    ("sft.py:optimizer=galore", "rank=4", "optimizer.rank"),
    ("preference.py:", "beta=0.2", "objective.beta"),
    ("preference.py:", "label_smoothing=0.2", "objective.label_smoothing"),
  ],
)
def test_near_names_are_of_every_section(config, override, field):
  assert f"did you mean '{field}'" in refused(config, override)


@pytest.mark.parametrize(
  ("config", "override", "said"),
  [
    ("sft.py", "beta=0.1", "objective.name='sft' does not read it (dpo,"),
    ("sft.py:adapter=none", "lora_r=8", "adapter.r, which this config does not have"),
    ("grouped.py", "beta=0.1", "the loss 'ppo' does not read it"),
    ("sft.py:optimizer=sgd", "adam_beta2=0.9", "optimizer.b2: optimizer.name='sgd' does not read"),
    ("rl.py", "critic.gamma=0.9", "does not have it; --config=rl:method=ppo has"),
    ("sft.py", "online.samples=4", "'online.samples': this config does not have it; --config=rl,"),
    ("sft.py:adapter=ia3", "adapter.r=4", "'adapter.r': this config does not have it"),
  ],
)
def test_a_field_of_another_method_says_whose(config, override, said):
  assert said in refused(config, override)


def test_an_argument_that_is_a_field_is_told_how_it_is_written():
  for name, field in (("learning_rate", "optimizer.lr"), ("packing", "data.packing")):
    with pytest.raises(ConfigError, match=rf"known are .*--config.NAME=value: {field}"):
      settings.load(f"{CONFIGS}/sft.py:{name}=1")


def test_the_table_names_fields_that_there_are():
  assert {*names.SAME.values()} <= {*fields.FIELDS}
  said = re.findall(r"--config\.([a-z_.]+)=", " ".join(names.INSTEAD.values()))
  assert len(said) > 20
  assert {name.replace("columns.text", "columns") for name in said} <= {*fields.FIELDS}
  assert not {*names.SAME} & {*names.INSTEAD}
  top = {name for name in fields.FIELDS if "." not in name}
  assert not {*names.SAME, *names.INSTEAD} & top
