"""Which way is better, and what compares with what."""

import copy

import pytest

from posttrain_jax.evals import meanings
from tests.evals import runs

DPO = dict(runs.CONFIG, objective=runs.PREFERENCE)


def changed(config, **fields):
  """The config with dotted fields changed, dots written as double underscores."""
  config = copy.deepcopy(config)
  for name, value in fields.items():
    *path, last = name.split("__")
    node = config
    for part in path:
      node = node.setdefault(part, {})
    node[last] = value
  return config


@pytest.mark.parametrize(
  ("name", "fields", "wanted"),
  [
    ("eval_loss", dict(objective__beta=0.3), ["objective.beta"]),
    (
      "loss",
      dict(objective__losses={"ipo": 1.0}),
      ["objective.losses.dpo", "objective.losses.ipo", "objective.losses.sft"],
    ),
    ("eval_loss", dict(optimizer__lr=1.0, adapter__r=4, steps=9), []),
    ("eval_rewards/margins", dict(objective__beta=0.3), ["objective.beta"]),
    ("eval_rewards/accuracies", dict(objective__beta=0.3), []),
    ("eval_kl", dict(objective__beta=0.3), []),
    ("eval_nll_loss", dict(objective__beta=0.3), []),
    ("eval_loss", dict(data__train="other.jsonl"), ["data.train"]),
    ("eval_rewards/accuracies", dict(data__train="other.jsonl"), ["data.train"]),
    ("eval_loss", dict(model__name="other"), ["model.name"]),
    ("accuracy/after", dict(data__train="other.jsonl", objective__beta=1.0), []),
    ("eval_score/exact", dict(eval__metric="exact", data__train="other.jsonl"), ["data.train"]),
    ("eval_score/exact", dict(eval__metric="exact", objective__beta=1.0), []),
    ("loss", dict(data__replay="old.jsonl"), ["data.replay"]),
    ("eval_loss", dict(data__replay="old.jsonl"), []),
    ("tokens_per_second", dict(data__train="other.jsonl", objective__beta=1.0), []),
  ],
)
def test_what_keeps_values_from_being_compared(name, fields, wanted):
  assert meanings.obstacles(name, [DPO, changed(DPO, **fields)]) == wanted


def test_held_out_rows_of_their_own_compare_whatever_the_training_rows():
  one = changed(DPO, data__eval="held.jsonl")
  assert meanings.obstacles("eval_loss", [one, changed(one, data__train="other.jsonl")]) == []
  assert meanings.obstacles("loss", [one, changed(one, data__train="other.jsonl")]) == [
    "data.train"
  ]
  assert meanings.obstacles("eval_loss", [one, changed(one, data__eval="b.jsonl")]) == ["data.eval"]


@pytest.mark.parametrize("kind", [*meanings.GROUPS, None, "own"])
def test_every_metric_has_one_place(kind):
  names = [
    "loss",
    "eval_loss",
    "loss/a",
    "rewards/margins",
    "kl",
    "grad_norm",
    "my_own",
    "eval_my_own",
  ]
  named = [one.name for _, some in meanings.sorted_into(kind, names) for one in some]
  assert sorted(named) == sorted({meanings.base(name) for name in names})


def test_channels_and_parts_are_told_apart():
  titles = lambda kind: [group.title for group, _ in meanings.sorted_into(kind, ["loss/sft"])]
  assert titles("sft") == ["Loss by channel"]
  assert titles("preference") == ["Parts of the loss"]


def test_parts_of_a_reward_are_told_by_what_stands_between():
  names = ["rewards/number/mean", "rewards/number/missing", "rewards/missing"]
  ((group, named),) = meanings.sorted_into("online", names)
  assert group is meanings.VERIFIED
  labels = {one.name: one.label for one in named}
  assert labels["rewards/number/mean"] == labels["rewards/number/missing"] == "number"
  assert labels["rewards/missing"] == "answers without a reward"
  assert meanings.better("online", "rewards/number/missing") == "lower"


def test_a_part_from_a_file_is_called_by_its_path_from_which_the_beginning_is_cut():
  files = ["/a/mine.py:f", f"/home/{'me' * 20}/mine.py:f"]
  ((_, named),) = meanings.sorted_into("online", [f"rewards/{file}/mean" for file in files])
  short, long = (one.label for one in named)
  assert short == files[0]
  assert long == "…" + files[1][1 - meanings.LONGEST :]


def test_a_reward_is_better_higher_where_the_run_writes_and_compares_under_one_reward():
  assert meanings.better("online", "reward") == meanings.better("online", "pass@8") == "higher"
  assert meanings.better("grouped", "reward") == meanings.better("online", "loss") == ""
  one = dict(objective=dict(name="grouped"), online=dict(samples=8), reward=dict(parts=["number"]))
  other = {**one, "reward": dict(parts=["exact"])}
  assert meanings.kind(one) == "online"
  assert meanings.kind(dict(objective=one["objective"])) == "grouped"
  for name in ("reward", "pass@1", "rewards/number/mean"):
    assert meanings.obstacles(name, [one, other]) == ["reward.parts"]
  assert not meanings.obstacles("entropy", [one, other])


def test_the_best_value_is_lowest_or_highest_or_none():
  assert meanings.best("preference", "eval_rewards/accuracies", [0.5, 0.9, None]) == 1
  assert meanings.best("sft", "eval_loss", [0.5, 0.9, float("nan")]) == 0
  assert meanings.best("preference", "eval_kl", [0.5, 0.9]) is None
  assert meanings.best("grouped", "loss", [0.5, 0.9]) is None
  assert meanings.best("sft", "accuracy/after", [0.5, 0.9]) == 1
  assert meanings.best("sft", "eval_loss", [float("nan"), None]) is None
  assert meanings.best("sft", "eval_loss", [0.5, None]) is None  # nothing to be better than
  assert meanings.best("sft", "eval_loss", [0.5, 0.5]) is None


@pytest.mark.parametrize("kind", [*meanings.GROUPS])
def test_every_group_says_how_to_read_it_and_every_metric_what_it_means(kind):
  for group in meanings.groups(kind):
    assert all(metric.meaning.endswith(".") for metric in group.metrics)
    if group is not meanings.OTHER:
      assert len(group.reading) > 80
