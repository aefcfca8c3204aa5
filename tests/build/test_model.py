"""config.model: which heads a base has, by what the losses of a run read."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from posttrain_jax import settings
from posttrain_jax.build import model
from posttrain_jax.models import decoder, hf
from tests import tiny

pytestmark = pytest.mark.usefixtures("in_float32")

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
BOTH, ONE = {"lm_head", "score"}, {"score"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """One whose head is not its embedding."""
  return tiny.tiny_model_folder(tmp_path_factory.mktemp("heads") / "model")


def load(folder, config, fields=()):
  return settings.load(f"{CONFIGS / config},model={folder}", fields)


@pytest.mark.parametrize(
  ("config", "fields", "heads"),
  [
    ("preference.py:loss=dpo", [], {"lm_head"}),
    ("preference.py:loss=dpo+reward", [], BOTH),
    ("preference.py:loss=reward+kto", [], BOTH),
    ("preference.py:loss=reward", [], ONE),
    ("reward.py:kind=pairs", [], ONE),
    ("reward.py:kind=steps", ["objective.sft_weight=0.1"], BOTH),
  ],
)
def test_the_head_that_writes_stays_where_a_loss_reads_it(config, fields, heads, folder):
  loaded = model.load(load(folder, config, fields))
  assert {"lm_head", "score"} & {*loaded.params} == heads
  if "lm_head" in heads:  # the very one, and no embedding in its place
    params, _ = hf.load(folder)
    np.testing.assert_array_equal(decoder.head(loaded.params), decoder.head(params))


def test_a_folder_holds_both_heads(folder, tmp_path):
  loaded = model.load(load(folder, "preference.py:loss=dpo+reward,adapter=none"))
  hf.save(tmp_path / "both", loaded.params, loaded.config, tokenizer_from=folder)
  params, config = hf.load(tmp_path / "both")
  assert dataclasses.replace(config, source="") == dataclasses.replace(loaded.config, source="")
  for head in BOTH:
    np.testing.assert_array_equal(params[head]["weight"], loaded.params[head]["weight"])


def test_a_reward_model_that_cannot_write_is_not_asked_to(folder, tmp_path):
  params, config = decoder.scored(jax.random.key(0), *hf.load(folder))
  hf.save(tmp_path / "judge", params, config, tokenizer_from=folder)
  assert {"lm_head", "score"} & {
    *model.load(load(tmp_path / "judge", "reward.py:kind=pairs")).params
  } == ONE
  with pytest.raises(settings.ConfigError, match="a reward model without a head to write with"):
    model.load(load(tmp_path / "judge", "preference.py:loss=dpo+reward"))
