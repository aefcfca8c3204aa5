"""Tiny transformers models of every family, and the helpers that compare them with ours."""

import functools

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: run `make oracle`")
transformers = pytest.importorskip("transformers")

from posttrain_jax.models import hf  # noqa: E402
from tests.models import families  # noqa: E402


def perturb(model, seed: int = 0):
  """Every parameter random: fresh norms are ones or zeros, and biases zeros, which hides mistakes."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in model.parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if parameter.ndim > 1:
        parameter.copy_(noise * 1.5 / families.FAMILIES["llama"]["hidden_size"] ** 0.5)
      else:
        parameter.add_(0.3 * noise)
  return model.eval()


@pytest.fixture(scope="session")
def tiny_model():
  """name, changes -> a random transformers model of a family of `tests.models.families`."""

  def make(name: str, **changes):
    config = transformers.AutoConfig.for_model(**{**families.FAMILIES[name], **changes})
    # Eager attention is the one that computes soft-caps.
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return perturb(model)

  return make


@pytest.fixture(scope="session")
def torch_logits():
  """model, tokens -> logits as a numpy array."""

  def run(model, tokens):
    with torch.no_grad():
      return model(input_ids=torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()

  return run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """family -> (folder, params, config) of a tiny model that transformers reads too."""

  @functools.cache
  def make(family):
    folder = tmp_path_factory.mktemp(family) / "model"
    config, params = families.make(family)
    hf.save(folder, params, config)
    return folder, *hf.load(folder)

  return make
