"""Adapters merged here and by PEFT's add_weighted_adapter."""

import functools

import jax.numpy as jnp
import pytest

from posttrain_jax import merge
from posttrain_jax.adapters import combine, peft_format
from posttrain_jax.models import hf
from tests.models import families
from tests.oracle.pefts import close, logits_of, quiet, torch_logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.oracle

TARGETS = ["q_proj", "v_proj", "down_proj"]
WEIGHTS = [0.7, -0.4, 1.1]
NAMES = ["first", "second", "third"]


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
  """ranks -> (PEFT's model with three adapters, ours, params, config)."""
  folder = tmp_path_factory.mktemp("base") / "model"
  config, params = families.make("llama")
  hf.save(folder, params, config)
  params, config = hf.load(folder)

  @functools.cache
  def make(ranks):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wrapped, loaded = None, []
    for i, rank in enumerate(ranks):
      options = peft.LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=3 + i, target_modules=TARGETS
      )
      if wrapped is None:
        wrapped = quiet(peft.get_peft_model, model, options, adapter_name=NAMES[i])
      else:
        wrapped.add_adapter(NAMES[i], options)
    torch.manual_seed(1)
    with torch.no_grad():
      for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
          parameter.copy_(0.3 * torch.randn(parameter.shape))
    for i in range(len(ranks)):
      out = tmp_path_factory.mktemp("adapters")
      quiet(wrapped.save_pretrained, out, selected_adapters=[NAMES[i]])
      loaded.append(peft_format.load(out / NAMES[i], params, config)[0])
    return wrapped.eval(), loaded, params, config

  return make


def compare(model, name, ours, params, config):
  model.set_adapter(name)
  tokens = families.tokens(2, 20)
  close(logits_of(params, ours, tokens, config), torch_logits(model, tokens), 2e-4)
  model.set_adapter(NAMES[0])
  model.delete_adapter(name)


def test_side_by_side_is_pefts_cat(setup):
  model, loaded, params, config = setup((2, 5, 3))
  model.add_weighted_adapter(NAMES, WEIGHTS, "m", combination_type="cat")
  compare(model, "m", combine.concatenate(loaded, weights=WEIGHTS)[0], params, config)


@pytest.mark.parametrize("rank", [2, 6])
def test_a_chosen_rank_is_pefts_svd(rank, setup):
  model, loaded, params, config = setup((2, 5, 3))
  options = dict(combination_type="svd", svd_rank=rank)
  model.add_weighted_adapter(NAMES, WEIGHTS, "m", **options)
  made, _ = combine.compress(loaded, rank=rank, weights=WEIGHTS)
  compare(model, "m", made, params, config)


SUM = lambda arrays, weights: sum(w * x for w, x in zip(weights, arrays))


@pytest.mark.parametrize("how", ["linear", "ties"])
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_factors_apart_are_pefts(how, sign, setup):
  model, loaded, params, config = setup((4, 4, 4))
  options = dict(combination_type=how)
  operator = SUM
  if how == "ties":
    options |= dict(density=0.4, majority_sign_method=sign)
    operator = functools.partial(ties, election={"total": "sum", "frequency": "count"}[sign])
  model.add_weighted_adapter(NAMES, WEIGHTS, "m", **options)
  made, _ = combine.factors(loaded, operator=operator, weights=WEIGHTS)
  compare(model, "m", made, params, config)


def test_ties_of_the_changes_is_pefts_ties_svd(setup):
  model, loaded, params, config = setup((4, 4, 4))
  options = dict(combination_type="ties_svd", svd_rank=5, density=0.4)
  model.add_weighted_adapter(NAMES, WEIGHTS, "m", **options)
  made, _ = combine.compress(loaded, rank=5, operator=ties, weights=WEIGHTS)
  compare(model, "m", made, params, config)


def ties(arrays, weights, election="sum"):
  options = dict(density=0.4, semantics="peft", election=election)
  zero = jnp.zeros_like(arrays[0])
  return merge.OPERATORS["ties"](arrays, base=zero, weights=weights, **options)
