"""DPO from an adapter is TRL's with a PeftModel, and what was trained over an adapter is one to PEFT."""

import json
import pathlib
import warnings

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: run `make oracle`")
pytest.importorskip("trl", reason="TRL is not installed: run `make oracle`")
peft = pytest.importorskip("peft")

from posttrain_jax import adapters, settings  # noqa: E402
from posttrain_jax.adapters import AdapterConfig, over  # noqa: E402
from posttrain_jax.build import earlier_adapter, run  # noqa: E402
from posttrain_jax.core import metrics, tree  # noqa: E402
from posttrain_jax.models import hf  # noqa: E402
from posttrain_jax.train import step  # noqa: E402
from tests.adapters.kinds import moved  # noqa: E402
from tests.models import families  # noqa: E402
from tests.oracle.pefts import close, logits_of, quiet, torch_logits  # noqa: E402
from tests.oracle.test_preference import (  # noqa: E402
  BETA,
  PAIRS,
  arguments,
  models,
  paired_dataset,
  tokenizer,
  torch_model,
)

pytestmark = pytest.mark.oracle

__all__ = ["models", "tokenizer"]  # fixtures
CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "preference.py"
TARGETS = ("q_proj", "down_proj")
KEY = jax.random.key(0)
NAMES = {"a": "lora_A", "b": "lora_B"}


def shaken(model, name, size, seed):
  """Every factor of an adapter moved, as by training."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for key, parameter in model.named_parameters():
      if f".{name}." in key:
        parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def begun(models, tmp_path_factory):
  """The folder of an adapter that PEFT made on the policy's base."""
  config = peft.LoraConfig(
    task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=list(TARGETS), lora_dropout=0.0
  )
  model = quiet(peft.get_peft_model, torch_model(models[0]), config)
  shaken(model, "default", 0.3, 0)
  folder = tmp_path_factory.mktemp("begun") / "adapter"
  quiet(model.save_pretrained, folder)
  return folder


def of_trl(models, tokenizer, begun, tmp_path, is_moved):
  """(loss, {name: gradient}) of TRL's trainer that goes on with the adapter; moved away from it, or where it begins."""
  import trl

  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = peft.PeftModel.from_pretrained(torch_model(models[0]), begun, is_trainable=True)
    trainer = trl.DPOTrainer(
      model=model,
      args=arguments(trl.DPOConfig, tmp_path, beta=BETA, max_length=None),
      train_dataset=paired_dataset(),
      processing_class=tokenizer,
    )
    assert "ref" in trainer.model.peft_config  # a copy of the adapter, and not the bare base
    if is_moved:
      shaken(trainer.model, "default", 0.1, 1)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    folder = tmp_path / "trl"
    trainer.model.save_pretrained(folder, selected_adapters=["default"])
    named = trainer.model.named_parameters()
    return loss.item(), {key: p.grad.numpy() for key, p in named if p.grad is not None}, folder


@pytest.mark.parametrize("is_moved", [False, True], ids=["where_it_begins", "moved"])
def test_dpo_from_an_adapter_is_trls(is_moved, models, tokenizer, begun, tmp_path):
  their_loss, their_gradient, reached = of_trl(models, tokenizer, begun, tmp_path, is_moved)
  data = tmp_path / "pairs.jsonl"
  rows = [json.dumps(dict(prompt=p, chosen=c, rejected=r)) for p, c, r in PAIRS]
  data.write_text("".join(row + "\n" for row in rows))
  fields = {
    "model.adapter": begun,
    "data.chat": False,
    "data.eval_rows": 0,
    "data.length": 64,
    "batch.rows": len(PAIRS),
    "objective.beta": BETA,
    "objective.cache_reference": False,
  }
  asked = [f"--config.{name}={value}" for name, value in fields.items()]
  config = settings.load(f"{CONFIG}:model={models[0]},data={data}", asked)
  config, _ = earlier_adapter.settled(config, list(fields))
  pieces = run.build(config, None)
  state, batch = pieces.first_state(), next(pieces.batches)
  trainable, context = state.trainable, state.context(pieces.trees.context)
  if is_moved:
    params, model_config = hf.load(models[0])
    ((nodes, _),) = over.load(reached, params, model_config)
    trainable, _ = tree.partition(nodes)
  gradient, values = step.gradient(pieces.objective, trainable, context, batch, KEY, accumulate=1)
  values = metrics.read(values)
  np.testing.assert_allclose(values["loss"], their_loss, rtol=1e-4)
  if not is_moved:
    assert values["loss"] == pytest.approx(np.log(2), abs=1e-6)
  compared = 0
  for path, node in tree.items(gradient):
    for layer, module in enumerate(tree.expand(path, (2,))):
      for field, named in NAMES.items():
        wanted = their_gradient[f"base_model.model.model.{module}.{named}.default.weight"]
        found = np.asarray(vars(node)[field][layer]).T
        close(found, wanted, 2e-3)
        compared += 1
  assert compared == len(their_gradient) == 8


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_what_was_trained_over_an_adapter_is_one_to_peft(method, begun, models, tmp_path):
  """LoRA over LoRA is one adapter of the base; DoRA stands on the first, which PEFT merges into the base."""
  params, config = hf.load(models[0])
  levels = over.load(begun, params, config)
  under = over.bound(params, levels)
  described = AdapterConfig(method=method, r=2, lora_alpha=5, target_modules=("q_proj", "up_proj"))
  nodes = moved(adapters.init(KEY, under, described)[1], seed=5, size=0.2)
  over.save(tmp_path / "out", [*levels, (nodes, described)], config, base_name=str(models[0]))
  model = torch_model(models[0])
  if method == "dora":
    below = quiet(peft.PeftModel.from_pretrained, model, tmp_path / "out" / "under")
    model = below.merge_and_unload()
  model = quiet(peft.PeftModel.from_pretrained, model, tmp_path / "out")
  tokens = families.tokens(2, 9)
  wanted = logits_of(under, nodes, tokens, config)
  close(torch_logits(model, tokens), np.asarray(wanted), 1e-4)
  assert np.abs(wanted - logits_of(under, {}, tokens, config)).max() > 0.01
