"""Which parameters a policy is compared with."""

import pathlib

import jax
import numpy as np
import pytest

from posttrain_jax import adapters, settings
from posttrain_jax.adapters import AdapterConfig, peft_format
from posttrain_jax.build import model, reference
from posttrain_jax.models import decoder, hf
from tests.adapters.kinds import moved

KEY = jax.random.key(0)
TOKENS = np.arange(3, 20)[None]
CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "preference.py"


@pytest.mark.parametrize("adapter", ["lora", "pissa"])
def test_an_adapter_as_the_reference_stands_on_the_whole_base(adapter, shared, tmp_path):
  """PiSSA takes a part out of the base: of the policy's, not of the reference's."""
  params, config = hf.load(shared / "model")
  lora = AdapterConfig(r=2)
  node = moved(adapters.init(KEY, params, lora)[1], size=0.3)
  peft_format.save(tmp_path / "adapter", node, lora, config)
  run = settings.load(
    f"{CONFIG}:model={shared / 'model'},adapter={adapter}",
    [f"--config.objective.reference={tmp_path / 'adapter'}", "--config.adapter.r=4"],
  )
  base = model.load(run)
  other = reference.params(run, base, None)
  wanted = decoder.forward(adapters.bind(params, node), TOKENS, config)
  found = decoder.forward(other, TOKENS, config)
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
