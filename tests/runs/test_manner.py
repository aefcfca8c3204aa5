"""How a model was trained stands in its folder; what stands there is input."""

import json

import pytest

from posttrain_jax.runs import manner
from posttrain_jax.runs.manner import Manner


def test_it_is_read_as_it_was_written_beside_what_was_there(tmp_path):
  assert manner.read(tmp_path) is None
  (tmp_path / manner.RECORD).write_text('{"base": {"fingerprint": "a"}}')
  assert manner.read(tmp_path) is None
  how = Manner("nf4", "bfloat16", "Be brief", chat=False, writes=False)
  manner.write(tmp_path, how)
  assert manner.read(tmp_path) == how
  assert json.loads((tmp_path / manner.RECORD).read_text())["base"] == {"fingerprint": "a"}


@pytest.mark.parametrize(
  ("said", "message"),
  [
    ([], "'use' is list"),
    ({"storage": "nf5"}, "storage='nf5': known are dense, nf4"),
    ({"storage": 4}, "storage=4 is of another type"),
    ({"dtype": "int8"}, "dtype='int8': known are auto"),
    ({"chat": "yes"}, "chat='yes' is of another type"),
    ({"sytem": "a"}, "sytem is unknown; known are storage"),
  ],
)
def test_what_is_none_of_ours_is_named(tmp_path, said, message):
  (tmp_path / manner.RECORD).write_text(json.dumps({manner.USE: said}))
  with pytest.raises(ValueError, match=message):
    manner.read(tmp_path)


@pytest.mark.parametrize(
  ("method", "changes_base", "storage"),
  [("lora", False, "nf4"), ("pissa", True, "dense"), ("none", False, None)],
)
def test_a_runs_base_is_what_its_adapter_is_made_for(method, changes_base, storage):
  config = dict(
    model=dict(base="nf4", template="chatml", dtype="auto"),
    adapter=dict(method=method),
    data=dict(chat=True, system="Be brief"),
  )
  found = manner.of(config, changes_base=changes_base, chat=True, writes=True)
  assert (found.storage, found.system, found.template) == (storage, "Be brief", "chatml")
