"""What tests of serving serve: the tiny model, and folders of adapters for it."""

import functools
import queue
import time
from typing import Any

import jax

from posttrain_jax import adapters
from posttrain_jax.adapters import AdapterConfig, peft_format
from posttrain_jax.models import decoder
from posttrain_jax.serve import worker as workers
from posttrain_jax.serve.asked import Ended, Failed, Prompt, Started, Tokens
from tests import tiny
from tests.adapters.kinds import moved

KEY = jax.random.key(0)
CONFIG = tiny.config()
KINDS = {
  "lora": AdapterConfig(r=4),
  "thin": AdapterConfig(r=2, target_modules=("q_proj", "v_proj")),
  "rslora": AdapterConfig(r=8, use_rslora=True),
  "dora": AdapterConfig(method="dora", r=3, target_modules=("q_proj", "down_proj")),
  "adalora": AdapterConfig(method="adalora", init_r=4, target_r=2),
  "prompt": AdapterConfig(method="prompt", num_virtual_tokens=5),
  "prefix": AdapterConfig(method="prefix", num_virtual_tokens=3),
  "uneven": AdapterConfig(r=2, rank_pattern={r"layers\.1\..*": 6}),
}


@functools.cache
def params():
  return decoder.init(KEY, CONFIG, std=tiny.STD)


def made(kind, seed=1):
  return moved(adapters.init(KEY, params(), KINDS[kind])[1], seed, 0.3)


def write(folder, kind="lora", seed=1):
  """A folder of an adapter that changes what the model says."""
  peft_format.save(folder, made(kind, seed), KINDS[kind], CONFIG)
  return folder


def worker(**options):
  """One that has started."""
  settings: dict[str, Any] = dict(
    rows=3, length=96, window=4, slots=2, rank=8, prompt_slots=6, prefix_slots=4
  )
  pieces: dict[str, Any] = dict(pieces=(16,), at_once=32, prefix_bytes=2**20)
  base = options.pop("params", None) or params()
  made = workers.Worker(base, CONFIG, tokenizer=tiny.tokenizer(), **settings | pieces | options)
  made.start()
  return made


class Heard:
  """The events of one answer."""

  def __init__(self):
    self.events = []
    self.over = queue.Queue()
    self.ticket: Any = None

  def __call__(self, event):
    self.events.append(event)
    if isinstance(event, Ended | Failed):
      self.over.put(event)

  def end(self, seconds=120):
    event = self.over.get(timeout=seconds)
    if isinstance(event, Failed):
      raise event.error
    return event

  def of(self, kind):
    return [event for event in self.events if isinstance(event, kind)]

  @property
  def ids(self):
    return [token for event in self.of(Tokens) for token in event.ids]

  @property
  def logps(self):
    return [float(logp) for event in self.of(Tokens) for logp in event.logps]

  @property
  def started(self):
    return self.of(Started)[0]

  @property
  def prompt(self):
    return self.of(Prompt)[0]


def ask(worker, asked):
  heard = Heard()
  heard.ticket = worker.submit(asked, heard)
  return heard


def until(condition, seconds=30):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "it did not come to pass"
    time.sleep(0.005)
