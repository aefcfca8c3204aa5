"""The worker: each answer as if it were alone, whatever is asked beside it."""

import functools
import gc
import itertools
import shutil
import threading
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import adapters, quant
from posttrain_jax.adapters import layout, peft_format
from posttrain_jax.core import bits, sharding
from posttrain_jax.models import decoder
from posttrain_jax.rollout import requests
from posttrain_jax.rollout.sampling import Sampling
from posttrain_jax.serve import asked as asking
from posttrain_jax.serve import worker as workers
from posttrain_jax.serve.asked import Asked, Closed, Ended, Failed, Full, Tokens, UnknownAdapter
from tests import tiny
from tests.marks import few
from tests.serve import models
from tests.serve.models import ask, until

SHARED = list(b"You are a helpful assistant, and brief.")  # more than two blocks of sixteen
NEW = 9


def prompt(number):
  return [*SHARED, *b"question ", 65 + number]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp("adapters")
  for kind in models.KINDS:
    models.write(root / kind, kind)
  return root


@pytest.fixture(scope="module")
def worker(root):
  worker = models.worker(root=root)
  until(lambda: worker.state == "ready" or worker.error, 240)
  yield worker
  worker.close()
  assert worker.error is None


def answer(worker, asked):
  heard = ask(worker, asked)
  heard.end()
  return heard


@pytest.fixture(scope="module")
def alone(worker):
  """The greedy answer of the base and of each adapter, one by one."""
  made = {}

  def of(kind, number=0):
    if (kind, number) not in made:
      made[kind, number] = answer(worker, Asked(prompt(number), NEW, adapter=kind))
    return made[kind, number]

  return of


def full_logps(text, kind=None):
  """[tokens, vocab] by one forward pass of base and adapter, without cache, slots or neighbours."""
  params = models.params() if kind is None else adapters.bind(models.params(), models.made(kind))
  padded = np.zeros((1, 96), np.int32)
  padded[0, : len(text)] = text
  logits = jax.jit(decoder.forward, static_argnums=2)(params, jnp.asarray(padded), models.CONFIG)
  return np.asarray(jax.nn.log_softmax(logits[0, : len(text)]))


@pytest.mark.parametrize("kind", few([None, *models.KINDS], None, "dora", "prefix"))
def test_an_answer_is_that_of_the_full_forward_pass_with_the_adapter_bound(kind, alone):
  heard = alone(kind)
  expected = full_logps([*prompt(0), *heard.ids], kind)[len(prompt(0)) - 1 : -1]
  best = expected.argmax(axis=1)
  np.testing.assert_array_equal(heard.ids, best)
  np.testing.assert_allclose(heard.logps, expected.max(axis=1), rtol=1e-3, atol=1e-4)
  assert heard.events[-1] == Ended("length")


def test_adapters_answer_unlike(alone):
  assert len({tuple(alone(kind).ids) for kind in (None, *models.KINDS)}) == len(models.KINDS) + 1


def test_among_many_an_answer_is_bit_by_bit_what_it_is_alone(worker, alone):
  """Nine contents on two slots and three rows, prompts that begin alike: loads, evictions and a warm prefix cache."""
  asked = [(kind, number) for number in (0, 1) for kind in (*models.KINDS, None)]
  expected = {key: alone(*key) for key in asked}
  before = worker.numbers()
  order = np.random.default_rng(0).permutation(len(asked))
  many = [
    (asked[i], ask(worker, Asked(prompt(asked[i][1]), NEW, adapter=asked[i][0]))) for i in order
  ]
  for key, heard in many:
    heard.end()
    assert heard.ids == expected[key].ids
    assert heard.logps == expected[key].logps
  after = worker.numbers()
  assert after.adapter_evictions > before.adapter_evictions
  assert after.prefix_hits > before.prefix_hits
  assert after.compiled_programs == before.compiled_programs
  assert after.running == after.waiting == after.adapters_in_use == 0


def test_a_name_given_new_content_answers_anew_and_requests_keep_theirs(worker, alone, tmp_path):
  """Under a prefix cache that is warm with what the name stood for before."""
  first, second = (
    models.write(tmp_path / name, "lora", seed) for name, seed in (("a", 1), ("b", 5))
  )
  worker.adapters.load("mine", first)
  old = answer(worker, Asked(prompt(0), NEW, adapter="mine"))
  assert old.ids == alone("lora").ids
  assert old.started.cached >= 32  # of the adapter of the same content
  kept = ask(worker, Asked(prompt(0), 40, adapter="mine"))
  worker.adapters.load("mine", second)
  new = answer(worker, Asked(prompt(0), NEW, adapter="mine"))
  assert new.ids != old.ids
  assert new.started.cached == 0
  kept.end()
  assert kept.ids[:NEW] == old.ids
  worker.adapters.unload("mine")
  with pytest.raises(UnknownAdapter):
    worker.submit(Asked(prompt(0), NEW, adapter="mine"), print)


def test_one_content_under_two_names_has_one_slot(worker, alone, tmp_path):
  expected = alone("thin").ids
  copied = shutil.copytree(worker.adapters.folder("thin"), tmp_path / "copy")
  worker.adapters.load("copy", copied)
  loads = worker.numbers().adapter_evictions
  pair = [ask(worker, Asked(prompt(0), NEW, adapter=name)) for name in ("thin", "copy") * 2]
  for heard in pair:
    heard.end()
    assert heard.ids == expected
  assert worker.numbers().adapter_evictions == loads
  worker.adapters.unload("copy")


def test_a_cold_prefix_cache_answers_as_a_warm_one(worker):
  asked = Asked([*b"another beginning, of more than one block of sixteen"], NEW, adapter="rslora")
  cold, *warm = [answer(worker, asked) for _ in range(2)]
  worker.engine._held = [
    None
  ] * worker.engine.rows  # rows that hold the prompt still, so that blocks are read
  warm.append(answer(worker, asked))
  assert cold.started.cached == 0
  for heard in warm:
    assert heard.started.cached > 0
    assert heard.ids == cold.ids
    assert heard.logps == cold.logps


def test_every_token_is_told_with_the_most_likely_ones(worker):
  heard = answer(worker, Asked(prompt(0), NEW, Sampling(temperature=1.3, top_k=5), top=3, seed=4))
  every = full_logps([*prompt(0), *heard.ids])[len(prompt(0)) - 1 : -1]
  expected = every[np.arange(NEW), heard.ids]
  np.testing.assert_allclose(heard.logps, expected, rtol=1e-3, atol=1e-4)  # at temperature 1
  ids = np.concatenate([event.top[0] for event in heard.of(Tokens)])
  logps = np.concatenate([event.top[1] for event in heard.of(Tokens)])
  np.testing.assert_array_equal(ids, np.argsort(-every, axis=1, kind="stable")[:, :3])
  np.testing.assert_allclose(logps, np.sort(every, axis=1)[:, ::-1][:, :3], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [None, "dora"])
def test_the_prompts_tokens_are_told_with_their_log_probabilities(kind, worker, alone):
  heard = answer(worker, Asked(prompt(0), 0, adapter=kind, top=2, echo_logprobs=True))
  every = full_logps(prompt(0), kind)[:-1]
  expected = every[np.arange(len(every)), prompt(0)[1:]]
  np.testing.assert_allclose(heard.prompt.logps, expected, rtol=1e-3, atol=1e-4)
  np.testing.assert_array_equal(heard.prompt.top[0][:, 0], every.argmax(axis=1))
  assert heard.ids == []
  assert heard.events[-1] == Ended("length")
  both = answer(worker, Asked(prompt(0), NEW, adapter=kind, echo_logprobs=True))
  assert both.ids == alone(kind).ids
  np.testing.assert_allclose(both.prompt.logps, expected, rtol=1e-3, atol=1e-4)


def test_a_grammar_says_what_may_come(worker, alone):
  """An answer between others, whose tokens are as they are without it."""
  digits = np.isin(np.arange(models.CONFIG.vocab_size), list(b"0123456789"))
  letters = np.isin(np.arange(models.CONFIG.vocab_size), list(b"abc"))
  seen = []

  def allowed(ids):
    seen.append(len(ids))
    return digits if len(ids) % 2 == 0 else np.asarray(bits.pack(jnp.asarray(letters)))

  heard = [
    ask(worker, Asked(prompt(0), NEW, allowed=allowed)),
    ask(worker, Asked(prompt(0), NEW, adapter="lora")),
    ask(worker, Asked(prompt(1), NEW)),
  ]
  for one in heard:
    one.end()
  text = bytes(heard[0].ids)
  assert all(chr(c) in ("0123456789" if i % 2 == 0 else "abc") for i, c in enumerate(text))
  assert seen == list(range(NEW))
  assert heard[1].ids == alone("lora").ids
  assert heard[2].ids == alone(None, 1).ids


@pytest.mark.parametrize(
  ("allowed", "said"),
  [
    (lambda ids: np.zeros(models.CONFIG.vocab_size, bool), "allows no token"),
    (lambda ids: np.ones(3, bool), r"found bool \(3,\)"),
    (lambda ids: 1 / 0, "division by zero"),
  ],
)
def test_a_grammar_that_fails_ends_its_request_and_no_other(allowed, said, worker, alone):
  beside = ask(worker, Asked(prompt(0), NEW, adapter="lora"))
  with pytest.raises((ValueError, ZeroDivisionError), match=said):
    ask(worker, Asked(prompt(0), NEW, allowed=allowed)).end()
  beside.end()
  assert beside.ids == alone("lora").ids


@pytest.mark.parametrize("asks", [dict(max_new=NEW), dict(max_new=0, echo_logprobs=True)])
def test_an_adapter_whose_numbers_overflow_fails_its_requests_and_no_other(
  asks, worker, root, alone
):
  huge = jax.tree.map(lambda x: 1e20 * x, models.made("lora"))
  peft_format.save(root / "huge", huge, models.KINDS["lora"], models.CONFIG)
  expected = {kind: alone(kind).ids for kind in (None, "dora", "lora")}
  beside = {kind: ask(worker, Asked(prompt(0), NEW, adapter=kind)) for kind in expected}
  for _ in range(2):
    with pytest.raises(ArithmeticError, match="log-probabilities of 'huge' are no numbers"):
      ask(worker, Asked(prompt(0), adapter="huge", **asks)).end()
  for heard in beside.values():
    heard.end()
  assert {kind: heard.ids for kind, heard in beside.items()} == expected
  assert answer(worker, Asked(prompt(0), NEW, adapter="lora")).ids == expected["lora"]


def test_penalties_and_biases_are_each_requests_own(worker, alone):
  plain = alone(None).ids
  first, worst = plain[0], 5
  never = answer(worker, Asked(prompt(0), NEW, Sampling(0.0, bias=((first, -100.0),))))
  always = answer(worker, Asked(prompt(0), NEW, Sampling(0.0, bias=((worst, 100.0),))))
  assert first not in never.ids
  assert always.ids == [worst] * NEW
  tamed = Sampling(0.0, bias=((worst, 6.0),), frequency_penalty=2.0)
  assert answer(worker, Asked(prompt(0), NEW, tamed)).ids.count(worst) < NEW
  # the log-probabilities are the model's own
  every = full_logps([*prompt(0), *always.ids])[len(prompt(0)) - 1 : -1]
  np.testing.assert_allclose(always.logps, every[:, worst], rtol=1e-3, atol=1e-4)


def test_an_answer_is_drawn_by_its_seed_and_sample_alone(worker):
  draw = lambda seed, sample: Asked(prompt(0), NEW, Sampling(2.0), seed=seed, sample=sample)
  alone = {key: answer(worker, draw(*key)).ids for key in [(1, 0), (1, 1), (2, 0)]}
  assert len(set(map(tuple, alone.values()))) == 3
  together = {key: ask(worker, draw(*key)) for key in alone}
  for key, heard in together.items():
    heard.end()
    assert heard.ids == alone[key]


def test_what_ends_an_answer_is_told(worker, alone):
  plain = alone(None).ids
  stopped = answer(worker, Asked(prompt(0), NEW, stop_ids=frozenset([plain[3]])))
  at = plain.index(plain[3])
  assert (stopped.ids, stopped.events[-1]) == (plain[: at + 1], Ended("stop"))
  text = requests.text_of(tiny.tokenizer(), plain)
  string = next(letter for letter in text[1:] if letter.isascii() and letter.isprintable())
  matched = answer(worker, Asked(prompt(0), NEW, stop_strings=("never said", string)))
  assert matched.events[-1] == Ended("stop", string)
  assert string in tiny.tokenizer().decode(matched.ids)
  biased = Sampling(0.0, bias=((258, 100.0),))
  special = answer(worker, Asked(prompt(0), NEW, biased, min_new=2, stop_strings=("<|im_end|>",)))
  assert (len(special.ids), special.events[-1]) == (3, Ended("stop"))


def test_a_cancelled_request_frees_its_row_within_a_window(worker, alone):
  long = [ask(worker, Asked(prompt(i), 45)) for i in range(5)]
  until(lambda: long[0].of(Tokens))
  for heard in long:
    worker.cancel(heard.ticket)
  for heard in long:
    assert heard.end() == Ended("cancelled")
  assert worker.numbers().running == worker.numbers().waiting == 0
  told = [len(heard.events) for heard in long]
  assert answer(worker, Asked(prompt(0), NEW)).ids == alone(None).ids
  assert [len(heard.events) for heard in long] == told  # nothing comes after the end
  worker.cancel(long[0].ticket)  # once more, which is nothing


def test_a_request_that_is_dropped_while_others_wait_for_its_prompt(worker, alone):
  """The second and third are to share what the first, cancelled at once, has yet to read."""
  alone("lora")
  beginning = [*b"a beginning that is new to all of them, and long enough for blocks"]
  asked = [Asked([*beginning, 65 + i], NEW, adapter="lora") for i in range(3)]
  heard = [ask(worker, one) for one in asked]
  worker.cancel(heard[0].ticket)
  assert heard[0].end() == Ended("cancelled")
  for one, again in zip(heard[1:], asked[1:]):
    one.end()
    assert one.ids == answer(worker, again).ids


@pytest.mark.parametrize(
  ("asked", "said"),
  [
    (Asked([], 3), "is empty"),
    (Asked([1, 999], 3), "outside 0..260"),
    (Asked([1] * 90, 30), "more than the engine's length=96"),
    (Asked([1] * 80, 14, adapter="prompt"), "5 of a soft prompt"),
    (Asked([1], 0), "asks for nothing"),
    (Asked([1], 3, top=21), "at most 20"),
    (Asked([1], 3, stop_strings=("",)), "empty stop string"),
    (Asked([1], 3, Sampling(bias=((300, 1.0),))), "bias for tokens"),
    (Asked([1], 3, min_new=5), "min_new_tokens"),
    (Asked([1], 3, seed=-1), "seed"),
  ],
)
def test_what_cannot_be_answered_is_refused_at_once(asked, said, worker):
  with pytest.raises(ValueError, match=said):
    worker.submit(asked, print)
  assert worker.numbers().adapters_in_use == 0


def test_a_listener_that_raises_is_cancelled(worker, alone):
  def deaf(event):
    raise ConnectionError("gone")

  worker.submit(Asked(prompt(0), 40), deaf)
  until(lambda: worker.numbers().running + worker.numbers().waiting == 0)
  assert answer(worker, Asked(prompt(0), NEW)).ids == alone(None).ids


def test_a_full_queue_says_when_to_come_again(worker):
  worker._most_waiting, before = 2, worker._most_waiting
  try:
    held, refused = [], []
    for _ in range(8):
      try:
        held.append(ask(worker, Asked(prompt(0), 45)))
      except Full as error:
        refused.append(error)
    assert len(held) == 5  # three rows and two that wait
    assert all(error.retry_after >= 1 for error in refused)
  finally:
    worker._most_waiting = before
    for heard in held:
      worker.cancel(heard.ticket)
      heard.end()


def test_loads_and_unloads_meanwhile_change_no_answer(worker, alone, tmp_path):
  """While adapters come and go under other names."""
  kinds = ["lora", "thin", "dora", None]
  expected = [alone(kind).ids for kind in kinds]
  folders = [models.write(tmp_path / f"n{i}", "thin", seed=20 + i) for i in range(3)]
  stop, failed = threading.Event(), []

  def churn():
    for i in itertools.count():
      if stop.wait(0.01):
        return
      try:
        worker.adapters.load(f"name{i % 2}", folders[i % 3])
        if i % 3 == 2:
          worker.adapters.unload(f"name{i % 2}")
      except Exception as error:  # told below
        failed.append(error)

  thread = threading.Thread(target=churn)
  thread.start()
  try:
    many = [ask(worker, Asked(prompt(0), NEW, adapter=kind)) for kind in kinds * 4]
    for heard in many:
      heard.end()
  finally:
    stop.set()
    thread.join()
  assert [heard.ids for heard in many] == expected * 4
  assert not failed
  for name in ("name0", "name1"):
    if name in worker.adapters.names():
      worker.adapters.unload(name)


@pytest.mark.slow
@pytest.mark.parametrize(
  "base",
  ["nf4", "fp4", "int8", "bfloat16", "kept int8", "kept bfloat16", "data 4 tensor 2"]
  + [
    "fsdp 4 tensor 2",
    "expert 2 tensor 4",
    "nf4 data 4 tensor 2",
    "fp4 fsdp 4 tensor 2",
    "int8 data 2 tensor 4",
  ],
)
def test_any_base_serves_what_it_says_with_the_adapter_bound(base, root):
  params, mesh, storage = models.params(), None, "auto"
  first, *words = base.split()
  if first == "kept":
    (storage,) = words
  elif first in quant.STORAGES:
    params = quant.quantize_params(params, storage=first)
  elif first == "bfloat16":
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  else:
    words = [first, *words]
  if first != "kept" and words:
    mesh = sharding.mesh(**dict(zip(words[::2], map(int, words[1::2]))))
  placed = layout.laid_out(params, mesh)
  worker = models.worker(
    root=root, params=placed, mesh=mesh, storage=storage, rows=4, dtype=jnp.float32
  )
  kinds = [None, "lora", "dora", "prefix", "prompt"]
  alone = [answer(worker, Asked(prompt(0), NEW, adapter=kind)).ids for kind in kinds]
  many = [ask(worker, Asked(prompt(0), NEW, adapter=kind)) for kind in kinds * 2]
  for heard in many:
    heard.end()
  worker.close()
  assert worker.error is None
  assert [heard.ids for heard in many] == alone * 2
  for kind, ids in zip(kinds, alone):
    bound = params if kind is None else adapters.bind(params, models.made(kind))
    text = jnp.asarray([[*prompt(0), *ids]])
    forward = jax.jit(functools.partial(decoder.forward, dtype=jnp.float32), static_argnums=2)
    logits = np.asarray(forward(bound, text, models.CONFIG))[0, len(prompt(0)) - 1 : -1]
    told = np.take_along_axis(logits, np.asarray(ids)[:, None], 1)[:, 0]
    np.testing.assert_allclose(
      told, logits.max(axis=1), atol=0.02
    )  # two may be as close as rounding


def test_a_base_that_is_kept_in_8_bits_is_kept_in_nothing_else():
  params = decoder.init(models.KEY, models.CONFIG)
  matrix = weakref.ref(params["layers"]["self_attn"]["q_proj"]["weight"])
  settings: Any = dict(tokenizer=tiny.tokenizer(), rows=1, length=32, slots=1, rank=2)
  worker = workers.Worker(params, models.CONFIG, storage="int8", **settings)
  del params
  gc.collect()
  assert matrix() is None
  assert worker.adapters.names() == []


@pytest.mark.slow
def test_thousands_of_requests_leave_memory_and_live_arrays_flat(worker):
  """5,000 of them, over every adapter; the first hundreds fill what is kept."""
  import resource

  rng = np.random.default_rng(0)
  kinds = [None, *models.KINDS]

  def some(count):
    for start in range(0, count, 100):
      heard = [
        ask(worker, Asked([*SHARED, *rng.integers(65, 90, 9).tolist()], 3, adapter=kinds[i % 9]))
        for i in range(start, start + 100)
      ]
      for one in heard:
        one.end()
    return len(jax.live_arrays()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

  before = some(500)
  programs = worker.numbers().compiled_programs
  after = some(4500)
  assert after[0] <= before[0] + 5
  assert after[1] <= before[1] * 1.05
  assert worker.numbers().compiled_programs == programs


def test_draining_answers_what_was_asked_and_takes_no_more(root):
  worker = models.worker(root=root, slots=0, prefix_bytes=0)
  heard = [ask(worker, Asked(prompt(i), NEW)) for i in range(4)]
  drained = threading.Thread(target=worker.drain, args=(240,))
  drained.start()
  until(lambda: worker.state == "draining")
  with pytest.raises(Closed):
    worker.submit(Asked(prompt(0), NEW), print)
  drained.join()
  assert [one.events[-1] for one in heard] == [Ended("length")] * 4
  worker.close()
  late = models.Heard()
  with pytest.raises(Closed):
    worker.submit(Asked(prompt(0), NEW), late)
  assert late.events == []


def test_a_worker_that_dies_says_so_to_everyone(monkeypatch):
  worker = models.worker(slots=0, prefix_bytes=0)
  until(lambda: worker.state == "ready", 240)
  broken = RuntimeError("the device is gone")
  monkeypatch.setattr(worker, "_turn", lambda: (_ for _ in ()).throw(broken))
  heard = ask(worker, Asked(prompt(0), NEW))
  with pytest.raises(RuntimeError, match="worker has ended"):
    heard.end()
  assert isinstance(heard.events[-1], Failed)
  until(lambda: worker.state == "closed")
  assert worker.error is broken
  assert asking.STOP == "stop"
