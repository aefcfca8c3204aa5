"""What config files share: their argument string, and the parts that every run has.  Plain data.

What each field means and may hold is in `posttrain_jax.settings.fields`.
"""

import difflib
import os

import ml_collections
from ml_collections import config_dict

# what `adapter=` may be; "none" is full fine-tuning
ADAPTERS = (
  "none",
  "lora",
  "dora",
  "pissa",
  "olora",
  "loftq",
  "longlora",
  "vera",
  "adalora",
  "ia3",
  "prompt",
  "prefix",
)
BASES = ("dense", "nf4", "fp4", "int8")
OPTIMIZERS = (
  "adamw",
  "adafactor",
  "lion",
  "sgd",
  "adamw8bit",  # moments in 8 bits
  "adam_mini",
  "galore",
  "galore8bit",
)


def parse(arg, **defaults):
  """The arguments after the colon of `--config=FILE:name=value,name=value` as a ConfigDict.

  A value takes the type of its default; a bare name means True.  An unknown name is an error that lists the known.
  Every config takes `optimizer`.
  """
  defaults = {"optimizer": "adamw", **defaults}
  args = ml_collections.ConfigDict(defaults)
  for part in filter(None, (arg or "").split(",")):
    name, given, value = part.partition("=")
    if name not in defaults:
      near = difflib.get_close_matches(name, defaults, n=1)
      hint = f"; did you mean {near[0]!r}?" if near else ""
      raise ValueError(f"unknown config argument {name!r}: known are {', '.join(defaults)}{hint}")
    args[name] = _typed(name, value if given else "true", defaults[name])
  return args


def _typed(name, text, default):
  if isinstance(default, bool):
    if text.lower() not in ("true", "false", "1", "0"):
      raise ValueError(f"config argument {name}={text!r}: write true or false")
    return text.lower() in ("true", "1")
  try:
    return type(default)(text)
  except ValueError:
    raise ValueError(
      f"config argument {name}={text!r}: expected a {type(default).__name__}"
    ) from None


def chosen(name, value, known):
  if value not in known:
    raise ValueError(f"config argument {name}={value[:80]!r}: known are {', '.join(known)}")
  return value


def adapter(method):
  """The options of an adapter method, under PEFT's names: a method has those that it reads and no other.

  Several methods that train together, "prompt+lora", have a section each: adapter.prompt, adapter.lora.
  """
  a = ml_collections.ConfigDict()
  names = method.split("+")
  if len(names) == 1:
    return _options(a, method)
  a.method = method
  for name in names:
    if names.count(name) > 1 or name == "none":
      raise ValueError(f"config argument adapter={method!r}: write two methods, each once")
    a[name] = _options(ml_collections.ConfigDict(), name)
    del a[name].method
  return a


def _options(a, method):
  a.method = chosen("adapter", method, ADAPTERS)
  if method == "none":
    return a
  a.modules_to_save = ()  # name endings of what trains whole beside it
  if method in ("prompt", "prefix"):
    a.num_virtual_tokens = 20
    if method == "prompt":
      a.prompt_tuning_init = "RANDOM"  # RANDOM, SAMPLE_VOCAB, TEXT
      a.prompt_tuning_init_text = ""  # with TEXT
    return a
  # "all-linear", a regular expression over names such as layers.3.self_attn.q_proj, or name endings
  a.target_modules = ("k_proj", "v_proj", "down_proj") if method == "ia3" else "all-linear"
  a.exclude_modules = ""
  a.layers_to_transform = ()  # (): every layer
  if method == "ia3":
    a.feedforward_modules = ("down_proj",)  # scaled at their input
    return a
  a.lora_dropout = 0.0
  if method == "vera":
    a.r = 256
    a.d_initial = 0.1  # start of the trained scale between the frozen projections
    a.projection_prng_key = 0  # seed of the frozen projections
    return a
  # the update is scaled by lora_alpha / r; LoftQ's start makes up for what quantising lost at a scale of 1
  a.lora_alpha = 16.0 if method == "loftq" else 32.0
  if method == "adalora":
    a.init_r = 24  # rank at the start
    a.target_r = 16  # average rank at the end
    a.tinit = 0  # steps before pruning
    a.tfinal = 0  # steps after it
    a.deltaT = 1  # steps from one pruning to the next
    a.beta1 = 0.85  # of the moving average of importance
    a.beta2 = 0.85  # of that of its uncertainty
    a.orth_reg_weight = 0.5
    return a
  a.r = 16
  a.depth_ranks = ()  # of the first and the last layer, linear between: (4, 64); (): r everywhere
  a.rank_pattern = ml_collections.ConfigDict()
  a.alpha_pattern = ml_collections.ConfigDict()
  a.use_rslora = False
  # how a and b start: uniform, gaussian, zero_a, pissa, pissa_niter_16, olora, loftq
  a.init_lora_weights = method if method in ("pissa", "olora", "loftq") else "uniform"
  a.use_dora = method == "dora"
  a.loftq_iter = 1  # rounds of quantisation and SVD
  if method == "longlora":
    a.modules_to_save = ("embed_tokens", "norm", "layernorm")
    # tokens of a group of the shifted attention in training; 0: full attention
    a.attention_group = 64
    # tokens of a context that positions are interpolated to; 0: the model's own
    a.context_length = 0
  return a


def optimizer(name):
  """The options of an optimizer: it has those that it reads and no other."""
  o = ml_collections.ConfigDict()
  o.name = chosen("optimizer", name, OPTIMIZERS)
  o.lr = 2e-4  # peak
  o.warmup = 0.05  # share of steps
  o.schedule = "cosine"  # constant, linear, cosine
  o.weight_decay = 0.0  # on matrices
  o.clip = 1.0  # largest global gradient norm; 0 for none
  o.offload = "none"  # what lives in host memory: none, state, params (and state)
  o.loraplus_lr_ratio = 0.0  # rate of the factors b over that of a; 0 for one rate
  o.loraplus_lr_embedding = 1e-6  # then that of adapters on embeddings
  if name != "adafactor":
    o.b1 = 0.9  # of the first moment; sgd's momentum
  if name not in ("adafactor", "sgd"):
    o.b2 = 0.999
  if name not in ("adafactor", "sgd", "lion"):
    o.eps = config_dict.placeholder(float)  # None: the optimizer's own
  if name.endswith("8bit"):
    o.embeddings_in_float32 = True  # their moments
  if name.startswith("galore"):
    o.rank = 128  # of the subspace
    o.update_gap = 200  # updates from one subspace to the next
    o.scale = 0.25  # of the projected update
    o.projection = "std"  # std, reverse_std, right, left, full
    o.target = "layers/.*"  # paths of the matrices that are projected
  return o


def run(arg):
  """The parts that every training run has: model, adapter, batch, optimizer, mesh, evaluation, checkpoints."""
  c = ml_collections.ConfigDict()
  c.seed = 0  # of data order, initialisation and dropout
  c.steps = 100  # optimizer updates; None where epochs says how many
  c.epochs = config_dict.placeholder(float)  # passes over the training rows, in place of steps

  c.model = ml_collections.ConfigDict()
  c.model.name = arg.model  # "smollm2", a Hugging Face folder or hub name
  # an adapter's or a run's folder to start from; "": a fresh adapter on the base alone
  c.model.adapter = ""
  c.model.adapter_use = "trained"  # it goes on being trained, or is frozen under a fresh one
  c.model.base = chosen("base", arg.base, BASES)  # how frozen matrices are stored
  c.model.dtype = "auto"  # of products: bfloat16 on accelerators and CPUs that multiply in it
  # chat template: the tokenizer's own, or chatml llama3 llama2 mistral vicuna gemma
  c.model.template = "tokenizer"
  # what the backward pass recomputes: none, names, dots, full, host (as full, with the layers' inputs in host memory)
  c.model.remat = "auto"
  c.model.offload = (
    "none"  # layers: a frozen base stays in host memory, its layers fetched one at a time
  )
  c.model.attention = "auto"  # what computes it: xla, splash (TPU), cudnn (GPU)
  c.model.router_aux_loss_coef = 0.0  # weight of the loss that spreads tokens over experts

  c.adapter = adapter(arg.adapter)

  c.batch = ml_collections.ConfigDict()
  c.batch.rows = 8  # in an optimizer batch, over all devices
  c.batch.accumulate = 1  # micro-batches in it

  c.optimizer = optimizer(arg.optimizer)

  c.mesh = ml_collections.ConfigDict()
  c.mesh.data = 1
  c.mesh.fsdp = -1  # -1: all the devices that are left
  c.mesh.expert = 1  # devices that share the experts of a mixture
  c.mesh.context = 1  # devices that share each row, for rows too long for one
  c.mesh.tensor = 1

  c.eval = ml_collections.ConfigDict()
  c.eval.every = 50  # steps; 0 for none but the last
  c.eval.rows = 8  # rows a batch
  # held-out metric whose best step is exported, like "loss"; "": the last step
  c.eval.best = ""
  c.eval.stop_after = 0  # evaluations without its improvement after which the run ends; 0: never
  c.eval.samples = 0  # held-out prompts whose answers, before and after, are shown in the report
  # what grades answers: exact, contained, json, number, FILE.py:name, or several with commas between
  c.eval.metric = ""
  c.eval.task = ""  # what is asked instead of held-out prompts: "sql" (built in), or a file of rows
  c.eval.task_limit = 0  # questions that are graded; 0 for all
  c.eval.max_new_tokens = 0  # of an answer; 0: what the longest expected answer needs
  c.eval.before = True  # answer before training too
  c.eval.suite = ""  # what else is measured before and after: "core", or a folder with suite.json
  c.eval.suite_limit = 0  # rows of each of its parts; 0 for all
  c.checkpoint = ml_collections.ConfigDict()
  c.checkpoint.every = 100  # steps; the last step is always kept
  c.checkpoint.keep = 2  # newest ones
  c.log_every = 1  # steps
  c.log = ml_collections.ConfigDict()  # trackers that get the metrics too, by project; "": none
  c.log.wandb = ""
  c.log.mlflow = ""
  c.log.trackio = ""
  c.max_skipped = 10  # updates in a row with a gradient that is not finite before the run gives up
  return c


def answers(arg, kind):
  """Where answers to compare come from, and how they become batches."""
  d = text(arg)
  del d.train_on  # an answer is scored whole
  d.kind = kind
  # whether a prompt's answers share its tokens, which are computed once; shifted attention has no room for it
  d.share_prompt = "longlora" not in arg.adapter
  d.truncate = "error"  # error, drop (counted), prompt (its beginning is cut; answers stay whole)
  return d


def reference(o):
  """Where the reference policy comes from."""
  o.reference = "base"  # the base without its adapter, an adapter folder on it, or another model
  o.reference_base = "dense"  # how another model's matrices are stored: dense, nf4, fp4, int8
  o.cache_reference = True  # its log-probabilities are computed once, before training


def names(text):
  """The names of a text with "+" between them; one within a path that is there is a part of that path."""
  pieces, found = text.split("+"), []
  while pieces:
    paths = ["+".join(pieces[:count]) for count in range(len(pieces), 1, -1)]
    found.append(next(filter(_is_there, paths), pieces[0]))
    pieces = pieces[found[-1].count("+") + 1 :]
  return tuple(filter(None, found))


def _is_there(name):
  """Whether the file of FILE.py:name, or a folder, is on this machine, and has each "+" in its path."""
  path = name.rpartition(":")[0] or name
  return path.count("+") == name.count("+") and os.path.exists(os.path.expanduser(path))


def reward(parts):
  """What scores the answers that a model writes.

  Args:
    parts: names with "+" between, such as "number+length".
  """
  r = ml_collections.ConfigDict()
  # verifiers whose scores are added: built in, FILE.py:name, or a reward model's folder
  r.parts = names(parts)
  r.weights = ()  # one for each of them; (): 1 each
  r.gates = ()  # verifiers that multiply the sum
  r.options = ml_collections.ConfigDict()  # part or gate -> its options
  r.ranges = ml_collections.ConfigDict()  # part or gate -> (lowest, highest) score
  r.untested = ()  # those that do not ask whether an answer is right
  r.seconds = config_dict.placeholder(float)  # deadline of a call in a worker; None: its own
  r.retries = 1  # how often a missing score is asked for again
  r.unsafe_code = False  # run programs that the model wrote where nothing isolates them
  return r


def policy_loss(loss, aggregation, advantage, epsilon_high):
  """The policy-gradient loss of a method: it has the fields that it reads and no other."""
  o = ml_collections.ConfigDict({"name": "grouped", "loss": loss})
  # group, batch, none (of a deviation to divide by), leave_one_out, whitened, max_rl
  o.advantage = advantage
  if loss != "rloo":  # whose loss is of answers
    # token_mean, sequence_mean, constant_length, sequence_sum, prompt_mean
    o.aggregation = aggregation
  if loss in ("ppo", "gspo", "rloo", "dppo_tv", "dppo_kl"):
    o.epsilon = {"gspo": 3e-4, "dppo_tv": 0.15, "dppo_kl": 0.05}.get(loss, 0.2)
    o.epsilon_high = epsilon_high
  if loss == "ppo":
    # the loss of a bad answer is at most this times -A
    o.dual_clip = config_dict.placeholder(float)
  if loss in ("cispo", "dppo_tv", "dppo_kl"):
    o.ceiling = 5.0 if loss == "cispo" else 20.0  # bound on the ratio
  return o


def critic(arg):
  """PPO's critic: what says how good a text is so far."""
  v = ml_collections.ConfigDict()
  v.trunk = "own"  # own: a copy of what trains, on the same base; shared: a head on the policy's
  v.lr = 1e-4 if arg.adapter != "none" else 1e-5  # peak
  v.weight = 0.5  # of its loss, which counts where the trunk is shared
  v.epsilon = (
    0.2  # how far a value may move from the one that its batch was made with; None: no bound
  )
  v.warmup = 0  # updates in which it learns alone
  v.gamma = 1.0  # discount of a token
  v.lam = 1.0  # of GAE, of the policy's advantages
  v.returns_lam = config_dict.placeholder(float)  # of the critic's returns; None: lam
  v.whiten = True  # advantages are whitened over all tokens of the batch that was written
  return v


def following(o):
  """TR-DPO: whether the reference follows the policy."""
  # updates from one step of the reference towards the policy to the next; 0: it stays
  o.sync_every = 0
  o.sync_mix = 0.6


def text(arg):
  """Where rows come from, and how they become batches."""
  d = ml_collections.ConfigDict()
  # a built-in task, a .jsonl .json .csv .tsv .parquet path, or a hub dataset: owner/name[:config][#split]
  d.train = arg.data
  # the same; "": the task's own evaluation split, or `eval_rows` rows drawn from train, of each label its share
  d.eval = ""
  d.eval_rows = config_dict.placeholder(int)  # None: a tenth of the rows, at most 64; 0: none
  d.columns = ml_collections.ConfigDict()  # this schema's name -> the file's column(s)
  d.chat = True  # prompt and completion strings become a user's and an assistant's turn
  d.system = config_dict.placeholder(str)  # system message put before them
  # what is trained of a conversation: assistant (each of its messages), last (the last of them)
  d.train_on = "assistant"
  d.length = 512  # tokens in a row; no example may be longer
  d.truncate = "error"  # error, drop, keep_start, split (plain text)
  d.on_error = "raise"  # raise, skip (counted)
  d.packing = True  # several examples in a row
  d.kind = "text"  # what a row is: text, pairs, triples, labels, outcomes, steps, scored
  d.limit = 0  # rows used, drawn; 0 for all
  d.replay = ""  # general data mixed in against forgetting: as train
  d.replay_columns = ml_collections.ConfigDict()
  d.replay_fraction = 0.05  # share of the batch
  d.replay_by = "tokens"  # or examples
  return d
