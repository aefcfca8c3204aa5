"""The table of fields knows every field of every config, its names are the code's, and what lies outside is refused."""

import pathlib

import pytest

from posttrain_jax import settings
from posttrain_jax.adapters.config import OPTIONS
from posttrain_jax.build import attention, decisions, objective
from posttrain_jax.configs import common, distil, rl
from posttrain_jax.data import answers, chat
from posttrain_jax.losses import distillation
from posttrain_jax.models import backends, decoder
from posttrain_jax.objectives import groups, preference
from posttrain_jax.optim import chain, galore, offload, schedules
from posttrain_jax.quant import STORAGES
from posttrain_jax.settings import ConfigError, fields, later
from posttrain_jax.settings.domains import Choice, Expression, Number

ROOT = pathlib.Path(__file__).parents[2]
METHODS = (
  "sft.py:",
  *(f"preference.py:loss={loss}" for loss in fields.PAIRED),
  *(f"preference.py:loss={loss}" for loss in ("dpo+nca", "dpo+sft", "dpo+kto", "simpo+dpo")),
  "kto.py:",
  *(f"reward.py:kind={kind}" for kind in ("pairs", "outcomes", "steps")),
  *(
    f"grouped.py:method={method}"
    for method in (
      "grpo",
      "dr_grpo",
      "dapo",
      "gspo",
      "cispo",
      "rloo",
      "dppo",
      "dppo_kl",
      "reinforce",
    )
  ),
  *(f"rl.py:method={method}" for method in rl.METHODS),
  *(f"distil.py:teacher=x,loss={loss}" for loss in (*distil.LOSSES, distil.BY_GRADIENT)),
  "distil.py:teacher=x,on_policy=0.5",
  *(f"sft.py:optimizer={name}" for name in fields.OPTIMIZERS),
  *(f"sft.py:adapter={name}" for name in ("none", *OPTIONS, "prompt+lora", "vera+ia3")),
)


def load(config, *given):
  return settings.load(str(ROOT / "configs" / config), given)


def check(config, *given):
  fields.check(settings.plain(load(config, *given)), settings.given(given))


@pytest.mark.parametrize("config", METHODS)
def test_a_config_has_the_fields_that_its_method_reads_and_no_other(config):
  """And every one of them is in the table, within its domain."""
  check(config)


def test_the_table_knows_nothing_else():
  known = set()
  for config in METHODS:
    known |= {fields.known_as(name) for name, _ in fields.items(settings.plain(load(config)))}
  unset = {"adapter.total_step"}  # which no config writes: the run's steps
  assert set(fields.FIELDS) == known | unset


def test_what_came_later_does_by_default_what_runs_did_before():
  for config in METHODS:
    values = dict(fields.items(settings.plain(load(config))))
    for name in later.LATER.keys() & values.keys():
      assert values[name] == later.LATER[name], (config, name)
  assert later.LATER.keys() <= fields.FIELDS.keys()


def test_its_choices_are_the_codes():
  choices = {
    "model.base": ("dense", *STORAGES),
    "model.remat": ("auto", *decoder.REMAT),
    "model.attention": (attention.AUTO, *backends.ATTEND),
    "data.truncate": {*chat.TRUNCATE, *answers.TRUNCATE},
    "data.train_on": chat.TRAIN_ON,
    "optimizer.schedule": schedules.SCHEDULES,
    "optimizer.offload": offload.MODES,
    "optimizer.projection": galore.PROJECTIONS,
    "objective.name": objective.NAMES,
    "objective.divergence": preference.DIVERGENCES,
    "objective.loss": (*groups.POLICY_LOSSES, *distillation.LOSSES),
    "objective.aggregation": groups.AGGREGATIONS,
  }
  for name, known in choices.items():
    domain = fields.FIELDS[name].domain
    assert isinstance(domain, Choice)
    assert set(domain.names) == {*known}, name
  assert set(fields.FIELDS["optimizer.name"].domain.names) == {*fields.OPTIMIZERS}
  assert set(fields.PAIRED) == {*preference.KNOWN, *objective.SUMMED} == {*fields.LOSSES_OF_PAIRS}
  assert fields.ADAPTERS == common.ADAPTERS
  assert {"none", *OPTIONS} <= {*fields.ADAPTERS}
  assert set(fields.GROUPED) == {*groups.POLICY_LOSSES}
  assert set(fields.DISTILLED) == {*distillation.LOSSES} == {*distil.LOSSES}
  with pytest.raises(ValueError, match="known are") as error:
    chain.chain("none", lr=0.1, steps=1)
  assert all(name in str(error.value) for name in fields.OPTIMIZERS)


def test_what_a_loss_of_pairs_reads_is_what_its_function_takes():
  options = ("beta", "label_smoothing", "gamma_beta_ratio")
  for name, loss in preference.LOSSES.items():
    assert {o for o in options if o in fields.PAIRED[name]} == {*loss.options}, name
    assert ("reference" in fields.PAIRED[name]) == loss.reference, name
    assert ("divergence" in fields.PAIRED[name]) == loss.differences, name


OUTSIDE = {
  "steps": (0, -5, 2.5, True, "10", 2**31, None),
  "seed": (-1, 1.5, 2**32),
  "log_every": (0, -1),
  "max_skipped": (0, -1),
  "batch.rows": (0, -8, 2**30),
  "batch.accumulate": (0, -1),
  "mesh.fsdp": (0, -2, 1.5),
  "eval.rows": (0, -1),
  "eval.every": (-1, 2.5),
  "eval.task": (None, 3),
  "eval.metric": (None, 3),
  "eval.samples": (-1, 2.5),
  "eval.max_new_tokens": (-1, None),
  "eval.task_limit": (-1,),
  "eval.before": (1, "yes"),
  "checkpoint.keep": (0, -1),
  "checkpoint.every": (-1,),
  "data.eval_rows": (-2, 0.5),
  "data.limit": (-1,),
  "data.length": (0, 1, -4, 10**12),
  "data.replay_fraction": (0.0, 1.0, -0.5, 2.0),
  "data.train": (None, 5, "a\0b"),
  "data.columns": ([1], {"prompt": 3}),
  "model.dtype": ("float8", 32),
  "optimizer.lr": (-1e-3, float("nan"), float("inf"), 1e39, "fast", None, True),
  "optimizer.warmup": (-0.1, 1.5),
  "optimizer.weight_decay": (-0.1,),
  "optimizer.clip": (-1.0, float("nan")),
  "optimizer.b1": (-0.1, 1.0),
  "optimizer.b2": (1.0, 2.0),
  "optimizer.eps": ("abc", 0.0, -1e-8, float("inf"), 1e-50),
  "optimizer.loraplus_lr_ratio": (0.5, -1.0),
  "adapter.r": (0, -4, 2.5, 10**9, "8"),
  "adapter.lora_alpha": (0.0, -16.0, float("inf"), "16"),
  "adapter.lora_dropout": (-0.1, 1.0, 1.5),
  "adapter.target_modules": ("[", "a" * 30_000, "", 7, (3,)),
  "adapter.exclude_modules": ("(",),
  "adapter.rank_pattern": ({"[": 4}, {"q_proj": 0}, {"q_proj": "4"}, 5),
  "adapter.alpha_pattern": ({"q_proj": float("nan")},),
  "adapter.layers_to_transform": ((-1,), ("a",), 0.5),
  "adapter.depth_ranks": ((0, 4), ("a", "b")),
  "adapter.use_dora": ("true", 1),
}
OUTSIDE_OF = {
  "preference.py:loss=dpo": {
    "objective.beta": (0.0, -0.1, float("nan"), "0.1"),
    "objective.label_smoothing": (-0.1, 0.5, 1.5),
    "objective.ld_alpha": (-0.1, 1.1),
    "objective.sync_every": (-1, 1.5),
    "objective.sync_mix": (0.0, 1.5),
    "objective.losses": ({"dpo": -1.0}, {"dpoo": 1.0}, {"dpo": float("nan")}),
    "objective.reference_base": ("int3",),
    "objective.divergence": ("kl",),
  },
  "preference.py:loss=simpo": {"objective.gamma_beta_ratio": (-0.5,)},
  "kto.py:": {"objective.desirable_weight": (-1.0,), "objective.sft_weight": (-0.1,)},
  "reward.py:": {"objective.centering": (-0.1,)},
  "grouped.py:method=grpo": {
    "objective.epsilon": (-0.2, 0.0, 1.5),
    "objective.epsilon_high": (-0.2,),
    "objective.dual_clip": (1.0, -3.0, "x"),
    "objective.kl_weight": (-0.1,),
    "objective.aggregation": ("mean",),
    "objective.advantage": ("mean",),
  },
  "grouped.py:method=cispo": {"objective.ceiling": (0.0, -5.0)},
  "sft.py:optimizer=galore": {
    "optimizer.rank": (0, -4, 4.0),
    "optimizer.update_gap": (0,),
    "optimizer.scale": (0.0, -1.0),
    "optimizer.target": ("[", "(a", ""),
    "optimizer.projection": ("up",),
  },
  "sft.py:adapter=adalora": {"adapter.deltaT": (0,), "adapter.beta1": (1.0,)},
  "sft.py:adapter=prompt": {"adapter.num_virtual_tokens": (0, 10**9)},
}
WRONG = [
  (config, name, value)
  for config, table in {"sft.py:": OUTSIDE, **OUTSIDE_OF}.items()
  for name, values in table.items()
  for value in values
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda w: f"{w[1]}={str(w[2])[:20]!r}")
def test_a_value_outside_its_domain_is_refused_with_its_name(wrong):
  config, name, value = wrong
  resolved = settings.plain(load(config))
  *parents, last = name.split(".")
  node = resolved
  for parent in parents:
    node = node[parent]
  assert last in node
  node[last] = value
  with pytest.raises(ConfigError) as error:
    fields.check(resolved)
  said = str(error.value)
  assert said.startswith(f"{name}=")
  assert any(
    word in said for word in ("write", "known are", "expression", "repetition", "beyond", "nearer")
  )


def test_every_number_has_an_end():
  """No field takes a number beyond float32, or one that could not be counted to."""
  numbers = {n: f.domain for n, f in fields.FIELDS.items() if isinstance(f.domain, Number)}
  assert len(numbers) > 40
  for name, domain in numbers.items():
    for value in (float("nan"), float("inf"), -float("inf"), 1e39, 10**400, "1", True, [1]):
      assert domain.wrong(value), name


UNREAD = [
  (
    "grouped.py:method=rloo",
    "objective.aggregation=token_mean",
    "the loss 'rloo' does not read it",
  ),
  ("grouped.py:method=reinforce", "objective.epsilon=0.1", "ppo, gspo, rloo, dppo_tv, dppo_kl do"),
  ("grouped.py:method=reinforce", "objective.old=reference", "does not read it"),
  ("grouped.py:method=grpo", "objective.ceiling=2.0", "cispo, dppo_tv, dppo_kl do"),
  (
    "preference.py:loss=ipo",
    "objective.label_smoothing=0.1",
    "dpo, dpo_norm, robust, exo, aot, aot_unpaired, cpo do",
  ),
  ("preference.py:loss=simpo", "objective.cache_reference=false", "does not read it"),
  ("preference.py:loss=dpo+nca", "objective.divergence=forward_kl", "does not read it"),
  ("reward.py:kind=steps", "objective.centering=0.1", "reward models of pairs does"),
  ("sft.py:", "objective.beta=0.1", "objective.name='sft' does not read it"),
  (
    "sft.py:",
    "optimizer.rank=4",
    "optimizer.name='adamw' does not read it (galore, galore8bit do)",
  ),
  ("sft.py:optimizer=sgd", "optimizer.b2=0.9", "does not read it"),
  ("preference.py:", "objective.sync_mix=0.5", "objective.sync_every is 0: make that above 0"),
  ("preference.py:", "objective.divergence_alpha=0.3", "objective.divergence is 'reverse_kl'"),
  ("preference.py:", "objective.reference_base=nf4", "objective.reference is 'base'"),
  ("grouped.py:", "objective.cache_reference=false", "objective.kl_weight is 0"),
  ("sft.py:", "data.replay_fraction=0.5", "data.replay is ''"),
  ("sft.py:", "eval.task_limit=5", "eval.task is ''"),
  ("sft.py:", "optimizer.loraplus_lr_embedding=0.1", "optimizer.loraplus_lr_ratio is 0.0"),
]


@pytest.mark.parametrize("case", UNREAD, ids=lambda c: c[1])
def test_a_field_that_the_method_does_not_read_is_refused(case):
  config, given, message = case
  with pytest.raises(ConfigError) as error:
    check(config, f"--config.{given}")
  assert message in str(error.value)


@pytest.mark.parametrize(
  ("config", "given"),
  [
    ("preference.py:", ["objective.sync_every=2", "objective.sync_mix=0.5"]),
    ("preference.py:", ["objective.divergence=alpha_divergence", "objective.divergence_alpha=0.3"]),
    ("grouped.py:", ["objective.kl_weight=0.1", "objective.cache_reference=false"]),
    ("sft.py:", ["data.replay=x.jsonl", "data.replay_fraction=0.5"]),
    ("sft.py:", ["optimizer.rank=4", "optimizer.name=galore"]),  # in any order
    ("sft.py:", ["optimizer.eps=None"]),
    ("sft.py:", ["optimizer.eps=none"]),
    ("sft.py:", ["data.system=7"]),
    ("sft.py:", ["adapter.method=vera", "adapter.r=8"]),
  ],
)
def test_what_is_read_may_be_written(config, given):
  check(config, *(f"--config.{field}" for field in given))


def test_a_method_written_as_a_field_brings_its_fields():
  config = load("sft.py", "--config.optimizer.name=galore", "--config.optimizer.lr=0.5")
  assert (config.optimizer.rank, config.optimizer.lr) == (128, 0.5)
  assert "b2" not in load("sft.py", "--config.optimizer.name=sgd").optimizer
  assert load("quickstart.py", "--config.optimizer.name=lion").optimizer.lr == 2e-3


def test_a_config_of_before_is_told_what_its_method_reads():
  old = settings.plain(load("sft.py"))
  old["optimizer"]["rank"] = 128
  with pytest.raises(ConfigError, match=r"optimizer\.rank: .*does not read it.*it reads name, lr"):
    fields.check(old)
  old = settings.plain(load("sft.py")) | {"learning_rate": 1e-4}
  with pytest.raises(ConfigError, match="learning_rate: nothing reads such a field"):
    fields.check(old)
  less = settings.plain(load("grouped.py:method=rloo"))
  less["objective"]["loss"] = "ppo"
  with pytest.raises(
    ConfigError, match=r"has no objective\.aggregation, which the loss 'ppo' reads"
  ):
    fields.check(less)


@pytest.mark.parametrize(
  "text", ["(a|b)*c", ".*layers.*q_proj", "(?:ab)+", r"layers\.\d+\..*", "a{2}", r"(\w+\.)*q_proj"]
)
def test_a_plain_expression_is_taken(text):
  assert not Expression().wrong(text)


@pytest.mark.parametrize("text", ["(a", "[z-a]", "a{1000}{1000}", "a" * 30_000])
def test_what_is_no_expression_or_too_large_a_one_is_refused_in_a_sentence(text):
  assert Expression().wrong(text).startswith("it ")
  assert len(Expression().wrong(text)) < 200


def test_only_what_compares_has_a_reference():
  assert decisions.has_reference(load("preference.py:loss=dpo"))
  assert not decisions.has_reference(load("preference.py:loss=simpo"))


def test_a_word_that_would_do_harm_does_none_where_nothing_reads_it():
  """As in the config of an earlier run; who writes it by hand is told."""
  config = settings.plain(rl.get_config())
  config["objective"]["kl_estimator"] = "k1"
  fields.check(config)
  with pytest.raises(ConfigError, match="zero on average"):
    fields.check(config, ["objective.kl_estimator"])
  config["objective"]["kl_weight"] = 0.1
  with pytest.raises(ConfigError, match="zero on average"):
    fields.check(config)
  config["objective"] |= {"kl_weight": 0.0, "kl_estimator": "k4"}
  with pytest.raises(ConfigError, match="known are k2, k3"):
    fields.check(config)
