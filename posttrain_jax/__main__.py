"""The `posttrain` command: a verb, and what it takes."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import logging
import os
import platform
import re
import shutil
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from types import ModuleType, TracebackType

from posttrain_jax.core import ending

GUARD = ending.guard(__name__)  # before what takes a while to import

from posttrain_jax import settings  # noqa: E402
from posttrain_jax.commands import (  # noqa: E402
  chain,
  chat,
  common,
  completion,
  eval,
  export,
  fetch,
  launch,
  merge,
  pairs,
  plan,
  regress,
  report,
  sample,
  serve,
  student,
  sweep,
  train,
)

TRACEBACK = "POSTTRAIN_TRACEBACK"  # in the environment: errors show where they come from
EXAMPLES = """\
  posttrain fetch smollm2
  posttrain train --config=sft:model=smollm2,data=sql,adapter=lora --workdir=runs/sft
  posttrain train --config=sft --config.optimizer.lr=1e-4 --workdir=runs/lr --dry_run
  posttrain train --config=sft --help                        every field of a config
  posttrain chat --model=smollm2 --adapter=runs/sft/adapter
  posttrain report runs/sft --out=compare.html
  posttrain export --workdir=runs/sft --out=merged --merge
"""
# Each has `add(parser)` and `run(args, overrides) -> exit code`, and imports jax in `run` alone: jax.distributed must
# be set up before JAX counts its devices, and `--help` should not take seconds.
COMMANDS: Mapping[str, ModuleType] = {
  "fetch": fetch,
  "train": train,
  "eval": eval,
  "regress": regress,
  "sample": sample,
  "pairs": pairs,
  "chat": chat,
  "serve": serve,
  "export": export,
  "merge": merge,
  "sweep": sweep,
  "chain": chain,
  "student": student,
  "launch": launch,
  "plan": plan,
  "report": report,
  "completion": completion,
}


# what a verb that was ended leaves, where it is not a file that is whole or not there
LEFT: Mapping[str, str] = {
  "train": "run the same command again",
  "sweep": "finished points are kept; run the same command again",
  "chain": "finished stages are kept; run the same command again",
  "merge": "what is merged so far is kept beside --out, and the same command goes on there",
  "fetch": "what was fetched so far is gone; run the same command again",
  "chat": "nothing was being written",
  "regress": "with --out every result is kept; run the same command again",
  **dict.fromkeys(
    ("sample", "pairs"), "every answer and its score is kept; run the same command again"
  ),
}
# arguments that are paths, or names in the place of one; several have commas between
PATHS = (
  "workdir",
  "out",
  "config",
  "recipe",
  "json",
  "model",
  "adapter",
  "adapters",
  "api_key_file",
  "data",
  "reward",
  "evaluate",
  "before",
  "trained",
  "suite",
)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command.

  0: done; 75: preempted, safe to run again; 130: interrupted; 129 and 143: ended by SIGHUP and SIGTERM; 1 or 2: the
  user's mistake or a failure.
  """
  if argv is not None:
    return _run(list(argv))
  if (line := os.environ.get(completion.ASKED)) is not None:
    print("\n".join(completion.words(line, _options())))
    return 0
  if not os.environ.get(TRACEBACK):
    _hush()
  guard = GUARD or ending.Guard(sys.argv[1] if len(sys.argv) > 1 else "")
  with guard.armed():
    code = _run(sys.argv[1:], guard)
  return code if code in (0, ending.PREEMPTED) else _leave(code)


def _run(argv: list[str], guard: ending.Guard | None = None) -> int:
  overrides = [arg for arg in argv if arg.startswith("--config.")]
  rest = [arg for arg in argv if arg not in overrides]
  try:
    parser = _parser(_fields(rest, overrides))
  except (KeyboardInterrupt, ending.Ended, Exception) as error:
    return _failed(error, argparse.Namespace(command=""), guard)
  args, unknown = parser.parse_known_args(rest)
  if unknown:
    said = f"unrecognized arguments: {' '.join(unknown)}"
    parser.error(_unknown(unknown, overrides) if "config" in args else said)
  if overrides and "config" not in args:
    print(f"posttrain {args.command}: takes no {overrides[0]}", file=sys.stderr)
    return 2
  for name, value in vars(args).items():
    if name in PATHS and isinstance(value, str):
      setattr(args, name, _home(value))
  logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_ToStderr()])
  logging.getLogger("posttrain_jax").setLevel(logging.INFO)
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns that PyTorch is not there
  try:
    if getattr(args, "print_config", False):
      return common.print_config(args.config, overrides)
    return COMMANDS[args.command].run(args, overrides)
  except (KeyboardInterrupt, ending.Ended, Exception) as error:
    return _failed(error, args, guard)


def _failed(error: BaseException, args: argparse.Namespace, guard: ending.Guard | None) -> int:
  """Says what went wrong, or that a signal ended it, and returns the exit code."""
  number = guard.asked if guard else 0
  if isinstance(error, KeyboardInterrupt):
    number = signal.SIGINT
  elif isinstance(error, ending.Ended):  # from a handler of a verb's own, as chat's
    number = error.number
  if guard:
    guard.caught()
  if number:  # compiled modules make an ImportError of what is raised while they are imported
    return _ended(number, args)
  if os.environ.get(TRACEBACK):
    raise error
  _tell(f"posttrain {args.command}".rstrip() + f": {_message(error)}")
  return 1


def _ended(number: int, args: argparse.Namespace) -> int:
  """Says that a signal ended it and what is left, and returns the exit code."""
  how = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
  out = vars(args).get("out")
  if out and args.command != "report" and os.path.exists(out):
    left = f"{out} is whole"
  elif out and args.command not in LEFT:
    left = f"nothing was written to {out}"
  else:
    left = LEFT.get(args.command, "nothing was written")
  _tell(f"posttrain {args.command}".rstrip() + f": {how}; {left}")
  return ending.code(number, args.command)


def _tell(text: str) -> None:
  with contextlib.suppress(OSError):  # nobody reads it any more
    print(text, file=sys.stderr, flush=True)


def _message(error: BaseException) -> str:
  """What went wrong; what is neither ours nor of a kind that our checks raise is named by its kind."""
  is_ours = type(error).__module__.startswith("posttrain_jax.")
  if (is_ours or isinstance(error, ValueError | OSError)) and str(error):
    return str(error)
  text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
  if isinstance(error, KeyError) and " " in text:
    return text
  if isinstance(error, MemoryError):
    return f"this machine has too little memory for that{f': {text}' if text else ''}"
  return f"{type(error).__name__}: {text} ({TRACEBACK}=1 shows where)"


def _home(value: str) -> str:
  """The value with ~ for the home directory in each of its comma-separated parts, and after each = of arguments.

  >>> _home("a,b~c") == "a,b~c"
  True
  """
  return re.sub(r"(?:^|(?<=[,=]))~[^,=/]*", lambda home: os.path.expanduser(home[0]), value)


def _hush() -> None:
  """Of a failure a sentence is said: threads that fail as well would bury it under tracebacks, their own or Orbax's."""
  threading.excepthook = sys.unraisablehook = lambda _: None
  sys.excepthook = _told_of_the_main_thread  # tensorstore's threads call it
  said = _ToStderr()
  said.addFilter(lambda record: record.name != "absl")
  logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[said])


class _ToStderr(logging.StreamHandler):
  """Standard error as it is when something is said: a bar puts itself in its place, to stay below."""

  def emit(self, record: logging.LogRecord) -> None:
    self.stream = sys.stderr
    super().emit(record)


def _told_of_the_main_thread(
  kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
  if threading.current_thread() is threading.main_thread():
    sys.__excepthook__(kind, error, trace)


def _leave(code: int) -> int:
  """Ends the process without waiting for its threads, or for other processes to agree."""
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):
      stream.flush()
  os._exit(code)


def _fields(argv: Sequence[str], overrides: Sequence[str]) -> str:
  """The list of fields that `--help` shows beside a config; "" where it is not asked for."""
  config = common.asks_for_fields(argv)
  if not config:
    return ""
  resolved = settings.load(_home(config), overrides)
  width = settings.listing.fitting(shutil.get_terminal_size().columns)
  listed = settings.listing.text(resolved, width)
  return f"{settings.about(_home(config), width)}\n{listed}".lstrip()


def _unknown(arguments: Sequence[str], overrides: Sequence[str]) -> str:
  """What is said of arguments that no option of a verb with a config takes: fields are written another way."""
  said = f"unrecognized arguments: {' '.join(arguments)}"
  if bare := next((text for text in overrides if "=" not in text), ""):
    return f"{said}; write {bare}={arguments[0]}"
  name = arguments[0].removeprefix("--").partition("=")[0]
  meant = name if name in settings.fields.FIELDS else settings.names.elsewhere(name)
  meant = meant or " or ".join(settings.names.near(name, settings.fields.FIELDS))
  meant = meant or settings.names.elsewhere(settings.names.alike(name))
  return f"{said}; a field of a config is written --config.NAME=value: {meant}" if meant else said


def _version() -> str:
  """This program's version, and those that a report of a fault needs."""
  version = importlib.metadata.version
  return f"posttrain {version('posttrain-jax')} (jax {version('jax')}, Python {platform.python_version()})"


def _options() -> dict[str, list[str]]:
  """The options of each verb."""
  options = {}
  for name, module in COMMANDS.items():
    verb = argparse.ArgumentParser()
    module.add(verb)
    options[name] = sorted({*re.findall(r"--\w+", verb.format_usage()), "--help"})
  return options


def _parser(fields: str = "") -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="posttrain",
    description=__doc__,
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--version", action="version", version=_version())
  verbs = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
  for name, module in COMMANDS.items():
    summary = (module.__doc__ or "").partition(": ")[2].strip().rstrip(".")
    verb = verbs.add_parser(
      name,
      help=summary,
      description=f"{summary[:1].upper()}{summary[1:]}.",
      allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add(verb)
    verb.epilog = fields if fields and verb.epilog else verb.epilog
  return parser


if __name__ == "__main__":
  sys.exit(main())
