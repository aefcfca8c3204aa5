"""Run folders as training leaves them, made without training."""

import dataclasses
import json
import math

import numpy as np

from posttrain_jax.evals import intervals
from posttrain_jax.runs.record import TaskResult

CONFIG = dict(
  seed=0,
  steps=40,
  model=dict(name="smollm2", base="dense", template="tokenizer"),
  adapter=dict(method="lora", r=16, lora_alpha=32.0, target_modules="all-linear"),
  batch=dict(rows=8, accumulate=1),
  optimizer=dict(name="adamw", lr=2e-4),
  objective=dict(name="sft"),
  data=dict(train="sql", replay="", replay_fraction=0.05, replay_by="tokens"),
)


def answer(question, channel="join", correct=True, text="SELECT 1", reason=None):
  return dict(
    question=question,
    answer=text,
    gold="SELECT 1",
    correct=correct,
    reason=reason or ("ok" if correct else "wrong result"),
    channel=channel,
    finished=True,
  )


def result(answers):
  """The TaskResult of some answers."""
  channels, reasons = {}, {}
  for a in answers:
    right, total = channels.get(a["channel"], (0, 0))
    channels[a["channel"]] = (right + a["correct"], total + 1)
    reasons[a["reason"]] = reasons.get(a["reason"], 0) + 1
  return TaskResult(
    task="sql",
    split="test",
    correct=sum(a["correct"] for a in answers),
    total=len(answers),
    by_channel=channels,
    reasons=reasons,
    answers=answers,
    seconds=1.5,
    new_tokens=20 * len(answers),
  )


def graded(before, **metrics):
  """The same answers to rows of one's own, with what some metrics gave them."""
  answers = [
    {**a, "reason": "", "scores": dict(zip(metrics, values)), "origin": f"rows.jsonl:{i}"}
    for i, (a, *values) in enumerate(zip(before.answers, *metrics.values()), 1)
  ]
  scores = {name: intervals.mean(values) for name, values in metrics.items()}
  own = dict(task="held-out rows", answers=answers, scores=scores, max_new_tokens=40)
  return dataclasses.replace(before, **own)


def rows(steps=40, every=10, seed=0):
  """Lines of metrics.jsonl: a falling loss over two channels, and an evaluation now and then."""
  draw, lines = np.random.default_rng(seed), []
  for step in range(1, steps + 1):
    loss = 2 * math.exp(-step / 15) + 0.3 + 0.1 * draw.standard_normal()
    lines.append(
      {
        "step": step,
        "loss": loss,
        "loss/join": 1.3 * loss,
        "loss/lookup": 0.7 * loss,
        "loss/special": 0.2 * loss,
        "mean_token_accuracy": 1 - loss / 4,
        "grad_norm": loss,
        "learning_rate": 2e-4 * (1 - step / steps),
        "tokens_per_second": 170.0,
      }
    )
    if step % every == 0:
      lines.append({"step": step, "eval_loss": loss + 0.1, "eval_loss/join": loss + 0.2})
  return lines


PREFERENCE = dict(
  name="preference",
  losses={"dpo": 1.0, "sft": 0.2},
  beta=0.1,
  label_smoothing=0.0,
  reference="base",
)
GROUPED = dict(
  name="grouped",
  loss="ppo",
  advantage="group",
  aggregation="sequence_mean",
  epsilon=0.2,
  old="policy",
)


def preference_rows(steps=40, every=10, *, seed=0, beta=0.1, speed=1.0):
  """Lines of a DPO run: accuracy and margin rise, held-out ones less."""
  draw, lines = np.random.default_rng(seed), []
  for step in range(1, steps + 1):
    learned = speed * (1 - math.exp(-3 * step / steps))
    lines.append(
      {
        "step": step,
        **_pairs(draw, learned, beta, 0.05),
        "grad_norm": 2 + abs(draw.standard_normal()),
        "learning_rate": 2e-4 * (1 - step / steps),
        "tokens_per_second": 170.0 + 9 * draw.standard_normal(),
        "skipped": 0.0,
      }
    )
    if step % every == 0:
      held_out = _pairs(draw, 0.7 * learned, beta, 0.0)
      held_out |= {"kl": 0.2 * learned**2, "entropy": 1.1 - 0.2 * learned}
      lines.append({"step": step, **{f"eval_{name}": value for name, value in held_out.items()}})
  return lines


def _pairs(draw, learned, beta, noise):
  noisy = lambda value: value + noise * draw.standard_normal()
  return {
    "loss": noisy(math.log(2) - 0.3 * learned),
    "nll_loss": noisy(1.4 - 0.2 * learned),
    "rewards/margins": noisy(8 * beta * learned),
    "rewards/accuracies": min(1.0, max(0.0, noisy(0.5 + 0.4 * learned))),
    "rewards/accuracies/chosen_longer": 0.5 + 0.45 * learned,
    "rewards/accuracies/chosen_shorter": 0.5 + 0.3 * learned,
    "rewards/chosen": 2 * beta * learned,
    "rewards/rejected": -6 * beta * learned,
    "logps/chosen": -60 + 2 * learned,
    "logps/rejected": -64 - 6 * learned,
    "logps/chosen_drift": 2 * learned,
    "logps/rejected_drift": -6 * learned,
    "lengths/chosen": 40 + 4 * draw.standard_normal(),
    "lengths/rejected": 43 + 4 * draw.standard_normal(),
    "mean_token_accuracy": 0.6 + 0.1 * learned,
  }


def grouped_rows(steps=40):
  """Lines of a GRPO run at the policy itself, whose loss is 0."""
  draw, lines = np.random.default_rng(0), []
  for step in range(1, steps + 1):
    lines.append(
      {
        "step": step,
        "loss": 1e-9 * draw.standard_normal(),
        "reward": 0.4 + 0.1 * draw.standard_normal(),
        "reward_std": 0.45,
        "frac_reward_zero_std": 0.6,
        "clip_ratio/low_mean": 0.0,
        "completions/mean_length": 50 + 5 * draw.standard_normal(),
        "grad_norm": 1.0 + 0.1 * draw.standard_normal(),
      }
    )
  return lines


def write(folder, *, config=None, lines=(), before=None, after=None, done=None, **record):
  """A run folder of these parts."""
  folder.mkdir(parents=True, exist_ok=True)
  record = dict(config=config or CONFIG, command="posttrain train --config=c.py", **record)
  (folder / "config.json").write_text(json.dumps(record))
  if lines:
    write_rows(folder, lines)
  for name, some in (("before", before), ("after", after)):
    if some is not None:
      (folder / f"evaluation-{name}.json").write_text(json.dumps(some.to_json()))
  if done is not None:
    (folder / "done.json").write_text(json.dumps(done))
  return folder


def write_rows(folder, lines):
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
