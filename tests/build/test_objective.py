"""What a config makes of its objective: defaults in a notebook are those of a config."""

import dataclasses
import pathlib

import jax.numpy as jnp
import pytest

from posttrain_jax import objectives, settings
from posttrain_jax.build import objective
from posttrain_jax.build.model import Model
from tests import tiny

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
# what a run decides by its device, its base or its data
OF_THE_RUN = {
  "model",
  "dtype",
  "remat",
  "attention_group",
  "own_base",
  "starts_there",
  "max_length",
}


@pytest.mark.parametrize(
  ("config", "bare"),
  [
    ("preference.py:loss=dpo", objectives.Preference),
    ("kto.py", objectives.Labelled),
    ("grouped.py:method=dapo", objectives.Grouped),
    ("reward.py:kind=steps", lambda model: objectives.Reward(model, kind="steps")),
  ],
)
def test_a_default_is_the_configs(config, bare):
  loaded = settings.load(f"{CONFIGS}/{config}{',' if ':' in config else ':'}adapter=none")
  model = Model(pathlib.Path(), None, tiny.config(), None, None, jnp.float32)
  if loaded.objective.name == "grouped":  # DAPO's one number of its own
    loaded.objective.epsilon_high = 0.2
  made = dataclasses.asdict(objective.make(loaded, model, ()))
  for name, value in dataclasses.asdict(bare(tiny.config())).items():
    assert name in OF_THE_RUN or made[name] == value, name
