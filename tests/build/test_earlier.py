"""A run that starts from an adapter: what goes on, what is frozen under a fresh one, what is refused and exported."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import adapters, settings
from posttrain_jax.adapters import AdapterConfig, over, peft_format
from posttrain_jax.build import earlier_adapter, export, run, use
from posttrain_jax.core import tree
from posttrain_jax.models import decoder, hf
from posttrain_jax.objectives import policy
from posttrain_jax.objectives.reference import reference
from posttrain_jax.plan import program
from posttrain_jax.plan.topology import target
from posttrain_jax.runs import manner
from tests import tiny
from tests.adapters.kinds import moved
from tests.marks import slow

pytestmark = pytest.mark.usefixtures("in_float32")

KEY = jax.random.key(0)
TOKENS = np.arange(3, 20)[None]
CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "preference.py"
KINDS = {
  "lora": dict(r=4, lora_alpha=4, rank_pattern={"layers.1.mlp.down_proj": 3}, target_modules=("q_proj", "down_proj")),
  "dora": dict(method="dora", r=2, target_modules=("q_proj",)),
  "vera": dict(method="vera", r=3),
  "adalora": dict(method="adalora", init_r=3, target_r=2),
  "ia3": dict(method="ia3"),
  "prompt": dict(method="prompt", num_virtual_tokens=3),
  "prefix": dict(method="prefix", num_virtual_tokens=3),
  "whole": dict(r=2, target_modules=("q_proj",), modules_to_save=("embed_tokens", "norm")),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(shared):
  """Where a tiny model and rows of pairs are, and adapters of it by their kind."""
  pairs = [{"prompt": f"q{i}", "chosen": "yes" * (1 + i % 2), "rejected": "no"} for i in range(12)]
  tiny.write_jsonl(shared / "pairs.jsonl", pairs)
  return shared


def saved(folders, kind):
  """The folder of an adapter of a kind that changes the outputs."""
  if not (folders / kind).exists():
    params, config = hf.load(folders / "model")
    described = AdapterConfig(**KINDS[kind])
    nodes = moved(adapters.init(KEY, params, described)[1], size=0.2)
    name = str(folders / "model")
    peft_format.save(folders / kind, nodes, described, config, base_name=name)
  return folders / kind


def load(folders, arguments="", **fields):
  """The config of a DPO run, and the fields that were written by hand."""
  fields = {"data.eval_rows": 0, "data.length": 64, "objective.cache_reference": False, **fields}
  asked = [f"--config.{name}={value}" for name, value in fields.items()]
  data = f"model={folders / 'model'},data={folders / 'pairs.jsonl'}{arguments}"
  return settings.load(f"{CONFIG}:{data}", asked), list(fields)


def start(folders, arguments="", **fields):
  """The pieces of a run, its config settled first."""
  config, given = load(folders, arguments, **fields)
  return run.build(earlier_adapter.settled(config, given)[0], None)


def begun(pieces):
  """The policy before the first step."""
  state = pieces.first_state()
  return policy(state.trainable, state.context(pieces.trees.context))


@jax.jit
def logits(params):
  return decoder.forward(params, TOKENS, tiny.config())


def of_file(folders, kind):
  """The logits of the base with the adapter of a folder."""
  params, config = hf.load(folders / "model")
  return logits(adapters.bind(params, peft_format.load(saved(folders, kind), params, config)[0]))


def close(found, wanted, rtol=1e-5):
  np.testing.assert_allclose(found, wanted, rtol=rtol, atol=rtol * np.abs(wanted).max())


@pytest.mark.parametrize("kind", ["lora", *map(slow, list(KINDS)[1:])])
def test_an_adapter_goes_on_from_what_it_was_and_is_compared_with_that(kind, folders):
  """TRL does so with a PeftModel and ref_model=None: a copy of the adapter, frozen, is its reference."""
  pieces = start(folders, ",adapter=none", **{"model.adapter": saved(folders, kind)})
  first = begun(pieces)
  wanted = of_file(folders, kind)
  close(logits(first), wanted)
  assert np.array_equal(logits(reference(pieces.trees.context)), logits(first))
  assert np.abs(wanted - logits(pieces.trees.context.base)).max() > 0.05
  batch = next(pieces.batches)
  _, values = pieces.step(pieces.first_state(), pieces.trees.context, batch)
  metrics = run.metrics.read(values)
  assert metrics["loss"] == pytest.approx(np.log(2), abs=1e-6)
  assert metrics["rewards/chosen"] == pytest.approx(0, abs=1e-6)
  assert metrics["rewards/rejected"] == pytest.approx(0, abs=1e-6)
  assert metrics["grad_norm"] > 0


@pytest.mark.parametrize("base", ["dense", slow("nf4")])
@pytest.mark.parametrize("kind", ["lora", slow("prompt"), slow("whole")])
def test_a_fresh_adapter_starts_as_the_frozen_one_and_is_compared_with_it(kind, base, folders):
  fields = {"model.adapter": saved(folders, kind), "model.adapter_use": "frozen", "adapter.r": 2}
  if kind == "whole":
    fields["adapter.target_modules"] = "('up_proj',)"
  pieces = start(folders, f",base={base}", **fields)
  context = pieces.trees.context
  params, config = hf.load(folders / "model", storage=base)
  nodes = peft_format.load(saved(folders, kind), params, config)[0]
  wanted = logits(adapters.bind(params, nodes))
  close(logits(begun(pieces)), wanted)
  close(logits(reference(context)), wanted)
  plain = [leaf for _, leaf in tree.items(params)]
  assert tree.nbytes(pieces.model.bare) == tree.nbytes(
    plain
  )  # nothing was made dense, or quantised anew


@pytest.mark.parametrize(
  ("below", "above", "is_one"),
  [
    ("lora", dict(r=2), True),
    ("whole", dict(r=3, target_modules=("up_proj",)), True),
    ("lora", dict(r=2, target_modules=("up_proj",), modules_to_save=("q_proj",)), True),
    ("whole", dict(r=2, target_modules=("embed_tokens",)), False),
    slow("lora", dict(method="dora", r=2), False),
    slow("ia3", dict(r=2), False),
    ("prompt", dict(r=2), False),
  ],
)
def test_an_adapter_over_another_is_one_of_the_base_where_that_is_exact(
  below, above, is_one, folders, tmp_path
):
  params, config = hf.load(folders / "model")
  (frozen,) = over.load(saved(folders, below), params, config)
  under = over.bound(params, [frozen])
  described = AdapterConfig(**above)
  nodes = moved(adapters.init(KEY, under, described)[1], seed=5, size=0.2)
  wanted = logits(adapters.bind(under, nodes))
  over.save(
    tmp_path / "out", [frozen, (nodes, described)], config, base_name=str(folders / "model")
  )
  assert (tmp_path / "out" / peft_format.UNDER).exists() == (not is_one)
  levels = over.load(tmp_path / "out", params, config)
  assert len(levels) == 2 - is_one
  close(logits(over.bound(params, levels)), wanted, 2e-5)
  used = use.load(None, str(tmp_path / "out"))
  close(logits(used.bound), wanted, 2e-5)
  if not is_one:
    with pytest.raises(ValueError, match="stands on the adapter in its folder under"):
      peft_format.load(tmp_path / "out", params, config)
    described = json.loads((tmp_path / "out" / peft_format.CONFIG).read_text())
    assert described["base_model_name_or_path"] is None


def test_the_shape_is_the_files_and_what_is_of_training_the_configs(folders):
  config, given = load(
    folders,
    **{"model.adapter": saved(folders, "lora"), "adapter.lora_dropout": 0.25, "adapter.r": 4},
  )
  settled, notes = earlier_adapter.settled(config, given)
  assert (settled.adapter.r, settled.adapter.lora_alpha) == (4, 4)
  assert dict(settled.adapter.rank_pattern) == {"layers.1.mlp.down_proj": 3}
  assert settled.adapter.lora_dropout == 0.25
  assert any("adapter.lora_alpha 32.0 -> 4" in note for note in notes)
  again, _ = earlier_adapter.settled(settled, given)
  assert not settings.differences(settings.plain(settled), settings.plain(again))
  restored = settings.restored(json.loads(json.dumps(settings.plain(settled))))
  assert use.manner_of(restored).storage == "dense"
  pieces = run.build(settled, None)
  nodes = pieces.trees.adapter
  assert tree.get(nodes, "layers/mlp/down_proj/weight").dropout == 0.25


@pytest.mark.parametrize(
  ("arguments", "fields", "message"),
  [
    ("", {"model.adapter": "nowhere"}, "model.adapter=nowhere: .*name an adapter's or a run's folder"),
    ("", {"model.adapter": "model"}, "this is a model's folder; write model="),
    ("", {"adapter.r": 8}, r"adapter.r=8: the adapter in .*lora has 4.*write --config.adapter.r=4"),
    ("", {"adapter.target_modules": "('v_proj',)"}, r"adapter.target_modules=\('v_proj',\): the adapter in"),
    (",adapter=dora", {}, "adapter=dora: the adapter in .* is a lora.*write adapter=lora"),
    (",adapter=none", {"model.adapter_use": "frozen"}, "adapter=none has none: write adapter=lora"),
    (",adapter=pissa", {"model.adapter_use": "frozen"}, "adapter=pissa: .*write adapter=lora"),
    (",adapter=prompt", {"model.adapter": "prefix", "model.adapter_use": "frozen"}, "does not nest over a prefix"),
  ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_cure(arguments, fields, message, folders):
  at = fields.get("model.adapter", "lora")
  fields = {
    **fields,
    "model.adapter": at
    if at == "nowhere"
    else folders / at
    if at == "model"
    else saved(folders, at),
  }
  with pytest.raises(settings.ConfigError, match=f"(?s){message}"):
    earlier_adapter.settled(*load(folders, arguments, **fields))


def test_an_adapter_of_another_base_is_refused_by_its_name(folders, tmp_path):
  small = tiny.config(num_hidden_layers=1)
  params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), decoder.abstract(small))
  described = AdapterConfig(r=2)
  nodes = adapters.init(KEY, params, described)[1]
  peft_format.save(tmp_path / "a", nodes, described, small, base_name="Some/Model")
  (tmp_path / "a" / peft_format.RECORD).unlink()  # as PEFT writes it
  with pytest.raises(settings.ConfigError, match="it names Some/Model as its base"):
    earlier_adapter.settled(*load(folders, **{"model.adapter": tmp_path / "a"}))
  peft_format.save(tmp_path / "b", nodes, described, small, base_name=str(folders / "model"))
  (tmp_path / "b" / peft_format.RECORD).unlink()
  with pytest.raises(settings.ConfigError) as error:
    earlier_adapter.settled(*load(folders, **{"model.adapter": tmp_path / "b"}))
  assert "as its base" not in str(error.value)  # it is this run's


def test_a_changed_adapter_is_not_gone_on_from(folders, tmp_path):
  config, given = load(folders, **{"model.adapter": saved(folders, "lora")})
  config, _ = earlier_adapter.settled(config, given)
  began = {earlier_adapter.STARTED: earlier_adapter.fingerprint(config)}
  (tmp_path / "config.json").write_text(json.dumps({"config": {}, **began}))
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
  earlier_adapter.check_same(tmp_path, config)
  other, given = load(folders, ",adapter=none", **{"model.adapter": saved(folders, "ia3")})
  with pytest.raises(settings.ConfigError, match="its files are not those that the run"):
    earlier_adapter.check_same(tmp_path, earlier_adapter.settled(other, given)[0])


def test_template_and_system_message_travel(folders, tmp_path):
  params, config = hf.load(folders / "model")
  nodes, described = peft_format.load(saved(folders, "lora"), params, config)
  how = manner.Manner(storage="nf4", system="Be brief.", template="chatml")
  peft_format.save(
    tmp_path / "a", nodes, described, config, finish=lambda new: manner.write(new, how)
  )
  asked = {"model.adapter": tmp_path / "a"}
  settled, notes = earlier_adapter.settled(*load(folders, **asked))
  assert (settled.data.system, settled.model.template) == ("Be brief.", "chatml")
  assert any("the adapter was trained on it in nf4" in note for note in notes)
  settled, _ = earlier_adapter.settled(*load(folders, **asked, **{"data.system": ""}))
  assert settled.data.system == ""
  export.accompany(tmp_path / "a", folders / "model", "chatml", how)
  settled, _ = earlier_adapter.settled(*load(folders, **asked))
  assert run.build(settled, None).model.speech == tmp_path / "a"


def test_a_plan_knows_what_stands_under_it(folders):
  config, given = load(
    folders,
    **{"model.adapter": saved(folders, "lora"), "model.adapter_use": "frozen", "adapter.r": 2},
  )
  config, _ = earlier_adapter.settled(config, given, shape=program.shape)
  planned = program.build(config, target(None, 1))
  real = run.build(config, None)
  shapes = lambda tree: sorted((x.shape, str(x.dtype)) for x in jax.tree.leaves(tree))
  assert shapes(planned.context.base) == shapes(real.trees.context.base)
  assert shapes(planned.state.trainable) == shapes(real.trees.trainable)


def test_a_reward_head_is_trained_beside_the_adapter_that_goes_on(folders):
  reward = CONFIG.with_name("reward.py")
  config = settings.load(
    f"{reward}:model={folders / 'model'},data={folders / 'pairs.jsonl'}",
    [f"--config.{f}" for f in ("data.eval_rows=0", "data.length=64", f"model.adapter={saved(folders, 'lora')}")],
  )  # fmt: skip
  config, _ = earlier_adapter.settled(config)
  pieces = run.build(config, None)
  nodes = tree.flatten(pieces.trees.adapter)
  params, model_config = hf.load(folders / "model")
  wanted = tree.flatten(peft_format.load(saved(folders, "lora"), params, model_config)[0])
  assert nodes.keys() - wanted.keys() == {"score/weight"}
  for path, node in wanted.items():
    np.testing.assert_array_equal(nodes[path].b, node.b)
  assert float(jnp.abs(nodes["score/weight"].value).max()) > 0
