"""The code in a model card runs as it is printed, and computes what the folder holds."""

import contextlib
import io
import re

import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import adapters
from posttrain_jax.adapters import peft_format
from posttrain_jax.build import export
from posttrain_jax.data import chat
from posttrain_jax.models import decoder, hf
from tests import tiny
from tests.build.test_export import make_run
from tests.build.test_gguf import make_adapter

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.oracle


def executed(folder, monkeypatch):
  """The names that the card's code leaves behind, and what it printed, started in the folder."""
  (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
  monkeypatch.chdir(folder)
  names, printed = {}, io.StringIO()
  with contextlib.redirect_stdout(printed):
    exec(code, names)
  return names, printed.getvalue()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  return tiny.tiny_model_folder(tmp_path_factory.mktemp("base") / "model")


def exported(tmp_path, base, *, merge=False, keep_base=False):
  params, model_config = hf.load(base)
  node, chosen = make_adapter(params, target_modules=("q_proj", "down_proj"))
  run = make_run(tmp_path / "run", base)
  peft_format.save(run / "adapter", node, chosen, model_config, base_name=str(base))
  hf.copy_tokenizer(base, run / "adapter")
  return (
    export.export(run, tmp_path / "out", merge=merge, keep_base=keep_base),
    adapters.bind(params, node),
    model_config,
  )


@pytest.mark.parametrize(
  "how", [{}, {"merge": True}, {"keep_base": True}], ids=["adapter", "merged", "both"]
)
def test_the_code_answers_with_what_was_trained(tmp_path, base, monkeypatch, how):
  out, params, config = exported(tmp_path, base, **how)
  names, printed = executed(out, monkeypatch)
  ids = names["inputs"]["input_ids"]
  rendered = chat.template(chat.load_tokenizer(base)).render(
    names["messages"], add_generation_prompt=True
  )
  assert names["tokenizer"].decode(ids[0]) == rendered
  with torch.no_grad():
    theirs = names["model"](ids).logits.numpy()
  ours = np.asarray(decoder.forward(params, jnp.asarray(ids.numpy()), config))
  np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-3)
  assert names["answer"].shape[1] > ids.shape[1]
  assert printed
