"""Which modules, ranks and scales the options mean; the same table runs against PEFT in tests/oracle/test_peft.py."""

import dataclasses
import math

import pytest

from posttrain_jax.adapters import AdapterConfig, depth_ranks
from posttrain_jax.adapters.config import full_name
from posttrain_jax.core import tree
from tests.models import families

NAMES = [
  name for path in tree.flatten(families.make("llama")[1]) for name in tree.expand(path, (3,))
]
MATRICES = [name for name in NAMES if "norm" not in name]
QV = {f"layers.{i}.self_attn.{p}_proj" for i in range(3) for p in "qv"}


def targeted(**options):
  config = AdapterConfig(**options)
  return {name for name in MATRICES if config.targets(name)}


def test_all_linear_is_every_matrix_of_the_layers():
  found = targeted()
  assert len(found) == 3 * 7
  assert not found & {"embed_tokens", "lm_head"}


def test_names_match_whole_endings():
  assert targeted(target_modules=["q_proj", "v_proj"]) == QV
  assert targeted(target_modules=["1.mlp.up_proj"]) == {"layers.1.mlp.up_proj"}
  assert targeted(target_modules=["proj", "_proj", "attn"]) == set()
  assert targeted(target_modules=["embed_tokens", "lm_head"]) == {"embed_tokens", "lm_head"}


def test_a_string_is_an_expression_over_the_whole_name():
  assert targeted(target_modules=r".*self_attn\.[qv]_proj") == QV
  assert targeted(target_modules=r"self_attn\.q_proj") == set()
  assert targeted(target_modules=r"lm_head|.*layers\.0\.mlp\.up_proj") == {
    "lm_head",
    "layers.0.mlp.up_proj",
  }
  assert "lm_head" not in targeted(target_modules=r"model\..*")  # the head is outside


def test_excluded_modules_win():
  options = dict(target_modules=["q_proj", "v_proj"])
  assert targeted(**options, exclude_modules=["v_proj"]) == {n for n in QV if "q_proj" in n}
  assert targeted(**options, exclude_modules=r".*layers\.[01]\..*") == {
    n for n in QV if n.startswith("layers.2")
  }
  assert targeted(**options, exclude_modules=["layers.1.self_attn.q_proj"]) == QV - {
    "layers.1.self_attn.q_proj"
  }


def test_layers_to_transform_restricts_names_but_no_full_ones():
  layer = {n for n in QV if n.startswith("layers.1")}
  assert targeted(target_modules=["q_proj", "v_proj"], layers_to_transform=1) == layer
  assert targeted(target_modules=["q_proj", "v_proj"], layers_to_transform=[]) == QV
  assert len(targeted(layers_to_transform=(0, 2))) == 14
  assert targeted(target_modules=["embed_tokens", "q_proj"], layers_to_transform=[1]) == {
    "layers.1.self_attn.q_proj"
  }
  full = ["lm_head", "model.embed_tokens", "model.layers.0.mlp.up_proj", "q_proj", "v_proj"]
  assert targeted(target_modules=full, layers_to_transform=[1]) == layer | {
    "lm_head",
    "embed_tokens",
    "layers.0.mlp.up_proj",
  }


def test_the_first_pattern_that_matches_gives_the_rank():
  config = AdapterConfig(
    r=8, rank_pattern={r"layers\.1\..*": 3, "q_proj": 5, r"^model\.embed_tokens": 7, "^lm_head": 9}
  )
  ranks = {name: config.rank(name) for name in MATRICES}
  assert ranks["layers.1.self_attn.q_proj"] == 3
  assert ranks["layers.0.self_attn.q_proj"] == 5
  assert ranks["layers.0.mlp.up_proj"] == 8
  assert ranks["embed_tokens"] == 7
  assert ranks["lm_head"] == 9
  assert AdapterConfig(r=8, rank_pattern={"proj": 3}).rank("layers.0.mlp.up_proj") == 8


def test_scale_is_alpha_over_the_modules_own_rank():
  options = dict(r=8, lora_alpha=16, rank_pattern={"q_proj": 4}, alpha_pattern={"k_proj": 2})
  config = AdapterConfig(**options)
  assert config.scale("layers.0.mlp.up_proj") == 2
  assert config.scale("layers.0.self_attn.q_proj") == 4
  assert config.scale("layers.0.self_attn.k_proj") == 0.25
  rank_stabilised = AdapterConfig(**options, use_rslora=True)
  assert rank_stabilised.scale("layers.0.mlp.up_proj") == 16 / math.sqrt(8)
  assert rank_stabilised.scale("layers.0.self_attn.q_proj") == 8


def test_full_names_are_those_of_transformers():
  assert full_name("layers.0.mlp.up_proj") == "model.layers.0.mlp.up_proj"
  assert full_name("lm_head") == "lm_head"


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(r=0), "r=0: write a number from 1 to 1048576"),
    (dict(r=10**400), "r=a number of thousands of digits|r=1000.*: write a number from 1 to"),
    (dict(r=2.5), "r=2.5: write a whole number"),
    (dict(r=True), "r=True: write a whole number"),
    (dict(rank_pattern={"q_proj": "3"}), r"rank_pattern\['q_proj'\]='3': write a whole number"),
    (dict(rank_pattern=["q_proj"]), "rank_pattern=.* is no table of names and numbers"),
    (dict(rank_pattern={3: 3}), "rank_pattern=.* is no table of names and numbers"),
    (dict(alpha_pattern={"q_proj": None}), r"alpha_pattern\['q_proj'\]=None: write a number"),
    (dict(lora_alpha=10**400), "lora_alpha=.*: write a finite number"),
    (dict(lora_alpha="8"), "lora_alpha='8': write a number"),
    (dict(use_rslora="yes"), "use_rslora='yes': write true or false"),
    (dict(target_modules=[1, "q_proj"]), r"target_modules=\[1, 'q_proj'\]: write a list of names"),
    (dict(target_modules={"q_proj": 1}), "target_modules=.*: write a list of names"),
    (dict(modules_to_save="lm_head"), "modules_to_save='lm_head': write a list of names"),
    (dict(layers_to_transform=["1"]), "layers_to_transform='1': write a whole number"),
    (dict(layers_to_transform="all"), "layers_to_transform='all': write a list of layers"),
    (dict(layers_to_transform=[-1]), "layers_to_transform=-1: write a number from 0 to"),
    (dict(target_modules="(((a{1000}){1000}){1000})"), "target_modules: .* repeats up to 1e"),
    (dict(depth_ranks=(4, 0)), "depth_ranks=0: write a number from 1 to"),
    (dict(rank_pattern={"q_proj": 0}), "q_proj.*=0.*exclude_modules"),
    (dict(lora_dropout=1.0), r"lora_dropout=1.0 must be in \[0, 1\)"),
    (dict(lora_dropout=float("nan")), "lora_dropout=nan"),
    (dict(lora_alpha=float("inf")), "lora_alpha=inf: write a finite number"),
    (
      dict(alpha_pattern={"q_proj": float("nan")}),
      r"alpha_pattern\['q_proj'\]=nan: write a finite number",
    ),
    (dict(init_lora_weights="zeros"), "init_lora_weights='zeros': write one of True, 'gaussian'"),
    (dict(target_modules="(q_proj"), r"target_modules: '\(q_proj' is no regular expression"),
    (dict(exclude_modules="[q"), "exclude_modules: .* is no regular expression"),
    (dict(rank_pattern={"*": 2}), "rank_pattern: .* is no regular expression"),
    (dict(alpha_pattern={"*": 2}), "alpha_pattern: .* is no regular expression"),
  ],
)
def test_what_cannot_be_meant_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    AdapterConfig(**options)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(method="lorra"), "unknown adapter method 'lorra'; known: lora, "),
    (
      dict(method="pissa", init_lora_weights="olora"),
      "means init_lora_weights='pissa', found 'olora'",
    ),
    (dict(method="olora", init_lora_weights="pissa_niter_4"), "means init_lora_weights='olora'"),
    (dict(method="ia3", r=4), "r=4: the method 'ia3' has no such option; it reads target_modules"),
    (dict(method="vera", rank_pattern={"q_proj": 2}), "'vera' has no such option"),
    (dict(method="lora", attention_group=4), "'lora' has no such option"),
    (dict(method="pissa", init_lora_weights="pissa_niter_0"), "write one of True"),
    (dict(method="prompt", num_virtual_tokens=0), "num_virtual_tokens=0: write a number from 1"),
    (
      dict(method="prompt", prompt_tuning_init="ZEROS"),
      "'ZEROS': write one of RANDOM, SAMPLE_VOCAB",
    ),
    (dict(method="prompt", prompt_tuning_init="TEXT"), "TEXT goes with a text"),
    (dict(method="prompt", prompt_tuning_init_text="Say"), "a text with TEXT"),
    (dict(method="longlora", attention_group=1), "attention_group=1: write at least 2 tokens"),
    (dict(method="longlora", attention_group=-2), "attention_group=-2: write a number from 0"),
    (dict(method="longlora", context_length=-1), "context_length=-1: write a number from 0"),
  ],
)
def test_a_method_reads_its_own_options_and_says_so(options, message):
  with pytest.raises(ValueError, match=message):
    AdapterConfig(**options)


def test_the_least_that_may_be_written():
  for options in (
    dict(method="prompt", num_virtual_tokens=1),
    dict(method="prompt", prompt_tuning_init="TEXT", prompt_tuning_init_text=""),
    dict(method="longlora", attention_group=2, context_length=1),
    dict(method="longlora", attention_group=0),
    dict(r=1, rank_pattern={"q_proj": 1}, depth_ranks=(1, 1)),
  ):
    fields = dataclasses.asdict(AdapterConfig(**options))
    assert fields | options == fields


def test_a_method_that_is_lora_with_an_option_sets_it():
  assert AdapterConfig(method="dora").use_dora
  for method in ("pissa", "olora", "loftq"):
    config = AdapterConfig(method=method)
    assert (config.init_lora_weights, config.pissa_iterations) == (method, 0)
    assert config.changes_base
    assert config == AdapterConfig(method=method, init_lora_weights=method)
  fast = AdapterConfig(method="pissa", init_lora_weights="pissa_niter_16")
  assert (fast.pissa_iterations, fast.changes_base) == (16, True)
  assert AdapterConfig(init_lora_weights="pissa_niter_3").pissa_iterations == 3
  for init in (True, "gaussian", "zero_a"):
    assert not AdapterConfig(init_lora_weights=init).changes_base


def test_defaults_are_pefts():
  config = AdapterConfig()
  assert (config.r, config.lora_alpha, config.lora_dropout, config.loftq_iter) == (8, 8, 0, 1)
  assert (config.init_lora_weights, config.use_rslora, config.use_dora) == (True, False, False)
  assert (config.d_initial, config.projection_prng_key) == (0.1, 0)
  assert (config.init_r, config.target_r, config.tinit, config.tfinal, config.deltaT) == (
    12,
    8,
    0,
    0,
    1,
  )
  assert (config.beta1, config.beta2, config.orth_reg_weight) == (0.85, 0.85, 0.5)


# --- Ranks by depth ---------------------------------------------------------------------------------------------------


def test_ranks_go_from_the_first_layer_to_the_last():
  ranks = depth_ranks(4, 64, 30)
  assert list(ranks.values())[:3] == [4, 6, 8]
  assert list(ranks.values())[-1] == 64
  assert list(depth_ranks(8, 2, 4).values()) == [8, 6, 4, 2]
  assert list(depth_ranks(5, 9, 1).values()) == [5]
  config = AdapterConfig(rank_pattern=ranks)
  assert config.rank("layers.1.mlp.up_proj") == 6
  assert config.rank("layers.11.mlp.up_proj") == ranks[r"layers\.11\..*"]
  assert config.rank("lm_head") == config.r


def test_ranks_by_depth_yield_to_a_pattern_and_are_of_a_known_depth():
  config = AdapterConfig(depth_ranks=(4, 8), rank_pattern={"q_proj": 3}, r=2)
  with pytest.raises(ValueError, match="of a model of known depth"):
    config.rank("layers.1.mlp.up_proj")
  known = config.for_layers(3)
  found = [known.rank(f"layers.{i}.{name}") for i in range(3) for name in ("mlp.up_proj", "q_proj")]
  assert found == [4, 3, 6, 3, 8, 3]
  assert known.rank("lm_head") == 2
  assert AdapterConfig(r=2).for_layers(3) == AdapterConfig(r=2)


@pytest.mark.parametrize("ranks", [(4,), 4, (4, 8, 16)])
def test_ranks_by_depth_are_two(ranks):
  with pytest.raises(ValueError, match="write the ranks of the first and the last layer"):
    AdapterConfig(depth_ranks=ranks)
