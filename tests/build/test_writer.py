"""The engine of a run reads the weights that are trained."""

import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import settings
from posttrain_jax.build.model import Model
from posttrain_jax.build.prompts import Prompt
from posttrain_jax.build.writer import Writer
from tests import tiny

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "rl.py"


def test_a_changed_adapter_that_does_not_reach_what_writes_is_refused(monkeypatch):
  config, trainable, context = tiny.setup("lora")
  small = {"batch.rows": 1, "online.samples": 2, "online.max_new_tokens": 2}
  fields = settings.load(str(CONFIG), [settings.override(k, v) for k, v in small.items()])
  model = Model(pathlib.Path(), None, config, None, None, jnp.float32)
  writer = Writer(fields, model, [Prompt(np.asarray([5, 6, 7], np.int32), "?", {}, "row")])
  writer.bind(types.SimpleNamespace(context=context, adapter_config=object()))
  state = types.SimpleNamespace(trainable=trainable, carried=context.fixed)
  writer.check(state)
  ready, first = writer._ready, jax.tree.map(jnp.copy, trainable)
  monkeypatch.setattr(writer, "_ready", lambda base, _, carried: ready(base, first, carried))
  with pytest.raises(ValueError, match="does not have the weights that are trained"):
    writer.check(state)
