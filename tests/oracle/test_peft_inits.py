"""PEFT and we: what PiSSA, OLoRA and LoftQ take out of the same matrices, what is exported, and DoRA under dropout."""

import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import adapters
from posttrain_jax.adapters import AdapterConfig, inits, peft_format
from posttrain_jax.core import tree, weight
from posttrain_jax.core.weight import Adapted
from posttrain_jax.models import hf
from posttrain_jax.quant import int8, nf4
from tests.adapters.cases import trained
from tests.models import families
from tests.oracle.pefts import close, logits_of, quiet, torch_logits
from tests.oracle.test_peft import SEVEN

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
loftq_utils = pytest.importorskip("peft.utils.loftq_utils")

pytestmark = pytest.mark.oracle
OPTIONS = dict(r=4, lora_alpha=6, target_modules=SEVEN)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """(folder, params, config) of a tiny model."""
  folder = tmp_path_factory.mktemp("base") / "model"
  config, params = families.make("llama")
  hf.save(folder, params, config)
  return folder, *hf.load(folder)


def model_of(folder):
  return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def signed(ours, theirs):
  """theirs [rank, n] with the signs of ours, row by row."""
  return np.sign(np.sum(ours * theirs, axis=1, keepdims=True)) * theirs


@pytest.mark.parametrize("how", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_factors_and_bases_are_pefts(base, how, rslora):
  folder, params, config = base
  options = dict(OPTIONS, init_lora_weights=how, use_rslora=rslora, rank_pattern={"down_proj": 7})
  model = quiet(peft.get_peft_model, model_of(folder), peft.LoraConfig(**options))
  changed, adapter = adapters.init(jax.random.key(0), params, AdapterConfig(**options))
  layers = model.base_model.model.model.layers
  seen = 0
  for path, node in tree.items(adapter):
    for i, (a, b) in enumerate(node.split()):
      module = layers[i].get_submodule(
        path.removeprefix("layers/").replace("/", ".").removesuffix(".weight")
      )
      theirs = [getattr(module, f"lora_{x}")["default"].weight.detach().numpy() for x in "AB"]
      rtol = 1e-4
      if (
        how == "pissa"
      ):  # two float32 decompositions may differ by the rounding over the gap of singular values
        values = np.linalg.svd(np.asarray(tree.get(params, path)[i], np.float64), compute_uv=False)
        gap = np.min(values[: a.shape[1]] - values[1 : a.shape[1] + 1])
        rtol += 10 * np.finfo(np.float32).eps * values[0] / gap
        assert rtol < 5e-3
      close(a.T, signed(a.T, theirs[0]), rtol)
      close(b, signed(b, theirs[1].T), rtol)
      left = weight.layer(tree.get(changed, path), i)
      close(left, module.base_layer.weight.detach().numpy().T, rtol)
      seen += 1
  assert seen == 21
  tokens = families.tokens(2, 20)
  close(logits_of(changed, adapter, tokens, config), torch_logits(model.eval(), tokens))


def test_fast_pissa_is_as_near_as_pefts(base):
  """Both draw a subspace of their own: the distances from the matrix are compared, not the factors."""
  folder, params, _ = base
  options = dict(OPTIONS, init_lora_weights="pissa_niter_16")
  torch.manual_seed(0)
  model = quiet(peft.get_peft_model, model_of(folder), peft.LoraConfig(**options))
  changed, _ = adapters.init(jax.random.key(0), params, AdapterConfig(**options))
  for i, layer in enumerate(model.base_model.model.model.layers):
    theirs = layer.mlp.up_proj.base_layer.weight.detach().numpy()
    ours = np.asarray(changed["layers"]["mlp"]["up_proj"]["weight"][i])
    # ours draws eight columns more than it keeps
    assert 0.98 < np.linalg.norm(ours) / np.linalg.norm(theirs) < 1.0001


def pefts_loftq(w, bits, rank, turns):
  """(base, a, b) by PEFT's own lines, which name an accelerator to compute on, on the CPU."""
  source = inspect.getsource(loftq_utils.loftq_init)
  computed_on = '"xpu" if is_xpu_available() else "cuda"'
  assert computed_on in source
  scope = dict(vars(loftq_utils))
  exec(source.replace(computed_on, '"cpu"'), scope)
  made = scope["loftq_init"](torch.tensor(w.T.copy()), bits, rank, turns)
  base, a, b = (np.asarray(x.detach()) for x in made)
  return base.T, a.T, b.T


@pytest.mark.parametrize("turns", [1, 2, 5])
@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_is_pefts(bits, turns):
  w = np.random.default_rng(0).standard_normal((128, 96)).astype(np.float32)
  left, values, right = np.linalg.svd(w, full_matrices=False)
  w = (left * values * 0.95 ** np.arange(96)) @ right
  if bits == 4:
    store = lambda w: nf4.quantize(w, double_quant=False)
  else:
    store = int8.quantize
  options = dict(r=8, lora_alpha=8, init_lora_weights="loftq", loftq_iter=turns)
  base, node = inits.init(
    jax.random.key(0),
    jnp.asarray(w),
    ["lm_head"],
    AdapterConfig(target_modules=["lm_head"], **options),
    store,
  )
  theirs = pefts_loftq(w, bits, 8, turns)
  # bitsandbytes rounds to float16 before 8 bits; in 4 a code may tip over from turn to turn, which the next answers
  kept, product = (0.01, 2.0) if bits == 8 else (1e-5, 1e-4) if turns == 1 else (0.05, 0.3)
  distance = lambda x, y: np.linalg.norm(np.asarray(x) - y) / np.linalg.norm(y)
  assert distance(weight.dense(base), theirs[0]) < kept
  assert distance(node.a @ node.b, theirs[1] @ theirs[2]) < product
  lost = lambda base, product: np.linalg.norm(w - np.asarray(base) - np.asarray(product))
  assert lost(weight.dense(base), node.a @ node.b) == pytest.approx(
    lost(theirs[0], theirs[1] @ theirs[2]), rel=0.01
  )


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_8", "olora"])
@pytest.mark.parametrize("dora", [False, True])
def test_an_export_gives_peft_equal_logits_on_the_original(base, how, dora, tmp_path):
  folder, params, config = base
  ours = AdapterConfig(
    init_lora_weights=how, use_dora=dora, exclude_modules=["1.mlp.up_proj"], **OPTIONS
  )
  changed, adapter = adapters.init(jax.random.key(0), params, ours)
  adapter = trained(adapter)
  peft_format.save(tmp_path / "a", adapter, ours, config, base_name=str(folder))
  model = quiet(peft.PeftModel.from_pretrained, model_of(folder), tmp_path / "a").eval()
  written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
  assert (written["init_lora_weights"], written["r"], written["lora_alpha"]) == (True, 8, 12)
  tokens = families.tokens(2, 20)
  close(torch_logits(model, tokens), logits_of(changed, adapter, tokens, config), rtol=5e-4)


def test_what_peft_took_out_of_its_base_is_refused(base, tmp_path):
  folder, params, config = base
  options = peft.LoraConfig(init_lora_weights="pissa", **OPTIONS)
  quiet(peft.get_peft_model, model_of(folder), options).save_pretrained(tmp_path)
  with pytest.raises(ValueError, match=r"'pissa' is not supported: it moves .*path_initial_model"):
    peft_format.load(tmp_path, params, config)


def test_dora_under_dropout_is_pefts():
  """One layer and one mask: what is dropped reaches the change alone."""
  key = jax.random.key(0)
  options = dict(r=4, lora_alpha=6, lora_dropout=0.5, use_dora=True)
  holder = torch.nn.Sequential()
  holder.add_module("lm_head", torch.nn.Linear(64, 24, bias=False))
  model = quiet(peft.get_peft_model, holder, peft.LoraConfig(target_modules=["lm_head"], **options))
  layer = model.base_model.model.lm_head
  torch.manual_seed(0)
  with torch.no_grad():
    for parameter in layer.parameters():
      parameter.copy_(torch.randn(parameter.shape))
  w = jnp.asarray(layer.base_layer.weight.detach().numpy().T)
  config = AdapterConfig(target_modules=["lm_head"], **options)
  _, node = inits.init(key, w, ["lm_head"], config)
  node = node.replace(
    a=jnp.asarray(layer.lora_A["default"].weight.detach().numpy().T),
    b=jnp.asarray(layer.lora_B["default"].weight.detach().numpy().T),
    magnitude=jnp.asarray(layer.lora_magnitude_vector["default"].weight.detach().numpy()),
  )
  x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
  kept = torch.tensor(np.asarray(jax.random.bernoulli(key, 0.5, x.shape)))

  class Fixed(torch.nn.Module):
    def forward(self, x):
      return torch.where(kept, x / 0.5, 0)

  layer.lora_dropout["default"] = Fixed()
  model.train()
  theirs = layer(torch.tensor(x)).detach().numpy()
  close(Adapted(w, node, key).apply(x), theirs, rtol=1e-5)
  model.eval()
  close(Adapted(w, node).apply(x), layer(torch.tensor(x)).detach().numpy(), rtol=1e-5)
