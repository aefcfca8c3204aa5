"""Run folders as training leaves them, made without training."""

import json
import math

import numpy as np

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


def rows(steps=40, every=10):
  """Lines of metrics.jsonl: a falling loss over two channels, and an evaluation now and then."""
  draw, lines = np.random.default_rng(0), []
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
