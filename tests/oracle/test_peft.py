"""PEFT and we: the same targets, files, logits, gradients, merges and counts."""

import contextlib
import io
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import adapters
from posttrain_jax.adapters import AdapterConfig, peft_format
from posttrain_jax.adapters.codecs import lora as codec
from posttrain_jax.adapters.codecs import modules
from posttrain_jax.adapters.config import full_name
from posttrain_jax.core import tree
from posttrain_jax.models import decoder, fetch, hf
from tests.adapters.cases import trained
from tests.models import families
from tests.oracle.pefts import close, logits_of, quiet, torch_logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.oracle

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# What one may ask of LoRA: PEFT's own keyword arguments.
CONFIGS = {
  "seven_modules": dict(r=4, lora_alpha=8, target_modules=SEVEN),
  "all_linear": dict(r=2, lora_alpha=3, target_modules="all-linear"),
  "patterns": dict(
    r=4,
    lora_alpha=8,
    target_modules=SEVEN,
    # In sorted order: PEFT sorts patterns as it saves, and then cannot load what depended on another order.
    rank_pattern={r"^model\.layers\.0\..*": 3, "down_proj": 2, r"layers\.1\.self_attn\.q_proj": 7},
    alpha_pattern={"q_proj": 5, r".*mlp\.up_proj": 20},
  ),
  "rslora": dict(
    r=4,
    lora_alpha=8,
    target_modules=["q_proj", "v_proj"],
    use_rslora=True,
    rank_pattern={"v_proj": 6},
  ),
  "some_layers": dict(r=4, target_modules=["q_proj", "o_proj"], layers_to_transform=[0, 2]),
  "embedding_and_head": dict(
    r=4,
    lora_alpha=6,
    target_modules=["q_proj", "embed_tokens", "lm_head"],
    alpha_pattern={"lm_head": 2},
  ),
  "embedding_alone": dict(r=4, lora_alpha=6, target_modules=["embed_tokens"]),
  "head_and_a_layer": dict(r=4, target_modules=["up_proj", "lm_head"], layers_to_transform=[1]),
  "expression": dict(r=4, target_modules=r".*\.(0|1)\..*(q_proj|down_proj)"),
  "without_some": dict(
    r=4, target_modules=SEVEN, exclude_modules=["layers.1.mlp.up_proj", "k_proj"]
  ),
  "dora": dict(
    r=4,
    lora_alpha=8,
    target_modules=SEVEN,
    use_dora=True,
    use_rslora=True,
    exclude_modules=["layers.1.mlp.up_proj", "k_proj"],
    rank_pattern={"down_proj": 2},
  ),
  "dora_of_both_ends": dict(
    r=4, lora_alpha=6, target_modules=["q_proj", "embed_tokens", "lm_head"], use_dora=True
  ),
}


# Order decides here, and PEFT's own files lose it: made here, it must survive.
ORDERED = dict(
  r=4,
  target_modules=SEVEN,
  rank_pattern={"q_proj": 2, ".*_proj": 3},
  alpha_pattern={"up_proj": 5, r"mlp\..*": 6},
)


def saved(family, tmp_path_factory):
  """(folder, params, config) of a tiny model."""
  folder = tmp_path_factory.mktemp("base") / "model"
  config, params = families.make(family)
  hf.save(folder, params, config)
  return folder, *hf.load(folder)


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
  """A model whose head is its own."""
  return saved("llama", tmp_path_factory)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
  """A model whose head is its embedding."""
  return saved("llama3", tmp_path_factory)


# where a tied head matters
ENDS = [
  "embedding_and_head",
  "embedding_alone",
  "head_and_a_layer",
  "dora_of_both_ends",
]


@pytest.fixture
def base(request):
  return request.getfixturevalue(request.param)


def over_bases(names):
  """The configs on a model with its own head, and on a tied one where that makes a difference."""
  cases = [("apart", name) for name in names] + [("tied", name) for name in names if name in ENDS]
  return pytest.mark.parametrize(("base", "name"), cases, indirect=["base"])


def reference(folder, **kwargs):
  """A PEFT model with every factor random, as after training."""
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  model = quiet(peft.get_peft_model, model, peft.LoraConfig(task_type="CAUSAL_LM", **kwargs))
  torch.manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.requires_grad:
        parameter.copy_(0.2 * torch.randn(parameter.shape))
  return model.eval()


@over_bases(CONFIGS)
def test_an_adapter_made_by_peft_gives_equal_logits_here(base, name, tmp_path):
  folder, params, config = base
  model = reference(folder, **CONFIGS[name])
  quiet(model.save_pretrained, tmp_path)
  adapter, _ = peft_format.load(tmp_path, params, config)
  tokens = families.tokens(2, 20)
  ours = logits_of(params, adapter, tokens, config)
  theirs = torch_logits(model, tokens)
  close(ours, theirs)
  assert np.abs(theirs - torch_logits(model.unload(), tokens)).max() > 0.1  # the adapter acts


@over_bases([*CONFIGS, "ordered"])
def test_an_adapter_made_here_gives_equal_logits_in_peft(base, name, tmp_path):
  folder, params, config = base
  ours = AdapterConfig(**{**CONFIGS, "ordered": ORDERED}[name])
  _, adapter = adapters.init(jax.random.key(0), params, ours)
  adapter = trained(adapter)
  peft_format.save(tmp_path / "a", adapter, ours, config, base_name=str(folder))
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  with warnings.catch_warnings():
    warnings.simplefilter("error", RuntimeWarning)  # modules or tensors that do not fit the config
    warnings.filterwarnings("error", message=".*missing adapter keys.*")
    model = peft.PeftModel.from_pretrained(model, tmp_path / "a").eval()
  quiet(model.save_pretrained, tmp_path / "again")
  again, _ = peft_format.load(tmp_path / "again", params, config)
  jax.tree.map(np.testing.assert_array_equal, again, adapter)
  tokens = families.tokens(2, 20)
  logits = logits_of(params, adapter, tokens, config)
  close(logits, torch_logits(model, tokens))
  assert summary_of(model) == adapters.summary(params, adapter)


def test_ranks_and_scales_that_no_pattern_of_the_user_describes(apart, tmp_path):
  folder, params, config = apart
  ours = AdapterConfig(r=4, target_modules=["q_proj", "v_proj"])
  _, adapter = adapters.init(jax.random.key(0), params, ours)
  node = adapter["layers"]["self_attn"]["q_proj"]["weight"]
  mask = jnp.asarray([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], jnp.float32)  # pruned by hand
  node = node.replace(mask=mask, scale=jnp.asarray([1 / 3, 2.0, 0.7], jnp.float32))
  adapter = trained(tree.put(adapter, "layers/self_attn/q_proj/weight", node))
  peft_format.save(tmp_path / "a", adapter, ours, config)
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  model = quiet(peft.PeftModel.from_pretrained, model, tmp_path / "a")
  tokens = families.tokens(2, 20)
  logits = logits_of(params, adapter, tokens, config)
  close(logits, torch_logits(model.eval(), tokens))


def summary_of(model):
  for name, parameter in model.named_parameters():
    parameter.requires_grad = "lora_" in name
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    model.print_trainable_parameters()
  return out.getvalue().strip()


@over_bases(["patterns", "embedding_and_head", "dora", "dora_of_both_ends"])
def test_gradients_equal_peft(base, name, tmp_path):
  folder, params, config = base
  model = reference(folder, **CONFIGS[name])
  quiet(model.save_pretrained, tmp_path)
  adapter, _ = peft_format.load(tmp_path, params, config)
  tokens = families.tokens(2, 20)
  out = model(torch.tensor(tokens)).logits
  out.square().mean().backward()

  @jax.jit
  def loss(trained_part, fixed):
    bound = adapters.bind(params, tree.combine(trained_part, fixed))
    return jnp.square(decoder.forward(bound, jnp.asarray(tokens), config)).mean()

  gradients = jax.grad(loss)(*tree.partition(adapter))
  theirs = {
    key.replace(".default", "").replace("_vector.weight", "_vector"): parameter.grad.numpy()
    for key, parameter in model.named_parameters()
    if parameter.requires_grad
  }
  names_at = {path: tree.expand(path, (config.num_layers,)) for path in tree.flatten(adapter)}
  seen = 0
  for path, node in tree.items(tree.combine(gradients, tree.partition(adapter)[1])):
    for module, part in zip(names_at[path], codec._split(node)):
      prefix = f"base_model.model.{full_name(module)}"
      for field, ours in part.items():
        tensor = {**codec.NAMES, **codec.MAGNITUDE}[field][module == "embed_tokens"]
        close(ours.T, theirs[f"{prefix}.{tensor}"])
        seen += 1
  assert seen == len(theirs)


@over_bases(
  ["patterns", "rslora", "some_layers", "embedding_and_head", "dora", "dora_of_both_ends"]
)
def test_merge_equals_peft(base, name, tmp_path):
  folder, params, config = base
  if config.tied:
    # PEFT adds both updates to the one shared tensor, so its merged model is not its bound one; ours is.
    folder = tmp_path / "untied"
    params = {**params, "lm_head": {"weight": params["embed_tokens"]["weight"].T}}
    hf.save(folder, params, config)
    params, config = hf.load(folder)
  model = reference(folder, **CONFIGS[name])
  quiet(model.save_pretrained, tmp_path)
  adapter, _ = peft_format.load(tmp_path, params, config)
  hf.save(tmp_path / "ours", adapters.merge(params, adapter), config)
  ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
  theirs = quiet(model.merge_and_unload).state_dict()
  assert ours.keys() == theirs.keys()
  for key, tensor in theirs.items():
    close(ours[key].numpy(), tensor.numpy(), rtol=1e-6)


def test_merged_model_with_an_adapted_tied_embedding_is_the_bound_model(tmp_path):
  config, params = families.make("llama3")
  _, adapter = adapters.init(
    jax.random.key(0), params, AdapterConfig(r=4, target_modules=["embed_tokens"])
  )
  adapter = trained(adapter)
  hf.save(tmp_path / "merged", adapters.merge(params, adapter), config)
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
  tokens = families.tokens(2, 20)
  bound = logits_of(params, adapter, tokens, config)
  close(bound, torch_logits(model, tokens))


# Target specs: what PEFT adapts of a Llama, AdapterConfig.targets must adapt.
TARGETS = {
  "short names": dict(target_modules=["q_proj", "down_proj"]),
  "all-linear": dict(target_modules="all-linear"),
  "partly named": dict(target_modules=["1.mlp.up_proj", "self_attn.q_proj"]),
  "no half words": dict(target_modules=["q_proj", "proj", "_proj"]),
  "full names": dict(target_modules=["model.layers.1.mlp.up_proj", "lm_head"]),
  "full names despite layers": dict(
    target_modules=["model.layers.1.mlp.up_proj", "lm_head", "q_proj"], layers_to_transform=[0]
  ),
  "embedding needs its full name with layers": dict(
    target_modules=["embed_tokens", "q_proj"], layers_to_transform=[0]
  ),
  "layers": dict(target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 2]),
  "one layer": dict(target_modules=["q_proj"], layers_to_transform=1),
  "no layers is all layers": dict(target_modules=["q_proj"], layers_to_transform=[]),
  "expression": dict(target_modules=r".*\.self_attn\.[qk]_proj"),
  "expression over the whole name": dict(target_modules=r"model\.layers\.2\..*_proj"),
  "expression with the head": dict(target_modules=r"lm_head|.*q_proj"),
  "expression inside the model": dict(target_modules=r"model\..*(proj|embed_tokens|lm_head)"),
  "excluded name": dict(target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"]),
  "excluded layer": dict(target_modules=SEVEN, exclude_modules=["layers.1.mlp.up_proj"]),
  "excluded expression": dict(target_modules=SEVEN, exclude_modules=r".*layers\.[01]\..*"),
  "embedding and head": dict(target_modules=["embed_tokens", "lm_head"]),
}


@pytest.fixture(scope="module")
def shell():
  config = transformers.AutoConfig.for_model(**families.FAMILIES["llama"])
  return lambda: transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", TARGETS)
def test_peft_targets_the_same_modules(shell, name):
  model = quiet(peft.get_peft_model, shell(), peft.LoraConfig(r=2, **TARGETS[name]))
  theirs = set(model.base_model.targeted_module_names)
  config = AdapterConfig(r=2, **TARGETS[name])
  names = modules.all_names(families.make("llama")[1])
  ours = {full_name(name) for name in names if config.targets(name)}
  assert ours == theirs


@pytest.mark.parametrize("name", ["patterns", "rslora", "embedding_and_head"])
def test_peft_gives_the_same_ranks_and_scales(shell, name):
  model = quiet(peft.get_peft_model, shell(), peft.LoraConfig(**CONFIGS[name]))
  config = AdapterConfig(**CONFIGS[name])
  layers = {k: m for k, m in model.base_model.model.named_modules() if hasattr(m, "lora_alpha")}
  assert layers
  for full, layer in layers.items():
    module = full.removeprefix("model.")
    assert config.rank(module) == layer.r["default"], module
    assert config.scale(module) == pytest.approx(layer.scaling["default"], rel=1e-12), module


def test_initial_factors_are_drawn_from_the_same_distributions(shell):
  """Bounds, spread and zeros, module by module."""
  for how in (True, "gaussian"):
    options = dict(r=16, target_modules=["q_proj", "embed_tokens"], init_lora_weights=how)
    model = quiet(peft.get_peft_model, shell(), peft.LoraConfig(**options))
    params = families.make("llama")[1]
    _, adapter = adapters.init(jax.random.key(0), params, AdapterConfig(**options))
    theirs = model.base_model.model.model
    q, embedding = theirs.layers[0].self_attn.q_proj, theirs.embed_tokens
    for ours, other in (
      (adapter["layers"]["self_attn"]["q_proj"]["weight"].a, q.lora_A["default"].weight),
      (adapter["layers"]["self_attn"]["q_proj"]["weight"].b, q.lora_B["default"].weight),
      (adapter["embed_tokens"]["weight"].a, embedding.lora_embedding_A["default"]),
      (adapter["embed_tokens"]["weight"].b, embedding.lora_embedding_B["default"]),
    ):
      ours, other = np.asarray(ours), other.detach().numpy()
      assert ours.std() == pytest.approx(other.std(), rel=0.1)
      if how is True and other.any() and other.std() < 0.5:
        assert np.abs(ours).max() == pytest.approx(np.abs(other).max(), rel=0.05)


def test_a_named_adapter_lies_one_folder_deeper(apart, tmp_path):
  folder, params, config = apart
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  options = peft.LoraConfig(r=3, target_modules=["q_proj"])
  quiet(peft.get_peft_model, model, options, adapter_name="sql").save_pretrained(tmp_path)
  assert (tmp_path / "sql" / "adapter_config.json").exists()
  _, found = peft_format.load(tmp_path, params, config)
  assert found.r == 3


def test_a_whole_bfloat16_model_trained_by_peft(apart, tmp_path):
  """PEFT stores the embedding of the base beside its adapter; rounding it is no other base."""
  folder, params, config = apart
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
  options = peft.LoraConfig(r=3, target_modules=["embed_tokens", "q_proj"])
  quiet(quiet(peft.get_peft_model, model, options).save_pretrained, tmp_path)
  adapter, _ = peft_format.load(tmp_path, params, config)
  assert adapter["embed_tokens"]["weight"].a.dtype == jnp.float32
  other = families.params(config, seed=1)
  with pytest.raises(ValueError, match=r"embed_tokens of its own .*another base"):
    peft_format.load(tmp_path, other, config)


def test_the_embedded_model(tmp_path):
  """Rank 16 on the seven linear modules: PEFT's line, logits and files, both ways."""
  folder = fetch.resolve("smollm2")
  params, config = hf.load("smollm2", dtype=jnp.float32)
  model = reference(folder, r=16, lora_alpha=32, target_modules=SEVEN)
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.requires_grad:
        parameter.mul_(0.1)  # a trained update is small beside the base
  quiet(model.save_pretrained, tmp_path / "theirs")
  adapter, found = peft_format.load(tmp_path / "theirs", params, config)
  assert adapters.summary(params, adapter) == summary_of(model)
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 32), dtype=np.int32)
  theirs = torch_logits(model, tokens)
  ours = logits_of(params, adapter, tokens, config)
  close(ours, theirs)
  peft_format.save(tmp_path / "ours", adapter, found, config, base_name=str(folder))
  written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
  assert written["target_modules"] == sorted(SEVEN)
  again = quiet(peft.PeftModel.from_pretrained, model.unload(), tmp_path / "ours")
  close(torch_logits(again.eval(), tokens), theirs, rtol=1e-6)
