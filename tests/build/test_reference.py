"""Which parameters a policy is compared with."""

import pathlib

import jax
import numpy as np
import pytest

from posttrain_jax import adapters, settings
from posttrain_jax.adapters import AdapterConfig, peft_format
from posttrain_jax.build import model, reference, run
from posttrain_jax.models import decoder, hf
from tests import tiny
from tests.adapters.kinds import moved

pytestmark = pytest.mark.usefixtures("in_float32")


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
  config_of_run = settings.load(
    f"{CONFIG}:model={shared / 'model'},adapter={adapter}",
    [f"--config.objective.reference={tmp_path / 'adapter'}", "--config.adapter.r=4"],
  )
  base = model.load(config_of_run)
  other = reference.params(config_of_run, base, None)
  wanted = decoder.forward(adapters.bind(params, node), TOKENS, config)
  found = decoder.forward(other, TOKENS, config)
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(("loss", "is_copied"), [("dpo", True), ("simpo", False)])
def test_what_trains_is_copied_where_a_loss_compares_with_it_and_nowhere_else(
  loss, is_copied, shared, tmp_path
):
  rows = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(4)]
  data = tiny.write_jsonl(tmp_path / "pairs.jsonl", rows)
  arguments = f"model={shared / 'model'},data={data},adapter=none,loss={loss}"
  fields = ["data.eval_rows=0", "data.length=64"]
  fields += ["objective.cache_reference=false"] if is_copied else []  # the other has no reference
  config = settings.load(f"{CONFIG}:{arguments}", [f"--config.{field}" for field in fields])
  pieces = run.build(config, None)
  assert (pieces.trees.context.reference is not None) == is_copied


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("nowhere", "'nowhere'"),
    ("empty", "config.json"),
    ("small", "of another shape"),
    ("turned", r"computes otherwise than the model \(rope .*500.* for "),
  ],
)
def test_a_reference_that_is_no_policy_of_the_family_is_refused_at_the_start(
  name, message, shared, tmp_path
):
  (tmp_path / "empty").mkdir()
  for folder, changed in (("small", {"num_hidden_layers": 1}), ("turned", {"rope_theta": 500.0})):
    other = tiny.config(**changed)
    hf.save(tmp_path / folder, decoder.init(KEY, other), other)
  path = name if name == "nowhere" else tmp_path / name
  fields = [f"--config.objective.reference={path}"]
  config = settings.load(f"{CONFIG}:model={shared / 'model'},data=x", fields)
  with pytest.raises(settings.ConfigError, match=f"objective.reference=.*{message}"):
    reference.check(config, model.load(config))
