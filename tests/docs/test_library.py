"""The blocks of the page about the library run one after the other, on a tiny model."""

import pytest

from tests import tiny
from tests.docs import printed


@pytest.mark.slow  # it compiles four engines
def test_the_page_runs_as_printed(tmp_path, monkeypatch, capsys):
  tiny.tiny_model_folder(tmp_path / "model")
  monkeypatch.chdir(tmp_path)
  blocks = list(printed.fences(printed.ROOT / "docs" / "library.md", "python"))
  values = {}
  for block in blocks:
    exec(block.replace('"smollm2"', '"model"'), values)
  assert len(blocks) == 4
  out = capsys.readouterr().out.splitlines()
  assert len([line for line in out if line.startswith("(")]) == 8  # samples of two prompts
  assert sorted(line[0] for line in out[-3:]) == ["0", "1", "2"]
