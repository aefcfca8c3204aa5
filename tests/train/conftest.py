"""What the tests of runs train on."""

import pytest

from tests.train import tiny


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
  """A folder with a model and rows to train it on."""
  folder = tmp_path_factory.mktemp("shared")
  tiny.tiny_model_folder(folder / "model")
  tiny.write_jsonl(folder / "rows.jsonl", tiny.rows(40))
  return folder
