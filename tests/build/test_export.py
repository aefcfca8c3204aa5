"""What leaves a run is whole, computes what was trained, and says what it is."""

import json
import logging
import re
import shutil

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from posttrain_jax import adapters, quant
from posttrain_jax.adapters import peft_format
from posttrain_jax.adapters.replaced import Replaced
from posttrain_jax.build import export, start
from posttrain_jax.configs import common
from posttrain_jax.core import tree
from posttrain_jax.data import chat
from posttrain_jax.models import decoder, hf
from posttrain_jax.quant import nf4, report
from posttrain_jax.runs import manner
from tests.adapters import cases
from tests.data.conftest import make_tokenizer
from tests.evals import runs
from tests.marks import slow
from tests.models import families

TOKENS = families.tokens(2, 9)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """The folder of a tiny model with a ChatML tokenizer that has no template of its own."""
  folder = tmp_path_factory.mktemp("base") / "model"
  tokenizer = make_tokenizer("chatml")
  tokenizer.save_pretrained(folder / "tokenizer")
  config = families.config(
    "llama", vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2
  )
  (folder / "tokenizer" / "generation_config.json").write_text('{"eos_token_id": 0}')
  hf.save(folder / "base", families.params(config), config, tokenizer_from=folder / "tokenizer")
  return folder / "base"


@pytest.fixture(scope="module")
def adapter(base):
  """A LoRA that changes the outputs."""
  params, config = hf.load(base)
  chosen = adapters.AdapterConfig(r=2, lora_alpha=4)
  _, fresh = adapters.init(jax.random.key(0), params, chosen)
  return cases.trained(fresh), chosen, config


def make_run(folder, base_folder, adapter=None, done=True, **model):
  """A run folder on this base, with an adapter saved or without."""
  config = dict(runs.CONFIG, model={**runs.CONFIG["model"], "name": str(base_folder), **model})
  end = dict(steps=40, final={"loss": 0.1}) if done else None
  runs.write(folder, config=config, lines=runs.rows(steps=12), done=end)
  if adapter is not None:
    peft_format.save(folder / "adapter", *adapter, base_name="a/name")
  return folder


def logits(params, config):
  return np.asarray(decoder.forward(params, jnp.asarray(TOKENS), config))


def distance(a, b):
  return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_the_adapter_is_copied_whole(tmp_path, base, adapter):
  out = export.export(make_run(tmp_path / "run", base, adapter), tmp_path / "out")
  assert out == tmp_path / "out"
  params, config = hf.load(base)
  loaded, chosen = peft_format.load(out, params, config)
  assert chosen.r == 2
  for path, node in tree.items(adapter[0]):
    np.testing.assert_array_equal(tree.get(loaded, path).a, node.a)
    np.testing.assert_array_equal(tree.get(loaded, path).b, node.b)


def test_a_merged_model_computes_what_was_trained(tmp_path, base, adapter, caplog):
  out = export.export(make_run(tmp_path / "run", base, adapter), tmp_path / "out", merge=True)
  params, config = hf.load(base)
  merged, merged_config = hf.load(out)
  trained = logits(adapters.bind(params, adapter[0]), config)
  assert distance(logits(merged, merged_config), trained) < 1e-5
  assert distance(logits(params, config), trained) > 0.1
  assert len(chat.load_tokenizer(out)) == config.vocab_size
  assert not caplog.records


@pytest.mark.parametrize("storage", [None, "nf4"])
def test_a_reward_models_adapter_is_merged_with_its_head(tmp_path, base, storage):
  """The base was read without a head for scores, and the adapter's was no module of it."""
  params, config = hf.load(base)
  params, config = decoder.scored(jax.random.key(0), params, config, writes=True)
  chosen = adapters.AdapterConfig(r=2)
  trained = cases.trained(adapters.init(jax.random.key(0), params, chosen)[1])
  trained["score"] = {"weight": Replaced(params["score"]["weight"] + 0.1)}
  chosen = chosen.replace(modules_to_save=("score",))
  run = make_run(tmp_path / "run", base, (trained, chosen, config), base=storage)
  asked = json.loads((run / "config.json").read_text())
  asked["config"]["objective"] = dict(name="reward", sft_weight=0.0)
  (run / "config.json").write_text(json.dumps(asked))
  merged, merged_config = hf.load(export.export(run, tmp_path / "out", merge=True))
  assert (merged_config.scores, merged_config.writes) == (1, False)
  described = json.loads((tmp_path / "out" / "config.json").read_text())
  assert described["architectures"] == ["LlamaForSequenceClassification"]
  of = lambda params: decoder.scores(params, decoder.hidden(params, TOKENS, config))
  np.testing.assert_allclose(of(merged), of(adapters.bind(params, trained)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ("merge_base", "storage"),
  [
    ("original", "nf4"),
    slow("dequantised", "nf4"),
    slow("dequantised", "int8"),
    slow("original", "fp4"),
  ],
)
def test_a_quantised_base_is_merged_onto_what_is_asked_for(
  tmp_path, base, adapter, caplog, merge_base, storage
):
  run = make_run(tmp_path / "run", base, adapter, base=storage)
  with caplog.at_level(logging.INFO):
    export.export(run, tmp_path / "out", merge=True, merge_base=merge_base)
  assert f"trained on a base in {storage}, merged onto the {merge_base} weights" in caplog.text
  # what was trained on is nearer by its nature
  advised = "--merge_base=dequantised is nearer to what was trained: KL " in caplog.text
  assert advised == (merge_base == "original")
  params, config = hf.load(base)
  stored = quant.quantize_params(params, storage=storage)
  wanted = {"original": params, "dequantised": stored}
  tokens = jnp.asarray(chat.load_tokenizer(base)(export.PROBE)["input_ids"][: config.max_length])
  assert tokens.size > 60
  of = lambda params: decoder.forward(params, tokens[None], config)
  trained = of(adapters.bind(stored, adapter[0]))
  for name, frozen in wanted.items():
    off = report.logit_error(trained, of(adapters.merge(frozen, adapter[0])))
    (line,) = [r.getMessage() for r in caplog.records if f"merged onto {name}:" in r.getMessage()]
    said = float(re.search("max ([0-9.e-]+)", line)[1])
    assert said == pytest.approx(off.max_abs, rel=0.02, abs=1e-4)
    assert (said > 1e-3) == (name == "original")
  found = logits(*hf.load(tmp_path / "out"))
  for name, frozen in wanted.items():
    far = distance(found, logits(adapters.bind(frozen, adapter[0]), config))
    assert far < 1e-4 if name == merge_base else far > 1e-3, name


def started_run(folder, base, method, storage="nf4", **options):
  """(run folder, logits of what it trained) of an adapter that takes its start out of the base."""
  section = {**common.adapter(method), "r": 4, "lora_alpha": 8, **options}
  section = ml_collections.ConfigDict(section).to_dict()
  config = adapters.from_section(section)
  place = lambda _, leaf: jax.tree.map(jnp.asarray, leaf)
  started = start.plan(jax.random.key(0), config, hf.read_config(base), storage)
  stored, model = hf.load(base, storage="dense", dtype=jnp.float32, place=started.begin(place))
  _, adapter = adapters.init(jax.random.key(0), stored, config, started=started.nodes)
  run = make_run(folder, base, None, base=storage)
  record = json.loads((run / "config.json").read_text())
  record["config"] |= dict(adapter=section, seed=0)
  record["config"]["model"] |= dict(base=storage, dtype="float32")
  (run / "config.json").write_text(json.dumps(record))
  moved = cases.trained(adapter)
  peft_format.save(run / "adapter", moved, config, model, base_name="a/name")
  return run, logits(adapters.bind(stored, moved), model)


@pytest.mark.parametrize(
  ("method", "options"),
  [
    slow("pissa", {}),
    slow("olora", {}),
    slow("loftq", dict(loftq_iter=3)),
    (
      "pissa",
      dict(use_dora=True, rank_pattern={"q_proj": 2}, target_modules=("q_proj", "up_proj")),
    ),
  ],
)
def test_a_start_taken_from_a_quantised_base_is_said_and_exported_to_the_bit(
  tmp_path, base, caplog, method, options
):
  """The adapter of the original is off by half a logit and more: what was quantised is not the original."""
  run, trained = started_run(tmp_path / "run", base, method, **options)
  with caplog.at_level(logging.INFO):
    plain = export.export(run, tmp_path / "plain")
  (line,) = [r.getMessage() for r in caplog.records if "took its start out" in r.getMessage()]
  assert "posttrain export --keep_base" in line
  assert float(re.search("max ([0-9.e-]+)", line)[1]) > 0.01
  params, config = hf.load(base)
  on_original = adapters.bind(params, peft_format.load(plain, params, config)[0])
  assert distance(logits(on_original, config), trained) > 1e-2

  kept = export.export(run, tmp_path / "kept", keep_base=True)
  stored, model = hf.load(kept / "base")
  assert isinstance(stored["layers"]["mlp"]["up_proj"]["weight"], nf4.NF4)
  adapter, found = peft_format.load(kept / "adapter", stored, model)
  assert found.rank("layers.0.mlp.up_proj") == 4
  np.testing.assert_allclose(logits(adapters.bind(stored, adapter), model), trained, atol=2e-5)
  said = json.loads((kept / "adapter/adapter_config.json").read_text())
  assert said["base_model_name_or_path"] == str(kept / "base")

  out = export.export(run, tmp_path / "one", merge=True, merge_base="dequantised")
  assert distance(logits(*hf.load(out)), trained) < 1e-4


def test_the_base_of_an_adapter_is_kept_where_that_is_asked_for(tmp_path, base, adapter):
  run = make_run(tmp_path / "run", base, adapter, base="int8")
  kept = export.export(run, tmp_path / "kept", keep_base=True)
  stored, model = hf.load(kept / "base")
  on_it = adapters.bind(stored, peft_format.load(kept / "adapter", stored, model)[0])
  params, _ = hf.load(base, storage="int8")
  expected = logits(adapters.bind(params, adapter[0]), model)
  np.testing.assert_allclose(logits(on_it, model), expected, atol=1e-6)
  assert "`adapter/` is for it" in (kept / "README.md").read_text()
  for part in ("base", "adapter"):
    assert manner.read(kept / part) is not None
    assert chat.load_tokenizer(kept / part).get_vocab() == chat.load_tokenizer(base).get_vocab()
  with pytest.raises(ValueError, match="keep_base is for an adapter beside its base"):
    export.export(run, tmp_path / "out", merge=True, keep_base=True)


def test_the_base_may_be_a_quantised_folder(tmp_path, base, adapter):
  params, config = hf.load(base, storage="nf4")
  hf.save(tmp_path / "four", params, config, tokenizer_from=base)
  out = export.export(
    make_run(tmp_path / "run", tmp_path / "four", adapter, base="nf4"), tmp_path / "out", merge=True
  )
  merged, merged_config = hf.load(out)
  assert not [leaf for _, leaf in tree.items(merged) if hasattr(leaf, "apply")]
  assert "quantization_config" not in json.loads((out / "config.json").read_text())
  trained = logits(adapters.bind(params, adapter[0]), config)
  assert distance(logits(merged, merged_config), trained) < 1e-4


def test_the_template_that_was_trained_goes_with_the_model(tmp_path, base, adapter):
  run = make_run(tmp_path / "run", base, adapter, template="chatml")
  out = export.export(run, tmp_path / "out", merge=True)
  tokenizer = chat.load_tokenizer(out)
  messages = [dict(role="user", content="Hello"), dict(role="assistant", content="there")]
  wanted = chat.template(chat.load_tokenizer(base), "chatml").render(messages)
  assert chat.template(tokenizer).render(messages) == wanted
  assert tokenizer.apply_chat_template(messages, tokenize=False) == wanted
  ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
  assert ends == [0, tokenizer.convert_tokens_to_ids("<|im_end|>")]
  alone = export.export(run, tmp_path / "adapter")
  assert chat.template(chat.load_tokenizer(alone)).render(messages) == wanted
  assert manner.read(alone) == manner.Manner(storage="dense", writes=True)
  assert manner.read(out) == manner.Manner(writes=True)
  # Exported without a template of its own choice, the folder keeps the tokenizer as it came.
  plain = export.export(make_run(tmp_path / "plain", base, adapter), tmp_path / "b", merge=True)
  assert chat.load_tokenizer(plain).chat_template is None


@pytest.mark.parametrize("merge", [False, True])
def test_full_fine_tuning_gives_its_model(tmp_path, base, merge):
  run = make_run(tmp_path / "run", base)
  record = json.loads((run / "config.json").read_text())
  record["config"]["adapter"]["method"] = "none"
  (run / "config.json").write_text(json.dumps(record))
  params, config = hf.load(base)
  tuned = tree.put(params, "norm/weight", 2 * params["norm"]["weight"])
  hf.save(run / "model", tuned, config, tokenizer_from=base)
  out = export.export(run, tmp_path / "out", merge=merge)
  np.testing.assert_array_equal(hf.load(out)[0]["norm"]["weight"], tuned["norm"]["weight"])
  broken = tree.put(params, "norm/weight", jnp.inf * params["norm"]["weight"])
  with pytest.raises(ValueError, match=r"model.norm.weight holds 64 infinite of 64 numbers"):
    hf.save(run / "model", broken, config, tokenizer_from=base)
  file = run / "model/model.safetensors"
  tensors = load_file(file)
  save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] * np.inf}, file)
  with pytest.raises(ValueError, match=r"tensor 'model.norm.weight' holds 64 infinite of 64"):
    export.export(run, tmp_path / "other", merge=merge)


def test_an_unfinished_run_says_so(tmp_path, base, adapter, caplog):
  run = make_run(tmp_path / "run", base, done=False)
  with pytest.raises(FileNotFoundError, match="at step 12 of 40; to finish it: posttrain train"):
    export.export(run, tmp_path / "out")
  peft_format.save(run / "adapter", *adapter)
  with caplog.at_level(logging.WARNING):
    assert export.export(run, tmp_path / "out").is_dir()
  assert "saved so far: the run is at step 12 of 40" in caplog.text


def cut(folder):
  path = folder / "adapter" / peft_format.TENSORS
  path.write_bytes(path.read_bytes()[:-8])


def poison(folder):
  path = folder / "adapter" / peft_format.TENSORS
  path.write_bytes(path.read_bytes()[:-4] + np.float32(np.nan).tobytes())


@pytest.mark.parametrize(
  ("damage", "error", "message"),
  [
    (cut, ValueError, "adapter_model.safetensors cannot be read: .*cut short"),
    (poison, ValueError, "not finite; nothing was exported"),
    (
      lambda run: (run / "adapter" / peft_format.CONFIG).unlink(),
      FileNotFoundError,
      "adapter_config.json does not exist; .* not a whole adapter",
    ),
    (
      lambda run: (run / "adapter" / peft_format.TENSORS).unlink(),
      FileNotFoundError,
      "adapter_model.safetensors does not exist",
    ),
    (
      lambda run: shutil.rmtree(run / "adapter"),
      FileNotFoundError,
      "finished after 40 steps, and the folder was removed since",
    ),
    (lambda run: (run / "config.json").unlink(), FileNotFoundError, "has no config.json"),
  ],
)
@pytest.mark.parametrize("merge", [False, True])
def test_nothing_damaged_is_exported(tmp_path, base, adapter, damage, error, message, merge):
  run = make_run(tmp_path / "run", base, adapter)
  damage(run)
  with pytest.raises(error, match=message):
    export.export(run, tmp_path / "out", merge=merge)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_what_exists_is_not_overwritten(tmp_path, base, adapter):
  run = make_run(tmp_path / "run", base, adapter)
  (tmp_path / "out").mkdir()
  export.export(run, tmp_path / "out")  # an empty folder is fine
  with pytest.raises(FileExistsError, match="out exists; name a new folder"):
    export.export(run, tmp_path / "out")
  (tmp_path / "file").touch()
  with pytest.raises(FileExistsError, match="file exists; name a new folder"):
    export.export(run, tmp_path / "file")


def test_an_unknown_merge_base(tmp_path):
  with pytest.raises(ValueError, match="merge_base='nf4': write one of original, dequantised"):
    export.export(tmp_path, tmp_path / "out", merge=True, merge_base="nf4")


def ends(folder):
  return json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


def test_the_end_of_a_turn_ends_a_text_whoever_named_the_template(tmp_path, base, adapter):
  """A base model with a ChatML template of its own, whose EOS ends texts and not turns."""
  own = shutil.copytree(base, tmp_path / "own")
  tokenizer = chat.load_tokenizer(own)
  tokenizer.chat_template = (
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
  )
  tokenizer.save_pretrained(own)
  turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
  out = export.export(make_run(tmp_path / "run", own, adapter), tmp_path / "out", merge=True)
  assert ends(out) == [0, turn]
  # where no generation_config.json says more, the model's config does
  (own / "generation_config.json").unlink()
  config = json.loads((own / "config.json").read_text())
  (own / "config.json").write_text(
    json.dumps({**config, "eos_token_id": [5, 0], "pad_token_id": 7})
  )
  out = export.export(make_run(tmp_path / "run2", own, adapter), tmp_path / "out2", merge=True)
  assert ends(out) == [5, 0, turn]
  assert json.loads((out / "generation_config.json").read_text())["pad_token_id"] == 7
  # what is trained on plain text ends with the tokenizer's EOS, which another file may not know
  shutil.copytree(base, tmp_path / "plain")
  (tmp_path / "plain" / "generation_config.json").write_text('{"eos_token_id": 9}')
  run = make_run(tmp_path / "run3", tmp_path / "plain", adapter)
  assert ends(export.export(run, tmp_path / "out3", merge=True)) == [9, 0]


def test_templates_beside_the_default_go_with_the_model(tmp_path, base, adapter):
  own = shutil.copytree(base, tmp_path / "own")
  text = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
  (own / "chat_template.jinja").write_text(text)
  (own / "additional_chat_templates").mkdir()
  (own / "additional_chat_templates" / "tool_use.jinja").write_text(text + "{{ tools | tojson }}")
  run = make_run(tmp_path / "run", own, adapter)
  out = export.export(run, tmp_path / "out", merge=True)
  loaded = chat.load_tokenizer(out).chat_template
  assert loaded == chat.load_tokenizer(own).chat_template
  assert set(loaded) == {"default", "tool_use"}
  # one that was named was trained with for tools as well
  named = make_run(tmp_path / "named", own, adapter, template="chatml")
  out = export.export(named, tmp_path / "out2", merge=True)
  assert "<tool_call>" in chat.load_tokenizer(out).chat_template
