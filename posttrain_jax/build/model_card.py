"""The README.md of an exported folder: what was trained, on what, to which figures, and how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from posttrain_jax.adapters import peft_format
from posttrain_jax.core import files
from posttrain_jax.evals import online, panels, tasks
from posttrain_jax.models import fetch
from posttrain_jax.runs import record as runs

NAME = "README.md"
HERE = "."
QUESTION = "What is the capital of France?"
# The numbers of a loss that a reader compares; 0 is off.
NUMBERS = (
  *("beta", "label_smoothing", "gamma_beta_ratio", "sft_weight", "centering"),
  *("desirable_weight", "undesirable_weight", "epsilon", "epsilon_high", "kl_weight"),
)
# Held-out figures beside the loss and the accuracy that a reader asks for.
FIGURES = ("loss", "mean_token_accuracy", "accuracy", "margin", "kl")

ADAPTER_CODE = """\
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

name = {name}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoPeftModelForCausalLM.from_pretrained(name, dtype=torch.float32)
"""
KEPT_CODE = """\
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {name}
tokenizer = AutoTokenizer.from_pretrained(f"{{name}}/base")
model = AutoModelForCausalLM.from_pretrained(f"{{name}}/base", dtype=torch.float32)
model = PeftModel.from_pretrained(model, f"{{name}}/adapter")
"""
UNDER_CODE = """\
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {name}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained({base}, dtype=torch.float32)
{steps}
model = PeftModel.from_pretrained(model, name)
"""
MODEL_CODE = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {name}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
"""
CHAT_CODE = """\
messages = {messages}
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
"""
TEXT_CODE = """\
inputs = tokenizer({question}, return_tensors="pt")
"""
ANSWER_CODE = """\
answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""
SCORE_CODE = """\
with torch.no_grad():
    print(model(**inputs).logits)
"""


def write(folder: Path, run: runs.Run, *, name: str = HERE, notes: Sequence[str] = ()) -> None:
  """README.md in an exported folder of a run's adapter or model, or of both.

  Args:
    name: that the folder has on the hub.
    notes: sentences on how the folder was made.
  """
  files.write_text(folder / NAME, text(folder, run, name=name, notes=notes))


def text(folder: Path, run: runs.Run, *, name: str = HERE, notes: Sequence[str] = ()) -> str:
  is_adapter = (folder / peft_format.CONFIG).exists() or _is_kept(folder)
  title = name if name != HERE else f"{_base(run)}, {_loss(run)}"
  parts = [
    _head(run, is_adapter),
    f"# {title}",
    " ".join([_what(run, is_adapter), *_earlier(folder, run), *notes]),
    _table(["", ""], _facts(run)),
    *_held_out(run),
    "## How to load it",
    *_loading(folder, run, is_adapter, name),
  ]
  return "\n\n".join(parts) + "\n"


def _head(run: runs.Run, is_adapter: bool) -> str:
  """What the hub reads."""
  hub_id, licence = _hub_id(run), _licence(run)
  scores = "reward" in _losses(run)
  # JSON is YAML, and quotes what must be quoted
  said = {
    **({"base_model": hub_id, "base_model_relation": _relation(is_adapter)} if hub_id else {}),
    "library_name": "peft" if is_adapter else "transformers",
    **({"license": licence} if licence else {}),
    "pipeline_tag": "text-classification" if scores else "text-generation",
    "tags": ["posttrain-jax", *_tags(run)],
  }
  return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in said.items()), "---"])


def _tags(run: runs.Run) -> list[str]:
  if online.is_one(run):
    return [online.method(run).partition(" ")[0], "reinforcement-learning"]
  return [*_losses(run)]


def _relation(is_adapter: bool) -> str:
  return "adapter" if is_adapter else "finetune"


def _what(run: runs.Run, is_adapter: bool) -> str:
  method = run.field("adapter.method")
  made = (
    "A model of which every parameter was trained"
    if method == "none"
    else f"A {method} adapter"
    if is_adapter
    else f"A model with a {method} adapter merged into it"
  )
  state = "" if run.done is not None else " The run is not finished: this is what it had saved."
  return f"{made}, made with posttrain_jax from {_base(run)}.{state}"


def _is_kept(folder: Path) -> bool:
  """Whether the folder has the base as it was stored in training, and the adapter for it."""
  return (folder / "base").is_dir() and (folder / "adapter" / peft_format.CONFIG).exists()


def _earlier(folder: Path, run: runs.Run) -> list[str]:
  """What the run started from, and what the folder therefore stands on."""
  start = run.field("model.adapter")
  if not start:
    return []
  earlier = f"an adapter that was trained before (`{Path(start).parent.name}/{Path(start).name}`)"
  if run.field("model.adapter_use") == "trained":
    return [f"It went on from {earlier}."]
  if (folder / peft_format.UNDER).is_dir():
    return [
      f"It stands on {earlier}, which is in `{peft_format.UNDER}/`: on the bare base it is of no use."
    ]
  if (folder / peft_format.CONFIG).exists():
    return [
      f"It holds {earlier}, frozen, and the one trained over it: together one adapter of the base."
    ]
  return [f"It was trained over {earlier}, which it holds too."]


def _facts(run: runs.Run) -> list[tuple[str, str]]:
  storage = run.field("model.base")
  numbers = [f"{key} {value}" for key in NUMBERS if (value := run.field(f"objective.{key}"))]
  optimizer = [f"{run.field('optimizer.name')}", f"peak learning rate {run.field('optimizer.lr')}"]
  rows, accumulate = run.field("batch.rows"), run.field("batch.accumulate")
  tokens = (run.done or {}).get("tokens")
  versions = run.record.get("versions") or {}
  facts = {
    "base": _linked(run)
    + (f", its matrices stored as {storage} in training" if storage not in (None, "dense") else ""),
    "licence of the base": _licence(run) or "not known here: see the base",
    "method": _methods(run),
    "data": names_of(str(run.field("data.train"))),
    "replayed": names_of(str(run.field("data.replay") or "")),
    "loss": ", ".join([_loss(run), *numbers]),
    **_online(run),
    "optimizer": ", ".join(optimizer),
    "batch": f"{rows} rows" + (f" x {accumulate}" if (accumulate or 1) > 1 else "") if rows else "",
    "steps": f"{run.steps:,}"
    + (
      "" if run.given_step in (None, run.steps) else f", of which this is step {run.given_step:,}"
    ),
    "tokens": f"{tokens:,}" if tokens else "",
    "seed": str(run.field("seed")),
    "versions": ", ".join(f"{package} {version}" for package, version in versions.items()),
  }
  return [(key, value) for key, value in facts.items() if value]


def _online(run: runs.Run) -> dict[str, str]:
  """Of a run that wrote its own answers: what scored them, how many there were, and what the reward came to."""
  if not online.is_one(run):
    return {}
  scored = {"reward": "reward", "held-out score": "holdout_reward"}
  by = {name: online.scored_by(run, section) for name, section in scored.items()}
  reached = online.came_to(run)
  asked = f"; on {names_of(str(run.field('data.train')))}, which it was trained on"
  said = {**by, "answers": online.samples(run), "reached": reached and reached + asked}
  return {name: text for name, text in said.items() if text}


def _losses(run: runs.Run) -> dict[str, float]:
  """{name of a loss: its weight in the sum}."""
  losses = run.field("objective.losses")
  return dict(losses) if losses else {str(run.field("objective.name")): 1.0}


def _loss(run: runs.Run) -> str:
  if run.field("objective.name") == "grouped":
    return online.method(run)
  weighted = (
    f"{weight:g} {name}" if weight != 1 else name for name, weight in _losses(run).items()
  )
  return " + ".join(weighted)


def _methods(run: runs.Run) -> str:
  adapted = run.adapters()
  if not adapted:
    return "full fine-tuning"
  parts = []
  for method, options in adapted.items():
    sizes = {"r": "rank", "lora_alpha": "alpha", "num_virtual_tokens": "tokens"}
    said = [f"{word} {options[key]}" for key, word in sizes.items() if options.get(key) is not None]
    targets = options.get("target_modules")
    if targets:
      said.append(f"on {targets if isinstance(targets, str) else ', '.join(targets)}")
    parts.append(", ".join([method, *said]))
  return "; ".join(parts)


def names_of(source: str) -> str:
  """A mixture's files without the folders that they were in on one machine; a data set's name on the hub is whole.

  >>> names_of("/home/me/a.jsonl*0.7+b.jsonl*0.3"), names_of("openai/gsm8k"), names_of("sql")
  ('a.jsonl*0.7+b.jsonl*0.3', 'openai/gsm8k', 'sql')
  """
  return "+".join(map(_name_of, source.split("+")))


def _name_of(part: str) -> str:
  path = Path(part.partition("*")[0])
  here = path.suffix or part.startswith(("/", "~", ".")) or path.exists()
  return part.rpartition("/")[2] if here else part


def _held_out(run: runs.Run) -> list[str]:
  """The figures on rows and questions that were not trained on; nothing where there are none."""
  evaluated = {key.removeprefix("eval_"): v for key, v in run.given().items() if key[:5] == "eval_"}
  rows = [(key, f"{evaluated[key]:.4g}") for key in FIGURES if key in evaluated]
  answered = {"before": run.before, "after": run.after}
  for when, result in answered.items():
    if result is None or not result.is_graded:
      continue
    if not result.scores:
      rows.append((f"{result.task}, {when} training", f"{result.correct} of {result.total} right"))
    for name, score in result.scores.items():
      what = name if name == result.task else f"{name} of answers to {result.task}"
      rows.append((f"{what}, {when} training", panels.counted(score)))
  return ["## Held-out figures", _table(["", "value"], rows)] if rows else []


def _loading(folder: Path, run: runs.Run, is_adapter: bool, name: str) -> list[str]:
  if is_adapter and len(run.adapters()) > 1:
    return [
      "Several methods trained together, which PEFT does not load together; `posttrain chat --adapter=DIR` does."
    ]
  scores = "reward" in _losses(run)
  code, comment = _code(folder, is_adapter)
  end = ANSWER_CODE
  if scores:
    code, end = code.replace("ForCausalLM", "ForSequenceClassification"), SCORE_CODE
    if is_adapter:
      code = code.replace("dtype=", "num_labels=1, dtype=")
  where = "# this folder, where the program starts in it" if name == HERE else ""
  said = json.dumps(name)
  if _is_kept(folder) and name != HERE:  # transformers finds no part of a repository by a path
    code = code.replace(
      "import torch\n", "import torch\nfrom huggingface_hub import snapshot_download\n"
    )
    said = f"snapshot_download({said})"
  code = code.format(name=f"{said}  {where}".rstrip())
  return [
    *([comment] if comment else []),
    f"```python\n{code}\n{_inputs(folder, run, scores)}{end}```",
  ]


def _code(folder: Path, is_adapter: bool) -> tuple[str, str]:
  """(what loads the folder with transformers and PEFT, a sentence before it)."""
  if not is_adapter:
    return MODEL_CODE, ""
  if _is_kept(folder):
    return KEPT_CODE, "`base/` is the base as it was stored in training, and `adapter/` is for it."
  if not (folder / peft_format.UNDER).is_dir():
    return ADAPTER_CODE, "The base is found by the name in `adapter_config.json`."
  steps, below = [], folder
  while (below := below / peft_format.UNDER).is_dir():
    inside = json.dumps(below.relative_to(folder).as_posix())
    steps.append(
      f"model = PeftModel.from_pretrained(model, name, subfolder={inside}).merge_and_unload()"
    )
    named = peft_format.base_of(below)
  code = UNDER_CODE.replace("{base}", json.dumps(str(named)))
  return code.replace(
    "{steps}", "\n".join(reversed(steps))
  ), "What it stands on is merged into the base first."


def _inputs(folder: Path, run: runs.Run, scores: bool) -> str:
  if not _has_template(folder / "base" if _is_kept(folder) else folder):
    return TEXT_CODE.format(question=json.dumps(QUESTION))
  source = run.field("data.train")
  system = tasks.TASKS[source].system if source in tasks.TASKS else run.field("data.system")
  messages = [{"role": "user", "content": QUESTION}]
  if system:
    messages = [{"role": "system", "content": system}, *messages]
  if scores:
    messages = [*messages, {"role": "assistant", "content": "Paris."}]
  listed = "".join(f"    {json.dumps(message, ensure_ascii=False)},\n" for message in messages)
  code = CHAT_CODE.format(messages=f"[\n{listed}]")
  return code.replace("add_generation_prompt=True, ", "") if scores else code


def _has_template(folder: Path) -> bool:
  path = folder / "tokenizer_config.json"
  inside = path.exists() and bool(files.read_json(path).get("chat_template"))
  return inside or (folder / "chat_template.jinja").exists()


# The base


def _base(run: runs.Run) -> str:
  """Its name: the hub's, or its folder's without the way there."""
  return _hub_id(run) or Path(str(run.field("model.name"))).name


def _hub_id(run: runs.Run) -> str | None:
  return fetch.hub_id(str(run.field("model.name")))


def _linked(run: runs.Run) -> str:
  hub_id = _hub_id(run)
  if hub_id is None:
    return f"the folder `{_base(run)}`"
  link = f"[{hub_id}](https://huggingface.co/{hub_id})"
  converted = str(run.field("model.name")) in fetch.BUILT_IN
  told = (
    " (trained on a copy that was once stored in 4 bits, so its weights are not quite the hub's)"
  )
  return link + (told if converted else "")


def _licence(run: runs.Run) -> str | None:
  """As its own model card names it; None where nothing on this machine says."""
  name = str(run.field("model.name"))
  if name in fetch.BUILT_IN:
    return fetch.BUILT_IN[name].licence
  path = Path(name).expanduser() / NAME
  if not path.is_file():
    return None
  head = re.match(r"---\n(.*?)\n---", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
  said = None if head is None else re.search(r"^license:\s*(\S+)", head[1], re.MULTILINE)
  return None if said is None else said[1].strip("\"'")


def _table(heads: Sequence[str], rows: Sequence[tuple[str, str]]) -> str:
  lines = [heads, ["---"] * len(heads), *([_cell(cell) for cell in row] for row in rows)]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: str) -> str:
  return value.replace("|", "\\|").replace("\n", " ")
