"""A reward model's head beside every method, and methods that train together, against PEFT: files both ways, scores."""

import functools

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

from posttrain_jax import adapters
from posttrain_jax.adapters import AdapterConfig, peft_format
from posttrain_jax.core import weight
from posttrain_jax.models import decoder, hf
from tests.adapters.kinds import moved
from tests.models import families
from tests.oracle.pefts import close, quiet

pytestmark = pytest.mark.oracle

CONFIGS = {
  "lora": (dict(r=3), functools.partial(peft.LoraConfig, r=3, target_modules=["q_proj"])),
  "vera": (dict(r=3), functools.partial(peft.VeraConfig, r=3, target_modules=["q_proj"])),
  "adalora": (
    dict(init_r=4, target_r=2),
    functools.partial(
      peft.AdaLoraConfig, init_r=4, target_r=2, total_step=10, target_modules=["q_proj"]
    ),
  ),
  "ia3": (
    {},
    functools.partial(peft.IA3Config, target_modules=["k_proj"], feedforward_modules=[]),
  ),
  "prompt": (
    dict(num_virtual_tokens=4),
    functools.partial(peft.PromptTuningConfig, num_virtual_tokens=4),
  ),
  "prefix": (
    dict(num_virtual_tokens=4),
    functools.partial(peft.PrefixTuningConfig, num_virtual_tokens=4),
  ),
}
over_methods = pytest.mark.parametrize("method", CONFIGS)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
  """(folder, params, config) of a tiny reward model that transformers reads too."""
  folder = tmp_path_factory.mktemp("scored") / "model"
  config, params = families.make("llama")
  params, config = decoder.scored(jax.random.key(5), params, config)
  hf.save(folder, params, config)
  return folder, *hf.load(folder)


def base_model(folder):
  return transformers.AutoModelForSequenceClassification.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager"
  ).eval()


@functools.partial(jax.jit, static_argnames="config")
def scores_of(params, adapter, tokens, config):
  """The score at the last token of each row."""
  bound = adapters.bind(params, adapter)
  hidden = decoder.hidden(bound, tokens, config)
  return weight.linear32(hidden[:, -1], bound["score"]["weight"])


def theirs_of(model, tokens):
  with torch.no_grad():  # one row: several want a token for padding
    return np.concatenate([model(torch.tensor(row[None])).logits.numpy() for row in tokens])


def ours(scored, method):
  _, params, _ = scored
  chosen = AdapterConfig(method=method, modules_to_save=("score",), **CONFIGS[method][0])
  return chosen, moved(adapters.init(jax.random.key(0), params, chosen)[1], size=0.2)


@over_methods
def test_ours_gives_equal_scores_there(scored, method, tmp_path):
  folder, params, config = scored
  chosen, adapter = ours(scored, method)
  peft_format.save(tmp_path / "a", adapter, chosen, config)
  model = quiet(peft.PeftModel.from_pretrained, base_model(folder), tmp_path / "a").eval()
  tokens = np.asarray(families.tokens(2, 12))
  close(scores_of(params, adapter, tokens, config), theirs_of(model, tokens))
  assert np.abs(theirs_of(model, tokens) - theirs_of(base_model(folder), tokens)).max() > 0.1


@over_methods
def test_theirs_gives_equal_scores_here(scored, method, tmp_path):
  folder, params, config = scored
  made = CONFIGS[method][1](task_type="SEQ_CLS")
  model = quiet(peft.get_peft_model, base_model(folder), made)
  generator = torch.Generator().manual_seed(3)
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.requires_grad:
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
  quiet(model.eval().save_pretrained, tmp_path)
  adapter, found = peft_format.load(tmp_path, params, config)
  assert (found.method, found.modules_to_save) == (method, ("score",))
  tokens = np.asarray(families.tokens(2, 12))
  close(scores_of(params, adapter, tokens, config), theirs_of(model, tokens))


# --- methods that train together --------------------------------------------------------------------------------------


@pytest.mark.parametrize("standing", ["prompt", "prefix"])
def test_the_folders_of_a_combination_are_loaded_one_after_the_other(scored, standing, tmp_path):
  """PEFT has one type at a time: what is in weights is merged, what stands before the text is put over it."""
  folder, params, config = scored
  parts = [
    AdapterConfig(method=standing, num_virtual_tokens=4, modules_to_save=("score",)),
    AdapterConfig(r=3),
  ]
  chosen = adapters.together(parts)
  adapter = moved(adapters.init(jax.random.key(0), params, chosen)[1], size=0.2)
  peft_format.save(tmp_path / "a", adapter, chosen, config)
  load = lambda model, path: quiet(peft.PeftModel.from_pretrained, model, path).eval()
  merged = load(base_model(folder), tmp_path / "a" / "lora").merge_and_unload()
  model = load(merged, tmp_path / "a")
  tokens = np.asarray(families.tokens(2, 12))
  close(scores_of(params, adapter, tokens, config), theirs_of(model, tokens))
