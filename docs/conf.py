"""The documentation: Markdown pages, the table of fields and of other tools' names, and the library's docstrings."""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import pages  # noqa: E402

project = "posttrain_jax"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "posttrain_jax"
html_show_copyright = html_show_sphinx = False
html_copy_source = False
autodoc_typehints = "none"
autodoc_member_order = "bysource"

pages.write(HERE)


def setup(app):
  # before napoleon, which reads `Args:`
  app.connect("autodoc-process-docstring", _as_restructured_text, priority=400)


def _as_restructured_text(app, what, name, obj, options, lines):
  """Docstrings are plain text with `code`; in the markup that autodoc reads * and | and _ mean something."""
  lines[:] = [_escaped(line) for line in lines]


def _escaped(line):
  if line.lstrip().startswith(">>>"):
    return line
  parts = re.split(r"(`[^`]+`)", line)
  return "".join(
    f"`{part}`" if part[:1] == "`" else re.sub(r"([*|_\\])", r"\\\1", part) for part in parts
  )
