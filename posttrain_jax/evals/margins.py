"""What a preference run has learned, pair by pair: margins, what drives them, and what looks wrong, in plain words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain_jax.core import files
from posttrain_jax.evals import charts, page, panels, report
from posttrain_jax.runs import record

NEAR = 0.05  # a margin below this is a tie, more or less: sigma(0.05) is 0.51
LARGE = 5.0  # a pair with this margin has 0.7 % of its gradient left
ENDS = 4  # pairs shown of either end


@dataclasses.dataclass(frozen=True)
class Compared:
  """[pairs] each; rewards are beta times log-ratios, or of a reward model; drifts are log-ratios in nats, or None."""

  chosen: np.ndarray
  rejected: np.ndarray
  chosen_length: np.ndarray  # tokens of the answers
  rejected_length: np.ndarray
  chosen_drift: np.ndarray | None = None
  rejected_drift: np.ndarray | None = None
  texts: Sequence[tuple[str, str, str]] = ()  # prompt, chosen, rejected

  @property
  def margin(self) -> np.ndarray:
    return self.chosen - self.rejected

  @property
  def longer(self) -> np.ndarray:
    """Tokens that the chosen answer has more than the rejected one."""
    return self.chosen_length - self.rejected_length


def diagnose(pairs: Compared) -> dict[str, Any]:
  """Figures over all pairs, and `findings`: a sentence for each thing that looks wrong, or one that says nothing does.

  `length_correlation` is Pearson's of the margin with the difference in length, 0 where either is constant.
  """
  margin, longer = pairs.margin, pairs.longer
  of = lambda mask, values: float(np.mean(values[mask])) if mask.any() else None
  correct = margin > 0
  result: dict[str, Any] = {
    "pairs": len(margin),
    "accuracy": float(correct.mean()),
    "margin": {
      "mean": float(margin.mean()),
      **{f"p{q}": float(np.percentile(margin, q)) for q in (5, 25, 50, 75, 95)},
    },
    "near_ties": float((np.abs(margin) < NEAR).mean()),
    "large_margins": float((margin > LARGE).mean()),
    "length_correlation": _correlation(margin, longer),
    "accuracy_chosen_longer": of(longer > 0, correct),
    "accuracy_chosen_shorter": of(longer < 0, correct),
    "length": {
      "chosen": float(pairs.chosen_length.mean()),
      "rejected": float(pairs.rejected_length.mean()),
    },
  }
  if pairs.chosen_drift is not None and pairs.rejected_drift is not None:
    result["drift"] = {
      "chosen": float(pairs.chosen_drift.mean()),
      "rejected": float(pairs.rejected_drift.mean()),
      "per_token": float(
        (np.abs(pairs.chosen_drift) + np.abs(pairs.rejected_drift)).sum()
        / max((pairs.chosen_length + pairs.rejected_length).sum(), 1)
      ),
      # of log-ratios per token, which is what dpo_norm and ipo compare
      "margin_per_token": float(
        np.mean(
          pairs.chosen_drift / np.maximum(pairs.chosen_length, 1)
          - pairs.rejected_drift / np.maximum(pairs.rejected_length, 1)
        )
      ),
    }
  result["findings"] = _findings(result)
  return result


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
  if len(a) < 2 or a.std() == 0 or b.std() == 0:
    return 0.0
  return float(np.corrcoef(a, b)[0, 1])


def _findings(diagnosis: dict[str, Any]) -> list[str]:
  said, drift = [], diagnosis.get("drift")
  n, correlation = diagnosis["pairs"], diagnosis["length_correlation"]
  if diagnosis["large_margins"] > 0.8:
    said.append(
      f"Over-optimised: {diagnosis['large_margins']:.0%} of the pairs have margins above {LARGE:g}, where hardly any"
      " gradient is left; stop earlier, lower the rate, or take ipo."
    )
  # twice the standard error of no correlation at all
  if abs(correlation) > max(0.5, 2 / max(n - 2, 1) ** 0.5):
    which = "longer" if correlation > 0 else "shorter"
    said.append(
      f"Length-driven: margins go with the difference in length (correlation {correlation:+.2f}): the model prefers"
      f" {which} answers; compare dpo_norm or simpo, or balance the lengths of the data."
    )
  if drift and diagnosis["near_ties"] > 0.5 and drift["per_token"] < 0.01:
    said.append(
      f"Hardly moved: {diagnosis['near_ties']:.0%} of the pairs are near ties and log-probabilities moved by"
      f" {drift['per_token']:.4f} nats a token; too few steps, too low a rate, or beta too high, which holds the policy"
      " to its reference."
    )
  elif diagnosis["near_ties"] > 0.5:
    said.append(
      f"Undecided: {diagnosis['near_ties']:.0%} of the pairs are near ties though the policy moved; the pairs may"
      " differ in nothing that it can learn."
    )
  if drift and drift["per_token"] > 0.5:
    said.append(
      f"Far from the reference: log-probabilities moved by {drift['per_token']:.2f} nats a token; beta is too low to"
      " hold it, or the run too long."
    )
  if drift and drift["chosen"] < -1 and drift["rejected"] < drift["chosen"]:
    said.append(
      f"Likelihood displacement: the chosen answers themselves became less likely, by {-drift['chosen']:.1f} nats on"
      f" average (rejected ones by {-drift['rejected']:.1f}); add +sft to the loss, or raise beta."
    )
  if diagnosis["accuracy"] < 0.5 and n >= 10:
    said.append(
      f"Worse than chance: {diagnosis['accuracy']:.0%} of the pairs are ordered right; are chosen and rejected swapped?"
    )
  return said or ["Nothing stands out."]


def _panels(pairs: Compared) -> list[panels.Panel]:
  """Margins as a histogram, and against the difference in length."""
  known = np.isfinite(pairs.margin)
  margin, difference = pairs.margin[known], pairs.longer[known]
  counts, edges = np.histogram(margin, bins=min(40, max(8, len(margin) // 6)))
  how_often, by_length = "Margins of the pairs", "Margin by length"
  longer = "tokens that the chosen answer is longer"
  return [
    panels.Panel(
      how_often,
      charts.bars(edges.tolist(), counts.tolist(), title=how_often, across="margin"),
      note="Pairs with such a margin; above 0 the chosen answer is preferred.",
    ),
    panels.Panel(
      by_length,
      charts.dots(difference.tolist(), margin.tolist(), title=by_length, across=longer),
      note="A dot is a pair; a slope means that length drives the margin.",
    ),
  ]


BODY = """
{% for sentence in diagnosis.findings %}<p class="verdict">{{ sentence }}</p>{% endfor %}
<div class="panels">{% for p in panels %}{{ page.panel(p) }}{% endfor %}</div>
<div class="scroll"><table>
{% for name, value, meaning in rows %}<tr><td>{{ name }}</td><td class="number">{{ value }}</td>\
<td class="note meaning">{{ meaning }}</td></tr>
{% endfor %}</table></div>
{% for name, some in ends %}
<h2>{{ name }}</h2>
{% for pair in some %}
<div class="question"><b>margin {{ "%+.3f"|format(pair.margin) }}</b><pre>{{ pair.prompt }}</pre></div>
<div class="pair">
<div><span class="right">chosen, {{ pair.chosen_length }} tokens</span><pre>{{ pair.chosen }}</pre></div>
<div><span class="wrong">rejected, {{ pair.rejected_length }} tokens</span><pre>{{ pair.rejected }}</pre></div></div>
{% endfor %}{% endfor %}
"""


def write(folder: str | Path, pairs: Compared) -> tuple[dict[str, Any], Path]:
  """(the diagnosis, the page): `preference.json` and `preference.html` in a folder, and a link to it in its report."""
  diagnosis, folder = diagnose(pairs), Path(folder)
  files.write_json(folder / "preference.json", diagnosis)
  order = np.argsort(pairs.margin, kind="stable")
  shown = lambda indices: [
    dict(
      margin=pairs.margin[i],
      prompt=_short(pairs.texts[i][0]),
      chosen=_short(pairs.texts[i][1]),
      rejected=_short(pairs.texts[i][2]),
      chosen_length=int(pairs.chosen_length[i]),
      rejected_length=int(pairs.rejected_length[i]),
    )
    for i in indices
    if len(pairs.texts)
  ]
  is_run = (folder / record.CONFIG).exists()
  html = page.render(
    BODY,
    title=f"{folder.absolute().name}: {diagnosis['pairs']} pairs",
    links=[("report of the run", report.NAME)] if is_run else [],
    diagnosis=diagnosis,
    panels=_panels(pairs),
    rows=_rows(diagnosis),
    ends=[
      ("Lowest margins", shown(order[:ENDS])),
      ("Highest margins", shown(order[::-1][:ENDS])),
    ],
  )
  path = folder / "preference.html"
  files.write_text(path, html)
  if is_run:
    report.write(folder)
  return diagnosis, path


def _short(text: str, longest: int = 600) -> str:
  return text if len(text) <= longest else text[:longest] + " ..."


# What the figures of a diagnosis mean, by their names in it.
MEANINGS = {
  "pairs": "Pairs that were compared.",
  "accuracy": "Share whose chosen answer has the higher reward; 0.5 is chance, higher is better.",
  "margin": "Reward of the chosen answer less that of the rejected one: the mean, and what 5 to 95 % lie below.",
  "near_ties": f"Share of margins within {NEAR:g} of 0: pairs that are as good as undecided; lower is better.",
  "large_margins": f"Share of margins above {LARGE:g}, where hardly any gradient is left.",
  "length_correlation": "Of the margin with the difference in length, -1 to 1; near 0 is better.",
  "accuracy_chosen_longer": "Accuracy over pairs whose chosen answer is the longer one.",
  "accuracy_chosen_shorter": "Accuracy over pairs whose chosen answer is the shorter one.",
  "length": "Tokens of the answers, of the data.",
  "drift": "Log-probability less that under the reference, nats an answer, or nats a token where it says so.",
}


def _rows(diagnosis: dict[str, Any]) -> list[tuple[str, str, str]]:
  """(name, value, meaning); the meaning of several that belong together stands at the first."""
  rows = []
  for name, value in diagnosis.items():
    meaning = MEANINGS.get(name, "")
    if isinstance(value, dict):
      for i, (part, number) in enumerate(value.items()):
        rows.append((f"{name}, {part}", f"{number:.4g}", "" if i else meaning))
    elif isinstance(value, float | int):
      rows.append((name, f"{value:.4g}", meaning))
  return [(name.replace("_", " "), value, meaning) for name, value, meaning in rows]
