"""`--help` with a config lists its fields, `--print_config` prints them, `--version` the versions; all without jax."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

from posttrain_jax import settings
from posttrain_jax.__main__ import main
from posttrain_jax.configs import common, grouped, rl
from posttrain_jax.settings import fields, listing
from tests.settings.test_fields import METHODS

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
SHIPPED = sorted(
  {path.stem for path in CONFIGS.glob("*.py")} - {"__init__", "common", *settings.CHAINS}
)
SFT = f"--config={CONFIGS}/sft.py"
VERBS = ("train", "plan", "sweep", "eval")


def helped(capsys, *argv):
  with pytest.raises(SystemExit) as left:
    main([*argv])
  assert left.value.code == 0
  return capsys.readouterr().out


def listed(text):
  return re.findall(r"^  ((?:\w+\.)*\w+)=", text, re.MULTILINE)


@pytest.mark.parametrize("config", [*METHODS, *(f"{name}.py" for name in SHIPPED)])
@pytest.mark.parametrize("width", [80, 120])
def test_every_field_is_listed_once_with_its_value_and_meaning(config, width):
  resolved = settings.load(str(CONFIGS / config))
  text = listing.text(resolved, width)
  values = dict(fields.items(settings.plain(resolved)))
  assert sorted(listed(text)) == sorted(values)
  assert text.startswith(f"This config has {len(values)} fields")
  assert max(map(len, text.splitlines())) <= width
  words = " ".join(text.split())
  for name in values:
    field = fields.FIELDS[fields.known_as(name)]
    assert f"{field.meaning} ({field.domain.says})" in words


@pytest.mark.parametrize("verb", VERBS)
def test_help_lists_the_fields_of_the_config_as_it_is_asked_for(verb, capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "100")
  text = helped(capsys, verb, "--help", f"{SFT}:adapter=none", "--config.optimizer.name=galore")
  assert "usage: posttrain" in text
  assert "\nSupervised fine-tuning; " in text
  told = text.partition("Arguments after the colon:\n")[2].partition("\n\n")[0]
  assert "  model\n  data\n  adapter: none, lora, dora," in told
  assert "  base: dense, nf4, fp4, int8\n  smoke: true, false" in told
  names = listed(text)
  assert "optimizer.update_gap" in names
  assert "adapter.r" not in names
  assert "optimizer.lr=2e-05" in text
  assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("verb", VERBS)
def test_help_without_a_config_says_how_its_fields_are_listed(verb, capsys):
  text = helped(capsys, verb, "--help")
  assert f"posttrain {verb} --config=FILE --help lists every field" in text
  assert not listed(text)


@pytest.mark.parametrize(
  ("config", "argument", "words"),
  [
    ("rl", "method", [*rl.METHODS, rl.PAIRS]),
    ("rl", "storage", ["auto", "bfloat16", "int8"]),
    ("grouped", "method", [*grouped.METHODS]),
    ("preference", "loss", [*fields.LOSSES_OF_PAIRS]),
    ("reward", "kind", ["pairs", "outcomes", "steps"]),
    ("kto", "optimizer", [*common.OPTIMIZERS]),
    ("quickstart_rl", "adapter", [*common.ADAPTERS]),
    ("rl", "reward", []),  # functions of one's own, too
    ("sft", "model", []),
  ],
)
def test_the_values_of_an_argument_are_those_that_its_config_takes(config, argument, words):
  assert settings.argument_values(config, argument) == words


def test_help_of_a_config_that_takes_arguments_its_own_way(capsys, tmp_path):
  (tmp_path / "mine.py").write_text(
    "from posttrain_jax.configs import sft\n\n"
    "def get_config(arg=None):\n  return sft.get_config({None: 'base=nf4'}[arg])\n"
  )
  text = helped(capsys, "train", f"--config={tmp_path / 'mine.py'}", "--help")
  assert "model.base=nf4" in text
  assert "Arguments" not in text


def test_help_of_a_config_that_is_not_there_is_a_sentence(capsys):
  assert main(["train", "--config=nowhere.py", "--help"]) == 1
  assert "nowhere.py does not exist" in capsys.readouterr().err


def test_a_printed_config_is_read_again(capsys, tmp_path):
  """Tables whose keys have dots and fields that hold nothing among it."""
  changed = ("--config.adapter.rank_pattern={'layers.0.q_proj': 4}", "--config.data.length=128")
  assert main(["train", f"{SFT}:data=x.jsonl", *changed, "--print_config"]) == 0
  printed = capsys.readouterr().out
  expected = settings.load(f"{CONFIGS}/sft.py:data=x.jsonl", changed)
  assert json.loads(printed) == settings.plain(expected)
  (tmp_path / "mine.json").write_text(printed)
  again = f"--config={tmp_path / 'mine.json'}"
  assert main(["plan", again, "--print_config"]) == 0
  assert capsys.readouterr().out == printed
  (tmp_path / "config.json").write_text(json.dumps({"config": json.loads(printed), "command": []}))
  loaded = settings.load(str(tmp_path / "config.json"), ["--config.data.system=brief"])
  assert settings.differences(settings.plain(expected), settings.plain(loaded)) == [
    "data.system: None -> 'brief'"
  ]


@pytest.mark.parametrize(
  ("argv", "said"),
  [
    (["train", SFT, "--config.steps=0"], "steps=0: write a whole number"),
    (["eval"], "--print_config needs --config=FILE"),
    (["train", f"--config={CONFIGS}/../pyproject.json"], "pyproject.json: "),
  ],
)
def test_what_cannot_be_printed_is_refused(argv, said, capsys):
  assert main([*argv, "--print_config"]) == 1
  captured = capsys.readouterr()
  assert said in captured.err
  assert not captured.out


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("[1]", "has no object of fields"),
    ("{", "config file"),
  ],
)
def test_a_json_file_that_is_no_config_is_refused(text, said, tmp_path):
  (tmp_path / "mine.json").write_text(text)
  with pytest.raises(settings.ConfigError, match=said):
    settings.load(str(tmp_path / "mine.json"))
  (tmp_path / "mine.json").write_text("{}")
  with pytest.raises(settings.ConfigError, match="takes no arguments, 'adapter=lora'"):
    settings.load(f"{tmp_path / 'mine.json'}:adapter=lora")


def test_the_version_is_said(capsys):
  text = helped(capsys, "--version")
  assert re.fullmatch(
    r"posttrain \d+\.\d+\.\d+ \(jax \d+\.\d+\.\d+, Python \d+\.\d+\.\d+\)\n", text
  )


@pytest.mark.parametrize(
  ("argv", "said"),
  [
    (["--learning_rate=1e-4"], "--config.NAME=value: optimizer.lr"),
    (["--learning_rate", "1e-4"], "--config.NAME=value: optimizer.lr"),
    (["--optimizer.lr=1e-4"], "--config.NAME=value: optimizer.lr"),
    (["--config.steps", "4"], "write --config.steps=4"),
    (["more"], "unrecognized arguments: more"),
  ],
)
def test_an_option_that_is_a_field_is_told_how_it_is_written(argv, said, capsys):
  with pytest.raises(SystemExit) as left:
    main(["train", SFT, *argv])
  assert left.value.code == 2
  assert said in capsys.readouterr().err


def test_none_of_it_waits_for_jax():
  program = (
    "import sys\nfrom posttrain_jax.__main__ import main\n"
    f"main(['train', {SFT!r}, '--print_config'])\n"
    f"try:\n  main(['train', {SFT!r}, '--help'])\nexcept SystemExit:\n  pass\n"
    "assert not {'jax', 'transformers', 'numpy'} & {*sys.modules}"
  )
  subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
  "arguments", [["--config=sft:modle=x"], ["--config=nope"], ["--config=sft", "--config.stps=1"]]
)
def test_what_is_misspelt_is_refused_before_jax_is_imported(arguments):
  program = "import sys; from posttrain_jax.__main__ import main; code = main(sys.argv[1:]);"
  program += " sys.exit(code + 10 * ('jax' in sys.modules))"
  command = [sys.executable, "-c", program, "train", *arguments, "--workdir=nowhere"]
  assert subprocess.run(command, check=False, capture_output=True).returncode == 1
