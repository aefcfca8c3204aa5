"""The engine of a run reads the weights that are trained."""

import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import adapters, settings
from posttrain_jax.build.model import Model
from posttrain_jax.build.prompts import Prompt
from posttrain_jax.build.writer import Writer
from posttrain_jax.core import tree
from posttrain_jax.objectives import Context
from posttrain_jax.rollout.requests import Request
from tests import tiny

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "rl.py"


def made(config, prompts, **fields):
  small = {"batch.rows": 1, "online.samples": 2, "online.max_new_tokens": 2} | fields
  fields = settings.load(str(CONFIG), [settings.override(k, v) for k, v in small.items()])
  model = Model(pathlib.Path(), None, config, None, None, jnp.float32)
  return Writer(fields, model, [Prompt(np.asarray(p, np.int32), "?", {}, "row") for p in prompts])


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_what_stands_before_every_text_has_room_beside_the_longest(method):
  config, _, context = tiny.setup("lora")
  soft = adapters.AdapterConfig(method=method, num_virtual_tokens=20)
  base, adapter = adapters.init(jax.random.key(0), context.base, soft)
  trainable, carried = tree.partition(adapter)
  prompts = [[5, 6], [*range(3, 33)], [7]]
  writer = made(config, prompts)
  writer.bind(types.SimpleNamespace(context=Context(base, carried), adapter_config=soft))
  writer.load(trainable, carried)
  asked = [writer.request(prompt, number, 0) for number, prompt in enumerate(writer.prompts)]
  assert sorted(place for place, _ in writer.run(asked)) == [0, 1, 2]
  with pytest.raises(ValueError, match=r"prompt 7 has 40 .* length=52 .* model has 128 positions"):
    list(writer.run([Request([5] * 40, 2, number=7)]))


def test_a_changed_adapter_that_does_not_reach_what_writes_is_refused(monkeypatch):
  config, trainable, context = tiny.setup("lora")
  writer = made(config, [[5, 6, 7]])
  writer.bind(types.SimpleNamespace(context=context, adapter_config=object()))
  state = types.SimpleNamespace(trainable=trainable, carried=context.fixed)
  writer.check(state)
  ready, first = writer._ready, jax.tree.map(jnp.copy, trainable)
  monkeypatch.setattr(writer, "_ready", lambda base, _, carried: ready(base, first, carried))
  with pytest.raises(ValueError, match="does not have the weights that are trained"):
    writer.check(state)
