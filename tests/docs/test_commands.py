"""What is printed works: each command is read by the real parser, its config loads with its fields, its files exist."""

import json
import re

import pytest

from posttrain_jax import __main__ as program
from posttrain_jax import settings
from posttrain_jax.build import chain
from posttrain_jax.settings import fields
from tests.docs import printed

WHOLE = [
  *(command for path in printed.PAGES for command in printed.commands(path)),
  *printed.of_help(),
  *printed.of_configs(),
]
PARTS = list(dict.fromkeys(printed.in_sentences()))
SHOWN = {  # configs that a page shows
  name: text
  for path in printed.PAGES
  for name, text in printed.files(path).items()
  if "def sweep" in text
}
POSTTRAIN = [command for command in WHOLE if command.argv is not None]
CONFIGS = ("sft", "preference", "kto", "reward", "grouped", "rl", "distil")
EVERY = (
  *CONFIGS,
  *(f"sft:adapter={name}" for name in ("adalora", "vera", "prompt+longlora")),
  "sft:optimizer=galore8bit",
)
TARGETS = set(re.findall(r"^([\w-]+):", (printed.ROOT / "Makefile").read_text(), re.MULTILINE))
PLACEHOLDER = re.compile(r"^([A-Z][A-Z_]*|field|value)?$")  # of a field's name or value
SECTION = re.compile(
  r"(?:model|batch|mesh|eval|checkpoint|data|optimizer|objective|adapter|online|reward)\.[a-z_]\w*"
)
FILE = re.compile(r"(?:experiments|examples|tests|launch|configs|posttrain_jax|docs)/[\w./]+\.\w+")
README_WORDS = 700


def parsed(argv):
  """(arguments, overrides) by the real parser, which must know them all."""
  overrides = [arg for arg in argv if arg.startswith("--config.")]
  rest = [arg for arg in argv if not arg.startswith("--config.")]
  args, unknown = program._parser().parse_known_args(rest)
  assert not unknown, f"unknown arguments {unknown}"
  return args, overrides


def loads(config, overrides):
  resolved = settings.plain(settings.load(config, overrides))
  fields.check(resolved, settings.given(overrides))
  return resolved


@pytest.mark.parametrize("command", POSTTRAIN, ids=str)
def test_a_command_is_read_and_its_config_loads(command, monkeypatch, tmp_path):
  monkeypatch.chdir(printed.ROOT)
  argv = [arg for arg in command.argv if arg != "--help"]
  for name, text in SHOWN.items():
    (tmp_path / name).write_text(text)
    argv = [arg.replace(f"--config={name}", f"--config={tmp_path / name}") for arg in argv]
  argv = [re.sub(r"=FILE\b", "=sft", arg) for arg in argv]
  args, overrides = parsed(argv)
  if args.command == "chain":
    assert chain.expand(settings.stages(args.config), tmp_path / "runs")
  elif "config" in args and args.config is not None:
    loads(args.config, overrides)
  else:
    assert not overrides


@pytest.mark.parametrize("command", PARTS, ids=str)
def test_a_command_in_a_sentence_has_options_that_there_are(command):
  verb, *rest = command.argv
  known = program._options()[verb]
  for option in re.findall(r"(--\w+)(?!\S*\.)", " ".join(rest)):
    assert option in known


@pytest.mark.parametrize("command", [c for c in WHOLE if c.text.startswith("make ")], ids=str)
def test_a_target_is_one_of_the_makefile(command):
  assert command.text.split()[1] in TARGETS


@pytest.mark.parametrize("path", printed.PAGES, ids=lambda path: path.name)
def test_what_a_page_names_exists(path):
  codes = printed.inline(path)
  for code in codes:
    target = re.fullmatch(r"make ([\w-]+)( .*)?", code)
    assert not target or target[1] in TARGETS, code
    if path.name != "CONTRIBUTING.md":  # whose dotted names are modules
      assert not SECTION.fullmatch(code) or code in fields.FIELDS, code
    for file in FILE.findall(code):
      assert (printed.ROOT / file).exists(), code


def _fields():
  """{field in a sentence or page with its value: where} but for placeholders."""
  texts = [*printed.prose(), *((path.read_text(), path.name) for path in printed.PAGES)]
  named = {}
  for text, place in texts:
    for name, value in printed.FIELD.findall(text):
      if not any(PLACEHOLDER.match(part) for part in name.split(".")) and name != "field":
        named.setdefault((name, value.strip("'").rstrip(".")), place)
  return named


@pytest.mark.parametrize(("field", "place"), _fields().items(), ids=str)
def test_a_field_in_a_sentence_is_one_that_a_config_has(field, place):
  name, value = field
  if PLACEHOLDER.match(value) or "X" in value or value.startswith("("):
    assert [known for known in fields.FIELDS if f"{name}.".startswith(f"{known}.")], place
    return
  assert any(takes(config, [f"--config.{name}={value}"]) for config in EVERY), place


def _arguments():
  """{what is written after the colon of a config, in a sentence or page: where}."""
  texts = [*printed.prose(), *((path.read_text(), path.name) for path in printed.PAGES)]
  return {
    found: place
    for text, place in texts
    for found in re.findall(r"--config=FILE:([\w+]+=[\w+]+(?:,[\w+]+=[\w+]+)*)", text)
    if not re.search(r"=[A-Z]", found)
  }


@pytest.mark.parametrize(("arguments", "place"), _arguments().items(), ids=str)
def test_an_argument_in_a_sentence_is_one_that_a_config_takes(arguments, place):
  assert any(takes(f"{config}:{arguments}", []) for config in CONFIGS), place


def takes(config, overrides):
  try:
    fields.check_values(settings.plain(settings.load(config, overrides)))
  except (ValueError, settings.ConfigError):
    return False
  return True


def test_the_readme_is_a_landing_page():
  assert len((printed.ROOT / "README.md").read_text().split()) <= README_WORDS


@pytest.mark.parametrize("path", printed.PAGES, ids=lambda path: path.name)
def test_what_a_page_shows_is_json_and_python(path):
  for block in printed.fences(path, "json"):
    for line in block.splitlines():
      json.loads(line)
  for block in printed.fences(path, "python"):
    if path.name != "CONTRIBUTING.md":  # which shows lines of a table
      compile(block, path.name, "exec")


@pytest.mark.parametrize("path", printed.PAGES, ids=lambda path: path.name)
def test_a_link_leads_somewhere(path):
  for link in re.findall(r"\]\(([^)#]+)", path.read_text()):
    assert link.startswith("https://") or (path.parent / link).exists()


def test_pictures_are_small():
  pictures = [*(printed.ROOT / "docs" / "images").glob("*.png")]
  assert pictures
  assert not [path.name for path in pictures if path.stat().st_size > 200_000]
