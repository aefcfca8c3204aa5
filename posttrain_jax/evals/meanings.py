"""What each metric of a run means, which way is better, and between which runs it compares: the one table of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from posttrain_jax import settings

LOWER, HIGHER, NEITHER = "lower", "higher", ""
ONLINE = "online"  # a run that writes its own answers, whatever its objective
DEAD = "Groups that agree"  # a panel
EVAL = "eval_"
LONGEST = 32  # characters of a name that comes from data


@dataclasses.dataclass(frozen=True)
class Metric:
  """`name` is that of metrics.jsonl without `eval_`, with at most one `*`; those of one `panel` are drawn together."""

  name: str
  label: str
  better: str
  meaning: str
  panel: str = ""

  @property
  def around(self) -> tuple[str, str]:
    """What stands before the `*`, and behind it."""
    before, _, behind = self.name.partition("*")
    return before, behind

  def covers(self, name: str) -> bool:
    before, behind = self.around
    is_long = len(name) >= len(before) + len(behind)
    is_covered = is_long and name.startswith(before) and name.endswith(behind)
    return is_covered if "*" in self.name else name == self.name


@dataclasses.dataclass(frozen=True)
class Group:
  """Metrics that belong together, and a paragraph that says how to read their curves."""

  title: str
  metrics: tuple[Metric, ...]
  reading: str = ""


_LOSS = Metric("loss", "loss", LOWER, "What training lowers, the mean over the batch.", "Loss")
_NLL = Metric(
  "nll_loss*",
  "likelihood term",
  LOWER,
  "Nats per token of the chosen (or gold) answers: minus log of the right token's probability.",
  "Likelihood term",
)
LOSS = Group(
  "Loss",
  (_LOSS, _NLL),
  "A falling curve is learning. Flat from the first step: the rate is too low, or the part that "
  "trains cannot change what the loss reads; raise optimizer.lr threefold. Rising: the rate is "
  "too high; lower it threefold or lengthen optimizer.warmup. Held-out values that part upwards "
  "from falling training values: the run learns its rows by heart; take fewer steps, more data "
  "or a smaller rank. A spike that comes back is one odd batch; one that stays is a rate too "
  "high for these rows.",
)
_TOKEN_LOSS = (
  "Nats per trained token of this {}: 0.69 is a probability of one half for the right token."
)
CHANNELS = Group(
  "Loss by channel",
  (
    Metric("loss/special", "special tokens", LOWER, _TOKEN_LOSS.format("kind"), "Special tokens"),
    Metric("loss/special/*", "", LOWER, _TOKEN_LOSS.format("kind"), "Special tokens"),
    Metric("loss/*", "", LOWER, _TOKEN_LOSS.format("channel"), "Channels"),
  ),
  "Channels that fall together are learned alike. One that stays flat is known already, or too "
  "rare: give it a larger share of the mixture. One that rises while others fall is forgotten "
  "for their sake: replay rows of it (data.replay). Special tokens (end of turn, tool and think "
  "markers) fall within a few steps; where they stay high, answers will not end where they "
  "should or tools will not be called: look at the chat template (model.template) and at the "
  "marked tokens of the first example.",
)
PARTS = Group(
  "Parts of the loss",
  (Metric("loss/*", "", LOWER, "This part alone, before its weight in the sum.", "Parts"),),
  "The sum is weighted: a part that stays flat while the others fall has too small a weight, "
  "one that drowns the others too large a weight (objective.losses, objective.sft_weight).",
)
PREFERENCE = Group(
  "Preference",
  (
    Metric(
      "rewards/accuracies",
      "accuracy of pairs",
      HIGHER,
      "Share of pairs whose chosen answer has the higher implicit reward; 0.5 is chance.",
      "Accuracy of pairs",
    ),
    Metric(
      "rewards/accuracies/chosen_longer",
      "where chosen is longer",
      HIGHER,
      "The same over pairs whose chosen answer is the longer one.",
      "Accuracy by length",
    ),
    Metric(
      "rewards/accuracies/chosen_shorter",
      "where chosen is shorter",
      HIGHER,
      "The same over pairs whose chosen answer is the shorter one.",
      "Accuracy by length",
    ),
    Metric(
      "rewards/margins",
      "margin",
      HIGHER,
      "Reward of the chosen answer less that of the rejected one, beta included; 0 at the reference.",
      "Margin",
    ),
    Metric(
      "rewards/chosen",
      "chosen",
      NEITHER,
      "Mean reward of chosen answers; below 0 they have become less likely than under the reference.",
      "Rewards",
    ),
    Metric("rewards/rejected", "rejected", NEITHER, "Mean reward of rejected answers.", "Rewards"),
  ),
  "Rising accuracy and margin are learning. Flat at 0.5 and 0: the rate is too low, beta too "
  "high, or chosen and rejected differ in nothing that the model can see. Training accuracy at "
  "1 that parts from held-out accuracy: the pairs are learned by heart; stop earlier or add "
  "pairs. Margins that keep rising after the accuracy has settled only move the policy further "
  "from its reference: stop there, or take loss=ipo. Rewards that part (chosen up, rejected "
  "down) are healthy; both falling is likelihood displacement: add +sft to the loss, or raise "
  "objective.beta. Accuracies by length that part: the model has learned length; balance the "
  "data or take loss=dpo_norm.",
)
REWARD = Group(
  "Reward model",
  (
    Metric(
      "accuracy", "accuracy", HIGHER, "Share ordered or labelled right; 0.5 is chance.", "Accuracy"
    ),
    Metric("margin", "margin", HIGHER, "Score of the better answer less the other's.", "Margin"),
    Metric(
      "mean_reward",
      "mean reward",
      NEITHER,
      "Mean score of all answers; only differences count.",
      "Mean reward",
    ),
    Metric("rewards/*", "", NEITHER, "Mean score of this side's answers.", "Rewards"),
  ),
  "Rising accuracy is learning; flat at 0.5 means a rate too low or labels that say nothing. "
  "Training accuracy that parts from held-out accuracy is learning by heart. Margins that rise "
  "without accuracy are overconfidence: stop earlier. A mean reward that drifts is harmless for "
  "pairs.",
)
PAIRS = Group(
  "Pairs",
  (
    Metric(
      "pairs/tied",
      "ties",
      LOWER,
      "Share of scored groups that are no pair: their answers have one score, or the best and the worst are the same.",
      "Groups that tie",
    ),
    *(metric for metric in PREFERENCE.metrics if "*" not in metric.name),
  ),
  "Of answers that the run wrote itself. Rising accuracy is learning. Many ties: the prompts are too easy or too hard,"
  " or the verifier says the same of all; ask for more answers (online.samples).",
)
DISTANCE = Group(
  "Distance from the reference",
  (
    Metric(
      "kl",
      "KL",
      NEITHER,
      "How far the policy has gone from its reference, 0 at the start: nats per answer token (KTO: per answer). "
      "Little for much accuracy is what one wants.",
      "KL to the reference",
    ),
    Metric(
      "kl_to_old",
      "to who wrote",
      NEITHER,
      "How far the policy has gone since it wrote the batch, nats per answer token; 0 on the first update.",
      "KL to who wrote the answers",
    ),
    Metric(
      "reward_kl_penalty",
      "taken off the reward",
      NEITHER,
      "Nats an answer, before online.kl_in_reward multiplies it.",
      "KL in the reward",
    ),
    Metric(
      "logps/chosen_drift",
      "chosen",
      NEITHER,
      "Log-probability of chosen answers less that under the reference, nats per answer.",
      "Drift of log-probabilities",
    ),
    Metric(
      "logps/rejected_drift",
      "rejected",
      NEITHER,
      "The same of rejected answers.",
      "Drift of log-probabilities",
    ),
    Metric(
      "logps/chosen",
      "chosen",
      NEITHER,
      "Log-probability of chosen answers, nats per answer.",
      "Log-probabilities",
    ),
    Metric(
      "logps/rejected", "rejected", NEITHER, "The same of rejected answers.", "Log-probabilities"
    ),
    Metric(
      "logits/*", "", NEITHER, "Mean logit over the vocabulary; a drift is harmless.", "Logits"
    ),
    Metric("log_odds*", "", HIGHER, "ORPO's odds of chosen over rejected answers.", "Log odds"),
  ),
  "A KL that rises slowly and flattens is a policy that has learned what the data asks. Flat at "
  "0: nothing has moved; raise optimizer.lr or lower objective.beta. Rising without end, or "
  "above about half a nat per token: the text itself will suffer; raise objective.beta or stop "
  "earlier. A spike is one update too large: lower the rate.",
)
DISTANCE_ONLINE = Group(
  DISTANCE.title,
  tuple(m for m in DISTANCE.metrics if m.name in ("kl", "kl_to_old", "reward_kl_penalty")),
  "There where a KL is asked for (objective.kl_weight, online.kl_in_reward), or where a batch is used for several"
  " updates. A KL to the reference that rises slowly is a policy that learns. Above about half a nat a token the text"
  " itself will suffer: raise that weight, or stop earlier. A KL to who wrote the answers that grows over the run:"
  " lower the rate, or use a batch for fewer updates.",
)
CRITIC = Group(
  "Critic",
  (
    Metric(
      "critic/vf_explained_var",
      "explained",
      HIGHER,
      "Share of the returns' variance that the critic's values explain, over all tokens of a written batch: 1 is all, 0"
      " no more than their mean does.",
      "Explained variance",
    ),
    Metric(
      "loss/value_avg",
      "critic",
      LOWER,
      "Half the squared distance of values from returns, a token.",
      "Loss of the critic",
    ),
    Metric("critic/values/mean", "values", NEITHER, "Mean value.", "Values and returns"),
    Metric("critic/returns/mean", "returns", NEITHER, "Mean return.", "Values and returns"),
    Metric(
      "critic/moved",
      "moved",
      NEITHER,
      "How far values are from those that the batch was made with, 0 on its first update.",
      "Movement of values",
    ),
    Metric(
      "val/clipfrac_avg",
      "at the bound",
      NEITHER,
      "Share of tokens whose value has gone further than critic.epsilon, the worse way.",
      "Values at their bound",
    ),
    Metric(
      "reward_kl_coefficient",
      "weight",
      NEITHER,
      "That of the KL in the reward, which online.kl_target moves.",
      "Weight of the KL",
    ),
    Metric("loss/policy_avg", "policy", NEITHER, "The policy's loss alone.", "Loss of the policy"),
  ),
  "An explained variance that rises from 0 is a critic that learns; PPO is then better than its rewards alone. Below 0"
  " after the first batches: the critic is worse than a constant; raise critic.lr, or let it learn alone first"
  " (critic.warmup). Values that stay behind returns that rise: the same. Many values at their bound: raise"
  " critic.epsilon, which is in the reward's own units.",
)
CURRICULUM = Group(
  "Curriculum",
  (
    Metric(
      "curriculum/pass_rate",
      "of the batch",
      NEITHER,
      "Pass rate that the prompts of the batch were known by when they were chosen; 0.5 where nothing was.",
      "Known pass rate",
    ),
    Metric(
      "curriculum/share_seen",
      "prompts",
      NEITHER,
      "Share of the prompts that were answered so far.",
      "Prompts answered",
    ),
  ),
  "A pass rate near one half is where answers differ. Towards 0 or 1 with all prompts answered: nothing else is left.",
)
SCORED = Group(
  "Scored answers",
  (
    Metric(
      "reward",
      "score",
      NEITHER,
      "Mean score of the answers in the batch; scores that rows bring do not tell how good the policy is.",
      "Scores of the batch",
    ),
    Metric(
      "reward_std",
      "deviation",
      NEITHER,
      "Deviation of scores within a group; 0 teaches nothing.",
      "Scores of the batch",
    ),
    Metric(
      "frac_reward_zero_std",
      "groups of one score",
      LOWER,
      "Share of answers whose whole group has one score, so that they teach nothing.",
      "Groups of one score",
    ),
    Metric(
      "advantage", "advantage", NEITHER, "Mean advantage; about 0 by construction.", "Advantage"
    ),
    Metric(
      "clip_ratio/*",
      "",
      NEITHER,
      "Share of tokens whose ratio to who wrote them is clipped and gives no gradient.",
      "Clipped",
    ),
  ),
  "Scores that rows bring move with the rows alone; held-out answers (eval.task) tell "
  "what the policy is worth. Many groups of one score: the prompts are too easy or too hard. "
  "Clipped shares that rise above a fifth: the policy has left the answers that it learns from; "
  "lower the rate, or write fresh answers. A spike is one batch far from the policy.",
)
TAUGHT = Group(
  "What the teacher says",
  (
    Metric(
      "teacher/agreement",
      "same likeliest token",
      HIGHER,
      "Share of trained tokens at which teacher and student hold the same token likeliest.",
      "Likeliest token the same",
    ),
    Metric(
      "teacher/reverse_kl",
      "reverse KL",
      LOWER,
      "Nats a token of the student's own answers: its log-probability less the teacher's, on average.",
      "Distance from the teacher",
    ),
    Metric(
      "teacher/mass",
      "teacher",
      NEITHER,
      "What the teacher gives to its objective.top_k likeliest tokens, which alone are told apart.",
      "Mass of the likeliest tokens",
    ),
    Metric(
      "teacher/student_mass",
      "student",
      HIGHER,
      "What the student gives to the same tokens.",
      "Mass of the likeliest tokens",
    ),
  ),
  "The loss is a divergence in nats a token: 0 is a student that says what its teacher says. Agreement rises with"
  " learning, and settles below 1 where the student is smaller. A divergence of the data's answers that falls while the"
  " student's own answers stay poor: let it write some of the rows itself (on_policy=0.5). A teacher's mass below 0.95:"
  " keep more of its tokens (objective.top_k).",
)
_RIGHT = (
  Metric(
    "pass@1", "first answer right", HIGHER, "Share of answers that are right.", "Right answers"
  ),
  Metric(
    "pass@*",
    "",
    HIGHER,
    "Share of prompts of which at least one of so many answers is right, without bias (Chen et al. 2021).",
    "Right answers",
  ),
)
_REWARD = Metric(
  "reward",
  "reward",
  HIGHER,
  "Mean reward of the answers that were written for the batch: the parts with their weights, times the gates.",
  "Reward",
)
_BESIDE_REWARD = tuple(metric for metric in SCORED.metrics if metric.name != "reward")
REWARDED = Group(
  "Reward",
  (_REWARD, *_RIGHT, *_BESIDE_REWARD),
  "A reward that rises, and pass@1 with it, is learning. Every batch has other prompts: compare the fifths of a run"
  " and not single batches. Flat: most groups agree and teach nothing (what is written says on what), or the rate is"
  " too low. Falling: it is too high. pass@1 that rises towards a flat pass@n: the model learns to say at once what it"
  " could say before. Clipped shares above a fifth: the policy has left the answers that it learns from; lower the"
  " rate, or use a batch for fewer updates (online.passes, online.minibatches).",
)
VERIFIED = Group(
  "Parts of the reward",
  (
    Metric("rewards/*/mean", "", NEITHER, "Mean score of this part, before its weight.", "Parts"),
    Metric("rewards/*/std", "", NEITHER, "Deviation of this part over all answers.", "Deviations"),
    Metric(
      "rewards/missing",
      "answers without a reward",
      LOWER,
      "Share of answers of which a part could not say how good they are. They are left out, and never count as 0.",
      "Missing",
    ),
    Metric("rewards/*/missing", "", LOWER, "Share of answers without this part.", "Missing"),
    Metric(
      "rewards/retried", "asked again", LOWER, "Scores that were asked for once more.", "Missing"
    ),
    Metric(
      "logged/*", "", NEITHER, "What a reward function logs (log_metric), over its calls.", "Logged"
    ),
  ),
  "One part that rises while the others fall is the one that pays best: look at what is written, and change the weights"
  " or make the part a gate. A format that is learned while right answers do not come is the same. Missing scores above"
  " a few in a hundred: read their reasons, mend the verifier, or raise reward.seconds.",
)
HELD_OUT = Group(
  "A second score",
  (
    Metric(
      "holdout/reward",
      "held-out score",
      HIGHER,
      "Mean of the score that is not trained on (holdout_reward), of the same answers as the reward.",
      "Reward and held-out score",
    ),
    Metric("holdout/*", "", NEITHER, "The same of a part of it.", "Parts of the held-out score"),
  ),
  "Rising with the reward is learning. Falling while the reward rises is a reward that is gamed: the run says so after"
  " twenty batches of it; read what is written.",
)
WRITTEN = Group(
  "What is written",
  (
    Metric(
      "completions/clipped_ratio",
      "cut answers",
      LOWER,
      "Share of answers that online.max_new_tokens cut.",
      "Cut answers",
    ),
    Metric(
      "completions/mean_length", "mean", NEITHER, "Tokens of an answer, on average.", "Lengths"
    ),
    Metric(
      "completions/max_length", "longest", NEITHER, "Tokens of the longest answer.", "Lengths"
    ),
    Metric(
      "completions/min_length", "shortest", NEITHER, "Tokens of the shortest answer.", "Lengths"
    ),
    Metric("frac_groups_dead", "all", LOWER, "Share of groups whose answers agree.", DEAD),
    Metric(
      "frac_groups_all_worst",
      "on the lowest",
      LOWER,
      "Share of groups whose answers all have the lowest outcome there is, 0 where it has no bound.",
      DEAD,
    ),
    Metric(
      "frac_groups_all_best",
      "on the highest",
      NEITHER,
      "Share of groups whose answers all have the highest outcome there is, 1 where it has no bound.",
      DEAD,
    ),
    Metric(
      "dynamic_sampling/rounds",
      "rounds",
      LOWER,
      "How often prompts were asked to fill the batch.",
      "Rounds",
    ),
    Metric(
      "dynamic_sampling/kept", "groups used", HIGHER, "Of all that were written.", "Groups used"
    ),
    Metric(
      "timing_share/*",
      "",
      NEITHER,
      "Share of the time from one written batch to the next; updating is all but writing and scoring.",
      "Time",
    ),
    Metric(
      "timing_s/*",
      "",
      NEITHER,
      "Seconds from one written batch to the next; of scoring, those after the last answer was written; updating is"
      " the rest.",
      "Seconds",
    ),
  ),
  "Groups that agree on the lowest outcome: the prompts are too hard, answers are cut, or the verifier says no to"
  " everything. On the highest: too easy, there is nothing left to learn. Many cut answers: raise"
  " online.max_new_tokens, or let the reward have the part length; an answer that is cut is seldom right. Lengths that"
  " grow while the reward does not are padding; those that shrink to nothing are what the reward pays for.",
)
TURNS = Group(
  "Turns and tools",
  (
    Metric("turns/mean", "turns", NEITHER, "Turns of the model in an answer, on average.", "Turns"),
    Metric(
      "turns/unparsed",
      "unparsed",
      LOWER,
      "Share of answers with a turn whose call cannot be read; each has the score online.unparsed.",
      "How answers end",
    ),
    Metric(
      "turns/failed",
      "environment failed",
      LOWER,
      "Share of answers whose environment raised, died or was too slow; they have no score.",
      "How answers end",
    ),
    Metric(
      "turns/cut",
      "out of turns",
      LOWER,
      "Share of answers that online.max_turns ended.",
      "How answers end",
    ),
    Metric(
      "turns/masked_share",
      "not the model's",
      NEITHER,
      "Share of an answer's tokens that tools or environments wrote: they are read, and nothing is learned from them.",
      "Tokens of others",
    ),
    Metric(
      "tools/call_frequency", "calls", NEITHER, "Calls of tools in an answer, on average.", "Calls"
    ),
    Metric(
      "tools/failure_frequency",
      "calls that failed",
      LOWER,
      "Share of calls of a tool that is unknown, raised or was too slow.",
      "Calls that failed",
    ),
  ),
  "Calls that go to zero: the model has found that it is paid without them, or never called one; show it how by a short"
  " fine-tuning first. Unparsed turns: the same, or the chat template is another than it was trained with. Many answers"
  " out of turns: raise online.max_turns.",
)
VARIETY = Group(
  "Variety",
  (
    Metric(
      "entropy",
      "entropy",
      NEITHER,
      "Nats: how undecided the policy is about the next token of an answer.",
      "Entropy",
    ),
  ),
  "An entropy that falls slowly is a policy that has found what pays. Towards 0, all answers to a prompt become one,"
  " groups agree and nothing is left to learn: lower the rate, raise objective.epsilon_high, or stop. One that rises"
  " without end: the text falls apart; lower the rate.",
)
SAMPLER = Group(
  "Sampler and trainer",
  (
    Metric(
      "sampling/logp_difference",
      "difference",
      LOWER,
      "Nats a token between the log-probabilities that answers were drawn with and the trainer's.",
      "Difference of log-probabilities",
    ),
    Metric(
      "sampling/token_mult_prob_error",
      "factor",
      LOWER,
      "The same as a factor of the probability; above 1.02 and rising, weights do not reach the sampler.",
      "Factor of probabilities",
    ),
    Metric(
      "rollout_corr/kl", "KL", NEITHER, "Of the sampler from the trainer, nats a token.", "KL"
    ),
    Metric(
      "rollout_corr/k3_kl", "KL by k3", LOWER, "The same, by k3, which is never negative.", "KL"
    ),
    Metric(
      "rollout_corr/training_ppl", "trainer", NEITHER, "Of answers, by the trainer.", "Perplexity"
    ),
    Metric(
      "rollout_corr/rollout_ppl", "sampler", NEITHER, "Of answers, by the sampler.", "Perplexity"
    ),
    Metric(
      "rollout_corr/ppl_ratio", "ratio", NEITHER, "The trainer's over the sampler's.", "Perplexity"
    ),
    Metric("rollout_corr/chi2_*", "", LOWER, "Mean squared ratio less 1.", "Chi-squared"),
    Metric(
      "rollout_corr/log_ppl*", "", NEITHER, "Difference of log-perplexities.", "Log-perplexity"
    ),
    Metric(
      "rollout_corr/rollout_is_eff_sample_size",
      "effective sample",
      HIGHER,
      "As how large a share of the tokens the weighted ones count; 1 is all.",
      "Effective sample",
    ),
    Metric(
      "rollout_corr/rollout_*",
      "",
      NEITHER,
      "Of the weights that correct for the sampler: mean, largest and least before the bounds, deviation, shares"
      " beyond.",
      "Importance weights",
    ),
  ),
  "All of it is 0, and perplexities are equal, where sampler and trainer compute alike. What grows from step to step:"
  " the sampler has other weights, or another precision; objective.importance corrects for it.",
)
LENGTHS = Group(
  "Lengths of answers",
  (
    Metric(
      "lengths/chosen", "chosen", NEITHER, "Tokens of chosen answers, of the data.", "Lengths"
    ),
    Metric("lengths/rejected", "rejected", NEITHER, "Tokens of rejected answers.", "Lengths"),
    Metric(
      "completions/mean_length", "answers", NEITHER, "Tokens of the scored answers.", "Lengths"
    ),
  ),
  "Rows bring the answers: flat is right, and a slope means that rows are sorted. Lines that lie apart "
  "(chosen answers longer throughout) teach length "
  "along with quality: compare the accuracies by length.",
)
PREDICTION = Group(
  "Predictions",
  (
    Metric(
      "mean_token_accuracy",
      "token accuracy",
      HIGHER,
      "Share of trained tokens to which the model gives the highest probability.",
      "Token accuracy",
    ),
    Metric(
      "entropy",
      "entropy",
      NEITHER,
      "Nats: how undecided the model is about the next token.",
      "Entropy",
    ),
  ),
  "Token accuracy rises as the loss falls. An entropy that falls towards 0 is a model that has "
  "become sure of everything it writes: too many passes over too few rows.",
)
OPTIMISATION = Group(
  "Optimisation",
  (
    Metric("grad_norm", "gradient norm", NEITHER, "Length of the gradient.", "Gradient norm"),
    Metric("learning_rate", "learning rate", NEITHER, "That of this update.", "Learning rate"),
    Metric(
      "skipped",
      "skipped updates",
      LOWER,
      "Updates whose gradient was not finite.",
      "Skipped updates",
    ),
    Metric(
      "skipped_in_a_row",
      "skipped in a row",
      LOWER,
      "The same, since the last good one.",
      "Skipped updates",
    ),
    Metric("epoch", "epoch", NEITHER, "Passes over the data so far.", "Epoch"),
  ),
  "A gradient norm that falls or stays level is healthy. Single spikes are odd batches, which "
  "optimizer.clip bounds; growth over many steps comes before divergence: lower optimizer.lr. "
  "Flat near 0: nothing is left to learn, or nothing trains.",
)
ROUTERS = Group(
  "Experts",
  (
    Metric(
      "router/imbalance",
      "imbalance",
      LOWER,
      "Shares of tokens times the routers' probabilities, over all experts and layers; 1 where all are alike.",
      "Load of experts",
    ),
    Metric(
      "router/busiest",
      "the busiest expert",
      LOWER,
      "Tokens of each layer's busiest expert beside an even share, on average over layers.",
      "Load of experts",
    ),
    Metric(
      "router/idle",
      "idle experts",
      NEITHER,
      "Share of experts that no token of a micro-batch chose.",
      "Idle experts",
    ),
    Metric(
      "loss/balance",
      "balance",
      LOWER,
      "The part of the loss that model.router_aux_loss_coef weighs: imbalance times the experts of a token.",
      "Balance",
    ),
    Metric("loss/rows", "of the rows", LOWER, "The loss without that part.", "Loss of the rows"),
  ),
  "Of a mixture of experts. A load that grows more uneven while the routers train wastes experts: give "
  "model.router_aux_loss_coef a weight such as 0.001. Under an adapter that leaves routers frozen, little moves.",
)
SPEED = Group(
  "Speed",
  (
    Metric(
      "tokens_per_second",
      "tokens per second",
      HIGHER,
      "All tokens, trained or not.",
      "Tokens per second",
    ),
    Metric(
      "tokens",
      "tokens",
      NEITHER,
      "Tokens of the batch (held out: of all held-out rows), without padding.",
      "",
    ),
    Metric("num_tokens", "tokens so far", NEITHER, "Tokens since the start.", ""),
  ),
  "Level is right. Dips are evaluations, saves, or other work on the machine; a low first value "
  "is the compilation.",
)
SCORE = Metric(
  "score/*",
  "",
  HIGHER,
  "What eval.metric gives the answers to held-out prompts, on average; higher is better.",
  "Score of answers",
)
SCORES = Group(
  "Scores of answers",
  (SCORE,),
  "Taken before and after training. A score that falls while the held-out loss falls too: answers "
  "no longer end or have another form; read them in the report.",
)
SUITES = Group(
  "What the suite says",
  (
    Metric(
      "suite/change",
      "change of what was not trained",
      HIGHER,
      "The mean change of the suite's scores, those of what was trained left out; below 0 ability was paid.",
    ),
    Metric("suite/*", "", HIGHER, "The share of the suite's items that are right after training."),
    Metric("bits_per_byte/*", "", LOWER, "Bits that a byte of the suite's text takes."),
  ),
  "Taken before and after training (eval.suite); the report has what was forgotten, item by item.",
)
OTHER = Group(
  "Other", (Metric("*", "", NEITHER, "Recorded by an objective or an adapter of this run.", ""),)
)
_COMMON = (SCORES, SUITES, LENGTHS, PREDICTION, ROUTERS, OPTIMISATION, SPEED, OTHER)
GROUPS: Mapping[str, tuple[Group, ...]] = {
  "sft": (LOSS, ROUTERS, CHANNELS, *(group for group in _COMMON if group is not ROUTERS)),
  "preference": (LOSS, PARTS, PREFERENCE, DISTANCE, *_COMMON),
  "kto": (LOSS, PARTS, PREFERENCE, DISTANCE, *_COMMON),
  "reward": (LOSS, PARTS, REWARD, *_COMMON),
  "grouped": (LOSS, PARTS, SCORED, DISTANCE, *_COMMON),
  "distil": (LOSS, TAUGHT, PARTS, *_COMMON),
  ONLINE: (
    *(REWARDED, PAIRS, CRITIC, CURRICULUM, VERIFIED, HELD_OUT, WRITTEN, TURNS, VARIETY),
    *(DISTANCE_ONLINE, SAMPLER, LOSS, PARTS, TAUGHT),
    *(SCORES, SUITES, ROUTERS, OPTIMISATION, SPEED, OTHER),
  ),
}


def kind(config: Mapping[str, Any]) -> str | None:
  """What decides which metrics a run has: its objective, or that it writes its own answers."""
  return ONLINE if "online" in config else (config.get("objective") or {}).get("name")


def groups(objective: str | None) -> tuple[Group, ...]:
  """The groups of an objective's metrics, in the order of a page; of an unknown objective, all of them."""
  return GROUPS.get(objective or "", (LOSS, CHANNELS, PREFERENCE, DISTANCE, *_COMMON))


def base(name: str) -> str:
  """The metric without the mark of held-out values."""
  return name.removeprefix(EVAL)


@dataclasses.dataclass(frozen=True)
class Named:
  """A metric that runs have: its name without `eval_`, and what the table says of it."""

  name: str
  metric: Metric

  @property
  def label(self) -> str:
    """What the table calls it, or of several that one line covers, what the `*` stands for, which may be of data."""
    if self.metric.label:
      return self.metric.label
    before, behind = self.metric.around
    rest = self.name.removeprefix(before).removesuffix(behind)
    # a "/" behind a "/" begins a path, of a verifier in a file
    rest = (rest if before.endswith("/") else rest.lstrip("/_")).rstrip("/_") or self.name
    if len(rest) <= LONGEST:
      return rest
    is_path = "/" in rest  # which differs from others at its end
    return "…" + rest[1 - LONGEST :] if is_path else rest[: LONGEST - 1] + "…"

  @property
  def alone(self) -> str:
    """A name that says what it is outside its panel."""
    panel = self.metric.panel
    if (
      not panel
      or panel.lower().startswith(self.label.lower())
      or self.label.lower().startswith(panel.lower())
    ):
      return self.label
    return (
      f"{panel}: {self.label}".lower() if self.metric.label else f"{panel.lower()}: {self.label}"
    )


def sorted_into(objective: str | None, names: Iterable[str]) -> list[tuple[Group, list[Named]]]:
  """The groups that have one of these metrics, each metric once, in the order of the table."""
  left = list(dict.fromkeys(map(base, names)))
  result = []
  for group in groups(objective):
    here = []
    for metric in group.metrics:
      mine = [name for name in left if metric.covers(name)]
      here += [Named(name, metric) for name in mine]
      left = [name for name in left if name not in mine]
    if here:
      result.append((group, here))
  return result


def meaning(objective: str | None, name: str) -> Metric:
  """What the table says of one metric, `eval_` or not."""
  ((_, (named,)),) = sorted_into(objective, [name])
  return named.metric


# Between runs


def better(objective: str | None, name: str) -> str:
  """higher, lower, or "" where neither is; `accuracy/after` is of the built-in task's answers."""
  if name.startswith(ANSWERS):
    return HIGHER
  if objective in ("grouped", ONLINE) and base(name) == "loss":
    return NEITHER
  return meaning(objective, name).better


def ranked(objective: str | None) -> list[str]:
  """The metrics of an objective of which one way is better, but those of which every run has its own."""
  metrics = [metric for group in groups(objective) for metric in group.metrics]
  apart = {metric.name for metric in (*OPTIMISATION.metrics, *SPEED.metrics)}
  names = [m.name for m in metrics if m.name not in apart and "*" not in m.name]
  return [name for name in dict.fromkeys(names) if better(objective, name)]


def best(objective: str | None, name: str, values: Sequence[float | None]) -> int | None:
  """The place of the best value that is a number; None where neither way is better, or all are equal.

  >>> best("sft", "eval_loss", [2.0, None, 1.5, math.nan]), best("sft", "grad_norm", [1.0, 2.0])
  (2, None)
  """
  known = [
    (value, i) for i, value in enumerate(values) if value is not None and math.isfinite(value)
  ]
  way = better(objective, name)
  if way == NEITHER or len({value for value, _ in known}) < 2:
    return None
  value = lambda pair: pair[0]
  return (min(known, key=value) if way == LOWER else max(known, key=value))[1]


ANSWERS = "accuracy/"  # of the built-in task, before and after training
# Fields that say of which rows a value is, of which text a token is, and how large a reward is.
ROWS = ("data.train", "data.eval", "data.eval_rows", "data.limit", "data.kind")
TEXT = ("model.name", "model.template")
SCALE = (
  "objective.name",
  "objective.losses",
  "objective.loss",
  "objective.beta",
  "objective.divergence",
)
SCALED = ("rewards/margins", "rewards/chosen", "rewards/rejected", "margin", "mean_reward")
BY_VERIFIERS = (_REWARD, *_RIGHT, *VERIFIED.metrics)  # of an online run
PER_TOKEN = ("loss", "nll_loss", "mean_token_accuracy", "entropy", "kl")


def obstacles(name: str, configs: Sequence[Mapping[str, Any]]) -> list[str]:
  """The fields whose differences make a metric's values those of different things; [] where values compare.

  A loss is a function of its objective's section: across betas, its values say nothing of which run is better.
  """
  fields = [settings.flat(dict(config)) for config in configs]
  names = {field for some in fields for field in some}
  differ = sorted(f for f in names if len({repr(some.get(f)) for some in fields}) > 1)
  decide = _decide(name, fields)
  return [f for f in differ if any(f == d or f.startswith(f"{d}.") for d in decide)]


def _decide(name: str, fields: Sequence[Mapping[str, Any]]) -> list[str]:
  """The fields, or their sections, that say what a metric is of."""
  bare = base(name)
  if any(metric.covers(bare) for metric in SUITES.metrics):
    return ["eval.suite", "eval.suite_limit", "model.name", "model.template", "seed"]
  if name.startswith(ANSWERS) or SCORE.covers(bare):
    decide = ["eval.task", "eval.task_limit", "eval.max_new_tokens"]
    decide += ["eval.metric"] if name.startswith(ANSWERS) else []
    if not any(some.get("eval.metric") and not some.get("eval.task") for some in fields):
      return decide
    return decide + (["data.eval"] if all(some.get("data.eval") for some in fields) else [*ROWS])
  if any(metric.covers(bare) for metric in (*OPTIMISATION.metrics, *SPEED.metrics)):
    return []
  has_own_rows = name.startswith(EVAL) and all(some.get("data.eval") for some in fields)
  decide = [field for field in ROWS if not (has_own_rows and field != "data.eval")]
  if not name.startswith(EVAL):
    decide += ["data.replay"]
  if bare in PER_TOKEN or bare.startswith("loss/"):
    decide += TEXT
  if bare == "loss" or bare.startswith("loss/"):
    decide += ["objective"]
  decide += ["reward", "online.outcome"] if any(m.covers(bare) for m in BY_VERIFIERS) else []
  decide += ["holdout_reward"] if bare.startswith("holdout/") else []
  return decide + ([*SCALE] if bare in SCALED else [])
