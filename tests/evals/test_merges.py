"""Task vectors beside each other: cosines and conflicts as numpy counts them."""

import json

import numpy as np

from posttrain_jax.evals import merges
from tests.evals.test_report import Page

RNG = np.random.default_rng(0)
BASE = [RNG.standard_normal((4, 5)).astype(np.float32) for _ in range(3)]
LAYERS = ("embedding", "0", "0")


def models():
  """Three models; the second leaves half of each tensor as it was."""
  made = [[x + RNG.standard_normal(x.shape).astype(np.float32) for x in BASE] for _ in range(3)]
  for x, base in zip(made[1], BASE):
    x[:2] = base[:2]
  return made


def test_cosines_and_conflicts_of_each_layer():
  three = models()
  rows = [(layer, base, own) for layer, base, *own in zip(LAYERS, BASE, *three)]
  found = merges.overlaps(rows, 3)
  assert list(found) == ["embedding", "0"]
  for layer, own in found.items():
    at = [i for i, name in enumerate(LAYERS) if name == layer]
    deltas = [np.concatenate([(m[i] - BASE[i]).ravel() for i in at]) for m in three]
    norms = [np.linalg.norm(d) for d in deltas]
    expected = np.array([[a @ b for b in deltas] for a in deltas]) / np.outer(norms, norms)
    np.testing.assert_allclose(own.cosine(), expected, atol=1e-5)
    signs = np.sign(deltas)
    shared = (signs != 0).sum(0) > 1
    differ = (signs > 0).any(0) & (signs < 0).any(0)
    assert own.conflict_rate() == (differ & shared).sum() / shared.sum()


def test_a_model_that_changes_nothing_has_no_direction():
  found = merges.overlaps([("0", BASE[0], [BASE[0], BASE[0] + 1])], 2)["0"]
  np.testing.assert_allclose(found.cosine(), [[0, 0], [0, 1]], atol=1e-9)
  assert found.conflict_rate() == 0


def test_the_report_holds_scores_and_layers(tmp_path):
  found = merges.overlaps([("0", BASE[0], [BASE[0] + 1, BASE[0] - 1])], 2)
  scores = {"a": {"sql, right": 0.5}, "b": {"sql, right": 0.25}, "merge": {"sql, right": 0.75}}
  merges.write(tmp_path, ["a", "b"], found, scores)
  told = json.loads((tmp_path / "merge_report.json").read_text())
  assert told["scores"]["merge"] == {"sql, right": 0.75}
  assert told["layers"]["0"]["conflict_rate"] == 1.0
  page = (tmp_path / "merge_report.md").read_text()
  assert "| merge | 0.75 |" in page
  assert "| 0 | 1.000 | -1.000 |" in page
  html = Page((tmp_path / "merge_report.html").read_text())
  assert "merge 0.75" in html.text
  assert "layer sign conflicts mean cosine 0 1.000 -1.000" in html.text
  assert [text.partition(" over")[0] for text in html.figures] == [
    "Sign conflicts",
    "Cosine of task vectors",
  ]
