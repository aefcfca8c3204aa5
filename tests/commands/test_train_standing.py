"""Runs that train a soft prompt, a prefix, or LongLoRA, stopped in the middle, exported, merged."""

import json
import signal

import numpy as np
import pytest

from posttrain_jax import adapters
from posttrain_jax.__main__ import main
from posttrain_jax.adapters import peft_format
from posttrain_jax.models import decoder, hf, rotary
from posttrain_jax.runs.metrics_log import Journal
from tests.commands.test_train import CONFIG, assert_equal, weights
from tests.marks import slow

FIELDS = {
  "steps": 4,
  "batch.rows": 8,
  "data.length": 48,
  "data.eval_rows": 0,
  "eval.every": 0,
  "checkpoint.every": 2,
  "optimizer.lr": 0.02,
}
KINDS = {
  "prompt": {
    "adapter.num_virtual_tokens": 4,
    "adapter.prompt_tuning_init": "TEXT",
    "adapter.prompt_tuning_init_text": "be brief",
  },
  "prefix": {"adapter.num_virtual_tokens": 4},
  "longlora": {
    "adapter.r": 2,
    "adapter.target_modules": "('q_proj',)",
    "adapter.attention_group": 16,
    "adapter.context_length": 256,
  },
}


def train(shared, kind, folder):
  fields = FIELDS | KINDS[kind]
  return main(
    [
      "train",
      f"--config={CONFIG}:model={shared / 'model'},data={shared / 'rows.jsonl'},adapter={kind}",
      f"--workdir={folder}",
      *(f"--config.{name}={value}" for name, value in fields.items()),
    ]
  )


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k if k == "prompt" else slow(k) for k in KINDS])
def test_stopped_it_goes_on_as_if_it_had_not_and_its_files_are_of_use(
  kind, shared, tmp_path, monkeypatch, capsys
):
  assert train(shared, kind, tmp_path / "a") == 0
  said = capsys.readouterr().out
  assert (f"the fresh {kind} changes the logits" in said) == (kind != "longlora")

  write = Journal.write

  def asked(self, step, values):
    write(self, step, values)
    if step == 2 and "loss" in values:
      signal.raise_signal(signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(Journal, "write", asked)
    assert train(shared, kind, tmp_path / "b") == 75
  assert train(shared, kind, tmp_path / "b") == 0
  assert "going on from step" in capsys.readouterr().out
  assert_equal(weights(tmp_path / "b"), weights(tmp_path / "a"))
  lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
  losses = [line["loss"] for line in lines if "loss" in line]
  assert losses[-1] < losses[0]

  params, config = hf.load(shared / "model")
  adapter, found = peft_format.load(tmp_path / "a" / "adapter", params, config)
  longer = rotary.stretched(config, found.context_length)
  tokens = np.arange(40, dtype=np.int32)[None]
  bound = decoder.forward(adapters.bind(params, adapter), tokens, longer)
  merged = main(["export", f"--workdir={tmp_path / 'a'}", f"--out={tmp_path / 'm'}", "--merge"])
  if kind != "longlora":
    assert merged != 0
    assert f"a {kind} stands before the text and is in no weight" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
    return
  assert merged == 0
  params, config = hf.load(tmp_path / "m")
  assert (config.max_length, config.rope) == (256, longer.rope)
  np.testing.assert_allclose(decoder.forward(params, tokens, config), bound, rtol=1e-4, atol=1e-4)
  evaluated = main(
    ["eval", f"--workdir={tmp_path / 'a'}", f"--data={shared / 'rows.jsonl'}", "--limit=4"]
  )
  assert evaluated == 0
