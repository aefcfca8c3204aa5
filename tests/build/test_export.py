"""What leaves a run is whole, computes what was trained, and says what it is."""

import json
import logging
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import adapters, quant
from posttrain_jax.adapters import peft_format
from posttrain_jax.build import export
from posttrain_jax.core import tree
from posttrain_jax.data import chat
from posttrain_jax.models import decoder, hf
from posttrain_jax.quant import report
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


@pytest.mark.parametrize(
  ("merge_base", "storage"),
  [
    ("original", "nf4"),
    slow("dequantised", "nf4"),
    ("dequantised", "int8"),
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


def test_a_start_taken_from_the_base_is_merged_onto_the_original_alone(
  tmp_path, base, adapter, caplog
):
  run = make_run(tmp_path / "run", base, adapter, base="nf4")
  record = json.loads((run / "config.json").read_text())
  record["config"]["adapter"]["init_lora_weights"] = "pissa_niter_4"
  (run / "config.json").write_text(json.dumps(record))
  with pytest.raises(ValueError, match=r"merge_base='dequantised': .*write merge_base=original"):
    export.export(run, tmp_path / "out", merge=True, merge_base="dequantised")
  out = export.export(run, tmp_path / "out", merge=True)
  params, config = hf.load(base)
  bound = logits(adapters.bind(params, adapter[0]), config)
  assert distance(logits(*hf.load(out)), bound) < 1e-4


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
  assert manner.read(alone) == manner.Manner(storage="dense")
  assert manner.read(out) == manner.Manner()
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
  shutil.rmtree(run / "model")
  hf.save(run / "model", broken, config, tokenizer_from=base)
  with pytest.raises(ValueError, match="norm/weight holds numbers that are not finite"):
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
