"""Every field that a run's config may hold: its meaning with its unit, what it may be, and which methods read it.

A default is what the config file says.  `check` holds a config to this table before anything is read or written; what
sections ask of each other is in `build.checks`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from posttrain_jax.settings import names
from posttrain_jax.settings.domains import (
  LARGEST_WHOLE,
  Anything,
  Choice,
  Domain,
  Either,
  Expression,
  Flag,
  Number,
  Several,
  Table,
  Text,
)
from posttrain_jax.settings.errors import ConfigError

Config = Mapping[str, Any]
MOST_ROWS = 2**20  # of a batch; more would be a slip of the hand that ends in memory
MOST_TOKENS = 2**24  # in a row
HIGHEST_RANK = 2**14
MOST_EPOCHS = 2**16

_whole = lambda low, high=LARGEST_WHOLE, also=(): Number(low, high, whole=True, also=also)
_POSITIVE, _NOT_NEGATIVE = Number(0, above=True), Number(0)
_DECAY = Number(0, 1, below=True)  # of a moving average
_SHARE = Number(0, 1)
_STORAGES = Choice(("dense", "nf4", "fp4", "int8"))
_NAMES = Several(Text("a name"))
_OF_ENGINE = ("online.engine", bool, "an address")
_OF_TURNS = ("online.environment or online.tools", bool, "the name of one")
_COLUMNS = Table(Text("a name"), Several(Text("a column's name")))


@dataclasses.dataclass(frozen=True)
class Field:
  """`meaning` is understood beside the name alone: "tokens in a row; no example may be longer"."""

  meaning: str
  domain: Domain
  # (another field or several with " or " between, whether a value of it has this one read, how that is said): read
  # then alone
  when: tuple[str, Callable[[Any], bool], str] | None = None


LOSSES_OF_PAIRS = (
  *("dpo", "dpo_norm", "robust", "ipo", "hinge", "exo", "discopop", "nca", "bco", "apo_zero"),
  *("apo_down", "sppo", "cpo", "simpo", "orpo", "tpo", "tpo_norm", "aot", "aot_unpaired"),
  *("sft", "sft_with_prompt", "gold", "kto", "reward"),
)
ADAPTERS = (
  *("none", "lora", "dora", "pissa", "olora", "loftq", "longlora", "vera", "adalora", "ia3"),
  *("prompt", "prefix"),
)
_FOLLOWS = ("objective.sync_every", lambda every: every > 0, "above 0")
_REPLAYS = ("data.replay", bool, "a source")
# a run that writes answers
_ANSWERS = ("eval.task or eval.metric or eval.samples", bool, "set")
# a run that measures something before it trains
_BEFORE = ("eval.task or eval.metric or eval.samples or eval.suite", bool, "set")
_GRADES = ("eval.task or eval.metric", bool, "set")
_HAS_EARLIER = ("model.adapter", bool, "a folder")
_CORRECTS = ("objective.importance", lambda level: level != "none", "token, sequence or geometric")
_ELSEWHERE = ("objective.reference", lambda name: name != "base", "an adapter or another model")
_TAUGHT = ("objective.teacher", bool, "a model")

_REWARD: Mapping[str, Field] = {
  "reward.parts": Field(
    "verifiers whose scores are added: built in, a function of yours as FILE.py:name, or a reward model's folder",
    _NAMES,
  ),
  "reward.weights": Field("one for each of the parts; (): 1 each", Several(Number())),
  "reward.gates": Field(
    "verifiers within 0 and 1 that multiply the sum of the parts, and never raise it", _NAMES
  ),
  "reward.options": Field(
    "part or gate -> its options",
    Table(Text("a name"), Table(Text("an option's name"), Anything())),
  ),
  "reward.ranges": Field(
    "part or gate -> (lowest, highest) score; one beyond is missing",
    Table(Text("a name"), Several(Number())),
  ),
  "reward.untested": Field(
    "verifiers that do not ask whether an answer is right, so that rows do not try them at the start and they are no"
    " part of the outcome",
    _NAMES,
  ),
  "reward.seconds": Field(
    "deadline of a call in a worker process; None: 10, of python 120",
    Number(0, above=True, also=(None,)),
  ),
  "reward.retries": Field("how often a missing score is asked for again", _whole(0, 999)),
  "reward.unsafe_code": Field(
    "run programs that the model wrote where nothing isolates them", Flag()
  ),
}

FIELDS: Mapping[str, Field] = {
  "seed": Field("seed of data order, initialisation and dropout", _whole(0)),
  "steps": Field("optimizer updates; None: epochs says how many", _whole(1, also=(None,))),
  "epochs": Field(
    "passes over the training rows, parts of one too, in place of steps; None: steps says how many",
    Number(0, MOST_EPOCHS, above=True, also=(None,)),
  ),
  "log_every": Field("steps from one line of metrics.jsonl to the next", _whole(1)),
  "max_skipped": Field(
    "updates in a row with a gradient that is not finite before the run gives up", _whole(1)
  ),
  # --- model
  "model.name": Field("smollm2 (built in), a Hugging Face folder or a hub name", Text("a name")),
  "model.adapter": Field(
    "an adapter's or a run's folder to start from; '': a fresh adapter on the base alone",
    Text("a folder", empty=True),
  ),
  "model.adapter_use": Field(
    "trained: that adapter goes on being trained, and is DPO's reference as it came; frozen: under a fresh one",
    Choice(("trained", "frozen")),
    _HAS_EARLIER,
  ),
  "model.base": Field("how frozen matrices are stored", _STORAGES),
  "model.dtype": Field(
    "number format of products; auto: bfloat16 on accelerators and on CPUs that multiply in it, float32 on others",
    Choice(("auto", "float32", "bfloat16", "float16")),
  ),
  "model.template": Field(
    "chat template: the tokenizer's own, chatml, llama3, llama2, mistral, vicuna, gemma, or a .jinja file",
    Text("a name"),
  ),
  "model.remat": Field(
    "what the backward pass recomputes; host: as full, with the layers' inputs in host memory",
    Choice(("auto", "none", "names", "dots", "full", "host")),
  ),
  "model.offload": Field(
    "what of a frozen base lives in host memory: its layers, fetched one at a time",
    Choice(("none", "layers")),
  ),
  "model.attention": Field(
    "what computes attention: xla, a TPU's splash, which auto takes where it fits the run, or a GPU's cudnn",
    Choice(("auto", "xla", "splash", "cudnn")),
  ),
  "model.router_aux_loss_coef": Field(
    "of a mixture of experts: weight of the loss that spreads tokens over them evenly; 0 for none",
    _NOT_NEGATIVE,
  ),
  # --- batch, mesh, evaluation, checkpoints
  "batch.rows": Field("rows in an optimizer batch, over all devices", _whole(1, MOST_ROWS)),
  "batch.accumulate": Field(
    "micro-batches that an optimizer batch is cut into", _whole(1, MOST_ROWS)
  ),
  "mesh.data": Field("devices along data; -1: all that are left", _whole(1, also=(-1,))),
  "mesh.fsdp": Field("devices along fsdp; -1: all that are left", _whole(1, also=(-1,))),
  "mesh.expert": Field(
    "devices that share the experts of a mixture, and each have rows of their own; -1: all that are left",
    _whole(1, also=(-1,)),
  ),
  "mesh.context": Field(
    "devices that share each row, a part of its tokens each; -1: all that are left",
    _whole(1, also=(-1,)),
  ),
  "mesh.tensor": Field("devices along tensor; -1: all that are left", _whole(1, also=(-1,))),
  "eval.every": Field("steps from one evaluation to the next; 0: after the last alone", _whole(0)),
  "eval.best": Field(
    "held-out metric whose best step is exported, like loss; '': the last step is, or with stop_after that of the"
    " lowest loss",
    Text("a metric's name", empty=True),
  ),
  "eval.stop_after": Field(
    "evaluations without an improvement of eval.best after which the run ends; 0: never", _whole(0)
  ),
  "eval.rows": Field("rows in an evaluation batch", _whole(1, MOST_ROWS)),
  "eval.samples": Field(
    "held-out prompts that are answered before and after training, for the report to show; 0 for none",
    _whole(0),
  ),
  "eval.metric": Field(
    "what grades answers to held-out prompts, before and after training: exact, contained, json, number, or a function"
    " of yours as FILE.py:name; several with commas between; '' for none",
    Text("exact, contained, json, number or FILE.py:name", empty=True),
  ),
  "eval.task": Field(
    "what is asked instead of held-out prompts: the built-in task sql, or rows of your own, named as data.eval, that"
    " eval.metric grades",
    Text("sql or a source of rows", empty=True),
  ),
  "eval.task_limit": Field("questions that are graded, drawn; 0 for all", _whole(0), _GRADES),
  "eval.max_new_tokens": Field(
    "tokens of an answer at most; 0: as many as the longest expected answer takes, and a quarter more",
    _whole(0, MOST_TOKENS),
    _ANSWERS,
  ),
  "eval.before": Field(
    "write answers, and measure the suite, before training too", Flag(), _BEFORE
  ),
  "eval.suite": Field(
    "what else is measured before and after training, so that the report says what was forgotten: core, a folder with"
    " suite.json, or FORM:FILE, several with commas between; '' for none",
    Text("core, a folder, or FORM:FILE", empty=True),
  ),
  "eval.suite_limit": Field(
    "rows of each part of the suite, drawn; 0 for all", _whole(0), ("eval.suite", bool, "set")
  ),
  "checkpoint.every": Field(
    "steps from one checkpoint to the next; 0: the last alone, which is always kept", _whole(0)
  ),
  "checkpoint.keep": Field("newest checkpoints that are kept", _whole(1)),
  # --- trackers, beside metrics.jsonl and TensorBoard
  "log.wandb": Field(
    "project of Weights & Biases that gets the metrics too; '': none",
    Text("a project's name", empty=True),
  ),
  "log.mlflow": Field(
    "experiment of MLflow that gets the metrics too; '': none",
    Text("an experiment's name", empty=True),
  ),
  "log.trackio": Field(
    "project of trackio that gets the metrics too; '': none", Text("a project's name", empty=True)
  ),
  # --- data
  "data.train": Field(
    "a built-in task, a .jsonl .json .csv .tsv .parquet path, a hub name, or a mixture FIRST*0.7+SECOND*0.3",
    Text("a source of rows", empty=True),  # what reads no rows needs none
  ),
  "data.eval": Field(
    "held-out rows, named as data.train; '': the task's own evaluation split, or eval_rows rows of train",
    Text("a source of rows", empty=True),
  ),
  "data.eval_rows": Field(
    "rows held out of train; 0 for none; None: a tenth of them, at most 64", _whole(0, also=(None,))
  ),
  "data.columns": Field("this schema's name -> the file's column, or columns", _COLUMNS),
  "data.chat": Field(
    "prompt and completion strings become a user's and an assistant's turn", Flag()
  ),
  "data.system": Field(
    "system message put before prompts",
    Text(empty=True, optional=True),
    ("data.chat", bool, "true"),
  ),
  "data.length": Field("tokens in a row; no example may be longer", _whole(2, MOST_TOKENS)),
  "data.truncate": Field(
    "what becomes of longer examples: texts keep_start or split, answers prompt",
    Choice(("error", "drop", "keep_start", "split", "prompt")),
  ),
  "data.train_on": Field(
    "what is trained of a conversation: assistant (each of its messages), last (the last)",
    Choice(("assistant", "last")),
  ),
  "data.on_error": Field(
    "a row that cannot be used: raise, or skip (counted)", Choice(("raise", "skip"))
  ),
  "data.packing": Field("several examples in a row", Flag()),
  "data.share_prompt": Field(
    "a prompt's answers share its tokens, which are computed once", Flag()
  ),
  "data.kind": Field(
    "what a row is",
    Choice(("text", "pairs", "triples", "labels", "outcomes", "steps", "scored", "prompts")),
  ),
  "data.limit": Field("rows used; 0 for all", _whole(0)),
  "data.replay": Field(
    "general data mixed in against forgetting, named as data.train",
    Text("a source of rows", empty=True),
  ),
  "data.replay_columns": Field("data.columns of the replayed data", _COLUMNS, _REPLAYS),
  "data.replay_fraction": Field(
    "share of replayed data in the batch", Number(0, 1, above=True, below=True), _REPLAYS
  ),
  "data.replay_by": Field(
    "what replay_fraction is a share of", Choice(("tokens", "examples")), _REPLAYS
  ),
  # --- reward
  **_REWARD,
  **{
    f"holdout_{name}": Field(
      f"as {name}, of a second score, which is logged beside the reward and never trained on",
      field.domain,
    )
    for name, field in _REWARD.items()
  },
  # --- answers that the model writes itself
  "online.samples": Field(
    "answers to a prompt; a method that compares them needs two, PPO and a teacher one",
    _whole(1, MOST_ROWS),
  ),
  "online.max_new_tokens": Field("tokens of an answer at most", _whole(1, MOST_TOKENS)),
  "online.temperature": Field(
    "of the softmax that answers are drawn from, and that the loss is of", Number(1e-3, 1e3)
  ),
  "online.top_k": Field(
    "most likely tokens that one is drawn among, and that the loss is of; 0 for all",
    _whole(2, MOST_TOKENS, also=(0,)),
  ),
  "online.top_p": Field(
    "a token is drawn among the likeliest that hold this share of the mass, and so is the loss; 1 for all",
    Number(0, 1, above=True),
  ),
  "online.min_p": Field(
    "a token is drawn among those at least this part as likely as the likeliest; 0 for all; so is the loss",
    Number(0, 1, below=True),
  ),
  "online.minibatches": Field(
    "updates that a written batch is cut into; it has batch.rows prompts for each",
    _whole(1, MOST_ROWS),
  ),
  "online.passes": Field("times that a written batch is used", _whole(1, MOST_ROWS)),
  "online.rows": Field(
    "answers that are under way at once, in all processes together", _whole(1, MOST_ROWS)
  ),
  "online.storage": Field(
    "how weights are kept while answers are written: as the model has them, or in fewer bits, which are faster",
    Choice(("auto", "bfloat16", "int8")),
  ),
  "online.dynamic": Field(
    "groups whose answers have one outcome are replaced by others (DAPO's dynamic sampling)", Flag()
  ),
  "online.most_rounds": Field(
    "times that prompts are asked for one batch; then it is filled up with groups that agree",
    _whole(1, MOST_ROWS),
    ("online.dynamic", bool, "true"),
  ),
  "online.curriculum": Field(
    "how prompts are chosen: none, each once an epoch; pass_rate, the more often the likelier it is that their answers"
    " differ, by how many of the last ones were right (and by the column pass_rate, where rows have it)",
    Choice(("none", "pass_rate")),
  ),
  "online.outcome": Field(
    "part of the reward that says which answers are right and which groups agree; '': the total without parts that do"
    " not ask for that, as length, tags, is_json, schema, regex and reward.untested; total: the reward itself",
    Text("a part's name or total", empty=True),
  ),
  "online.kl_in_reward": Field(
    "weight of an answer's KL to the reference, taken off its reward before the advantage",
    _NOT_NEGATIVE,
  ),
  "online.kl_in_reward_estimator": Field(
    "of that KL, summed over the answer's tokens",
    Choice(
      ("k1", "k3"),
      {
        "k2": "k2 is of the KL's gradient in a loss (objective.kl_estimator); as a value it is biased, and in a reward"
        " its value is what counts"
      },
    ),
    ("online.kl_in_reward", bool, "above 0"),
  ),
  "online.gold_rows": Field(
    "rows of an update that are the data's own answers and not the policy's, to be imitated or distilled",
    _whole(0, MOST_ROWS),
  ),
  "online.kl_target": Field(
    "nats an answer that this weight is moved towards, up where the KL is above; None: it stays",
    Number(0, above=True, also=(None,)),
    ("online.kl_in_reward", bool, "above 0"),
  ),
  "online.kl_horizon": Field(
    "answers over which an error of a fifth or more changes the weight by a fifth, the most for a batch",
    _POSITIVE,
    ("online.kl_target", lambda target: target is not None, "a number"),
  ),
  "online.cut_penalty": Field(
    "taken off the reward of an answer that max_new_tokens cut, before the advantage", _NOT_NEGATIVE
  ),
  "online.mask_cut": Field("answers that max_new_tokens cut teach nothing", Flag()),
  "online.environment": Field(
    "what answers of several turns are written in: sql, python, or FILE.py:Class with reset() and step(), or with"
    " methods that are tools; '': none",
    Text("a name or FILE.py:Class", empty=True),
  ),
  "online.tools": Field(
    "functions that the model may call in its turns: python, or FILE.py:function with type hints and a docstring",
    _NAMES,
  ),
  "online.max_turns": Field("turns of an answer at most", _whole(1, 4096), _OF_TURNS),
  "online.tool_tokens": Field(
    "tokens of what a tool or an environment says at once; beyond, it is cut",
    _whole(1, MOST_TOKENS),
    _OF_TURNS,
  ),
  "online.tool_seconds": Field(
    "seconds that one answer of a tool or an environment may take", _POSITIVE, _OF_TURNS
  ),
  "online.unparsed": Field(
    "score of an answer with a turn whose call cannot be read, instead of the reward's",
    Number(),
    _OF_TURNS,
  ),
  "online.engine": Field(
    "address of a server that writes the answers, as far as /v1 (vLLM, SGLang, posttrain serve); '': this program does",
    Text("http://HOST:PORT/v1", empty=True),
  ),
  "online.engine_wire": Field(
    "how the server is asked: openai, as vLLM and posttrain serve, or sglang, by SGLang's own route",
    Choice(("openai", "sglang")),
    _OF_ENGINE,
  ),
  "online.engine_folder": Field(
    "folder that the server reads adapters from; '': engine/ in the run's folder",
    Text("a folder", empty=True),
    _OF_ENGINE,
  ),
  "online.engine_key": Field(
    "environment variable that holds the server's key; '': none is sent",
    Text("a variable's name", empty=True),
    _OF_ENGINE,
  ),
  "online.engine_patience": Field(
    "seconds for which the server is asked again where it does not answer; then the run ends, to be run again",
    _POSITIVE,
    _OF_ENGINE,
  ),
  "online.ahead": Field(
    "batches that are written while one is learned from, by weights that are as many batches old",
    _whole(0, 1),
    _OF_ENGINE,
  ),
  "online.most_drift": Field(
    "nats a token by which the sampler's log-probabilities may be off the trainer's on average; above, the run ends",
    _POSITIVE,
  ),
  # --- PPO's critic
  "critic.trunk": Field(
    "what its score head stands on: own, a copy of what trains on the base that the policy has, or shared, the policy's"
    " hidden states",
    Choice(("own", "shared")),
  ),
  "critic.lr": Field("its learning rate at its peak", _NOT_NEGATIVE),
  "critic.weight": Field(
    "of its loss beside the policy's; with a trunk of its own it cancels in most optimizers",
    _POSITIVE,
  ),
  "critic.epsilon": Field(
    "how far a value may move from the one that its batch was made with; None: as it will",
    Number(0, above=True, also=(None,)),
  ),
  "critic.warmup": Field("updates in which it learns alone, before the policy does", _whole(0)),
  "critic.gamma": Field("discount of a reward, for each token that it is off", _SHARE),
  "critic.lam": Field("lambda of GAE, of the policy's advantages", _SHARE),
  "critic.returns_lam": Field(
    "lambda of the returns that the critic learns; None: critic.lam", Number(0, 1, also=(None,))
  ),
  "critic.whiten": Field(
    "advantages are whitened over all tokens of the batch that was written", Flag()
  ),
  # --- optimizer
  "optimizer.name": Field(
    "method; it decides which fields there are",
    Choice(("adamw", "adafactor", "lion", "sgd", "adamw8bit", "adam_mini", "galore", "galore8bit")),
  ),
  "optimizer.lr": Field("learning rate at its peak", _NOT_NEGATIVE),
  "optimizer.warmup": Field("share of steps in which the learning rate rises to its peak", _SHARE),
  "optimizer.schedule": Field(
    "how the learning rate goes on after its peak", Choice(("constant", "linear", "cosine"))
  ),
  "optimizer.weight_decay": Field("weight decay of matrices", _NOT_NEGATIVE),
  "optimizer.clip": Field("largest global gradient norm; 0 for none", _NOT_NEGATIVE),
  "optimizer.b1": Field("decay of the first moment, or of the momentum", _DECAY),
  "optimizer.b2": Field("decay of the second moment", _DECAY),
  "optimizer.eps": Field(
    "beside the root of the second moment; None: the optimizer's own",
    Number(0, above=True, also=(None,)),
  ),
  "optimizer.offload": Field(
    "what lives in host memory; params: and the state", Choice(("none", "state", "params"))
  ),
  "optimizer.embeddings_in_float32": Field(
    "moments of embeddings are kept in float32, in the 8-bit optimizers", Flag()
  ),
  "optimizer.rank": Field("rank of GaLore's subspace", _whole(1, HIGHEST_RANK)),
  "optimizer.update_gap": Field("updates from one subspace to the next", _whole(1)),
  "optimizer.scale": Field("factor of the projected update", _POSITIVE),
  "optimizer.projection": Field(
    "which side of a matrix is projected", Choice(("std", "reverse_std", "right", "left", "full"))
  ),
  "optimizer.target": Field("paths of the matrices that are projected", Expression()),
  "optimizer.loraplus_lr_ratio": Field(
    "LoRA+: learning rate of the factors b over that of a; 0 for one rate", Number(1, also=(0, 0.0))
  ),
  "optimizer.loraplus_lr_embedding": Field(
    "LoRA+: learning rate of adapters on embeddings",
    _NOT_NEGATIVE,
    ("optimizer.loraplus_lr_ratio", bool, "1 or more"),
  ),
  # --- objective
  "objective.name": Field(
    "what is learned, of the rows that it takes",
    Choice(("sft", "preference", "reward", "kto", "grouped", "distil")),
  ),
  "objective.losses": Field(
    "loss -> its weight in the sum; they decide which fields there are",
    Table(Choice(LOSSES_OF_PAIRS), _NOT_NEGATIVE),
  ),
  "objective.beta": Field("weight of the KL to the reference", _POSITIVE),
  "objective.label_smoothing": Field(
    "share of labels held to be wrong", Number(0, 0.5, below=True)
  ),
  "objective.gamma_beta_ratio": Field("target margin over beta", _NOT_NEGATIVE),
  "objective.divergence": Field(
    "of the policy from the reference",
    Choice(("reverse_kl", "forward_kl", "jensen_shannon", "alpha_divergence")),
  ),
  "objective.divergence_alpha": Field(
    "alpha of that divergence; 1 is the reverse KL",
    _NOT_NEGATIVE,
    ("objective.divergence", lambda name: name == "alpha_divergence", "alpha_divergence"),
  ),
  "objective.ld_alpha": Field("weight of tokens past the length that both answers reach", _SHARE),
  "objective.weighting": Field("pairs count by how likely the policy is to write them", Flag()),
  "objective.running_shift": Field("BCO's running mean of rewards", Flag()),
  "objective.reference": Field(
    "the policy compared with: base, an adapter folder on it, or another model", Text("a name")
  ),
  "objective.reference_base": Field(
    "how another model's matrices are stored", _STORAGES, _ELSEWHERE
  ),
  "objective.cache_reference": Field(
    "the reference's log-probabilities are computed once, before training", Flag()
  ),
  "objective.sync_every": Field(
    "updates from one step of the reference towards the policy to the next; 0: it stays", _whole(0)
  ),
  "objective.sync_mix": Field(
    "share of the policy in such a step", Number(0, 1, above=True), _FOLLOWS
  ),
  "objective.desirable_weight": Field("weight of the loss of desirable answers", _NOT_NEGATIVE),
  "objective.undesirable_weight": Field("weight of the loss of undesirable answers", _NOT_NEGATIVE),
  "objective.estimate_kl": Field(
    "the KL is estimated from answers to other prompts; false: APO-zero on labels", Flag()
  ),
  "objective.sft_weight": Field(
    "weight of the likelihood of the better answers, or of the data's own, beside the loss",
    _NOT_NEGATIVE,
  ),
  "objective.centering": Field("weight of the square of a pair's summed rewards", _NOT_NEGATIVE),
  "objective.loss": Field(
    "loss of a token; it decides which fields there are",
    Choice(
      (
        *("reinforce", "ppo", "gspo", "rloo", "cispo", "dppo_tv", "dppo_kl"),
        *("forward_kl", "reverse_kl", "jsd"),
      )
    ),
  ),
  "objective.teacher": Field(
    "the model that is learned from: a name or a folder, a run's or an adapter's too; '' for none",
    Text("a name", empty=True),
  ),
  "objective.teacher_base": Field("how the teacher's matrices are stored", _STORAGES, _TAUGHT),
  "objective.teacher_weight": Field(
    "weight of the reverse KL to the teacher, taken off the advantage of each token",
    _POSITIVE,
    _TAUGHT,
  ),
  "objective.mixture": Field(
    "share of the teacher in the mixture that jsd compares both with (GKD's beta)",
    Number(0, 1, above=True, below=True),
  ),
  "objective.temperature": Field(
    "of the softmax of teacher and student that are compared", Number(1e-3, 1e3)
  ),
  "objective.top_k": Field(
    "most likely tokens of the teacher that are computed once and kept with the data, all others being one; 0: the"
    " teacher stands beside the student, and each step asks for all",
    _whole(0, MOST_TOKENS),
  ),
  "objective.aggregation": Field(
    "how tokens add up",
    Choice(("token_mean", "sequence_mean", "constant_length", "sequence_sum", "prompt_mean")),
  ),
  "objective.advantage": Field(
    "what scores are centred and divided by; gae: PPO's, of a critic",
    Choice(("group", "batch", "none", "leave_one_out", "whitened", "max_rl", "gae")),
  ),
  "objective.importance": Field(
    "correction for a sampler of other numbers: the loss times pi / mu of a token, an answer, or its geometric mean",
    Choice(("none", "token", "sequence", "geometric")),
  ),
  "objective.importance_high": Field("bound on that weight", _POSITIVE, _CORRECTS),
  "objective.importance_low": Field("lower bound on it", _NOT_NEGATIVE, _CORRECTS),
  "objective.importance_outside": Field(
    "what becomes of a weight beyond them: moved there, or 0",
    Choice(("truncate", "mask")),
    _CORRECTS,
  ),
  "objective.epsilon": Field(
    "the ratio is held above 1 - epsilon; of DPPO, the divergence of what falls",
    Number(0, 1, above=True),
  ),
  "objective.epsilon_high": Field(
    "the ratio is held below 1 + epsilon_high; of DPPO, the divergence of what rises", _POSITIVE
  ),
  "objective.dual_clip": Field(
    "the loss of a bad answer is at most this times -A; None: no bound",
    Number(1, above=True, also=(None,)),
  ),
  "objective.ceiling": Field("CISPO's and DPPO's bound on the ratio", _POSITIVE),
  "objective.kl_weight": Field("weight of the KL to the reference", _NOT_NEGATIVE),
  "objective.kl_estimator": Field(
    "of that KL in the loss: k2 has the gradient of the reverse KL, k3 of the forward KL",
    Choice(
      ("k2", "k3"),
      {
        "k1": "k1 in a loss has a gradient that is zero on average; in the reward it is the right one"
        " (online.kl_in_reward_estimator)"
      },
    ),
    ("objective.kl_weight", bool, "above 0"),
  ),
  "objective.old": Field(
    "who wrote the answers: the policy (every ratio is 1 at first) or the reference",
    Choice(("policy", "reference")),
  ),
  # --- adapter, under PEFT's names; of several methods each has a section with its own
  "adapter.method": Field(
    "what trains; it decides which fields there are",
    Text(f"{', '.join(ADAPTERS)}, or several with + between"),
  ),
  "adapter.r": Field("rank", _whole(1, HIGHEST_RANK)),
  "adapter.lora_alpha": Field("the update is scaled by lora_alpha / r", _POSITIVE),
  "adapter.lora_dropout": Field("dropout of the adapter's input, in training", _DECAY),
  "adapter.target_modules": Field(
    "all-linear, a regular expression over names such as layers.3.self_attn.q_proj, or name endings",
    Either(Expression(), _NAMES),
  ),
  "adapter.exclude_modules": Field(
    "modules that are left out, named as target_modules", Either(Expression(empty=True), _NAMES)
  ),
  "adapter.layers_to_transform": Field(
    "layers that are adapted; (): every layer", Several(_whole(0))
  ),
  "adapter.rank_pattern": Field(
    "name ending or expression -> rank", Table(Expression(), _whole(1, HIGHEST_RANK))
  ),
  "adapter.alpha_pattern": Field(
    "name ending or expression -> lora_alpha", Table(Expression(), _POSITIVE)
  ),
  "adapter.depth_ranks": Field(
    "ranks of the first and the last layer, linear between; (): r everywhere",
    Several(_whole(1, HIGHEST_RANK)),
  ),
  "adapter.use_rslora": Field("scale by lora_alpha / sqrt(r)", Flag()),
  "adapter.init_lora_weights": Field(
    "how a and b start: uniform, gaussian, zero_a, pissa, pissa_niter_16, olora, loftq",
    Either(Text("a name"), Flag()),
  ),
  "adapter.use_dora": Field(
    "DoRA: the adapter gives the direction, beside a trained magnitude of each output", Flag()
  ),
  "adapter.loftq_iter": Field("LoftQ's rounds of quantisation and SVD", _whole(1, 1000)),
  "adapter.modules_to_save": Field("name endings of what trains whole beside it", _NAMES),
  "adapter.attention_group": Field(
    "tokens of a group of the shifted attention in training; 0: full attention",
    _whole(0, MOST_TOKENS),
  ),
  "adapter.context_length": Field(
    "tokens of a context that positions are interpolated to; 0: the model's own", _whole(0, 2**28)
  ),
  "adapter.d_initial": Field("start of the trained scale between the frozen projections", Number()),
  "adapter.projection_prng_key": Field("seed of the frozen projections", _whole(0)),
  "adapter.init_r": Field("rank at the start", _whole(1, HIGHEST_RANK)),
  "adapter.target_r": Field("average rank at the end", _whole(1, HIGHEST_RANK)),
  "adapter.tinit": Field("steps before pruning", _whole(0)),
  "adapter.tfinal": Field("steps after pruning", _whole(0)),
  "adapter.deltaT": Field("steps from one pruning to the next", _whole(1)),
  "adapter.beta1": Field("decay of the moving average of importance", _DECAY),
  "adapter.beta2": Field("decay of the moving average of its uncertainty", _DECAY),
  "adapter.orth_reg_weight": Field(
    "weight of the factors' orthogonality in the loss", _NOT_NEGATIVE
  ),
  "adapter.total_step": Field("steps of the schedule; None: the run's", _whole(1, also=(None,))),
  "adapter.feedforward_modules": Field(
    "modules that are scaled at their input, named as target_modules",
    Either(Expression(empty=True), _NAMES),
  ),
  "adapter.num_virtual_tokens": Field("tokens of a soft prompt or prefix", _whole(1, 2**16)),
  "adapter.prompt_tuning_init": Field(
    "how the soft prompt starts", Choice(("RANDOM", "SAMPLE_VOCAB", "TEXT"))
  ),
  "adapter.prompt_tuning_init_text": Field(
    "text that it starts as, with TEXT", Text(empty=True, optional=True)
  ),
}

# --- what a method reads ---------------------------------------------------------------------------------------------

_MOMENTS = ("b1", "b2", "eps")
_PROJECTED = ("rank", "update_gap", "scale", "projection", "target")
EVERY_OPTIMIZER = (
  *("name", "lr", "warmup", "schedule", "weight_decay", "clip", "offload"),
  *("loraplus_lr_ratio", "loraplus_lr_embedding"),
)
OPTIMIZERS: Mapping[str, tuple[str, ...]] = {  # beside those
  "adamw": _MOMENTS,
  "adafactor": (),
  "lion": ("b1", "b2"),
  "sgd": ("b1",),
  "adamw8bit": (*_MOMENTS, "embeddings_in_float32"),
  "adam_mini": _MOMENTS,
  "galore": (*_MOMENTS, *_PROJECTED),
  "galore8bit": (*_MOMENTS, *_PROJECTED, "embeddings_in_float32"),
}
_REFERENCE = ("reference", "reference_base", "cache_reference")
_COMPARED = ("beta", *_REFERENCE, "sync_every", "sync_mix")
_OF_PAIRS = ("ld_alpha", "weighting")
_DIVERGENCE = ("divergence", "divergence_alpha")
_DIFFERENCE = (*_COMPARED, *_OF_PAIRS, *_DIVERGENCE)
PAIRED: Mapping[str, tuple[str, ...]] = {  # of objective.losses
  "dpo": (*_DIFFERENCE, "label_smoothing"),
  "dpo_norm": (*_DIFFERENCE, "label_smoothing"),
  "robust": (*_DIFFERENCE, "label_smoothing"),
  "ipo": _DIFFERENCE,
  "hinge": _DIFFERENCE,
  "exo": (*_DIFFERENCE, "label_smoothing"),
  "discopop": _DIFFERENCE,
  "nca": (*_COMPARED, *_OF_PAIRS),
  "bco": (*_COMPARED, *_OF_PAIRS, "running_shift"),
  "apo_zero": (*_COMPARED, *_OF_PAIRS),
  "apo_down": (*_COMPARED, *_OF_PAIRS),
  "sppo": (*_COMPARED, *_OF_PAIRS),
  "aot": (*_COMPARED, *_OF_PAIRS, "label_smoothing"),
  "aot_unpaired": (*_COMPARED, *_OF_PAIRS, "label_smoothing"),
  "cpo": ("beta", *_OF_PAIRS, "label_smoothing"),
  "simpo": ("beta", *_OF_PAIRS, "gamma_beta_ratio"),
  "orpo": ("beta", *_OF_PAIRS),
  "tpo": ("beta", *_OF_PAIRS, "gamma_beta_ratio"),
  "tpo_norm": ("beta", *_OF_PAIRS, "gamma_beta_ratio"),
  "sft": (),
  "sft_with_prompt": (),
  "gold": (),
  "kto": _COMPARED,
  "reward": (),
}
BESIDE = (
  "sft",
  "sft_with_prompt",
  "gold",
  "kto",
  "reward",
)  # which leave a divergence to the others
_IMPORTANCE = ("importance", "importance_high", "importance_low", "importance_outside")
_KL = ("kl_weight", "kl_estimator")
GROUPED: Mapping[str, tuple[str, ...]] = {  # of objective.loss
  "ppo": ("aggregation", "epsilon", "epsilon_high", "dual_clip", "old"),
  "gspo": ("aggregation", "epsilon", "epsilon_high", "old"),
  "rloo": ("epsilon", "epsilon_high", "old"),
  "cispo": ("aggregation", "ceiling", "old"),
  "dppo_tv": ("aggregation", "epsilon", "epsilon_high", "ceiling", "old"),
  "dppo_kl": ("aggregation", "epsilon", "epsilon_high", "ceiling", "old"),
  "reinforce": ("aggregation",),
}

_TEACHER = ("teacher", "teacher_base", "teacher_weight")
_DISTILLED = ("loss", "teacher", "teacher_base", "temperature", "top_k", "sft_weight")
DISTILLED: Mapping[str, tuple[str, ...]] = {  # of objective.loss
  "forward_kl": _DISTILLED,
  "reverse_kl": _DISTILLED,
  "jsd": (*_DISTILLED, "mixture"),
}


def read_by_objective(objective: Config, kind: str) -> tuple[str, ...]:
  """The fields of config.objective that its method reads, of rows of that kind."""
  name = objective["name"]
  if name == "preference":
    losses = [loss for loss in objective.get("losses", {}) if loss in PAIRED]
    fields = dict.fromkeys(field for loss in losses for field in PAIRED[loss])
    if any("divergence" not in PAIRED[loss] for loss in losses if loss not in BESIDE):
      fields = {field: None for field in fields if field not in _DIVERGENCE}
    return ("name", "losses", *fields)
  if name == "grouped":
    of_loss = GROUPED.get(objective.get("loss", ""), ())
    if kind == "prompts":  # answers that the policy writes
      own = (*(field for field in of_loss if field != "old"), *_IMPORTANCE)
      return ("name", "loss", "advantage", *own, *_KL, *_REFERENCE, *_TEACHER, "sft_weight")
    return ("name", "loss", "advantage", *of_loss, *_KL, "sft_weight", *_REFERENCE)
  if name == "kto":
    weights = ("desirable_weight", "undesirable_weight")
    return ("name", *weights, "estimate_kl", "sft_weight", *_COMPARED)
  if name == "distil":
    return ("name", *DISTILLED.get(objective.get("loss", ""), ()))
  if name == "reward":
    return ("name", *(("centering",) if kind == "pairs" else ()), "sft_weight")
  return ("name",)


def read_by_optimizer(optimizer: Config) -> tuple[str, ...]:
  """The fields of config.optimizer that its method reads."""
  return (*EVERY_OPTIMIZER, *OPTIMIZERS.get(optimizer["name"], ()))


def readers(field: str) -> list[str]:
  """The methods that read a field which not all of its section do."""
  section, _, name = field.partition(".")
  methods = {"optimizer": OPTIMIZERS, "objective": {**PAIRED, **GROUPED, **DISTILLED}}.get(
    section, {}
  )
  found = [method for method, fields in methods.items() if name in fields]
  return found or {"centering": ["reward models of pairs"]}.get(name, [])


# --- checks ----------------------------------------------------------------------------------------------------------


def check(config: Config, given: Sequence[str] = ()) -> None:
  """Holds a config to the table: values in their domains, no field that nothing reads.

  Args:
    given: fields that were written by hand, which must be read under the config as it is.

  Raises:
    ConfigError: the first that does not hold.
  """
  check_values(config, given)
  check_read(config)
  for name in given:
    _check_given(config, name)


def check_values(config: Config, given: Sequence[str] = ()) -> None:
  """Raises ConfigError for the first value outside its field's domain; what the table does not know is left alone.

  A word that is refused for what it would do is left alone, too, where nobody wrote it by hand and nothing reads it: so
  was it in the config of an earlier run, which goes on.
  """
  values = dict(items(config))
  for name, value in values.items():
    field = FIELDS.get(known_as(name))
    if field is None or (name not in given and _does_nothing(field, value, values)):
      continue
    if wrong := field.domain.wrong(value):
      shown = repr(value) if len(repr(value)) < 200 else f"{repr(value)[:200]}..."
      raise ConfigError(f"{name}={shown}: {wrong}")
  if "steps" in config and config["steps"] is None and config.get("epochs") is None:
    raise ConfigError("steps=None: nothing says how long the run is; write steps, or epochs")


def _does_nothing(field: Field, value: Any, values: Mapping[str, Any]) -> bool:
  """Whether a word is refused for what it would do, and another field leaves this one unread."""
  is_refused = isinstance(field.domain, Choice) and value in [*field.domain.refused]
  return is_refused and bool(_unread_where(field, values))


def _unread_where(field: Field, values: Mapping[str, Any]) -> list[str]:
  """The fields because of whose values this one is not read; [] where it is."""
  if field.when is None:
    return []
  others = [other for other in field.when[0].split(" or ") if other in values]
  return [] if any(field.when[1](values[other]) for other in others) else others


def check_read(config: Config) -> None:
  """Raises ConfigError for the first field that the config's methods do not read, or that is missing."""
  present = [name for name, _ in items(config)]
  for name in present:
    if sentence := unread(config, name):
      raise ConfigError(sentence)
  for section, fields in _read(config).items():
    for field in fields:
      if f"{section}.{field}" not in present:
        raise ConfigError(
          f"the config has no {section}.{field}, which {_method(config, section)} reads; let the config file make the"
          f" section of that method, like --config=FILE:{_ARGUMENTS[section]}"
        )


def unread(config: Config, name: str) -> str:
  """Why nothing reads a field, in a sentence; "" where something does."""
  section, _, field = name.partition(".")
  if known_as(name) not in FIELDS:
    meant = names.SAME.get(name) or " or ".join(names.near(name, FIELDS))
    hint = f"; did you mean {meant}?" if meant else ""
    return f"{name}: nothing reads such a field{hint}"
  read = _read(config).get(section)
  if read is None or field in read:
    return ""
  by = readers(name)
  others = f" ({', '.join(by)} {'does' if len(by) == 1 else 'do'})" if by else ""
  return f"{name}: {_method(config, section)} does not read it{others}; of config.{section} it reads {', '.join(read)}"


def _check_given(config: Config, name: str) -> None:
  """Raises ConfigError for a field written by hand that another field has left unread."""
  values = dict(items(config))
  field = FIELDS.get(known_as(name))
  if field is not None and field.when is not None and (others := _unread_where(field, values)):
    are = " and ".join(f"{other} is {values[other]!r}" for other in others)
    cure = "write one of them" if len(others) > 1 else f"make that {field.when[2]}"
    raise ConfigError(f"{name} is not read where {are}: {cure}, or leave {name} out")
  objective = config.get("objective", {})
  compares = objective.get("kl_weight") or objective.get("old") == "reference"
  compares = compares or config.get("online", {}).get("kl_in_reward")
  if objective.get("name") == "grouped" and _is_of_reference(name) and not compares:
    other = (
      "online.kl_in_reward is, too" if "online" in config else "objective.old is not reference"
    )
    raise ConfigError(
      f"{name} is not read where objective.kl_weight is 0 and {other}: no reference is"
    )


def _is_of_reference(name: str) -> bool:
  return name in [f"objective.{field}" for field in _REFERENCE]


def known_as(name: str) -> str:
  """The name under which the table knows a field: adapter.prompt.x of several methods is adapter.x."""
  parts = name.split(".")
  return f"adapter.{parts[-1]}" if parts[0] == "adapter" and len(parts) == 3 else name


def items(config: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """(dotted name, value) of every field; what the table knows as a dict is one value."""
  for key, value in config.items():
    name = f"{prefix}{key}"
    if isinstance(value, Mapping) and known_as(name) not in FIELDS:
      yield from items(value, f"{name}.")
    else:
      yield name, value


_ARGUMENTS = {"optimizer": "optimizer=NAME", "objective": "loss=NAME (or method=, kind=)"}


def _read(config: Config) -> dict[str, tuple[str, ...]]:
  """{section: the fields of it that are read} of the sections whose method decides that."""
  kind = config.get("data", {}).get("kind", "text")
  read = {}
  if "name" in config.get("objective", {}):
    read["objective"] = read_by_objective(config["objective"], kind)
  if "name" in config.get("optimizer", {}):
    read["optimizer"] = read_by_optimizer(config["optimizer"])
  return read


def _method(config: Config, section: str) -> str:
  named = config[section]
  if section == "objective" and "losses" in named:
    return f"the loss {'+'.join(named['losses'])!r}"
  if section == "objective" and "loss" in named:
    return f"the loss {named['loss']!r}"
  return f"{section}.name={named['name']!r}"
