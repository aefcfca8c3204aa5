"""The planned program is the one that runs: state, context and batch of every config, shape by shape."""

import pathlib
import types

import huggingface_hub
import jax
import jax.numpy as jnp
import pytest
from huggingface_hub import errors as hub_errors

from posttrain_jax import settings
from posttrain_jax.build import reference, teacher
from posttrain_jax.build import run as runs
from posttrain_jax.plan import program, topology
from tests import tiny
from tests.commands.test_train_answers import ROWS, pair
from tests.marks import slow

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
KINDS = {**ROWS, "triples": lambda i: {**pair(i), "reference": "ab" * (1 + i % 3)}}
KINDS["outcomes"] = KINDS["labels"]
FIELDS = {"data.length": 128, "batch.rows": 4, "data.eval_rows": 0}
RANK = {"adapter.r": 4, "adapter.target_modules": "('q_proj','down_proj')"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A tiny model, and rows of every kind."""
  made = tmp_path_factory.mktemp("planned")
  tiny.tiny_model_folder(made / "model")
  for kind, make in KINDS.items():
    tiny.write_jsonl(made / f"{kind}.jsonl", [make(i) for i in range(20)])
  tiny.write_jsonl(made / "text.jsonl", tiny.rows(20))
  return made


LORA = [
  ("sft", "text", "", {}),
  ("sft", "text", ",base=nf4", {}),
  slow("preference", "pairs", "", {}),
  ("preference", "pairs", ",loss=simpo", {"data.share_prompt": False}),
  ("preference", "pairs", ",loss=bco+kto", {"objective.running_shift": True}),
  ("preference", "pairs", ",loss=dpo+reward", {"objective.cache_reference": False}),
  ("preference", "pairs", "", {"objective.sync_every": 2, "objective.cache_reference": False}),
  slow("preference", "triples", ",loss=tpo", {}),
  ("kto", "labels", "", {}),
  slow("kto", "labels", "", {"objective.estimate_kl": False}),
  slow("reward", "pairs", "", {}),
  slow("reward", "outcomes", ",kind=outcomes", {}),
  ("reward", "steps", ",kind=steps", {"objective.sft_weight": 0.1}),
  ("grouped", "scored", "", {"objective.kl_weight": 0.1}),
  slow("grouped", "scored", ",method=reinforce", {}),
]
OTHER = [
  ("sft", "text", ",adapter=none", {}),
  ("preference", "pairs", ",adapter=none", {"objective.cache_reference": False}),
  slow("kto", "labels", ",adapter=none", {}),
  slow(
    "preference",
    "pairs",
    ",adapter=none",
    {"objective.sync_every": 2, "objective.cache_reference": False},
  ),
  slow("sft", "text", ",adapter=vera", {"adapter.r": 8}),
  ("kto", "labels", ",adapter=vera", {"adapter.r": 8}),
  slow("sft", "text", ",adapter=prompt", {}),
  ("preference", "pairs", ",adapter=prompt", {}),
  slow("grouped", "scored", ",adapter=prefix", {}),
  slow("reward", "pairs", ",adapter=prompt", {}),
]


def load(folder, config, kind, arguments, fields):
  ranked = "adapter=" not in arguments
  given = FIELDS | (RANK if ranked else {}) | fields
  where = f"{CONFIGS / config}.py:model={folder / 'model'},data={folder / kind}.jsonl{arguments}"
  return settings.load(where, [settings.override(*item) for item in given.items()])


def described(tree):
  """Structure, shapes and dtypes; of a batch, how many answers a row has room for is the data's to say."""
  is_batch = isinstance(tree, dict) and "present" in tree
  room = tree["present"].shape[1] if is_batch else None

  def one(x):
    shape = (x.shape[0], "room") if is_batch and x.shape[1] == room else x.shape
    return shape, jnp.dtype(x.dtype)

  return jax.tree.map(one, tree)


@pytest.mark.parametrize(("config", "kind", "arguments", "fields"), [*LORA, *OTHER])
def test_a_plan_is_of_what_runs(config, kind, arguments, fields, folder):
  c = load(folder, config, kind, arguments, fields)
  planned = program.build(c, topology.target(count=1))
  pieces = runs.build(c, None)
  batch = reference.blank(c, next(pieces.batches), pieces.objective)
  assert planned.model == pieces.model.config
  assert described(planned.state) == described(pieces.abstract_state())
  assert described(planned.state) == described(pieces.first_state())
  assert described(planned.context) == described(pieces.trees.context)
  assert described(planned.batch) == described(dict(batch))


def test_a_reference_of_another_folder_is_planned(folder):
  fields = {"objective.reference": folder / "model", "objective.cache_reference": False}
  c = load(folder, "preference", "pairs", "", fields)
  planned = program.build(c, topology.target(count=1))
  pieces = runs.build(c, None)
  assert pieces.trees.context.reference is not None
  assert described(planned.context) == described(pieces.trees.context)


@pytest.mark.parametrize("more", ["", ",top_k=5"])
def test_a_teacher_is_planned_beside_the_student_or_what_it_says_beside_the_rows(folder, more):
  tiny.tiny_model_folder(folder / "teacher")
  c = load(folder, "distil", "text", f",teacher={folder / 'teacher'}{more}", {})
  planned = program.build(c, topology.target(count=1))
  pieces = runs.build(c, None)
  batch = teacher.blank(c, reference.blank(c, next(pieces.batches), pieces.objective))
  assert (pieces.trees.context.teacher is None) == bool(more)
  assert described(planned.context) == described(pieces.trees.context)
  assert described(planned.batch) == described(dict(batch))
  assert program.compile(planned).arguments > 0


@pytest.mark.parametrize(("fields", "kinds"), [
  ({"model.offload": "layers"}, ["base"]),
  ({"optimizer.offload": "state"}, ["optimizer"]),
  ({"optimizer.offload": "params"}, ["optimizer", "trained"]),
  ({"optimizer.offload": "params", "model.offload": "layers"}, ["base", "optimizer", "trained"]),
])  # fmt: skip
def test_what_lies_on_the_host_is_counted_there(folder, fields, kinds):
  """By the config, as the shardings say where they can."""
  built = program.build(load(folder, "sft", "text", ",base=nf4", fields), topology.target(count=1))
  by_kind = program.on_host(built)
  assert [kind for kind, size in sorted(by_kind.items()) if size] == kinds
  arrays = jax.tree.leaves((built.state, built.context))
  hosted = [x for x in arrays if x.sharding.memory_kind == "pinned_host"]
  assert sum(by_kind.values()) == program.bytes_a_device(hosted)


def test_of_a_model_on_the_hub_its_config_alone_is_fetched(folder, monkeypatch):
  asked = {}
  fetched = lambda name, **kw: asked.update(kw, name=name) or str(folder / "model")
  monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
  assert program.shape("org/model") == program.shape(str(folder / "model"))
  assert (asked["name"], asked["allow_patterns"]) == ("org/model", ["config.json"])


@pytest.mark.parametrize("failure", [hub_errors.RepositoryNotFoundError, hub_errors.HfHubHTTPError])
def test_a_model_that_is_not_found_is_answered_with_the_sizes_that_are_known(failure, monkeypatch):
  def fail(*_, **__):
    raise failure("said no", response=types.SimpleNamespace(headers={}, request=None))

  monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
  with pytest.raises(
    (FileNotFoundError, ConnectionError), match=r"llama-3-8b.*\n.*llama3-8b, "
  ) as error:
    program.shape("meta/llama-3-8b")
  assert all(name in str(error.value) for name in ("qwen3-0.6b", "gemma3-27b", "qwen3-30b-a3b"))
