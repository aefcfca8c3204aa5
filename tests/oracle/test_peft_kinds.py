"""VeRA, AdaLoRA and (IA)3 against PEFT: logits and gradients on the same tensors, files both ways, counts, merging."""

import contextlib
import copy
import io
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from posttrain_jax import adapters
from posttrain_jax.adapters import AdapterConfig, peft_format
from posttrain_jax.adapters.config import full_name
from posttrain_jax.core import tree
from posttrain_jax.models import decoder, hf
from tests.adapters.kinds import moved
from tests.models import families
from tests.oracle.pefts import close, logits_of, quiet, torch_logits

pytestmark = pytest.mark.oracle

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADALORA = dict(init_r=5, target_r=3, lora_alpha=7, total_step=10, tinit=1, tfinal=2)
# name -> (family, PEFT's config, the method here); qwen2 and llama_biased have biases, which (IA)3 scales
CASES = {
  "vera": ("llama", peft.VeraConfig(r=6, target_modules=SEVEN), "vera"),
  "vera_some": (
    "qwen2",
    peft.VeraConfig(r=40, target_modules=["k_proj", "down_proj"], layers_to_transform=[0, 2]),
    "vera",
  ),
  "vera_head": (
    "llama",
    peft.VeraConfig(r=6, target_modules=["lm_head", "1.mlp.up_proj"], d_initial=0.3),
    "vera",
  ),
  "adalora": ("llama", peft.AdaLoraConfig(**ADALORA, target_modules=SEVEN), "adalora"),
  "adalora_some": (
    "qwen2",
    peft.AdaLoraConfig(
      **ADALORA, target_modules=SEVEN, exclude_modules=["layers.1.mlp.up_proj", "k_proj"]
    ),
    "adalora",
  ),
  "ia3": ("llama", peft.IA3Config(), "ia3"),
  "ia3_biased": (
    "qwen2",
    peft.IA3Config(
      target_modules=["q_proj", "k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "ia3",
  ),
  "ia3_all": (
    "llama_biased",
    peft.IA3Config(target_modules=SEVEN, feedforward_modules=["o_proj", "down_proj"]),
    "ia3",
  ),
  "ia3_some": (
    "llama_biased",
    peft.IA3Config(
      target_modules=["model.layers.2.self_attn.v_proj", "model.layers.0.mlp.down_proj"],
      feedforward_modules=["model.layers.0.mlp.down_proj"],
    ),
    "ia3",
  ),
  "ia3_expression": (
    "llama",
    peft.IA3Config(
      target_modules=r".*\.(0|1)\..*(k_proj|up_proj)", feedforward_modules=".*up_proj"
    ),
    "ia3",
  ),
}
every_case = pytest.mark.parametrize("name", CASES)


def base_model(folder):
  return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def reference(folder, config, seed=0):
  """A PEFT model with what it trains random, as after training."""
  # PEFT writes into its config
  model = quiet(peft.get_peft_model, base_model(folder), copy.deepcopy(config))
  torch.manual_seed(seed)
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.requires_grad:
        parameter.add_(0.3 * torch.randn(parameter.shape))
  return model.eval()


def counted(model):
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    model.print_trainable_parameters()
  return out.getvalue().strip()


@pytest.fixture
def case(request, folders):
  """(folder, params, config, PEFT's model) of a case."""
  family, config, _ = CASES[request.getfixturevalue("name")]
  folder, params, model_config = folders(family)
  return folder, params, model_config, reference(folder, config)


@every_case
def test_an_adapter_made_by_peft_gives_equal_logits_here(name, case, tmp_path):
  _, params, config, model = case
  quiet(model.save_pretrained, tmp_path)
  adapter, found = peft_format.load(tmp_path, params, config)
  assert found.method == CASES[name][2]
  tokens = families.tokens(2, 20)
  theirs = torch_logits(model, tokens)
  close(logits_of(params, adapter, tokens, config), theirs)
  assert np.abs(theirs - torch_logits(model.unload(), tokens)).max() > 0.1  # the adapter acts


@every_case
def test_an_adapter_made_here_gives_equal_logits_in_peft(name, folders, tmp_path):
  family, theirs, method = CASES[name]
  folder, params, config = folders(family)
  wanted = ours_of(theirs, method)
  _, adapter = adapters.init(jax.random.key(0), params, wanted)
  adapter = moved(adapter)
  peft_format.save(tmp_path / "a", adapter, wanted, config, base_name=str(folder))
  with warnings.catch_warnings():
    warnings.simplefilter("error", RuntimeWarning)
    warnings.filterwarnings("error", message=".*missing adapter keys.*")
    model = peft.PeftModel.from_pretrained(base_model(folder), tmp_path / "a").eval()
  tokens = families.tokens(2, 20)
  close(logits_of(params, adapter, tokens, config), torch_logits(model, tokens))
  quiet(model.save_pretrained, tmp_path / "again")
  again, _ = peft_format.load(tmp_path / "again", params, config)
  saved, _ = peft_format.load(tmp_path / "a", params, config)
  jax.tree.map(np.testing.assert_array_equal, again, saved)


def ours_of(theirs, method):
  """The AdapterConfig of a PEFT config."""
  fields = {"target_modules", "exclude_modules", "feedforward_modules", "layers_to_transform", "r"}
  fields |= {"d_initial", "lora_alpha", *ADALORA}
  own = {name: v for name, v in vars(theirs).items() if name in fields and v is not None}
  if method != "vera":
    own.pop("r", None)
  if method == "ia3":
    own.setdefault("target_modules", ["k_proj", "v_proj", "down_proj"])
  if own.get("target_modules") == set(SEVEN) and "exclude_modules" not in own:
    own["target_modules"] = "all-linear"
  return AdapterConfig(method=method, **own)


@every_case
def test_gradients_equal_pefts(name, case, tmp_path):
  _, params, config, model = case
  quiet(model.save_pretrained, tmp_path)
  adapter, _ = peft_format.load(tmp_path, params, config)
  tokens = families.tokens(2, 20)
  model(torch.tensor(tokens)).logits.square().mean().backward()

  @jax.jit
  @jax.grad
  def gradient(part, fixed):
    bound = adapters.bind(params, tree.combine(part, fixed))
    return jnp.square(decoder.forward(bound, jnp.asarray(tokens), config)).mean()

  part, fixed = tree.partition(adapter)
  slopes = tree.flatten(gradient(part, fixed))
  names_at = {path: tree.expand(path, (config.num_layers,)) for path in slopes}
  theirs = {k: p.grad.numpy() for k, p in model.named_parameters() if p.requires_grad}
  tensors = {"lambda_b": "vera_lambda_b", "lambda_d": "vera_lambda_d", "gain": "ia3_l"}
  tensors |= {"a": "lora_A", "b": "lora_B", "e": "lora_E"}
  seen = 0
  for path, node in slopes.items():
    for field in getattr(node, "TRAINED", ()):
      array = np.asarray(getattr(node, field))
      array = array if path.startswith("layers/") else array[None]
      for layer, module in enumerate(names_at[path]):
        key = f"base_model.model.{full_name(module)}.{tensors[field]}.default"
        if key in theirs:
          close(array[layer].T.reshape(theirs[key].shape), theirs[key])
          seen += 1
        else:
          assert not array[layer].any(), key  # a layer that is not adapted
  assert seen == len(theirs) > 0


@every_case
def test_merge_equals_pefts(name, case, tmp_path):
  _, params, config, model = case
  quiet(model.save_pretrained, tmp_path)
  adapter, _ = peft_format.load(tmp_path, params, config)
  hf.save(tmp_path / "ours", adapters.merge(params, adapter), config)
  ours = base_model(tmp_path / "ours").state_dict()
  theirs = quiet(model.merge_and_unload).state_dict()
  assert ours.keys() == theirs.keys()
  for key, tensor in theirs.items():
    close(ours[key].numpy(), tensor.numpy(), rtol=2e-6)


@every_case
def test_the_counts_are_pefts(name, case, folders):
  _, params, _, model = case
  wanted = ours_of(*CASES[name][1:])
  _, adapter = adapters.init(jax.random.key(0), params, wanted)
  trainable, total = model.get_nb_trainable_parameters()
  assert adapters.count(adapter) == trainable
  if wanted.method != "adalora":  # PEFT counts one `ranknum` a module among all parameters
    assert adapters.summary(params, adapter) == counted(model)
  else:
    modules = sum("ranknum" in key for key, _ in model.named_parameters())
    assert tree.size(params) + trainable + modules == total


def test_projections_are_drawn_from_pefts_distributions(folders):
  folder, params, _ = folders("llama")
  model = quiet(
    peft.get_peft_model, base_model(folder), peft.VeraConfig(r=200, target_modules=SEVEN)
  )
  _, adapter = adapters.init(jax.random.key(0), params, AdapterConfig(method="vera", r=200))
  for ours, theirs in (
    (adapter["shared"]["vera"].a.T, model.base_model.vera_A["default"]),
    (adapter["shared"]["vera"].b.T, model.base_model.vera_B["default"]),
  ):
    assert ours.shape == theirs.shape
    assert float(jnp.abs(ours).max()) == pytest.approx(float(theirs.abs().max()), rel=0.01)
    assert float(jnp.std(ours)) == pytest.approx(float(theirs.std()), rel=0.03)


def test_initial_factors_of_adalora_are_drawn_from_pefts_distribution(folders):
  folder, params, _ = folders("llama")
  options = dict(ADALORA, init_r=24)
  model = quiet(
    peft.get_peft_model,
    base_model(folder),
    peft.AdaLoraConfig(**options, target_modules=["q_proj"]),
  )
  theirs = model.base_model.model.model.layers[0].self_attn.q_proj
  wanted = AdapterConfig(method="adalora", **options, target_modules=["q_proj"])
  node = adapters.init(jax.random.key(0), params, wanted)[1]["layers"]["self_attn"]["q_proj"]
  node = node["weight"]
  for ours, other in ((node.a, theirs.lora_A), (node.b, theirs.lora_B)):
    assert float(jnp.std(ours)) == pytest.approx(float(other["default"].detach().std()), rel=0.1)
  assert not node.e.any()
  assert not theirs.lora_E["default"].any()
  assert float(node.scale[0]) == pytest.approx(7 / (24 + 1e-5), rel=1e-6)


def test_projections_that_are_left_to_torch_are_refused(folders, tmp_path):
  folder, params, config = folders("llama")
  options = quiet(peft.VeraConfig, r=6, target_modules=SEVEN, save_projection=False)
  quiet(reference(folder, options).save_pretrained, tmp_path)
  with pytest.raises(ValueError, match=r"no base_model.vera_A and no .*save_projection=True"):
    peft_format.load(tmp_path, params, config)


def test_a_schedule_without_pruning_is_refused_by_both():
  with pytest.raises(ValueError, match="budgeting phase"):
    peft.AdaLoraConfig(total_step=10, tinit=4, tfinal=6)
  wanted = AdapterConfig(method="adalora", tinit=4, tfinal=6)
  with pytest.raises(ValueError, match=r"tinit=4 and tfinal=6 leave none of 10 steps to prune in"):
    adapters.hooks(wanted, 10)


# --- AdaLoRA's allocation ---------------------------------------------------------------------------------------------


SCHEDULES = {
  "every step": dict(tinit=2, tfinal=3, deltaT=1),
  "every third step": dict(tinit=1, tfinal=2, deltaT=3),
  "to the last step": dict(tinit=0, tfinal=0, deltaT=1),
}


def with_gradients(model, step, weight):
  """The orthogonality penalty's gradient and a random one beside it, which differs by orders from rank to rank."""
  generator = torch.Generator().manual_seed(step)
  penalty = 0.0
  factors = [(n, p) for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]
  for name, p in factors:
    square = p @ p.T if "lora_A" in name else p.T @ p
    penalty = penalty + torch.norm(square - torch.eye(len(square)), p="fro")
  model.zero_grad()
  (weight * penalty / len(factors)).backward()
  for p in model.parameters():
    if p.requires_grad:
      size = 10 ** (2 * torch.rand(p.shape, generator=generator) - 2)
      noise = torch.randn(p.shape, generator=generator) * size
      p.grad = noise if p.grad is None else p.grad + noise


@pytest.mark.parametrize(
  ("name", "schedule"),
  [("adalora", schedule) for schedule in SCHEDULES] + [("adalora_some", "every step")],
)
def test_the_rank_trajectory_is_pefts(name, schedule, folders):
  """Twelve steps of SGD by both on the same gradients: masks, budget, every e, step by step."""
  family, theirs, _ = CASES[name]
  folder, params, config = folders(family)
  steps, rate = 12, 0.05
  options = dict(ADALORA, **{**SCHEDULES[schedule], "total_step": steps})
  theirs = peft.AdaLoraConfig(
    **options, target_modules=theirs.target_modules, exclude_modules=theirs.exclude_modules
  )
  model = reference(folder, theirs).train()
  ours = ours_of(theirs, "adalora").replace(deltaT=options["deltaT"])
  made = adapters.init(jax.random.key(0), params, ours)[1]
  adapter = from_torch(made, model, lambda p: p.detach())
  hooks = adapters.hooks(ours, steps)
  after = jax.jit(hooks.after_update)
  penalised = jax.jit(jax.grad(lambda part, fixed: hooks.penalty(tree.combine(part, fixed))))
  totals = []
  for step in range(1, steps + 1):
    with_gradients(model, step, weight=0.5)
    gradient = tree.partition(from_torch(adapter, model, lambda p: p.grad))[0]
    if step == 1:  # the part of the gradient that is the penalty's
      check_penalty(model, penalised(*tree.partition(adapter)), adapter)
    with torch.no_grad():
      for p in model.parameters():
        if p.requires_grad:
          p -= rate * p.grad
    model.base_model.update_and_allocate(step)
    part, fixed = tree.partition(adapter)
    part = jax.tree.map(lambda p, g: p - rate * g, part, gradient)
    adapter = after(tree.combine(part, fixed), gradient, step - 1)
    pattern = model.peft_config["default"].rank_pattern
    for path, node in tree.items(adapter):
      for layer, module in enumerate(tree.expand(path, (config.num_layers,))):
        key = f"{full_name(module)}.lora_E.default"
        if not node.adapted[layer]:
          assert not node.mask[layer].any()
          continue
        if pattern is not None:
          assert (np.asarray(node.mask[layer]) > 0).tolist() == pattern[key], (step, module)
        e = dict(model.base_model.model.named_parameters())[key].detach().numpy()[:, 0]
        np.testing.assert_allclose(node.e[layer], e, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(np.asarray(node.e[layer]) == 0, e == 0)
    totals.append(int(sum(node.ranks().sum() for _, node in tree.items(adapter))))
  modules = sum(sum(node.adapted) for _, node in tree.items(adapter))
  assert totals[0] > totals[-1] == 3 * modules
  assert totals[options["tinit"] - 1 if options["tinit"] else 0] <= 5 * modules
  assert len(set(totals)) >= 3  # it fell in several steps


def from_torch(adapter, model, read):
  """adapter with its factors from PEFT's parameters (or their gradients)."""
  theirs = dict(model.base_model.model.named_parameters())

  def one(path, node):
    fields = {"a": np.array(node.a), "b": np.array(node.b), "e": np.array(node.e)}
    layers = len(node.adapted)
    for layer, module in enumerate(tree.expand(path, (layers,))):
      for field, array in fields.items():
        key = f"{full_name(module)}.lora_{field.upper()}.default"
        if key in theirs:
          array[layer] = read(theirs[key]).numpy().T.reshape(array[layer].shape)
        else:
          array[layer] = 0
    return node.replace(**{field: jnp.asarray(array) for field, array in fields.items()})

  return tree.unflatten((path, one(path, node)) for path, node in tree.items(adapter))


def check_penalty(model, ours, adapter):
  """The penalty's gradient against torch's, without the noise."""
  factors = [(n, p) for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]
  total = sum(
    torch.norm((p @ p.T if "lora_A" in n else p.T @ p) - torch.eye(5), p="fro") for n, p in factors
  )
  grads = torch.autograd.grad(0.5 * total / len(factors), [p for _, p in factors])
  by_name = {n.removeprefix("base_model.model."): g.numpy() for (n, _), g in zip(factors, grads)}
  seen = 0
  for path, node in tree.items(ours):
    for layer, module in enumerate(tree.expand(path, (len(tree.get(adapter, path).adapted),))):
      for field in "ab":
        key = f"{full_name(module)}.lora_{field.upper()}.default"
        array = np.asarray(getattr(node, field)[layer]).T
        if key in by_name:
          close(array, by_name[key])
          seen += 1
        else:
          assert not array.any()
  assert seen == len(factors)


def test_a_pruned_adapter_has_equal_files_both_ways(folders, tmp_path):
  """Ranks from none to all, in PEFT's rank_pattern."""
  folder, params, config = folders("llama")
  wanted = AdapterConfig(method="adalora", **ADALORA)
  adapter = moved(adapters.init(jax.random.key(0), params, wanted)[1])
  mask = jnp.asarray([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], jnp.float32)
  path = "layers/self_attn/q_proj/weight"
  node = tree.get(adapter, path)
  adapter = tree.put(adapter, path, node.replace(mask=mask, e=node.e * mask))
  peft_format.save(tmp_path / "a", adapter, wanted, config)
  written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["rank_pattern"]
  assert written["model.layers.0.self_attn.q_proj.lora_E"] == [True, False, True, False, False]
  model = quiet(peft.PeftModel.from_pretrained, base_model(folder), tmp_path / "a").eval()
  tokens = families.tokens(2, 20)
  ours = logits_of(params, adapter, tokens, config)
  close(ours, torch_logits(model, tokens))
  quiet(model.save_pretrained, tmp_path / "again")
  again, _ = peft_format.load(tmp_path / "again", params, config)
  close(logits_of(params, again, tokens, config), ours, rtol=1e-6)
  assert tree.get(again, path).ranks().tolist() == [2, 0, 5]
  assert adapters.count(again) == adapters.count(adapter)


def test_what_peft_pruned_has_equal_logits_here(folders, tmp_path):
  folder, params, config = folders("llama")
  options = peft.AdaLoraConfig(**ADALORA, target_modules=SEVEN)
  model = reference(folder, options).train()
  for step in range(1, 11):
    with_gradients(model, step, weight=0.5)
    model.base_model.update_and_allocate(step)
  quiet(model.eval().save_pretrained, tmp_path)
  adapter, _ = peft_format.load(tmp_path, params, config)
  assert sum(node.ranks().sum() for _, node in tree.items(adapter)) == 3 * 21
  tokens = families.tokens(2, 20)
  close(logits_of(params, adapter, tokens, config), torch_logits(model, tokens))
