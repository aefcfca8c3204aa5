"""Fields of a config through `posttrain train`: each changes what it says, a count, a text or a number of the run."""

import json
import re

import pytest

from posttrain_jax import settings
from posttrain_jax.build import data as data_build
from posttrain_jax.build import mesh
from posttrain_jax.build import model as model_build
from posttrain_jax.build import run as runs
from posttrain_jax.evals import tasks
from tests import tiny
from tests.commands import test_train, test_train_answers
from tests.commands.test_train import lines
from tests.commands.test_train_answers import ROWS, pair
from tests.marks import few, slow

SHORT = dict(steps=1, eval__every=0, data__eval_rows=0, checkpoint__every=0)
TALK = [{"q": f"tell {i}", "a": "once " * (1 + i % 3), "channel": "general"} for i in range(20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A tiny model, and rows of every kind, twice: the second file's prompts say `tell`."""
  made = tmp_path_factory.mktemp("fields")
  tiny.tiny_model_folder(made / "model")
  tiny.write_jsonl(made / "rows.jsonl", tiny.rows(40))
  tiny.write_jsonl(made / "talk.jsonl", TALK)
  renamed = [{"prompt": row["q"], "completion": row["a"]} for row in TALK]
  tiny.write_jsonl(made / "talk2.jsonl", renamed)
  for kind, make in ROWS.items():
    tiny.write_jsonl(made / f"{kind}.jsonl", [make(i) for i in range(20)])
    other = [{**make(i), "prompt": f"tell {i}"} for i in range(20)]
    tiny.write_jsonl(made / f"{kind}2.jsonl", other)
  return made


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
  """A cache of its own, and one device of the eight: a program for it compiles sooner."""
  monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(mesh, "make", lambda config: None)


@pytest.fixture
def told(folder, tmp_path, monkeypatch, capsys):
  """What a dry run says, of text or (with `config`) of answers, without compiling its step."""
  monkeypatch.setattr(runs, "_explain_memory", lambda pieces, say: None)

  def say(config="sft", **fields):
    module = test_train if config == "sft" else test_train_answers
    how = {} if config == "sft" else {"config": config}
    fields = {"data__eval_rows": 0} | fields
    code = module.train(folder, tmp_path / "run", "--dry_run", **how, **fields)
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out

  return say


def counts(said):
  """(examples, tokens, trained tokens) of an epoch."""
  found = re.search(
    r"^data: ([\d,]+) examples, ([\d,]+) tokens, ([\d,]+) trained", said, re.MULTILINE
  )
  return tuple(int(n.replace(",", "")) for n in found.groups())


# --- data ------------------------------------------------------------------------------------------------------------


def test_a_limit_is_how_many_rows_are_used(told):
  assert counts(told())[0] == 40
  assert counts(told(data__limit=7))[0] == 7


def test_a_system_message_stands_before_every_prompt(told):
  without, said = (told(data__length=96, data__system=text) for text in (None, "be brief"))
  message = "<|im_start|>system\nbe brief<|im_end|>\n"
  assert message not in without
  assert message in said
  tokens = len(tiny.tokenizer()(message)["input_ids"])
  assert counts(said)[1] == counts(without)[1] + 40 * tokens
  assert counts(said)[2] == counts(without)[2]


REPLAY = {"data__replay_columns__prompt": "q", "data__replay_columns__completion": "a"}


def test_replay_is_a_share_of_what_is_trained(told, folder):
  """Of the tokens, or of the examples; the data itself stays whole."""
  fields = dict(data__replay=folder / "talk.jsonl", **REPLAY)
  examples, tokens, _ = counts(told())
  found = told(data__replay_fraction=0.25, data__replay_by="examples", **fields)
  assert counts(found)[0] == round(examples / 0.75)
  for fraction in (0.25, 0.05):
    found = counts(told(data__replay_fraction=fraction, data__replay_by="tokens", **fields))
    assert found[1] == pytest.approx(tokens / (1 - fraction), abs=40)  # the last text is whole


@pytest.mark.slow
def test_replay_rows_have_columns_of_their_own(folder, tmp_path, capsys):
  """Without a word on them the file's are looked for; the run's own columns are not those of replay."""
  fields = SHORT | dict(data__replay=folder / "talk.jsonl", data__replay_fraction=0.5)
  assert test_train.train(folder, tmp_path / "wrong", **fields) == 1
  assert "talk.jsonl" in capsys.readouterr().err
  assert test_train.train(folder, tmp_path / "run", **fields, **REPLAY) == 0
  assert lines(tmp_path / "run")[0]["loss/general"] > 0  # the channel of replay's rows


def mixture(folder, kind, first=0.75):
  paths = folder / f"{kind}.jsonl", folder / f"{kind}2.jsonl"
  return f"{paths[0]}*{first}+{paths[1]}*{1 - first:g}"


@pytest.mark.parametrize(
  ("config", "kind"),
  few([("preference", "pairs"), ("kto", "labels"), ("grouped", "scored")], ("kto", "labels")),
)
def test_a_mixture_of_answers_has_the_tokens_of_its_fractions(config, kind, told, folder):
  """The first source whole, and as much of the second as its fraction says."""
  alone = counts(told(config, kind=kind))[1]
  mixed = told(config, kind=kind, data__train=mixture(folder, kind))
  longest = 60
  assert counts(mixed)[1] == pytest.approx(alone / 0.75, abs=longest)
  assert (
    counts(told(config, kind=kind, data__train=mixture(folder, kind, 0.5)))[1] > counts(mixed)[1]
  )


@pytest.mark.parametrize(("config", "kind"), [slow("preference", "pairs"), slow("kto", "labels")])
def test_each_answer_of_a_mixture_has_its_own_reference(config, kind, folder, tmp_path):
  """Before any training policy and reference agree on every answer, whichever source it comes from."""
  fields = SHORT | dict(kind=kind, config=config, data__train=mixture(folder, kind, 0.5))
  assert test_train_answers.train(folder, tmp_path, **fields) == 0
  first = lines(tmp_path)[0]
  assert first["rewards/chosen"] == pytest.approx(0, abs=1e-4)
  assert first["rewards/rejected"] == pytest.approx(0, abs=1e-4)


def test_the_draws_of_a_mixture_follow_the_seed(folder):
  """The first epoch of two sources of which not all is taken."""
  both = f"{folder / 'rows.jsonl'}*0.5+{folder / 'talk2.jsonl'}*0.5"
  arguments = f"{test_train.CONFIG}:model={folder / 'model'},data={both}"

  def drawn(seed):
    fields = (f"--config.seed={seed}", "--config.data.eval_rows=0")
    config = settings.load(arguments, fields)
    rows = data_build.read(config, model_build.load(config)).train
    return rows.indices(0).tolist()

  first = drawn(0)
  assert drawn(0) == first
  assert drawn(1) != first


def test_a_mixture_of_texts_has_both(told, folder):
  both = f"{folder / 'rows.jsonl'}*0.8+{folder / 'talk2.jsonl'}*0.2"
  assert counts(told(data__train=both))[1] == pytest.approx(counts(told())[1] / 0.8, abs=40)


@pytest.mark.parametrize("kind", ["pairs", "scored"])
def test_a_shared_prompt_is_there_once(kind, told):
  """One token of it belongs to each answer: what that is predicted from."""
  config = {"pairs": "preference", "scored": "grouped"}[kind]
  shared, apart = (
    counts(told(config, kind=kind, data__share_prompt=share, data__length=200))
    for share in (True, False)
  )
  assert shared[2] == apart[2]
  head = lambda i: f"<|im_start|>user\n{pair(i)['prompt']}<|im_end|>\n<|im_start|>assistant\n"
  prompts = [len(tiny.tokenizer()(head(i))["input_ids"]) - 1 for i in range(20)]
  copies = {"pairs": 1, "scored": 2}[kind]  # beside the first
  assert apart[1] - shared[1] == copies * sum(prompts)


# --- the objective ---------------------------------------------------------------------------------------------------


def grouped(folder, out, **fields):
  """The lines of a run on groups whose prompts stand alone in their rows."""
  fields = SHORT | dict(config="grouped", kind="scored") | fields
  assert test_train_answers.train(folder, out, **fields) == 0
  return lines(out)


@pytest.mark.slow  # `test_methods` has every aggregation and CISPO's ceiling
def test_an_aggregation_scales_the_gradient(folder, tmp_path):
  """A sum over answers against the same by the constant data.length."""
  of = lambda name: grouped(folder, tmp_path / name, objective__aggregation=name)[0]["grad_norm"]
  assert of("sequence_sum") == pytest.approx(of("constant_length") * 120, rel=1e-4)


@pytest.mark.slow
def test_a_ceiling_below_1_weakens_every_token(folder, tmp_path):
  """CISPO at its start, where every ratio is 1."""
  of = lambda name, ceiling: grouped(
    folder, tmp_path / name, arguments=",method=cispo", objective__ceiling=ceiling
  )[0]["grad_norm"]
  assert of("half", 0.5) == pytest.approx(0.5 * of("whole", 5.0), rel=1e-4)


@pytest.mark.slow  # `test_methods` has the weight of the KL
def test_the_kl_is_added_with_its_weight(folder, tmp_path):
  """After one update from where it is 0, with a gradient of 0: the second losses differ by it."""
  fields = dict(steps=2, arguments=",method=dapo", optimizer__warmup=0)
  free = grouped(folder, tmp_path / "free", **fields)
  held = grouped(folder, tmp_path / "held", objective__kl_weight=0.5, **fields)
  assert "kl" not in free[1]
  assert held[0]["kl"] == pytest.approx(0, abs=1e-6)
  assert held[1]["kl"] > 1e-4
  assert held[1]["loss"] - free[1]["loss"] == pytest.approx(0.5 * held[1]["kl"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_the_reference_is_stored_as_reference_base_says(storage, folder, tmp_path):
  """The policy's own folder: dense it is the policy, in four bits it is not quite."""
  fields = dict(objective__reference=folder / "model", objective__reference_base=storage)
  assert test_train_answers.train(folder, tmp_path, **SHORT, **fields) == 0
  first = lines(tmp_path)[0]
  margin = max(abs(first["rewards/chosen"]), abs(first["rewards/rejected"]))
  assert margin < 1e-5 if storage == "dense" else margin > 1e-4


# --- a task before and after -----------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
  """How often and how the task was asked; its answers are none."""
  calls = []

  def answer(params, config, tokenizer, *, task, split, limit, **options):
    rows = task.examples(split, n=limit)
    calls.append((task.name, len(rows)))
    right = len(calls) > 1  # after training, when asked before
    told = dict(correct=right, reason="", finished=True, tokens=1, scores={"sql": float(right)})
    names = ("question", "gold", "channel")
    return rows, [
      {name: row[name] for name in names} | told | {"answer": row["gold"]} for row in rows
    ]

  monkeypatch.setattr(tasks, "answer", answer)
  return calls


def test_a_task_is_answered_before_and_after(folder, tmp_path, asked, capsys):
  fields = SHORT | dict(eval__task="sql", eval__task_limit=3)
  assert test_train.train(folder, tmp_path / "run", **fields) == 0
  assert asked == [("sql", 3)] * 2
  results = [
    json.loads((tmp_path / "run" / f"evaluation-{when}.json").read_text())
    for when in ("before", "after")
  ]
  assert [result["correct"] for result in results] == [0, 3]
  said = capsys.readouterr().out
  assert "sql before training: 0/3 correct" in said
  assert "sql after training: 3/3 correct" in said


@pytest.mark.slow
def test_a_task_may_be_left_out_before_training(folder, tmp_path, asked):
  fields = SHORT | dict(eval__task="sql", eval__task_limit=2, eval__before=False)
  assert test_train.train(folder, tmp_path / "run", **fields) == 0
  assert asked == [("sql", 2)]
  assert not (tmp_path / "run" / "evaluation-before.json").exists()
  assert (tmp_path / "run" / "evaluation-after.json").exists()
