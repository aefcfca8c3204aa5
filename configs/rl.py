r"""Online reinforcement learning: the model answers prompts, verifiers score the answers, and it learns from them.

posttrain train --config=rl:method=grpo,data=sql,reward=sql --workdir=runs/rl

data=sql is the built-in task; data=FILE.jsonl has rows with a prompt and the columns that the verifiers read.
storage=int8 or bfloat16 keeps the sampler's weights so, and corrects for it token by token.
teacher=NAME adds the reverse KL to a model of the same tokenizer to each token's advantage (on-policy distillation).
engine=http://127.0.0.1:8000/v1: a server (vLLM, SGLang, posttrain serve) writes the answers, one batch ahead.
environment=sql or tools=python: answers of several turns, in which the model calls tools.
method: grpo, dr_grpo, dapo, gspo, cispo, rloo, dppo, dppo_kl, reinforce, reinforce_pp, max_rl, centred; ppo, with a
critic; online_dpo, whose pairs are the best and the worst answer to a prompt (and loss=ipo, or another of
configs/preference.py).
"""

import ml_collections
from ml_collections import config_dict

from posttrain_jax.configs import common, grouped, preference

# loss, aggregation, advantage, epsilon_high
METHODS = {
  **grouped.METHODS,
  "reinforce_pp": ("ppo", "token_mean", "whitened", 0.2),
  "max_rl": ("ppo", "token_mean", "max_rl", 0.2),
  "centred": ("reinforce", "token_mean", "none", 0.2),
  "ppo": ("ppo", "token_mean", "gae", 0.2),
}
PAIRS = "online_dpo"


def get_config(arg=None):
  arg = common.parse(
    arg,
    model="smollm2",
    data="sql",
    adapter="lora",
    base="dense",
    method="grpo",
    reward="sql",
    environment="",
    tools="",
    engine="",
    storage="auto",
    holdout="",
    teacher="",
    loss="dpo",
    smoke=False,
  )
  c = common.run(arg)
  common.chosen("method", arg.method, (*METHODS, PAIRS))
  is_same = arg.storage == "auto" and not arg.engine
  if arg.method == PAIRS:
    if arg.teacher:
      raise ValueError(
        f"config argument teacher={arg.teacher!r}: pairs have no advantage it could be part of"
      )
    o, _ = preference.objective(arg.loss.split("+"))
  elif arg.loss != "dpo":
    raise ValueError(f"config argument loss={arg.loss!r}: it is of method={PAIRS}")
  else:
    o = _policy_gradient(arg, is_same)
  c.objective = o
  if "reference" in o:
    o.cache_reference = False  # answers are not there before training
  if arg.method == "ppo":
    c.critic = common.critic(arg)
  c.reward = common.reward(arg.reward)
  c.holdout_reward = common.reward(arg.holdout)  # logged beside the reward, and never trained on
  n = c.online = ml_collections.ConfigDict()
  n.samples = 8  # answers to a prompt
  n.max_new_tokens = 64  # of an answer
  n.temperature = 1.0
  # filters of what a token is drawn among; training is then over what they kept
  n.top_k = 0  # most likely tokens; 0 for all
  n.top_p = 1.0  # share of the mass that the likeliest hold; 1 for all
  n.min_p = 0.0  # least probability over that of the most likely; 0 for all
  n.minibatches = 1  # updates that a written batch is cut into
  n.passes = 1  # times that a written batch is used
  n.rows = 16  # answers under way at once
  # how the weights are kept meanwhile: auto, bfloat16 or int8, the fastest on a CPU of float32 products; its KL is
  # 0.007 nats a token, and the log-probability of a token is off by 0.09 on average
  n.storage = arg.storage
  n.dynamic = arg.method == "dapo"  # groups whose answers agree are replaced by others
  n.most_rounds = 10  # times that prompts are asked for one batch, with dynamic
  n.curriculum = "none"  # or pass_rate: prompts whose answers are likely to differ come more often
  # part of the reward that says which answers are right and which groups agree; "": the total without what does not
  # ask for that (length, tags, reward.untested); total: the reward itself
  n.outcome = ""
  n.kl_in_reward = 0.0  # weight of an answer's KL to the reference, taken off its reward
  n.kl_in_reward_estimator = "k1"  # k1 (unbiased) or k3 (never negative), summed over the answer
  # nats an answer that the weight is moved towards, over answers; None: the weight stays
  n.kl_target = config_dict.placeholder(float)
  n.kl_horizon = 10_000.0
  n.cut_penalty = 0.0  # taken off the reward of an answer that max_new_tokens cut
  n.mask_cut = False  # answers that were cut teach nothing
  n.gold_rows = 0  # rows of an update that are the data's own answers
  # answers of several turns: an environment (sql, python or FILE.py:Class), and tools (python or FILE.py:function, "+"
  # between two)
  n.environment = arg.environment
  n.tools = common.names(arg.tools)
  n.max_turns = 4  # of an answer, which max_new_tokens bounds as a whole, with what tools say
  n.tool_tokens = 128  # of what is said to the model at once; beyond, it is cut
  n.tool_seconds = 30.0  # for one answer of a tool or an environment
  n.unparsed = 0.0  # the score of an answer with a turn that cannot be read
  # the address of a server that writes, as http://127.0.0.1:8000/v1; "": this program does
  n.engine = arg.engine
  n.engine_wire = "openai"  # how it is asked: openai (vLLM, posttrain serve) or sglang
  n.engine_folder = ""  # where the server reads adapters; "": engine/ in the run's folder
  n.engine_key = ""  # the environment variable that holds its key; "": none
  n.engine_patience = 300.0  # seconds for which it is asked again where it does not answer
  # batches that are written while one is learned from, by weights that are as many batches old
  n.ahead = int(bool(arg.engine) and not (arg.environment or arg.tools))
  # nats a token between sampler and trainer above which the run ends.  In float32 they differ by 1e-6; in bfloat16 by
  # 0.014 on average over 384 tokens of SmolLM2-135M (0.16 at most)
  n.most_drift = 0.05 if is_same else 0.5
  if (arg.environment or arg.tools) and arg.model == "smollm2":
    c.model.template = "chatml"  # its own has no tools
  c.data = common.answers(arg, "prompts")
  c.data.length = 1024  # tokens of a row: a prompt with all its answers
  c.data.packing = False
  c.data.eval_rows = 0  # prompts are asked by eval.task
  c.batch.rows = 4  # prompts an update
  c.eval.every = 0
  c.checkpoint.every = 5  # a step is a batch that was written, which takes longer than saving
  c.optimizer.lr = 5e-5 if arg.adapter != "none" else 1e-6
  c.optimizer.schedule = "constant"
  if arg.environment or arg.tools:
    n.max_new_tokens, c.data.length = 192, 3072  # of all turns, and what is said between them
  if arg.method == "ppo":
    n.passes = 4
  if arg.smoke:
    c.steps, c.batch.rows, n.samples, n.max_new_tokens = 2, 2, 2, 8
  return c


def _policy_gradient(arg, is_same):
  """config.objective of a method of METHODS."""
  o = common.policy_loss(*METHODS[arg.method])
  # correction where the sampler's numbers differ from the trainer's: none, token, sequence, geometric
  o.importance = "none" if is_same else "token"
  o.importance_high = 2.0
  o.importance_low = 0.0
  o.importance_outside = "truncate"  # truncate or mask
  o.kl_weight = 0.0  # of the KL to the reference
  o.kl_estimator = "k3"  # k2 has the gradient of the reverse KL, k3 of the forward KL
  common.reference(o)
  o.teacher = arg.teacher  # a model whose tokens are learned beside the reward; "" for none
  o.teacher_base = "dense"  # how its matrices are stored
  o.teacher_weight = 1.0  # of the reverse KL to it, taken off each token's advantage
  o.sft_weight = 0.0  # of the likelihood of the data's own answers (online.gold_rows)
  return o
