"""Losses on pairs and labels, and their gradients, against TRL's trainers on the same tiny models."""

import copy
import json
import warnings

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: run `make oracle`")
pytest.importorskip("trl", reason="TRL is not installed: run `make oracle`")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
from safetensors import numpy as safetensors_numpy  # noqa: E402

from posttrain_jax import objectives  # noqa: E402
from posttrain_jax.core import tree  # noqa: E402
from posttrain_jax.data import answers, companions, packing, schema  # noqa: E402
from posttrain_jax.models import fetch, hf  # noqa: E402
from posttrain_jax.objectives import Context  # noqa: E402
from posttrain_jax.train import step  # noqa: E402

pytestmark = pytest.mark.oracle

SIZES = dict(
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=256,
)
PAIRS = [
  ("The capital of France is", " Paris.", " a city that I have quite forgotten, I am sorry."),
  ("Two and two make", " four, as everybody knows.", " five."),
  ("Water boils at", " a hundred degrees.", " noon, mostly, and in summer."),
  ("A haiku has", " three lines", " seven or perhaps eight lines of any length at all"),
]


@pytest.fixture(scope="module")
def tokenizer():
  return transformers.AutoTokenizer.from_pretrained(fetch.fetch("smollm2"))


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
  """(policy, reference) folders: two random models, so that no log-ratio is zero."""

  def make(seed):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
      **SIZES, vocab_size=len(tokenizer), initializer_range=0.05, tie_word_embeddings=True
    )
    folder = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

  return make(0), make(1)


def torch_model(folder):
  return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def arguments(config, tmp_path, **options):
  plain = dict(
    output_dir=str(tmp_path / "out"),
    per_device_train_batch_size=len(PAIRS),
    report_to=[],
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
  )
  return config(**plain, **options)


def theirs(trainer):
  """(loss, {name: gradient}) of the trainer's first batch."""
  batch = next(iter(trainer.get_train_dataloader()))
  trainer.model.train()
  loss = trainer.compute_loss(trainer.model, batch)
  loss.backward()
  return loss.item(), {
    name: p.grad.numpy() for name, p in trainer.model.named_parameters() if p.grad is not None
  }


def rows(tmp_path, fields):
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(each) + "\n" for each in fields))
  return list(schema.read(path))


def ours(objective, folders, examples, *, accumulate=1, packed=False):
  """(loss, {Hugging Face name: gradient}) of all examples as one optimizer batch."""
  params, config = hf.load(folders[0])
  reference, _ = hf.load(folders[1])
  objective = objective(config)
  length = 160 if packed else 64
  if packed:
    room = packing.slots(examples, length, True)
    chosen = packing.best_fit([len(e) for e in examples], length)
  else:
    room, chosen = max(e.count for e in examples), [[i] for i in range(len(examples))]
  batch = packing.pack_answers(examples, chosen, length, room)
  key = jax.random.key(0)
  context = Context(reference=reference)
  run = jax.jit(
    lambda params, batch: step.gradient(
      objective, params, context, batch, key, accumulate=accumulate
    )
  )
  gradient, metrics = run(params, batch)
  mean = metrics["loss"]
  return float(mean.total / mean.count), gradient, config


def same(found, expected, tmp_path):
  loss, gradient, config = found
  their_loss, their_gradient = expected
  np.testing.assert_allclose(loss, their_loss, rtol=1e-4)
  folder = tmp_path / "gradient"  # in the names and layouts of a checkpoint
  hf.save(folder, gradient, config)
  own = safetensors_numpy.load_file(folder / "model.safetensors")
  assert own.keys() == their_gradient.keys()
  for name, value in their_gradient.items():
    scale = np.abs(value).max()
    np.testing.assert_allclose(own[name], value, rtol=1e-4, atol=1e-4 * scale, err_msg=name)


# --- pairs -----------------------------------------------------------------------------------------------------------

# TRL's loss types and options, ours
DPO = {
  "sigmoid": (dict(loss_type=["sigmoid"]), dict(losses=(("dpo", 1.0),))),
  "hinge": (dict(loss_type=["hinge"]), dict(losses=(("hinge", 1.0),))),
  "ipo": (dict(loss_type=["ipo"]), dict(losses=(("ipo", 1.0),))),
  "exo": (
    dict(loss_type=["exo_pair"], label_smoothing=0.1),
    dict(losses=(("exo", 1.0),), label_smoothing=0.1),
  ),
  "nca": (dict(loss_type=["nca_pair"]), dict(losses=(("nca", 1.0),))),
  "robust": (
    dict(loss_type=["robust"], label_smoothing=0.2),
    dict(losses=(("robust", 1.0),), label_smoothing=0.2),
  ),
  "bco": (dict(loss_type=["bco_pair"]), dict(losses=(("bco", 1.0),))),
  "sppo": (dict(loss_type=["sppo_hard"]), dict(losses=(("sppo", 1.0),))),
  "aot": (
    dict(loss_type=["aot"], label_smoothing=0.1),
    dict(losses=(("aot", 1.0),), label_smoothing=0.1),
  ),
  "aot_unpaired": (dict(loss_type=["aot_unpaired"]), dict(losses=(("aot_unpaired", 1.0),))),
  "apo_zero": (dict(loss_type=["apo_zero"]), dict(losses=(("apo_zero", 1.0),))),
  "apo_down": (dict(loss_type=["apo_down"]), dict(losses=(("apo_down", 1.0),))),
  "discopop": (dict(loss_type=["discopop"]), dict(losses=(("discopop", 1.0),))),
  "sft": (dict(loss_type=["sft"]), dict(losses=(("sft", 1.0),))),
  "norm": (dict(loss_type=["sigmoid_norm"]), dict(losses=(("dpo_norm", 1.0),))),
  "mixed": (
    dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
    dict(losses=(("dpo", 0.8), ("bco", 0.2), ("sft", 1.0))),
  ),
  "forward_kl": (
    dict(loss_type=["sigmoid"], f_divergence_type="forward_kl"),
    dict(divergence="forward_kl"),
  ),
  "js": (
    dict(loss_type=["ipo"], f_divergence_type="js_divergence"),
    dict(losses=(("ipo", 1.0),), divergence="jensen_shannon"),
  ),
  "alpha": (
    dict(loss_type=["robust"], label_smoothing=0.1, f_divergence_type="alpha_divergence"),
    dict(
      losses=(("robust", 1.0),),
      label_smoothing=0.1,
      divergence="alpha_divergence",
      divergence_alpha=0.5,
    ),
  ),
  "ld": (dict(loss_type=["sigmoid"], ld_alpha=0.3), dict(ld_alpha=0.3)),
  "wpo": (dict(loss_type=["sigmoid"], use_weighting=True), dict(weighting=True)),
}
BETA = 0.4


def preference_rows(tmp_path):
  return rows(tmp_path, [dict(prompt=p, chosen=c, rejected=r) for p, c, r in PAIRS])


def encoded(tmp_path, tokenizer, **options):
  how = dict(kind="pairs", max_length=160) | options
  return answers.encode_all(preference_rows(tmp_path), tokenizer, **how).examples


def paired_dataset():
  return datasets.Dataset.from_list([dict(prompt=p, chosen=c, rejected=r) for p, c, r in PAIRS])


@pytest.fixture(scope="module")
def dpo_of_trl(models, tokenizer, tmp_path_factory):
  import trl

  def run(name):
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      trainer = trl.DPOTrainer(
        model=torch_model(models[0]),
        ref_model=torch_model(models[1]),
        args=arguments(
          trl.DPOConfig, tmp_path_factory.mktemp("dpo"), beta=BETA, max_length=None, **DPO[name][0]
        ),
        train_dataset=paired_dataset(),
        processing_class=tokenizer,
      )
      return theirs(trainer)

  return run


@pytest.mark.parametrize("name", DPO)
def test_a_step_on_pairs_is_trls(name, dpo_of_trl, models, tokenizer, tmp_path):
  expected = dpo_of_trl(name)
  objective = lambda config: objectives.Preference(config, beta=BETA, **DPO[name][1])
  same(ours(objective, models, encoded(tmp_path, tokenizer)), expected, tmp_path)
  same(ours(objective, models, encoded(tmp_path, tokenizer), accumulate=4), expected, tmp_path)
  if name in ("sigmoid", "ld", "mixed", "aot"):
    same(ours(objective, models, encoded(tmp_path, tokenizer), packed=True), expected, tmp_path)
    same(ours(objective, models, encoded(tmp_path, tokenizer, share=False)), expected, tmp_path)


# --- without a reference ---------------------------------------------------------------------------------------------

# SimPO's gamma in TRL is absolute; a cpo_alpha of 0 takes TRL's likelihood term away
CPO = {
  "cpo": (
    dict(loss_type="sigmoid", cpo_alpha=0.7, label_smoothing=0.1),
    dict(losses=(("cpo", 1.0), ("sft", 0.7)), label_smoothing=0.1),
  ),
  "simpo": (
    dict(loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.6),
    dict(losses=(("simpo", 1.0),), gamma_beta_ratio=0.6 / BETA),
  ),
}


def of_experimental(trainer, config, models, tokenizer, tmp_path, dataset=None, **options):
  tokenizer = copy.deepcopy(tokenizer)
  tokenizer.bos_token = None  # these trainers put one even where the tokenizer puts none
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return theirs(
      trainer(
        model=torch_model(models[0]),
        args=arguments(config, tmp_path, beta=BETA, **options),
        train_dataset=paired_dataset() if dataset is None else dataset,
        processing_class=tokenizer,
      )
    )


@pytest.mark.parametrize("name", CPO)
def test_a_step_without_a_reference_is_trls(name, models, tokenizer, tmp_path):
  from trl.experimental.cpo import CPOConfig, CPOTrainer

  expected = of_experimental(CPOTrainer, CPOConfig, models, tokenizer, tmp_path, **CPO[name][0])
  objective = lambda config: objectives.Preference(config, beta=BETA, **CPO[name][1])
  examples = encoded(tmp_path, tokenizer)
  same(ours(objective, models, examples), expected, tmp_path)
  same(ours(objective, models, examples, accumulate=2), expected, tmp_path)


def test_orpo_is_trls_with_its_likelihood_of_the_prompt(models, tokenizer, tmp_path):
  from trl.experimental.orpo import ORPOConfig, ORPOTrainer

  expected = of_experimental(ORPOTrainer, ORPOConfig, models, tokenizer, tmp_path)
  losses = (("orpo", 1.0), ("sft_with_prompt", 1.0))
  objective = lambda config: objectives.Preference(config, beta=BETA, losses=losses)
  for options in ({}, dict(share=False)):
    examples = encoded(tmp_path, tokenizer, **options)
    same(ours(objective, models, examples), expected, tmp_path)
    same(ours(objective, models, examples, accumulate=2), expected, tmp_path)


@pytest.mark.parametrize("name", ["tpo", "tpo_norm"])
def test_triples_are_trls(name, models, tokenizer, tmp_path):
  from trl.experimental.tpo import TPOConfig, TPOTrainer

  gold = [" Paris, on the Seine.", " four.", " 100 degrees.", " three lines, and no more."]
  fields = [dict(prompt=p, chosen=c, rejected=r, reference=g) for (p, c, r), g in zip(PAIRS, gold)]
  options = dict(loss_type="sigmoid" if name == "tpo" else "tpo-l", tpo_alpha=0.6, tpo_l_gamma=0.2)
  expected = of_experimental(
    TPOTrainer,
    TPOConfig,
    models,
    tokenizer,
    tmp_path,
    datasets.Dataset.from_list(fields),
    **options,
  )
  objective = lambda config: objectives.Preference(
    config,
    beta=BETA,
    losses=((name, 1.0), ("gold", 0.6)),
    gamma_beta_ratio=0.2 / BETA if name == "tpo_norm" else 0.0,
    answers=3,
  )
  examples = answers.encode_all(
    rows(tmp_path, fields), tokenizer, kind="triples", max_length=160
  ).examples
  same(ours(objective, models, examples), expected, tmp_path)
  same(ours(objective, models, examples, packed=True), expected, tmp_path)


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimate_kl", [True, False])
def test_kto_is_trls(estimate_kl, models, tokenizer, tmp_path):
  """TRL turns answers around within a batch; here by the data's order: one batch is both."""
  import trl

  fields = []
  for i, (p, c, r) in enumerate(PAIRS):
    fields.append(dict(prompt=p, completion=c if i % 2 else r, label=bool(i % 2)))
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    trainer = trl.KTOTrainer(
      model=torch_model(models[0]),
      ref_model=torch_model(models[1]),
      args=arguments(
        trl.KTOConfig,
        tmp_path,
        beta=BETA,
        max_length=None,
        desirable_weight=1.0,
        undesirable_weight=1.2,
        loss_type="kto" if estimate_kl else "apo_zero_unpaired",
      ),
      train_dataset=datasets.Dataset.from_list(fields),
      processing_class=tokenizer,
    )
    expected = theirs(trainer)
  objective = lambda config: objectives.Labelled(
    config,
    beta=BETA,
    undesirable_weight=1.2,
    estimate_kl=estimate_kl,
  )
  labelled = answers.encode_all(rows(tmp_path, fields), tokenizer, kind="labels", max_length=160)
  examples = companions.beside(labelled.examples, 160)
  same(ours(objective, models, examples), expected, tmp_path)
  same(ours(objective, models, examples, accumulate=4), expected, tmp_path)
  same(ours(objective, models, examples, packed=True), expected, tmp_path)


# --- reward models ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def padded(tokenizer):
  """transformers reads the last token that is not padding, which SmolLM2's own tokenizer says EOS is."""
  other = copy.deepcopy(tokenizer)
  other.pad_token = "<|endoftext|>"
  return other


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, padded):
  torch.manual_seed(2)
  config = transformers.LlamaConfig(
    **SIZES,
    vocab_size=len(padded),
    initializer_range=0.05,
    num_labels=1,
    pad_token_id=padded.pad_token_id,
  )
  folder = tmp_path_factory.mktemp("reward")
  transformers.LlamaForSequenceClassification(config).save_pretrained(folder)
  padded.save_pretrained(folder)
  return folder


def sequence_classifier(folder):
  return transformers.AutoModelForSequenceClassification.from_pretrained(
    folder, dtype=torch.float32
  )


@pytest.mark.parametrize("margins", [False, True])
def test_a_reward_model_is_trls(margins, reward_model, padded, tmp_path):
  import trl

  fields = [dict(prompt=p, chosen=c, rejected=r) for p, c, r in PAIRS]
  if margins:
    fields = [dict(f, margin=0.2 * i) for i, f in enumerate(fields)]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    trainer = trl.RewardTrainer(
      model=sequence_classifier(reward_model),
      args=arguments(trl.RewardConfig, tmp_path, max_length=None, center_rewards_coefficient=0.05),
      train_dataset=datasets.Dataset.from_list(fields),
      processing_class=padded,
    )
    expected = theirs(trainer)
  objective = lambda config: objectives.Reward(config, centering=0.05)
  examples = answers.encode_all(
    rows(tmp_path, fields), padded, kind="pairs", max_length=160
  ).examples
  folders = (reward_model, reward_model)
  same(ours(objective, folders, examples), expected, tmp_path)
  same(ours(objective, folders, examples, accumulate=2), expected, tmp_path)
  same(ours(objective, folders, examples, packed=True), expected, tmp_path)


def test_rewards_and_files_are_transformers(reward_model, padded, tmp_path):
  """The same rewards, there and back again through a folder that we write."""
  params, config = hf.load(reward_model)
  assert config.scores == 1
  hf.save(tmp_path / "own", params, config, tokenizer_from=reward_model)
  examples = encoded(tmp_path, padded)
  batch = packing.pack_answers(examples, [[i] for i in range(len(examples))], 64, 2)
  found = np.asarray(objectives.Reward(config).rewards(params, batch))
  for folder in (reward_model, tmp_path / "own"):
    model = sequence_classifier(folder).eval()
    for (prompt, *said), rewards in zip(PAIRS, found):
      for text, value in zip(said, rewards):
        ids = [*padded(prompt + text).input_ids, padded.eos_token_id]
        with torch.no_grad():
          expected = model(torch.tensor([ids])).logits.item()
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_reward_adapter_is_one_to_peft(reward_model, padded, tmp_path):
  import peft

  from posttrain_jax import adapters
  from posttrain_jax.adapters import peft_format

  params, config = hf.load(reward_model)
  chosen = adapters.AdapterConfig(r=4, lora_alpha=8, modules_to_save=("score",))
  params, adapter = adapters.init(jax.random.key(0), params, chosen)
  noise = lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype)
  trained, fixed = tree.partition(adapter)
  adapter = tree.combine(jax.tree.map(noise, trained), fixed)
  peft_format.save(tmp_path / "adapter", adapter, chosen, config)
  bound = adapters.bind(params, adapter)
  examples = encoded(tmp_path, padded)
  batch = packing.pack_answers(examples, [[i] for i in range(len(examples))], 64, 2)
  found = np.asarray(objectives.Reward(config).rewards(bound, batch))
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = peft.PeftModel.from_pretrained(sequence_classifier(reward_model), tmp_path / "adapter")
  model.eval()
  for (prompt, *said), rewards in zip(PAIRS, found):
    for text, value in zip(said, rewards):
      ids = [*padded(prompt + text).input_ids, padded.eos_token_id]
      with torch.no_grad():
        expected = model(torch.tensor([ids])).logits.item()
      assert value == pytest.approx(expected, rel=1e-4, abs=1e-5)
  again, _ = peft_format.load(tmp_path / "adapter", params, config)
  other = objectives.Reward(config).rewards(adapters.bind(params, again), batch)
  np.testing.assert_array_equal(other, found)
