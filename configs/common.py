"""What config files share: their argument string, and the parts that every run has.  Plain data."""

import difflib

import ml_collections
from ml_collections import config_dict

ADAPTERS = ("none", "lora")
BASES = ("dense", "nf4")


def parse(arg, **defaults):
  """The arguments after the colon of `--config=FILE:name=value,name=value` as a ConfigDict.

  A value takes the type of its default; a bare name means True.  An unknown name is an error that lists the known.
  """
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
    raise ValueError(f"config argument {name}={value!r}: known are {', '.join(known)}")
  return value


def run(arg):
  """The parts that every training run has: model, adapter, batch, optimizer, mesh, evaluation, checkpoints."""
  c = ml_collections.ConfigDict()
  c.seed = 0  # of data order, initialisation and dropout
  c.steps = 100  # optimizer updates

  c.model = ml_collections.ConfigDict()
  c.model.name = arg.model  # "smollm2", a Hugging Face folder or hub name
  c.model.base = chosen("base", arg.base, BASES)  # how frozen matrices are stored
  c.model.dtype = "auto"  # of the computation: bfloat16 on accelerators, float32 on CPU
  c.model.template = (
    "tokenizer"  # chat template: the tokenizer's own, or chatml llama3 llama2 mistral vicuna gemma
  )
  c.model.remat = "auto"  # what the backward pass recomputes: none, names, dots, full

  c.adapter = ml_collections.ConfigDict()
  c.adapter.method = chosen("adapter", arg.adapter, ADAPTERS)  # "none": full fine-tuning
  c.adapter.r = 16
  c.adapter.lora_alpha = 32.0
  c.adapter.lora_dropout = 0.0
  c.adapter.target_modules = (
    "all-linear"  # or a regular expression over names such as layers.3.self_attn.q_proj
  )
  c.adapter.exclude_modules = ""
  c.adapter.layers_to_transform = ()  # (): every layer
  c.adapter.rank_pattern = ml_collections.ConfigDict()
  c.adapter.alpha_pattern = ml_collections.ConfigDict()
  c.adapter.use_rslora = False
  c.adapter.init_lora_weights = "uniform"  # or "gaussian"

  c.batch = ml_collections.ConfigDict()
  c.batch.rows = 8  # in an optimizer batch, over all devices
  c.batch.accumulate = 1  # micro-batches in it

  c.optimizer = ml_collections.ConfigDict()
  c.optimizer.name = "adamw"
  c.optimizer.lr = 2e-4  # peak
  c.optimizer.warmup = 0.05  # share of steps
  c.optimizer.schedule = "cosine"  # constant, linear, cosine
  c.optimizer.weight_decay = 0.0  # on matrices
  c.optimizer.clip = 1.0  # largest global gradient norm; 0 for none
  c.optimizer.b1 = 0.9
  c.optimizer.b2 = 0.999

  c.mesh = ml_collections.ConfigDict()
  c.mesh.data = 1
  c.mesh.fsdp = -1  # -1: all the devices that are left
  c.mesh.tensor = 1

  c.eval = ml_collections.ConfigDict()
  c.eval.every = 50  # steps; 0 for none but the last
  c.eval.rows = 8  # rows a batch
  c.eval.task = ""  # a built-in task to answer before and after training, such as "sql"
  c.eval.task_limit = 0  # questions; 0 for all
  c.checkpoint = ml_collections.ConfigDict()
  c.checkpoint.every = 100  # steps; the last step is always kept
  c.checkpoint.keep = 2  # newest ones
  c.log_every = 1  # steps
  c.max_skipped = 10  # updates in a row with a gradient that is not finite before the run gives up
  return c


def text(arg):
  """Where rows come from, and how they become batches."""
  d = ml_collections.ConfigDict()
  d.train = arg.data  # a built-in task, a .jsonl .json .parquet path, or a hub name
  d.eval = (
    ""  # the same; "": the task's own evaluation split, or the last `eval_rows` rows of train
  )
  d.eval_rows = 64
  d.columns = ml_collections.ConfigDict()  # this schema's name -> the file's column(s)
  d.chat = True  # prompt and completion strings become a user's and an assistant's turn
  d.system = config_dict.placeholder(str)  # system message put before them
  d.length = 512  # tokens in a row; no example may be longer
  d.truncate = "error"  # error, drop, keep_start, split (plain text)
  d.on_error = "raise"  # raise, skip (counted)
  d.packing = True  # several examples in a row
  d.limit = 0  # rows used; 0 for all
  d.replay = ""  # general data mixed in against forgetting: as train
  d.replay_columns = ml_collections.ConfigDict()
  d.replay_fraction = 0.05  # share of the batch
  d.replay_by = "tokens"  # or examples
  return d
