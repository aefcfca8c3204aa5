"""Soft prompts, prefixes, modules_to_save and mixed batches against PEFT: logits, gradients, files, texts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from posttrain_jax import adapters
from posttrain_jax.adapters import AdapterConfig, peft_format
from posttrain_jax.core import tree
from posttrain_jax.models import decoder, hf, rotary
from posttrain_jax.rollout import engine
from tests.adapters.kinds import moved
from tests.models import families
from tests.oracle.pefts import close, quiet

pytestmark = pytest.mark.oracle

SLOTS = 5
KINDS = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}
# grouped keys, tied heads, scaled embeddings, windows that end inside the prompt, rotations of two kinds
FAMILIES = ["llama", "llama3", "mistral", "qwen3", "gemma2", "gemma3"]
over_families = pytest.mark.parametrize("family", FAMILIES)
over_kinds = pytest.mark.parametrize("kind", KINDS)


def base_model(folder):
  # eager attention is the one that computes soft-caps
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager"
  )


def reference(folder, config, seed=0):
  """A PEFT model with what it trains random, as after training."""
  model = quiet(peft.get_peft_model, base_model(folder), config)
  randomise(model, seed)
  return model.eval()


def randomise(model, seed=0):
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.requires_grad:
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def config_of(kind):
  return KINDS[kind](task_type="CAUSAL_LM", num_virtual_tokens=SLOTS)


@functools.partial(jax.jit, static_argnames="config")
def logits_of(params, adapter, tokens, config):
  return decoder.forward(adapters.bind(params, adapter), tokens, config)


def theirs_of(model, tokens, **options):
  """PEFT puts a prompt's own positions in front."""
  with torch.no_grad():
    return model(torch.tensor(tokens), **options).logits.numpy()[:, -tokens.shape[1] :]


# --- soft prompts and prefixes ----------------------------------------------------------------------------------------


@over_families
@over_kinds
def test_theirs_gives_equal_logits_here(folders, family, kind, tmp_path):
  folder, params, config = folders(family)
  model = reference(folder, config_of(kind))
  quiet(model.save_pretrained, tmp_path)
  adapter, found = peft_format.load(tmp_path, params, config)
  assert (found.method, found.num_virtual_tokens) == (kind, SLOTS)
  tokens = families.tokens(2, 20)
  theirs = theirs_of(model, tokens)
  close(logits_of(params, adapter, tokens, config), theirs)
  assert np.abs(theirs - theirs_of(base_model(folder), tokens)).max() > 0.1
  trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
  assert adapters.count(adapter) == trained


@over_families
@over_kinds
def test_ours_gives_equal_logits_in_peft(folders, family, kind, tmp_path):
  folder, params, config = folders(family)
  chosen = AdapterConfig(method=kind, num_virtual_tokens=SLOTS)
  _, adapter = adapters.init(jax.random.key(0), params, chosen)
  peft_format.save(tmp_path / "a", adapter, chosen, config, base_name=str(folder))
  model = peft.PeftModel.from_pretrained(base_model(folder), tmp_path / "a").eval()
  tokens = families.tokens(2, 20)
  close(logits_of(params, adapter, tokens, config), theirs_of(model, tokens))
  quiet(model.save_pretrained, tmp_path / "again")
  again, _ = peft_format.load(tmp_path / "again", params, config)
  jax.tree.map(np.testing.assert_array_equal, again, adapter)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@over_kinds
def test_gradients_equal_peft(folders, family, kind, tmp_path):
  folder, params, config = folders(family)
  model = reference(folder, config_of(kind))
  quiet(model.save_pretrained, tmp_path)
  adapter, chosen = peft_format.load(tmp_path, params, config)
  tokens = families.tokens(2, 20)
  out = model(torch.tensor(tokens)).logits[:, -20:]
  out.square().mean().backward()

  @jax.jit
  @jax.grad
  def gradient(part, fixed):
    bound = adapters.bind(params, tree.combine(part, fixed))
    return jnp.square(decoder.forward(bound, jnp.asarray(tokens), config)).mean()

  trained, fixed = tree.partition(adapter)
  found = tree.combine(gradient(trained, fixed), fixed)
  peft_format.save(tmp_path / "gradient", found, chosen, config)
  stored = peft_format._read_tensors(tmp_path / "gradient" / peft_format.TENSORS)
  [theirs] = [p.grad.numpy() for p in model.parameters() if p.requires_grad]
  close(stored["prompt_embeddings"], theirs)


@pytest.mark.parametrize("family", ["llama", "llama3", "mistral"])
@over_kinds
def test_greedy_texts_equal_peft(folders, family, kind, tmp_path):
  folder, params, config = folders(family)
  model = reference(folder, config_of(kind))
  quiet(model.save_pretrained, tmp_path)
  adapter, _ = peft_format.load(tmp_path, params, config)
  bound = adapters.bind(params, adapter)
  for length in (4, 9):
    prompt = families.tokens(length, seed=length)
    out = quiet(
      model.generate,
      input_ids=torch.tensor(prompt[None]),
      attention_mask=torch.ones(1, length, dtype=torch.long),
      max_new_tokens=12,
      do_sample=False,
      eos_token_id=None,
    )
    found = engine.generate(bound, config, [prompt.tolist()], max_new_tokens=12)
    assert found.tokens[0] == out[0, -12:].tolist()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_text_starts_a_prompt_where_it_starts_pefts(folders, family):
  """PEFT's embedding module scales Gemma's rows, and so its start."""
  folder, params, config = folders(family)
  ids = [5, 9, 7]
  model = base_model(folder)
  tuned = quiet(peft.get_peft_model, model, config_of("prompt"))
  table = tuned.word_embeddings(torch.tensor([ids[i % 3] for i in range(SLOTS)]))
  chosen = AdapterConfig(
    method="prompt",
    num_virtual_tokens=SLOTS,
    prompt_tuning_init="TEXT",
    prompt_tuning_init_text="three",
  )
  _, adapter = adapters.init(jax.random.key(0), params, chosen, text_tokens=ids, model=config)
  close(adapter["prompt"]["embeddings"].embeddings, table.detach().numpy(), 1e-6)


def test_starts_are_drawn_from_pefts_distributions(folders):
  folder, params, _ = folders("llama")
  for kind, make in KINDS.items():
    model = quiet(
      peft.get_peft_model, base_model(folder), make(task_type="CAUSAL_LM", num_virtual_tokens=200)
    )
    theirs = model.prompt_encoder["default"].embedding.weight.detach().numpy()
    _, adapter = adapters.init(
      jax.random.key(0), params, AdapterConfig(method=kind, num_virtual_tokens=200)
    )
    ours = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(adapter)])
    assert ours.size == theirs.size
    assert ours.std() == pytest.approx(theirs.std(), rel=0.03)
    assert abs(ours.mean() - theirs.mean()) < 0.03


def test_a_projected_prefix_is_what_its_projection_gave(folders, tmp_path):
  """PEFT saves the keys and values, and not the network that they came out of."""
  folder, params, config = folders("llama")
  projected = peft.PrefixTuningConfig(
    task_type="CAUSAL_LM", num_virtual_tokens=SLOTS, prefix_projection=True, encoder_hidden_size=8
  )
  model = reference(folder, projected)
  quiet(model.save_pretrained, tmp_path)
  adapter, _ = peft_format.load(tmp_path, params, config)
  tokens = families.tokens(1, 9)
  close(logits_of(params, adapter, tokens, config), theirs_of(model, tokens), 1e-5)


# --- what trains whole beside a LoRA ----------------------------------------------------------------------------------

SAVED = {
  "llama": ["embed_tokens", "norm", "layernorm", "lm_head"],
  "llama3": ["embed_tokens", "norm"],  # tied: the head keeps to the base
  "gemma3": ["q_norm", "1.mlp.up_proj"],
  "llama_biased": ["0.mlp.down_proj"],
}


def lora(family, **options):
  return dict(r=3, target_modules=["q_proj", "v_proj"], modules_to_save=SAVED[family], **options)


@pytest.mark.parametrize("family", SAVED)
def test_saved_modules_of_theirs_give_equal_logits_and_gradients_here(folders, family, tmp_path):
  folder, params, config = folders(family)
  model = reference(folder, peft.LoraConfig(task_type="CAUSAL_LM", **lora(family)))
  quiet(model.save_pretrained, tmp_path / "a")
  adapter, chosen = peft_format.load(tmp_path / "a", params, config)
  assert sorted(chosen.modules_to_save) == sorted(SAVED[family])
  tokens = families.tokens(2, 20)
  out = model(torch.tensor(tokens)).logits
  close(logits_of(params, adapter, tokens, config), out.detach().numpy())
  out.square().mean().backward()
  theirs = {
    name.replace(".default", "").replace(".modules_to_save", ""): p.grad.numpy()
    for name, p in model.named_parameters()
    if p.requires_grad and p.grad is not None
  }
  trained, fixed = tree.partition(adapter)
  loss = lambda part: jnp.square(
    logits_of(params, tree.combine(part, fixed), tokens, config)
  ).mean()
  found = tree.combine(jax.jit(jax.grad(loss))(trained), fixed)
  peft_format.save(tmp_path / "gradient", found, chosen, config)
  ours = peft_format._read_tensors(tmp_path / "gradient" / peft_format.TENSORS)
  assert theirs.keys() == ours.keys()
  for name, array in theirs.items():
    close(ours[name], array)


@pytest.mark.parametrize("family", SAVED)
def test_saved_modules_of_ours_give_equal_logits_in_peft(folders, family, tmp_path):
  folder, params, config = folders(family)
  chosen = AdapterConfig(**lora(family))
  adapter = moved(adapters.init(jax.random.key(0), params, chosen)[1])
  peft_format.save(tmp_path / "a", adapter, chosen, config, base_name=str(folder))
  model = quiet(peft.PeftModel.from_pretrained, base_model(folder), tmp_path / "a").eval()
  tokens = families.tokens(2, 20)
  close(logits_of(params, adapter, tokens, config), theirs_of(model, tokens))


def test_a_longlora_adapter_is_a_lora_to_peft_on_a_stretched_base(folders, tmp_path):
  folder, params, config = folders("llama")
  chosen = AdapterConfig(
    method="longlora", r=3, modules_to_save=("embed_tokens", "norm"), context_length=512
  )
  # farther from the start one token's float32 rounding grows to 4e-4 of the logits
  adapter = moved(adapters.init(jax.random.key(0), params, chosen)[1], size=0.1)
  longer = rotary.stretched(config, 512)
  peft_format.save(tmp_path / "a", adapter, chosen, longer, base_name=str(folder))
  hf.save(tmp_path / "base", params, longer)
  model = quiet(peft.PeftModel.from_pretrained, base_model(tmp_path / "base"), tmp_path / "a")
  tokens = families.tokens(2, 40)
  ours = logits_of(params, adapter, tokens, longer)
  close(ours, theirs_of(model.eval(), tokens))
  assert np.abs(ours - logits_of(params, adapter, tokens, config)).max() > 0.1
  hf.save(tmp_path / "merged", adapters.merge(params, adapter), longer)
  close(ours, theirs_of(base_model(tmp_path / "merged"), tokens))


# --- a batch of mixed adapters ----------------------------------------------------------------------------------------

MIXED = {
  "one": dict(r=3, target_modules=["q_proj", "down_proj"]),
  "two": dict(r=5, lora_alpha=3, target_modules=["v_proj", "up_proj", "q_proj"]),
  "dora": dict(r=2, target_modules=["q_proj", "up_proj"], use_dora=True),
  "dora_too": dict(r=4, target_modules=["down_proj", "o_proj"], use_dora=True),
}
ROWS = ["two", "__base__", "dora", "one", "dora_too", "two", "dora"]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_mixed_batch_is_pefts(folders, family, tmp_path):
  folder, params, config = folders(family)
  model = base_model(folder)
  for name, options in MIXED.items():
    options = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    if isinstance(model, peft.PeftModel):
      quiet(model.add_adapter, name, options)
    else:
      model = quiet(peft.get_peft_model, model, options, adapter_name=name)
  with torch.no_grad():
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
      if "lora_" in key:
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
  quiet(model.save_pretrained, tmp_path)
  loaded = [peft_format.load(tmp_path / name, params, config)[0] for name in MIXED]
  tokens = families.tokens(len(ROWS), 20)
  plain = ["__base__" if MIXED.get(name, {}).get("use_dora") else name for name in ROWS]
  theirs = theirs_of(model.eval(), tokens, adapter_names=plain)
  for row, name in enumerate(ROWS):  # PEFT refuses DoRA among adapter_names: one at a time
    if plain[row] != name:
      model.set_adapter(name)
      theirs[row] = theirs_of(model, tokens[row : row + 1])[0]
  index = [list(MIXED).index(name) if name in MIXED else -1 for name in ROWS]
  for stacked in (adapters.stack(loaded), adapters.stack(loaded, params)):
    run = jax.jit(
      lambda stacked: decoder.forward(adapters.bind(params, stacked, rows=index), tokens, config)
    )
    close(run(stacked), theirs)
