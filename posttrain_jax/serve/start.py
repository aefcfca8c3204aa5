"""From a command's options to a server that answers: the base read, its adapters registered, its programs compiled."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from posttrain_jax.adapters import peft_format, stacked
from posttrain_jax.build import mesh as meshes
from posttrain_jax.build import use
from posttrain_jax.core import files, progress
from posttrain_jax.rollout import engine
from posttrain_jax.serve import guard, server
from posttrain_jax.serve.adapters import folders
from posttrain_jax.serve.app import App
from posttrain_jax.serve.limits import Limits
from posttrain_jax.serve.metrics import Metrics
from posttrain_jax.serve.models import Models
from posttrain_jax.serve.voice import Voice
from posttrain_jax.serve.worker import Worker
from posttrain_jax.settings import ConfigError

log = logging.getLogger(__name__)
RUN = "adapter"  # the name of a run's own adapter, where nobody gives it another
# What a slot has room for on behalf of adapters that nobody named: every slot is as wide as the widest.
LARGE = {"rank": 64, "prompt_slots": 128, "prefix_slots": 128}


def serve(args: argparse.Namespace, *, keys: tuple[str, ...], named: Mapping[str, str]) -> int:
  """Serves until it is told to end; the exit code."""
  named, model = dict(named), args.model
  if args.workdir:
    made, adapter = use.produced(Path(args.workdir).expanduser())
    model = model or made
    if adapter is not None:
      named.setdefault(RUN, adapter)
  if model is None:
    raise ConfigError("write --model=NAME_OR_DIR, or --workdir=DIR")
  sock = server.listening(args.host, args.port)  # before the weights are read: it may be taken
  root = Path(args.adapters).expanduser() if args.adapters else None
  if root is not None and not root.is_dir():
    raise ConfigError(f"--adapters={args.adapters}: there is no such folder")
  found = folders(root) if root is not None else {}
  homes = {at: peft_format.locate(Path(path).expanduser()) for at, path in named.items()}
  storage, dtype = args.base, args.dtype
  if RUN in homes and args.workdir:  # the base as the run had it
    manner = use.manner_at(homes[RUN])
    storage, dtype = storage or manner.storage, dtype or manner.dtype
  devices = meshes.serving(args.mesh, args.rows) if args.mesh else None
  if devices is not None:
    log.info("mesh: %s", dict(devices.shape))
  used = use.load(model, base=storage, template=args.template, dtype=dtype, mesh=devices)
  used.check_writes()
  name = args.name or _name(model)
  length = min(args.length, used.config.max_length)
  room = _room(args, homes.values(), found)
  with progress.phase("preparing the weights"):
    worker = Worker(
      used.params,
      used.config,
      tokenizer=used.tokenizer,
      rows=args.rows,
      length=length,
      dtype=used.dtype,
      waiting=args.waiting,
      slots=args.slots,
      rank=room["rank"],
      prompt_slots=room["prompt_slots"],
      prefix_slots=room["prefix_slots"],
      root=root,
      reserved=(name,),
      prefix_bytes=args.prefix_cache << 20,
      storage=args.storage,
      mesh=devices,
    )
  for adapter, home in homes.items():
    _say_storage(adapter, home, used)
    with progress.phase(f"reading {adapter}"):
      worker.adapters.load(adapter, home)
  voice = _voice(used.tokenizer, used.template if used.manner.chat else None, used)
  used = dataclasses.replace(used, params=None, bare=None)  # the worker's alone, as it stores them
  models = Models(worker, name, voice, length, Speech(used, voice, args.template).of)
  limits = Limits()
  app = App(models, limits=limits, metrics=Metrics(name), allow_loading=args.allow_loading)
  asgi = app.asgi(keys=keys, local=guard.is_local(args.host))
  worker.start()
  first = list(homes)[-1] if homes else name
  ready = lambda: print(_opening(sock.getsockname(), models, keys, first), flush=True)
  with contextlib.closing(app):
    return server.run(asgi, worker, sock, limits=limits, drain_seconds=args.drain, ready=ready)


def _room(
  args: argparse.Namespace, named: Iterable[Path], found: Mapping[str, Path]
) -> dict[str, int]:
  """The largest adapter that a slot has room for: as the options say, else as those that there are need it.

  named: folders of adapters that the operator named; found: those of the folder, {name: folder}, which are refused
  where they are larger than LARGE.
  """
  asked = dict(rank=args.max_rank, prompt_slots=args.prompt_slots, prefix_slots=args.prefix_slots)
  room = {"rank": 16, "prompt_slots": 0, "prefix_slots": 0}
  for home in named:
    for kind, size in _sizes_at(home).items():
      room[kind] = max(room[kind], size)
  for adapter, home in found.items():
    for kind, size in _sizes_at(home).items():
      if size <= LARGE[kind]:
        room[kind] = max(room[kind], size)
      elif asked[kind] is None and size > room[kind]:
        log.warning(
          "adapter %s is not served: %s", adapter, stacked.too_large(kind, size, LARGE[kind])
        )
  return {kind: room[kind] if size is None else size for kind, size in asked.items()}


def _sizes_at(home: Path) -> dict[str, int]:
  try:
    return sizes(files.read_json(home / peft_format.CONFIG))
  except (ValueError, OSError):  # told when it is asked for
    return {}


def sizes(described: Mapping[str, Any]) -> dict[str, int]:
  """What an adapter's config says of its size, in the words of `Worker`.

  >>> sizes({"peft_type": "LORA", "r": 4, "rank_pattern": {"q_proj": 32}})
  {'rank': 32}
  >>> sizes({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 20})
  {'prompt_slots': 20}
  """
  if not isinstance(described, Mapping):
    return {}
  kind, tokens = described.get("peft_type"), described.get("num_virtual_tokens")
  if kind == "PROMPT_TUNING" and isinstance(tokens, int):
    return {"prompt_slots": tokens}
  if kind == "PREFIX_TUNING" and isinstance(tokens, int):
    return {"prefix_slots": tokens}
  pattern = described.get("rank_pattern")
  each = pattern.values() if isinstance(pattern, Mapping) else ()
  ranks = [described.get("r"), described.get("init_r"), *each]
  return {"rank": max((rank for rank in ranks if isinstance(rank, int)), default=0)}


def _say_storage(name: str, home: Path, used: use.Used) -> None:
  """A line where an adapter's base was stored otherwise when it was trained."""
  trained = use.manner_at(home).storage
  if trained not in (None, used.storage):
    log.warning(
      "adapter %s was trained on the base in %s and is served on it in %s: --base=%s serves it as it was trained",
      name, trained, used.storage, trained,
    )  # fmt: skip


def _name(model: str) -> str:
  """What requests call a base: its name, or its folder's."""
  path = Path(model).expanduser()
  return path.resolve().name if path.exists() else model


def _voice(tokenizer: Any, template: Any, used: use.Used) -> Voice:
  ends = _ends(used, tokenizer, template)
  return Voice(tokenizer, template, ends, used.config.vocab_size, used.manner.system)


def _ends(used: use.Used, tokenizer: Any, template: Any) -> tuple[int, ...]:
  most = engine.requests.MOST_STOPS - Limits.ends - Limits.stops  # which a request adds
  return use.ends(used.config, tokenizer, template, used.folder)[:most]


class Speech:
  """How adapters are spoken to: as when they were trained, by their folders or runs.

  What is the base's own is shared with it, a tokenizer of the same file too.
  """

  def __init__(self, used: use.Used, base: Voice, template: str | None) -> None:
    self._used, self._base, self._template = used, base, template

  def of(self, home: Path) -> Voice:
    """The voice of the adapter in a folder."""
    used, base = self._used, self._base
    tokenizer, template, manner = use.speech(used.folder, home, self._template)
    is_own = (home / "tokenizer.json").exists() and not _same_tokenizer(tokenizer, base.tokenizer)
    spoken = template if manner.chat else None
    texts = [None if one is None else (one.text, one.with_tools) for one in (spoken, base.template)]
    if not is_own and texts[0] == texts[1] and manner.system == base.system:
      return base
    if not is_own:
      tokenizer = base.tokenizer
    ends = _ends(used, tokenizer, template)
    return Voice(tokenizer, spoken, ends, used.config.vocab_size, manner.system)


def _same_tokenizer(one: Any, other: Any) -> bool:
  same = one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
  return same and one.special_tokens_map == other.special_tokens_map


def _opening(address: tuple, models: Models, keys: tuple[str, ...], first: str) -> str:
  """Where it listens, what it serves, and a first request: of a model that was read, so that it is answered."""
  host, port = address[:2]
  host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
  key = " -H 'authorization: Bearer KEY'" if keys else ""
  names = models.names()
  has_template = models.find(first).voice.template is not None
  route = "chat/completions" if has_template else "completions"
  text = '"messages": [{"role": "user", "content": "Hi!"}]' if has_template else '"prompt": "Once"'
  return (
    f"serving at http://{host}:{port}/v1\n"
    f"models: {', '.join(names)}\n"
    f"  curl http://{host}:{port}/v1/{route}{key} -H 'content-type: application/json' \\\n"
    f'    -d \'{{"model": "{first}", {text}, "max_tokens": 64}}\''
  )
