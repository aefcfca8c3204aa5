"""What a run's curves say, in sentences: what rose, stayed, parted or spiked, and what to try."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from posttrain_jax.evals import figures, online
from posttrain_jax.runs.record import Run

END = 0.1  # of a series, over which its start and its end are taken
UNSCORED = 0.05  # a share of answers without a reward above this is worth a look
STILL = 0.02  # a change below this share of the value is none
SPIKE = 6.0  # times the usual distance to the mean around it
TIE = 0.55  # an accuracy below this is hardly more than chance
FAR = 0.5  # nats a token from the reference
STOPPING = 1.0  # nats: an end-of-turn token that the model gives less than 0.37


@dataclasses.dataclass(frozen=True)
class Curve:
  """A series read as a whole: its values at both ends, and what single values differ from their mean by."""

  steps: np.ndarray
  values: np.ndarray
  start: float
  end: float
  noise: float  # standard error of either end

  @property
  def change(self) -> float:
    return self.end - self.start

  @property
  def trend(self) -> str:
    """rising, falling or flat: beyond both the noise and `STILL`."""
    scale = STILL * max(abs(self.start), abs(self.end))
    if abs(self.change) <= max(3 * self.noise, scale):
      return "flat"
    return "rising" if self.change > 0 else "falling"


def curve(steps: Sequence[int], values: Sequence[float]) -> Curve | None:
  """
  >>> curve(range(50), [2.0 - 0.02 * i for i in range(50)]).trend, curve(range(9), [0.7] * 9).trend
  ('falling', 'flat')
  """
  x, y = np.asarray(steps), np.asarray(values, np.float64)
  x, y = x[np.isfinite(y)], y[np.isfinite(y)]
  if len(y) < 2:
    return None
  n = max(1, round(END * len(y)))
  rest = y - figures.smooth(y.tolist()) if len(y) >= 20 else np.zeros(1)
  noise = float(np.std(rest)) * math.sqrt(2 / n)
  return Curve(x, y, float(np.mean(y[:n])), float(np.mean(y[-n:])), noise)


def spikes(steps: Sequence[int], values: Sequence[float]) -> list[int]:
  """Steps whose value is far above those around it.

  >>> spikes(range(40), [1.0 + 0.01 * (i % 3) + 9 * (i == 17) for i in range(40)])
  [17]
  """
  x, y = np.asarray(steps), np.asarray(values, np.float64)
  x, y = x[np.isfinite(y)], y[np.isfinite(y)]
  if len(y) < 20:
    return []
  width = 9
  padded = np.pad(y, width // 2, mode="edge")
  middle = np.median(np.lib.stride_tricks.sliding_window_view(padded, width), axis=1)
  over = y - middle
  usual = np.median(np.abs(over))
  high = (over > SPIKE * max(usual, 1e-12)) & (over > np.abs(middle))
  high[: width // 2] = False  # a first loss is high by nature
  return x[high].tolist()


def read(run: Run) -> list[str]:
  """Sentences about the run's curves; one that says that nothing stands out where nothing does."""
  kind = run.field("objective.name")
  said = [*_broken(run), *_reward(run), *_loss(run, kind)]
  if kind in ("preference", "kto"):
    said += [*_pairs(run), *_distance(run)]
  if kind == "reward":
    said += _accuracy(run, "accuracy")
  if kind == "grouped":
    said += [*_unscored(run), *_groups(run), *_distance(run)]
  said += [*_channels(run, kind), *_special(run), *_spiking(run)]
  if said:
    return said
  return ["Nothing stands out in these curves."] if run.rows else []


ZERO = (
  "The loss stays near 0, and that is right: each answer is compared with the policy itself"
  " (objective.old=policy), so every ratio is 1, the loss is minus the mean advantage, and advantages add up to 0 in"
  " each group. Its gradient is not 0. Whether the run learns is told by the KL, the entropy and the answers to"
  " held-out prompts, not by the loss."
)


ONLINE = (
  "The loss does not say how good the policy is: it is advantages weighted with ratios or log-probabilities, about 0"
  " where a batch is used once, and may rise while the policy improves. Read the reward, pass@1, the second score"
  " where there is one (holdout_reward), and {answers}."
)


POLICY = (
  "The value of a policy-gradient loss does not say how good the policy is: it is advantages weighted with ratios or"
  " log-probabilities, and may rise while the policy improves. Read the KL, the entropy and the answers to held-out"
  " prompts."
)


def of_policy_loss(run: Run) -> str:
  """What the value of a policy-gradient loss says, and what to read in its place."""
  if not online.is_one(run):
    return ZERO if is_zero_by_construction(run) else POLICY
  is_asked = run.after is not None and run.after.is_graded
  asked = "the answers to held-out prompts, above"
  return ONLINE.format(
    answers=asked if is_asked else "answers to held-out prompts, which eval.task asks for"
  )


def _of(run: Run, name: str) -> Curve | None:
  return curve(*run.series(name))


def _broken(run: Run) -> list[str]:
  said = []
  for name, what in (("loss", "training loss"), ("eval_loss", "held-out loss")):
    steps, values = run.series(name)
    bad = [step for step, value in zip(steps, values) if not math.isfinite(value)]
    if bad:
      said.append(
        f"The {what} is not a number at {_steps(bad)}: such values are in no curve. Lower "
        "optimizer.lr, or look at the rows of that step."
      )
  skipped = run.series("skipped")[1]
  if skipped and skipped[-1] > 0:
    said.append(
      f"{skipped[-1]:.0f} updates were skipped because their gradient was not finite; lower "
      "optimizer.lr where there are more than a few."
    )
  return said


RATIOS = ("ppo", "gspo", "rloo")  # policy losses that are ratio times advantage


def is_zero_by_construction(run: Run) -> bool:
  """Whether a scored group's loss is that of the policy at itself, where every ratio is 1."""
  o = run.field("objective") or {}
  alone = not o.get("kl_weight") and not o.get("sft_weight")
  is_itself = o.get("old") == "policy" and o.get("loss") in RATIOS
  return o.get("name") == "grouped" and is_itself and alone


def _loss(run: Run, kind: str | None) -> list[str]:
  train, held_out = _of(run, "loss"), _of(run, "eval_loss")
  if kind == "grouped":
    return [of_policy_loss(run)]
  rate = run.field("optimizer.lr")
  raised = f"optimizer.lr (now {rate:g})" if isinstance(rate, int | float) else "optimizer.lr"
  said = []
  if train is not None and len(train.values) >= 5:
    span = f"from {train.start:.3g} to {train.end:.3g}"
    if train.trend == "rising":
      said.append(
        f"The training loss rose, {span}: the rate is too high. Lower {raised} threefold, or "
        "raise optimizer.warmup."
      )
    elif train.trend == "flat":
      said.append(
        f"The training loss is flat, {span}: raise {raised} threefold, or train for more steps."
      )
    elif held_out is None:
      said.append(
        f"The training loss fell, {span}. Whether that is learning or learning by heart is told by two held-out losses"
        " or more: set eval.every."
      )
  if held_out is None:
    return said
  return said + _held_out(run, held_out, train)


def _held_out(run: Run, held_out: Curve, train: Curve | None) -> list[str]:
  best = int(held_out.values.argmin())
  low, last = float(held_out.values[best]), float(held_out.values[-1])
  span = f"from {float(held_out.values[0]):.3g} to {last:.3g}"
  if last > low + STILL * abs(low):
    falls = train is not None and train.trend == "falling"
    return [
      f"The held-out loss was lowest at step {held_out.steps[best]:,} ({low:.4g}) and ended at {last:.4g}"
      + (
        " while the training loss fell: they part, the run learns its rows by heart"
        if falls
        else ""
      )
      + f". Take fewer steps, a lower rate or more data{_kept(run)}."
    ]
  if last < float(held_out.values[0]) * (1 - STILL) and best == len(held_out.values) - 1:
    return [
      f"The held-out loss fell, {span}, and was lowest at the end: more steps may help still."
    ]
  if abs(last - float(held_out.values[0])) <= STILL * abs(last):
    return [
      f"The held-out loss is flat, {span}: what was learned, if anything, does not reach held-out rows."
    ]
  return []


def _kept(run: Run) -> str:
  if run.given_step is not None:
    return f"; what was exported is of step {run.given_step:,}"
  names = [name for name in ("adapter-best", "model-best") if (run.folder / name).is_dir()]
  return f"; {names[0]}/ is of the better step" if names else ""


def _accuracy(run: Run, name: str) -> list[str]:
  train, values = _of(run, name), run.series(f"eval_{name}")[1]
  last = _last(run, name)
  if last is None:
    return []
  where = "held-out pairs" if values else "training pairs"
  said = []
  if last < TIE:
    said.append(
      f"{last:.0%} of the {where} are ordered right, which is hardly more than chance: raise "
      "optimizer.lr, and look whether chosen and rejected answers differ in what they should."
    )
  else:
    said.append(f"{last:.0%} of the {where} are ordered right (chance is 50 %).")
  if values and train is not None and train.end > 0.95 and train.end - last > 0.15:
    said.append(
      f"Training accuracy ({train.end:.0%}) and held-out accuracy ({last:.0%}) part: the pairs "
      "are learned by heart. Stop earlier, or add pairs."
    )
  return said


def _pairs(run: Run) -> list[str]:
  said = _accuracy(run, "rewards/accuracies")
  margin = _of(run, "rewards/margins")
  if margin is not None and margin.trend == "flat":
    said.append(
      f"The margin is flat at {margin.end:.3g}: the policy has not left its reference; raise "
      "optimizer.lr, or lower objective.beta."
    )
  sides = [_of(run, f"rewards/{side}") for side in ("chosen", "rejected")]
  if all(side is not None and side.trend == "falling" and side.end < 0 for side in sides):
    said.append(
      "Rewards of chosen and rejected answers both fell: the chosen answers, too, have become "
      "less likely (likelihood displacement). Add +sft to the loss, or raise objective.beta."
    )
  longer, shorter = (
    _last(run, f"rewards/accuracies/chosen_{how}") for how in ("longer", "shorter")
  )
  if longer is not None and shorter is not None and abs(longer - shorter) > 0.3:
    said.append(
      f"Pairs whose chosen answer is longer are ordered right in {longer:.0%}, those where it is "
      f"shorter in {shorter:.0%}: the run has learned length. Balance the data, or take "
      "loss=dpo_norm."
    )
  return said


def _last(run: Run, name: str) -> float | None:
  """The last held-out value, or the mean of the last training values."""
  values = run.series(f"eval_{name}")[1]
  if values and math.isfinite(values[-1]):
    return float(values[-1])
  train = _of(run, name)
  return None if train is None else train.end


def _distance(run: Run) -> list[str]:
  last = _last(run, "kl")
  if last is None or run.field("objective.name") == "kto":  # KTO's is per answer
    return []
  if last > FAR:
    return [
      f"The KL to the reference is {last:.2g} nats a token, which is far: answers may lose their language. Raise "
      f"{_held_by(run)}, or stop earlier."
    ]
  return [f"The policy is {last:.2g} nats a token from its reference."]


def _held_by(run: Run) -> str:
  """What holds a policy near its reference."""
  if run.field("objective.name") != "grouped":
    return "objective.beta"
  return "online.kl_in_reward" if run.field("online.kl_in_reward") else "objective.kl_weight"


def _reward(run: Run) -> list[str]:
  """Of an online run: whether the reward has moved beyond what batches differ by, and the second score with it."""
  reward = online.ends(run, "reward") if online.is_one(run) else None
  if reward is None or reward.batches < 5:
    return []
  over = f"from {reward.first:.3g} to {reward.last:.3g} over {reward.batches:,} batches"
  if not reward.is_change:
    return [
      f"The reward went {over}, which is within what single batches differ by: take more steps, more prompts a batch"
      " (batch.rows), or a higher optimizer.lr."
    ]
  if reward.last < reward.first:
    return [f"The reward fell, {over}: lower optimizer.lr, and look at what is written."]
  other = online.ends(run, "holdout/reward")
  if other is not None and other.is_change and other.last < other.first:
    return [
      f"The reward rose, {over}, and the second score fell from {other.first:.3g} to {other.last:.3g}: the reward is"
      " gamed. Read what is written, and change the reward."
    ]
  return [f"The reward rose, {over}."]


def _unscored(run: Run) -> list[str]:
  """Of an online run: answers that have no reward, of which nothing is learned."""
  share = online.ends(run, "rewards/missing") if online.is_one(run) else None
  if share is None or share.last < UNSCORED:
    return []
  parts = [name for name in run.names() if re.fullmatch(r"rewards/.+/missing", name)]
  lost = [
    name.removeprefix("rewards/").removesuffix("/missing")
    for name in parts
    if (one := online.ends(run, name)) is not None and one.last >= UNSCORED
  ]
  why = (
    f"On them {', '.join(lost)} failed: the column missing of completions/ says why; mend the verifier, or raise"
    " reward.seconds"
    if lost
    else "No part of the reward applies to their rows: leave these rows out, or add a part that applies"
  )
  return [
    f"{share.last:.0%} of the answers have no reward, and nothing is learned from them. {why}."
  ]


def _groups(run: Run) -> list[str]:
  said = []
  same = _of(run, "frac_reward_zero_std")
  if same is not None and same.end > 0.5:
    said.append(
      f"{same.end:.0%} of the answers are in groups of one score, which teach nothing: take "
      "prompts that are answered right sometimes, neither always nor never."
    )
  cut = _of(run, "completions/clipped_ratio")
  if cut is not None and cut.end > 0.5:
    has_length = "length" in (run.field("reward.parts") or ())
    shorter = (
      "give the reward's part length more weight"
      if has_length
      else "let the reward have the part length"
    )
    said.append(
      f"{cut.end:.0%} of the answers are cut at online.max_new_tokens (now"
      f" {run.field('online.max_new_tokens')}), and seldom right: raise it, or {shorter}."
    )
  for side in ("low", "high"):
    clipped = _of(run, f"clip_ratio/{side}_mean")
    if clipped is not None and clipped.end > 0.2:
      said.append(
        f"{clipped.end:.0%} of the tokens are clipped ({side}): the policy has left the answers "
        f"that it learns from. Lower optimizer.lr, or {_fresher(run)}."
      )
  return said


def _fresher(run: Run) -> str:
  return (
    "use a batch for fewer updates (online.passes, online.minibatches)"
    if online.is_one(run)
    else "write fresh answers"
  )


def _channels(run: Run, kind: str | None) -> list[str]:
  """Channels whose held-out loss rose, where others' fell."""
  if kind != "sft":
    return []
  prefix = "eval_loss/" if any(n.startswith("eval_loss/") for n in run.names()) else "loss/"
  names = [n for n in run.names() if n.startswith(prefix) and not n.startswith(f"{prefix}special")]
  read = {name.removeprefix(prefix): found for name in names if (found := _of(run, name))}
  rising = [name for name, found in read.items() if found.trend == "rising"]
  if not rising or not any(found.trend == "falling" for found in read.values()):
    return []
  which = "held-out loss" if prefix == "eval_loss/" else "loss"
  return [
    f"The {which} of {', '.join(map(repr, rising[:5]))} rose while that of other channels fell: "
    "it is forgotten for their sake. Replay rows of it (data.replay), or give it a larger "
    "share."
  ]


def _special(run: Run) -> list[str]:
  """Markers that the model does not learn to write."""
  said = []
  kinds = [name for name in run.names() if name.startswith("loss/special/")]
  for name in kinds or ["loss/special"]:
    if (found := _of(run, name)) and found.end > STOPPING:
      what = name.removeprefix("loss/special").strip("/").replace("_", " ") or "special"
      said.append(
        f"The loss of {what} tokens is still {found.end:.2g}: the model gives them "
        f"{math.exp(-found.end):.0%} where they belong. Look at the chat template and at the "
        "marked tokens of the first example."
      )
  return said


def _spiking(run: Run) -> list[str]:
  said = []
  for name, what in (("loss", "training loss"), ("grad_norm", "gradient norm")):
    at = (
      []
      if name == "loss" and (is_zero_by_construction(run) or online.is_one(run))
      else spikes(*run.series(name))
    )
    if at:
      rest = _of(run, name)
      stays = name == "loss" and rest is not None and rest.trend == "rising"
      comes_back = "and comes back: odd batches. Look at the rows there; where there are many, lower optimizer.lr."
      then = "and did not come back: lower optimizer.lr." if stays else comes_back
      said.append(f"The {what} spikes at {_steps(at)} {then}")
  return said


def _steps(steps: Sequence[int], most: int = 5) -> str:
  """
  >>> _steps([3]), _steps([1, 2, 3, 4, 5, 6, 7])
  ('step 3', '7 steps (1, 2, 3, 4, 5, ...)')
  """
  if len(steps) == 1:
    return f"step {steps[0]:,}"
  listed = ", ".join(map(str, steps[:most]))
  return f"{len(steps)} steps ({listed}{', ...' if len(steps) > most else ''})"
