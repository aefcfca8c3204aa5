"""Runs on pairs, labels, steps and scored groups, from rows to a whole folder, and what they say when they cannot."""

import json
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from posttrain_jax import adapters
from posttrain_jax.__main__ import main
from posttrain_jax.adapters import peft_format
from posttrain_jax.build import reference, scoring
from posttrain_jax.data import schema
from posttrain_jax.evals import judge, margins, samples
from posttrain_jax.models import hf
from posttrain_jax.rewards.verifier import Answer
from posttrain_jax.runs.metrics_log import Journal
from posttrain_jax.train import loop
from tests import tiny
from tests.commands.test_train import assert_equal, environment, lines, weights
from tests.marks import slow

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
FIELDS = {
  "steps": 4,
  "batch.rows": 8,
  "data.length": 120,
  "data.eval_rows": 4,
  "eval.every": 2,
  "checkpoint.every": 2,
  "optimizer.lr": 0.02,
  "adapter.r": 4,
  "adapter.target_modules": "('q_proj','down_proj')",
}


def pair(i):
  letter = "abcdefg"[i % 7]
  return {
    "prompt": f"say {letter * (1 + i % 4)}",
    "chosen": letter * (2 + i % 3),
    "rejected": "z" * (1 + i % 4),
  }


ROWS = {
  "pairs": pair,
  "labels": lambda i: {
    "prompt": pair(i)["prompt"],
    "completion": pair(i)["chosen" if i % 2 else "rejected"],
    "label": bool(i % 2),
  },
  "steps": lambda i: {
    "prompt": pair(i)["prompt"],
    "completions": ["ab", "cd"],
    "labels": [True, bool(i % 2)],
  },
  "scored": lambda i: {
    "prompt": pair(i)["prompt"],
    "completions": [pair(i)["chosen"], pair(i)["rejected"], "q"],
    "scores": [1.0, 0.0, float(i % 2)],
  },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A tiny model, and rows of every kind."""
  made = tmp_path_factory.mktemp("comparisons")
  tiny.tiny_model_folder(made / "model")
  for kind, make in ROWS.items():
    tiny.write_jsonl(made / f"{kind}.jsonl", [make(i) for i in range(20)])
  return made


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))


def train(folder, out, *flags, config="preference", kind="pairs", arguments="", **fields):
  whole = "adapter=none" in arguments
  start = {k: v for k, v in FIELDS.items() if not (whole and k.startswith("adapter."))}
  given = start | {name.replace("__", "."): value for name, value in fields.items()}
  data = f"model={folder / 'model'},data={folder / (kind + '.jsonl')}"
  return main(
    [
      "train",
      f"--config={CONFIGS / (config + '.py')}:{data}{arguments}",
      f"--workdir={out}",
      *(f"--config.{name}={value}" for name, value in given.items()),
      *flags,
    ]
  )


@pytest.mark.slow
def test_pairs_are_learned_and_the_report_says_so(folder, tmp_path, capsys):
  out = tmp_path / "run"
  assert train(folder, out, steps=12, eval__every=6) == 0
  said = capsys.readouterr().out
  assert "reference: computing log-probabilities of 16 examples" in said
  assert "[[" in said
  found = lines(out)
  first = found[0]
  assert first["loss"] == pytest.approx(np.log(2), rel=1e-4)
  assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)
  last = found[-1]
  assert last["eval_rewards/accuracies"] == 1.0
  assert last["eval_rewards/margins"] > 0.1
  assert main(["eval", f"--workdir={out}"]) == 0
  told = json.loads((out / "eval.json").read_text())
  # the run's last evaluation, computed anew from the files that it left
  assert told["rewards/margins"] == pytest.approx(last["eval_rewards/margins"], rel=1e-3)
  assert told["diagnosis"]["pairs"] == 4
  assert told["diagnosis"]["margin"]["mean"] == pytest.approx(told["rewards/margins"], rel=1e-3)
  page = (out / "preference.html").read_text()
  assert "Lowest margins" in page
  assert pair(17)["prompt"] in page
  params, config = hf.load(folder / "model")
  adapter, _ = peft_format.load(out / "adapter", params, config)
  adapters.merge(params, adapter)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["bco", "dpo", "orpo"])
def test_stopped_it_goes_on_as_never_stopped(loss, folder, tmp_path, monkeypatch):
  """BCO with its running shift, which is in the checkpoint."""
  shift = {"objective__running_shift": True} if loss == "bco" else {}
  how = dict(arguments=f",loss={loss}", **shift)
  assert train(folder, tmp_path / "whole", **how) == 0
  whole_loop = Journal.write

  def stopping(self, step, values):
    whole_loop(self, step, values)
    if step == 2 and "loss" in values:
      signal.raise_signal(signal.SIGTERM)

  monkeypatch.setattr(Journal, "write", stopping)
  assert train(folder, tmp_path / "parts", **how) == 75
  monkeypatch.setattr(Journal, "write", whole_loop)
  assert train(folder, tmp_path / "parts", **how) == 0
  assert_equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


@pytest.mark.parametrize(
  ("config", "kind", "arguments", "metric"),
  [
    slow("kto", "labels", "", "eval_kl"),
    slow("kto", "pairs", "", "eval_kl"),
    slow("grouped", "scored", ",method=grpo", "eval_reward"),
    slow("grouped", "scored", ",method=gspo", "eval_reward"),
    slow("grouped", "scored", ",method=rloo", "eval_reward"),
    slow("reward", "labels", ",kind=outcomes", "eval_accuracy"),
    slow("reward", "steps", ",kind=steps", "eval_accuracy"),
    slow("preference", "pairs", ",loss=simpo", "eval_rewards/margins"),
    slow("preference", "pairs", ",loss=dpo+bco+sft,base=nf4", "eval_nll_loss"),
    slow("preference", "pairs", ",loss=ipo,adapter=none", "eval_rewards/margins"),
  ],
)
def test_every_kind_of_run_is_whole(config, kind, arguments, metric, folder, tmp_path, capsys):
  out = tmp_path / "run"
  assert train(folder, out, config=config, kind=kind, arguments=arguments) == 0, capsys.readouterr()
  assert metric in lines(out)[-1]
  assert (out / "report.html").exists()
  assert main(["eval", f"--workdir={out}"]) == 0


@pytest.mark.slow
def test_an_adapter_is_the_reference_of_what_trains_whole(folder, tmp_path):
  """Bound to a base of its own: what trains is donated from step to step."""
  params, config = hf.load(folder / "model")
  lora = adapters.AdapterConfig(r=2)
  _, node = adapters.init(jax.random.key(0), params, lora)
  peft_format.save(tmp_path / "adapter", node, lora, config)
  options = dict(objective__reference=tmp_path / "adapter", objective__cache_reference=False)
  assert train(folder, tmp_path / "run", arguments=",adapter=none", steps=2, **options) == 0
  assert len([line for line in lines(tmp_path / "run") if "loss" in line]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["adapter", "model"])
def test_the_reference_may_be_another_adapter_or_model(reference, folder, tmp_path):
  first = tmp_path / "first"
  assert train(folder, first) == 0
  if reference == "adapter":
    other = first / "adapter"
  else:
    other = tmp_path / "merged"
    assert main(["export", f"--workdir={first}", f"--out={other}", "--merge"]) == 0
  for cached in (True, False):
    out = tmp_path / f"run-{cached}"
    options = dict(objective__reference=other, objective__cache_reference=cached)
    assert train(folder, out, **options) == 0
    # the policy starts at the base, which is not this reference: its margins are not zero
    assert lines(out)[0]["rewards/margins"] < -0.01


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(kind="labels"), '"chosen" and "rejected"'),
    (dict(objective__sync_every=2, arguments=",adapter=none"), "cannot be computed beforehand"),
    (dict(arguments=",loss=dop"), "objective.losses={'dop': 1.0}: 'dop': known are dpo"),
    (dict(arguments=",loss=tpo"), '"reference"'),
    (dict(objective__reference="nowhere"), "nowhere"),
    (dict(data__length=20), "20 of 20 rows have more than data.length=20 tokens"),
    (dict(data__truncate="keep_start"), "answers are kept whole"),
    (dict(config="grouped", kind="scored", objective__advantage="mean"), "known are group"),
    (dict(data__kind="text"), "objective.name='preference' reads rows of pairs or triples"),
    (dict(config="kto", kind="labels", data__eval_rows=1), "1 completions of the held-out rows"),
  ],
)
def test_mistakes_are_named_and_leave_nothing(options, message, folder, tmp_path, capsys):
  options = dict(options)
  if "vera" in options.get("arguments", ""):
    options["adapter__r"] = 8
  assert train(folder, tmp_path / "run", **options) == 1
  assert message in capsys.readouterr().err
  assert not (tmp_path / "run" / "done.json").exists()


def test_a_reference_of_another_vocabulary_is_refused(folder, tmp_path, capsys):
  model = tiny.config(vocab_size=300)
  from posttrain_jax.models import decoder

  hf.save(tmp_path / "other", decoder.init(jax.random.key(0), model), model)
  tiny.tokenizer().save_pretrained(tmp_path / "other")
  assert train(folder, tmp_path / "run", objective__reference=tmp_path / "other") == 1
  assert "its vocabulary has 300 tokens, the model's 261" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("config", ["preference", "kto"])
def test_two_processes_are_one(config, folder, tmp_path):
  """Each of two computes its share of the reference, and the main one keeps it."""
  kind = {"preference": "pairs", "kto": "labels"}[config]
  fields = dict(optimizer__name="sgd", optimizer__lr=0.5, checkpoint__every=0, mesh__fsdp=-1)
  fields |= {"model__dtype": "float32"}  # of processes that know nothing of what is patched here
  given = [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
  assert train(folder, tmp_path / "one", config=config, kind=kind, **fields) == 0
  data = f"model={folder / 'model'},data={folder / (kind + '.jsonl')}"
  command = [
    f"--config={CONFIGS / (config + '.py')}:{data}",
    f"--workdir={tmp_path / 'two'}",
    *(f"--config.{name}={value}" for name, value in FIELDS.items()),
    *given,
  ]
  script = pathlib.Path(__file__).parents[2] / "launch" / "local.py"
  launched = subprocess.run(
    [sys.executable, str(script), "--processes=2", "--", *command],
    capture_output=True,
    text=True,
    timeout=280,
    env=environment(),
    check=False,
  )
  assert launched.returncode == 0, launched.stdout + launched.stderr
  assert launched.stdout.count("] reference: computing log-probabilities") == 1
  one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
  for name, array in one.items():
    assert np.linalg.norm(two[name] - array) <= 1e-4 * np.linalg.norm(array), name


@pytest.mark.slow
@pytest.mark.parametrize(("config", "kind"), [slow("preference", "pairs"), ("kto", "labels")])
def test_a_dry_run_compiles_the_step_that_runs(config, kind, folder, tmp_path, monkeypatch):
  """On batches of the very shapes, the reference's log-probabilities among them."""
  shapes = lambda batch: jax.tree.map(lambda x: (x.shape, x.dtype), batch)
  blank, placed = reference.blank, loop._placed
  dry, run = [], []
  note = lambda notes, batch: notes.append(shapes(batch)) or batch
  monkeypatch.setattr(reference, "blank", lambda *a: note(dry, blank(*a)))
  monkeypatch.setattr(loop, "_placed", lambda of, batch: placed(of, note(run, batch)))
  how = dict(config=config, kind=kind, steps=1, eval__every=0)
  assert train(folder, tmp_path / "run", "--dry_run", **how) == 0
  assert not (tmp_path / "run").exists()
  assert train(folder, tmp_path / "run", **how) == 0
  assert dry[-1] == run[0]
  assert "ref_logps" in run[0]


@pytest.mark.slow
def test_a_sweep_trains_its_points(folder, tmp_path):
  """Through the real command: a point's log stands in its folder before the run does."""
  path = tmp_path / "grid.py"
  path.write_text(
    "from posttrain_jax.configs import preference\nget_config = preference.get_config\n"
    "def sweep():\n  for beta in (0.1, 0.5):\n    yield 'loss=dpo', {'objective.beta': beta}\n"
  )
  given = [f"--config.{name}={value}" for name, value in {**FIELDS, "steps": 2}.items()]
  config = f"--config={path}:model={folder / 'model'},data={folder / 'pairs.jsonl'}"
  assert main(["sweep", config, f"--workdir={tmp_path / 'sweep'}", *given]) == 0
  assert len(list((tmp_path / "sweep").glob("*/done.json"))) == 2


# --- the diagnosis ---------------------------------------------------------------------------------------------------


def compared(margin, longer=None, drift=(0.0, 0.0), length=10.0):
  margin = np.asarray(margin, float)
  longer = np.zeros_like(margin) if longer is None else np.asarray(longer, float)
  full = lambda value: np.full_like(margin, value)
  return margins.Compared(
    margin, full(0.0), full(length) + longer, full(length), full(drift[0]), full(drift[1])
  )


RNG = np.random.default_rng(0)
LONGER = RNG.integers(-30, 30, 40)


@pytest.mark.parametrize(
  ("pairs", "finding"),
  [
    (compared(np.full(20, 8.0)), "Over-optimised"),
    (compared(LONGER / 20 + RNG.normal(size=40) * 0.1, LONGER), "prefers longer answers"),
    (compared(-LONGER / 20 + RNG.normal(size=40) * 0.1, LONGER), "prefers shorter answers"),
    (compared(RNG.normal(size=40) * 0.01), "beta too high"),
    (compared(RNG.normal(size=40) * 0.01, drift=(1.0, 1.0)), "Undecided"),
    (compared(RNG.normal(1, 1, 40), drift=(-9.0, -12.0)), "beta is too low"),
    (compared(RNG.normal(1, 1, 40), drift=(-3.0, -12.0), length=100), "Likelihood displacement"),
    (compared(RNG.normal(-1, 1, 40)), "Worse than chance"),
    (compared(RNG.normal(1, 1, 40), drift=(0.5, -0.5)), "Nothing stands out"),
  ],
)
def test_what_looks_wrong_is_said(pairs, finding):
  assert any(finding in sentence for sentence in margins.diagnose(pairs)["findings"])


def test_figures_of_a_diagnosis():
  found = margins.diagnose(compared([1.0, -1.0, 0.01, 3.0], [5, -5, 0, 5]))
  assert found["accuracy"] == 0.75
  assert found["near_ties"] == 0.25
  assert found["accuracy_chosen_longer"] == 1.0
  assert found["accuracy_chosen_shorter"] == 0.0
  given = compared([1.0, 1.0], [10, -5], drift=(3.0, -2.0))
  per_token = np.mean([3 / 20 + 2 / 10, 3 / 5 + 2 / 10])
  assert margins.diagnose(given)["drift"]["margin_per_token"] == pytest.approx(per_token)
  expected = np.corrcoef([1.0, -1.0, 0.01, 3.0], [5, -5, 0, 5])[0, 1]
  assert found["length_correlation"] == pytest.approx(expected)


# --- reward models at work -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_model(folder, tmp_path_factory):
  """The adapter of a run on pairs, in which every chosen answer comes to have more."""
  out = tmp_path_factory.mktemp("reward") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("POSTTRAIN_CACHE", str(out.parent / "cache"))
    assert train(folder, out, config="reward", steps=12, eval__every=6) == 0
  return out / "adapter"


@pytest.mark.slow
def test_a_reward_model_orders_pairs_and_is_read_again(reward_model):
  out = reward_model.parent
  last = lines(out)[-1]
  assert last["eval_accuracy"] == 1.0
  assert main(["eval", f"--workdir={out}"]) == 0
  told = json.loads((out / "eval.json").read_text())
  assert told["margin"] == pytest.approx(last["eval_margin"], rel=1e-3)
  assert json.loads((reward_model / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


def test_a_reward_model_is_a_part_of_a_reward_by_its_folder(reward_model):
  reward = scoring.of({"parts": (str(reward_model),)}, ["prompt"])
  prompt = [{"role": "user", "content": "Is it so?"}]
  texts = ["yes", "no", "x" * 1000, ""]
  given = reward.score([Answer(prompt, text, {}) for text in texts]).answers
  asked = {"prompt": prompt, "completion": [{"role": "assistant", "content": "no"}]}
  liked = scoring.judge(str(reward_model))
  ((alone,),) = liked.rewards(liked.encode(schema.read([asked])))
  assert given[1].total.value == pytest.approx(alone, rel=1e-5)
  assert given[0].total.value != given[1].total.value
  assert "tokens" in given[2].total.reason  # too long to be read: missing, and the others are not
  assert "is empty" in given[3].total.reason
  in_words = reward.score([Answer("Is it so?", "no", {})]).answers[0]
  assert in_words.total.value == pytest.approx(alone, rel=1e-5)
  assert not reward.has_most


def scores(reward_model, rows, tmp_path):
  """What `posttrain eval --reward` writes for rows."""
  tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
  out = tmp_path / "out.jsonl"
  out.unlink(missing_ok=True)
  data = f"--data={tmp_path / 'rows.jsonl'}"
  assert main(["eval", f"--reward={reward_model}", data, f"--out={out}"]) == 0
  return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.slow
def test_a_reward_model_scores_rows_of_every_schema_alike(reward_model, tmp_path, capsys):
  rows = [pair(i) for i in range(11)]
  by_pair = scores(reward_model, rows, tmp_path)
  assert [line["row"].rsplit(":")[-1] for line in by_pair] == [str(i + 1) for i in range(11)]
  assert all(line["chosen"] > line["rejected"] for line in by_pair)
  assert '"accuracy": 1.0' in capsys.readouterr().out
  one = lambda name: [{"prompt": row["prompt"], "completion": row[name]} for row in rows]
  group = [
    {"prompt": r["prompt"], "completions": [r["chosen"], r["rejected"]], "scores": [0, None]}
    for r in rows
  ]
  turn = lambda role, text: {"role": role, "content": text}
  talk = [{"messages": [turn("user", r["prompt"]), turn("assistant", r["chosen"])]} for r in rows]
  for name in ("chosen", "rejected"):
    expected = [line[name] for line in by_pair]
    found = [line["reward"] for line in scores(reward_model, one(name), tmp_path)]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  for i, line in enumerate(scores(reward_model, group, tmp_path)):
    both = [by_pair[i]["chosen"], by_pair[i]["rejected"]]
    np.testing.assert_allclose(line["rewards"], both, rtol=1e-4, atol=1e-5)
  found = [line["reward"] for line in scores(reward_model, talk, tmp_path)]
  np.testing.assert_allclose(found, [line["chosen"] for line in by_pair], rtol=1e-4, atol=1e-5)


def test_steps_are_scored_where_they_end(reward_model, tmp_path, capsys):
  """Each as the whole text up to it, labelled or not; labels are compared with the sign."""
  rows = [{"prompt": "say ab", "completions": ["a", "bb", "c"][: 1 + i % 3]} for i in range(9)]
  found = scores(reward_model, rows, tmp_path)
  assert [len(line["steps"]) for line in found] == [1 + i % 3 for i in range(9)]
  for shorter, longer in ((found[0], found[1]), (found[1], found[2])):
    np.testing.assert_allclose(longer["steps"][:-1], shorter["steps"], rtol=1e-4, atol=1e-5)
  capsys.readouterr()
  labelled = [
    {**row, "labels": [value > 0 for value in line["steps"]]} for row, line in zip(rows, found)
  ]
  labelled[0]["labels"] = [not labelled[0]["labels"][0]]
  assert scores(reward_model, labelled, tmp_path) == found
  total = sum(len(line["steps"]) for line in found)
  assert f'"accuracy": {1 - 1 / total:.6f}'[:16] in capsys.readouterr().out


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--model=m"], "--reward=DIR takes --data"),
    (["--data={rows}", "--out={rows}"], "is there already"),
    (["--data={mixed}"], "several schemas"),
    (["--data={texts}"], "a prompt with its answer"),
  ],
)
def test_what_a_reward_model_cannot_score_is_said(flags, message, reward_model, tmp_path, capsys):
  paths = {name: tmp_path / f"{name}.jsonl" for name in ("rows", "mixed", "texts")}
  tiny.write_jsonl(paths["rows"], [pair(0)])
  tiny.write_jsonl(paths["mixed"], [pair(0), {"prompt": "a", "completion": "b"}])
  tiny.write_jsonl(paths["texts"], [{"text": "abc"}])
  given = [flag.format(**paths) for flag in flags]
  assert main(["eval", f"--reward={reward_model}", *given]) == 1
  assert message in capsys.readouterr().err


def test_an_adapter_that_is_no_reward_model_is_refused(folder, tmp_path, capsys):
  params, config = hf.load(folder / "model")
  chosen = adapters.AdapterConfig(r=2, target_modules=("q_proj",))
  _, adapter = adapters.init(jax.random.key(0), params, chosen)
  peft_format.save(tmp_path / "a", adapter, chosen, config, base_name=str(folder / "model"))
  data = f"--data={folder / 'pairs.jsonl'}"
  assert main(["eval", f"--reward={tmp_path / 'a'}", data]) == 1
  assert "it is no reward model" in capsys.readouterr().err
  assert main(["eval", f"--reward={folder / 'model'}", data]) == 1
  assert "no scores a token" in capsys.readouterr().err


@pytest.fixture
def answering(monkeypatch):
  """Questions whose sampled answers are known: the third of four is right, as the gold one is."""
  plans = []

  def answered(writer, rows, plan, reward, example, progress=None):
    plans.append(plan)
    texts = lambda row: [row["gold"] if i == 2 else "z" * (i + 1) for i in range(plan.samples)]
    drawn = [
      samples.Drawn(number, i, [i], text, True)
      for number, row in enumerate(rows)
      for i, text in enumerate(texts(row))
    ]
    scored = samples.score(reward, rows, drawn, example)
    return [scored[i : i + plan.samples] for i in range(0, len(scored), plan.samples)]

  monkeypatch.setattr(samples, "answered", answered)
  return plans


def test_best_of_takes_the_answer_that_the_reward_model_likes(
  folder, reward_model, answering, monkeypatch, capsys
):
  flags = [f"--model={folder / 'model'}", "--data=sql", f"--reward={reward_model}", "--limit=5"]
  liked = lambda judge, examples: [[float(i % 4 == 2)] for i, _ in enumerate(examples)]
  monkeypatch.setattr(judge.Judge, "encode", lambda self, rows: rows)
  for rewards, best in ((liked, 1.0), (lambda *a: [[-x[0]] for x in liked(*a)], 0.0)):
    monkeypatch.setattr(judge.Judge, "rewards", rewards)
    capsys.readouterr()
    assert main(["eval", *flags, "--best_of=4"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["accuracy_best"] == best
    assert (told["accuracy_of_one"], told["accuracy_of_any"]) == (0.25, 1.0)
    assert (told["questions"], told["samples"], answering[-1].samples) == (5, 4, 4)
  assert main(["eval", *flags, "--best_of=1"]) == 1
  assert main(["eval", *flags[:2], "--best_of=4"]) == 1
  assert main(["eval", *flags, "--best_of=4", "--columns=prompt=ask"]) == 1
  assert "asks a built-in task" in capsys.readouterr().err
