"""`posttrain completion`: the lines by which bash or zsh complete what is typed."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence

from posttrain_jax import settings
from posttrain_jax.settings import fields
from posttrain_jax.settings.domains import Choice, Flag

ASKED = (
  "POSTTRAIN_COMPLETE"  # in the environment: the line so far, whose last word is to be completed
)
# readline has broken off what stands before the last = or :, so that part is not said again
BASH = f"""\
_posttrain() {{
  local IFS=$'\\n' line="${{COMP_LINE:0:COMP_POINT}}"
  local word="${{line##* }}"
  local broken_off="${{word%"${{word##*[=:]}}"}}"
  COMPREPLY=($({ASKED}="$line" posttrain 2>/dev/null))
  COMPREPLY=("${{COMPREPLY[@]#"$broken_off"}}")
}}
complete -o default -o nospace -F _posttrain posttrain"""
ZSH = f"""\
_posttrain() {{
  local line="${{LBUFFER}}"
  compadd -S '' -- ${{(f)"$({ASKED}="$line" posttrain 2>/dev/null)"}} && return
  compset -P '*[=,:]'  # a file after what names its option
  _files
}}
compdef _posttrain posttrain"""
SCRIPTS: Mapping[str, str] = {"bash": BASH, "zsh": ZSH}


def add(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "shell",
    choices=tuple(SCRIPTS),
    help='write eval "$(posttrain completion bash)" into ~/.bashrc, or zsh into ~/.zshrc after compinit',
  )


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
  print(SCRIPTS[args.shell])
  return 0


def words(line: str, options: Mapping[str, Sequence[str]]) -> list[str]:
  """What the last word of a line may become.

  Args:
    options: of each verb, such as --workdir.
  """
  _, *before, last = line.split(" ")
  typed = [word for word in before if word]
  if not typed:
    possible = iter(options)
  elif last.startswith("--config.") and "--config" in options.get(typed[0], ()):
    possible = _fields(last, typed)
  elif last.startswith("--config="):
    possible = _configs(last)
  elif last.startswith("-"):
    possible = iter(options.get(typed[0], ()))
  else:
    possible = iter(())
  return [word for word in possible if word.startswith(last)]


def _configs(last: str) -> Iterator[str]:
  """--config=NAME, or after its colon the arguments that it takes."""
  path, colon, given = last.removeprefix("--config=").partition(":")
  if not colon:
    yield from (f"--config={name}" for name in settings.shipped_names())
    return
  done = f"{given.rpartition(',')[0]}," if "," in given else ""
  yield from (f"--config={path}:{done}{name}=" for name in settings.arguments(path))


def _fields(last: str, typed: Sequence[str]) -> Iterator[str]:
  """--config.NAME= of the config's fields, or --config.NAME=VALUE of the values that it may have."""
  file = next((word for word in typed if word.startswith("--config=")), "")
  if not file:
    return
  overrides = [word for word in typed if word.startswith("--config.")]
  config = settings.plain(settings.load(file.removeprefix("--config="), overrides))
  for name, _ in fields.items(config):
    start = f"--config.{name}="
    yield from (start + value for value in _values(name)) if last.startswith(start) else [start]


def _values(name: str) -> tuple[str, ...]:
  field = fields.FIELDS.get(fields.known_as(name))
  if field is not None and isinstance(field.domain, Choice):
    return field.domain.names
  return ("true", "false") if field is not None and isinstance(field.domain, Flag) else ()
