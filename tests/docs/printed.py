"""Every command that is printed: in pages, in help, in the docstrings of configs, in the sentences of the program."""

import ast
import dataclasses
import functools
import pathlib
import re
import shlex

from posttrain_jax import __main__ as program

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = sorted((ROOT / "posttrain_jax").rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
# of a command in a sentence: options, placeholders, paths; the first other word ends it
ARGUMENT = r"(?: (?:--[\w.]+(?:=[^\s`;)]+)?|[A-Z][A-Z_]+\b|\S+/\S*))"
IN_PROSE = re.compile(rf"\bposttrain ({'|'.join(program.COMMANDS)})\b({ARGUMENT}*)")
FIELD = re.compile(r"--config\.([\w.]*\w)(?:=('[^']*'|[^\s`'\",;)]*))?")


@dataclasses.dataclass(frozen=True)
class Command:
  """A line as a shell reads it, and the file that prints it."""

  text: str
  place: str

  def __str__(self):
    return f"{self.place}: {self.text}"

  @property
  def argv(self):
    """What follows `posttrain`, in a pipe and behind the launcher, too; None of another program."""
    words = shlex.split(self.text, comments=True)
    if "|" in words:
      words = words[words.index("|") + 1 :]
    if words[:2] == ["python", "launch/local.py"]:
      words = ["posttrain", "train", *words[words.index("--") + 1 :]]
    return words[1:] if words and words[0] == "posttrain" else None


def fences(path, *languages):
  """The fenced blocks of a page in one of the languages."""
  for indent, language, body in FENCE.findall(path.read_text()):
    if language in languages:
      yield re.sub(rf"^{indent}", "", body, flags=re.MULTILINE)


def commands(path):
  """The whole commands of a page: each line of its blocks, continued lines as one."""
  for block in fences(path, "bash"):
    for line in re.sub(r" *\\\n *", " ", block).splitlines():
      if line.strip():
        yield Command(line.strip(), path.name)


def of_help():
  lines = [program._parser().format_help()]
  return _lines("\n".join(lines), "--help")


def of_configs():
  for path in CONFIGS:
    yield from _lines(ast.get_docstring(ast.parse(path.read_text())) or "", f"configs/{path.name}")


def _lines(text, place):
  """The commands of help and docstrings: a line each, and after it its meaning."""
  for line in text.splitlines():
    command = re.split(r" {2,}|\)", line.strip())[0]
    if re.match(r"posttrain .*--|make ", command):
      yield Command(command, place)


@functools.cache
def prose():
  """(what is said, where) of pages without their blocks, and of the sentences of the program."""
  return [
    *((FENCE.sub("", path.read_text()), path.name) for path in PAGES),
    *((text, str(path.relative_to(ROOT))) for path in SOURCES for text in sentences(path)),
  ]


def in_sentences():
  """Commands that a sentence names, whole or in part."""
  for text, place in prose():
    for found in IN_PROSE.finditer(re.sub(r"\s+", " ", text)):
      yield Command(found[0].rstrip(".,:;'\""), place)


def inline(path):
  """What a page writes as code within its sentences."""
  return [re.sub(r"\s+", " ", code) for code in CODE.findall(FENCE.sub("", path.read_text()))]


def sentences(path):
  """The texts of a module that are no docstrings; X stands for what is filled in."""
  nodes = list(ast.walk(ast.parse(path.read_text())))
  inner = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
  docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
  for node in nodes:
    if isinstance(node, ast.JoinedStr):
      yield "".join(
        str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values
      )
    elif isinstance(node, ast.Constant) and id(node) not in inner | docstrings:
      yield str(node.value)


def files(path):
  """{name: text} of the files that a page shows: "`name` has ...:" and a block."""
  shown = re.compile(
    r"^`([\w./-]+\.\w+)` (?:has|is)\b[^\n]*:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL
  )
  return dict(shown.findall(path.read_text()))
