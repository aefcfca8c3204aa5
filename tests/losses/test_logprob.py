"""Log-probabilities: the values and gradients of a float64 loop, at the cost that the docstring promises."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from posttrain_jax.adapters.lora import LoRA
from posttrain_jax.adapters.replaced import Replaced
from posttrain_jax.adapters.vera import Projections, VeRA
from posttrain_jax.core import bits, sharding
from posttrain_jax.core.weight import Adapted, Shared, Transposed, dense
from posttrain_jax.losses import logprob
from posttrain_jax.quant import nf4
from tests.marks import few

BATCH, TIME, EMBED, VOCAB = 4, 10, 64, 37
OPTIONS = {"softcap": 2.0, "temperature": 0.7}


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) / 4, jnp.float32)


def lora(seed):
  return LoRA(normal(seed, EMBED, 4), normal(seed + 1, 4, VOCAB), jnp.float32(1.7))


HEADS = {
  "dense": lambda: normal(1, EMBED, VOCAB),
  "tied": lambda: Transposed(normal(1, VOCAB, EMBED)),
  "lora": lambda: Adapted(normal(1, EMBED, VOCAB), lora(2)),
  "lora_on_tied": lambda: Adapted(Transposed(normal(1, VOCAB, EMBED)), lora(2)),
  "nf4": lambda: nf4.quantize(normal(1, EMBED, VOCAB)),
  "lora_on_nf4": lambda: Adapted(nf4.quantize(normal(1, EMBED, VOCAB)), lora(2)),
}
TRAINED = {  # what of a head is trained -> (its value, the head with it)
  "dense": lambda: (normal(1, EMBED, VOCAB), lambda w: w),
  "tied": lambda: (normal(1, VOCAB, EMBED), Transposed),
  "lora": lambda: (lora(2), lambda node: Adapted(normal(1, EMBED, VOCAB), node)),
  "lora_on_tied": lambda: (
    lora(2),
    lambda node: Adapted(Transposed(normal(1, VOCAB, EMBED)), node),
  ),
  "lora_on_nf4": lambda: (
    lora(2),
    lambda node: Adapted(nf4.quantize(normal(1, EMBED, VOCAB)), node),
  ),
}
MASKS = {
  "all": np.ones((BATCH, TIME), bool),
  "none": np.zeros((BATCH, TIME), bool),
  "one": np.arange(BATCH * TIME).reshape(BATCH, TIME) == 17,
  "ragged": np.arange(TIME) < np.array([10, 0, 3, 7])[:, None],
}


def problem(batch=BATCH, time=TIME, dtype=jnp.float32):
  """(hidden, labels, weight of each token in the objective)."""
  rng = np.random.default_rng(7)
  hidden = 4 * normal(0, batch, time, EMBED)
  labels = jnp.asarray(rng.integers(0, VOCAB, (batch, time)), jnp.int32)
  return hidden.astype(dtype), labels, normal(8, batch, time)


def kept_of(labels):
  """Three tokens in four, the label among them: (the booleans, what the scores are given)."""
  rng = np.random.default_rng(3)
  kept = rng.random((*labels.shape, VOCAB)) < 0.75
  kept |= np.eye(VOCAB, dtype=bool)[np.asarray(labels)]
  return kept, bits.pack(jnp.asarray(kept))


def oracle(hidden, head, labels, mask, g, softcap=None, temperature=1.0, kept=None):
  """Scores and the gradients of sum(g * logp) to hidden and to the matrix [embed, vocab], in float64."""
  hidden, w, g = (np.asarray(x, np.float64) for x in (hidden, dense(head, jnp.float32), g))
  z = hidden @ w
  squashed = z if softcap is None else softcap * np.tanh(z / softcap)
  slope = 1 / temperature * (1 if softcap is None else 1 - (squashed / softcap) ** 2)
  logits = squashed / temperature
  if kept is not None:
    logits = np.where(kept, logits, -1e9)
  logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  one_hot = np.eye(w.shape[1])[np.asarray(labels)]
  d_logits = (one_hot - np.exp(logps)) * slope * (g * mask)[..., None]
  return {
    "logp": (logps * one_hot).sum(-1) * mask,
    "correct": (logits.argmax(-1) == labels) * mask,
    "entropy": -(np.exp(logps) * logps).sum(-1) * mask,
    "d_hidden": d_logits @ w.T,
    "d_head": np.einsum("bte,btv->ev", hidden, d_logits),
  }


def assert_close(found, wanted, tolerance=2e-6):
  """Relative to the largest number there is."""
  found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
  assert found.shape == wanted.shape
  error, size = np.abs(found - wanted).max(), np.abs(wanted).max()
  assert error <= tolerance * size, f"{error:.2e} of {size:.2e}"


def scored(hidden, head, labels, mask, **options):
  return logprob.score(hidden, head, labels, mask=mask, entropy=True, **options)


def weighted(hidden, head, labels, mask, g, **options):
  return jnp.sum(g * logprob.token_logps(hidden, head, labels, mask=mask, **options))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  monkeypatch.setattr(logprob, "CHUNK", 7)  # divides neither a row nor the batch


@pytest.mark.parametrize("head", few(HEADS, "dense", "tied", "nf4", "lora_on_nf4"))
def test_scores_and_the_gradient_to_hidden(head):
  check_frozen(HEADS[head](), **OPTIONS)


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"temperature": 1.9}], ids=str)
def test_softcap_and_temperature_apart(options):
  check_frozen(HEADS["dense"](), **options)


def test_a_softmax_over_what_was_kept():
  """Nothing is kept where nothing is scored, as the engine records nothing there."""
  kept, packed = kept_of(problem()[1])
  nowhere = jnp.where(MASKS["ragged"][..., None], packed, 0)
  assert 0.7 < kept.mean() < 0.8
  check_frozen(HEADS["tied"](), kept=(kept, nowhere), **OPTIONS)
  check_trained("dense", kept=(kept, nowhere), **OPTIONS)
  hidden, labels, _ = problem()
  none = logprob.score(hidden, HEADS["dense"](), labels, kept=~packed).logp
  assert (none == -np.inf).all()  # the drift of a sampler that kept others is not hidden


def check_frozen(head, kept=None, **options):
  hidden, labels, g = problem()
  mask = MASKS["ragged"]
  wanted = oracle(hidden, head, labels, mask, g, kept=None if kept is None else kept[0], **options)
  options["kept"] = None if kept is None else kept[1]

  @jax.jit
  def run(hidden, head):
    loss = lambda h: weighted(h, head, labels, mask, g, **options)
    return scored(hidden, head, labels, mask, **options), jax.grad(loss)(hidden)

  scores, d_hidden = run(hidden, head)
  for name in ("logp", "correct", "entropy"):
    assert_close(vars(scores)[name], wanted[name])
  assert_close(d_hidden, wanted["d_hidden"])


@pytest.mark.parametrize("head", few(TRAINED, "dense", "tied", "lora_on_nf4"))
def test_gradient_to_a_trained_head_and_to_hidden_beside_it(head):
  check_trained(head, **OPTIONS)


def check_trained(head, kept=(None, None), **options):
  hidden, labels, g = problem()
  (trained, build), mask = TRAINED[head](), MASKS["ragged"]
  wanted = oracle(hidden, build(trained), labels, mask, g, kept=kept[0], **options)
  loss = lambda h, t: weighted(h, build(t), labels, mask, g, kept=kept[1], **options)
  value, (d_hidden, d_trained) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, trained)
  assert_close(value, np.sum(wanted["logp"] * g))
  assert_close(d_hidden, wanted["d_hidden"])
  d_head = wanted["d_head"]
  if not isinstance(trained, LoRA):
    assert_close(d_trained, d_head if head == "dense" else d_head.T)
    return
  a, b, scale = (np.asarray(x, np.float64) for x in (trained.a, trained.b, trained.scale))
  assert_close(d_trained.a, scale * d_head @ b.T)
  assert_close(d_trained.b, scale * a.T @ d_head)


def replaced(value):
  return Adapted(normal(1, EMBED, VOCAB), Replaced(value))


def vera_node(gain):
  pair = Projections(normal(4, EMBED, 3), normal(5, 3, VOCAB))
  node = VeRA(gain, normal(6, 3), pair=Shared(pair))
  return Adapted(Transposed(normal(1, VOCAB, EMBED)), node)


@pytest.mark.parametrize(
  ("build", "trained"),
  [(replaced, (EMBED, VOCAB)), (vera_node, (VOCAB,))],
  ids=["replaced", "vera"],
)
def test_gradient_to_a_head_whose_fields_are_called_value(build, trained):
  """Replaced and Shared have a `value`, as what a custom gradient rule is given for each leaf has."""
  hidden, labels, g = problem()
  trained, mask = normal(2, *trained), MASKS["ragged"]

  def plain(h, t):
    logits = jax.nn.log_softmax(h @ dense(build(t)))
    return jnp.sum(g * mask * jnp.take_along_axis(logits, labels[..., None], -1)[..., 0])

  loss = lambda h, t: weighted(h, build(t), labels, mask, g)
  for found, expected in zip(
    jax.jit(jax.grad(loss, argnums=(0, 1)))(hidden, trained),
    jax.jit(jax.grad(plain, argnums=(0, 1)))(hidden, trained),
  ):
    assert_close(found, expected)
  check_frozen(build(trained))


def test_gradient_to_the_head_alone():
  hidden, labels, g = problem()
  head, mask = HEADS["dense"](), MASKS["ragged"]
  d_head = jax.jit(jax.grad(lambda w: weighted(hidden, w, labels, mask, g)))(head)
  assert_close(d_head, oracle(hidden, head, labels, mask, g)["d_head"])


@jax.jit
def everything(hidden, head, labels, mask, g):
  loss = lambda h, w: weighted(h, w, labels, mask, g)
  frozen, both = jax.grad(loss)(hidden, head), jax.grad(loss, argnums=(0, 1))(hidden, head)
  return scored(hidden, head, labels, mask), frozen, *both


def test_masks():
  """Of every token, of none, of one, of the beginnings of rows."""
  hidden, labels, g = problem()
  head = HEADS["dense"]()
  for mask in MASKS.values():
    wanted = oracle(hidden, head, labels, mask, g)
    scores, frozen, beside, d_head = everything(hidden, head, labels, mask, g)
    for name in ("logp", "correct", "entropy"):
      assert_close(vars(scores)[name], wanted[name])
    assert_close(frozen, wanted["d_hidden"])
    assert_close(beside, wanted["d_hidden"])
    assert_close(d_head, wanted["d_head"])


def test_without_a_mask_every_token_counts():
  hidden, labels, g = problem()
  head = HEADS["dense"]()
  logps = logprob.token_logps(hidden, head, labels)
  assert_close(logps, oracle(hidden, head, labels, MASKS["all"], g)["logp"])
  assert_close(logprob.token_logps(hidden[0, 0], head, labels[0, 0]), logps[0, 0])


@pytest.mark.parametrize("chunk", few([1, 39, 40, 41], 1, 39))
def test_chunks_change_nothing(monkeypatch, chunk):
  monkeypatch.setattr(logprob, "CHUNK", chunk)
  everything.clear_cache()
  hidden, labels, g = problem()
  head, mask = HEADS["dense"](), MASKS["all"]
  wanted = oracle(hidden, head, labels, mask, g)
  scores, frozen, beside, d_head = everything(hidden, head, labels, mask, g)
  everything.clear_cache()
  assert_close(scores.logp, wanted["logp"])
  assert_close(frozen, wanted["d_hidden"])
  assert_close(beside, wanted["d_hidden"])
  assert_close(d_head, wanted["d_head"])


def test_entropy_is_zero_unless_asked_for():
  hidden, labels, _ = problem()
  assert not logprob.score(hidden, HEADS["dense"](), labels).entropy.any()


def test_far_logits_stay_finite():
  hidden, labels, _ = problem()
  loss = lambda h, w: jnp.sum(logprob.token_logps(h, w, labels))
  scores, slope = jax.jit(jax.value_and_grad(loss))(1e4 * hidden, HEADS["dense"]())
  assert np.isfinite(scores)
  assert np.isfinite(slope).all()


@pytest.mark.parametrize("head", few(["dense", "tied"], "tied"))
def test_bfloat16(head):
  """Values differ by the rounding of the inputs' products; scores are float32, gradients of the inputs' dtype."""
  hidden, labels, g = problem(dtype=jnp.bfloat16)
  (trained, build), mask = TRAINED[head](), MASKS["ragged"]
  trained = trained.astype(jnp.bfloat16)
  wanted = oracle(hidden, build(trained), labels, mask, g)
  scores = scored(hidden, build(trained), labels, mask)
  assert scores.logp.dtype == scores.entropy.dtype == jnp.float32
  assert_close(scores.logp, wanted["logp"], 2**-8)
  assert_close(scores.entropy, wanted["entropy"], 2**-8)
  loss = lambda h, t: weighted(h, build(t), labels, mask, g)
  frozen = jax.grad(loss)(hidden, trained)
  beside, d_trained = jax.grad(loss, argnums=(0, 1))(hidden, trained)
  d_head = wanted["d_head"] if head == "dense" else wanted["d_head"].T
  for found, exact in (
    (frozen, wanted["d_hidden"]),
    (beside, wanted["d_hidden"]),
    (d_trained, d_head),
  ):
    assert found.dtype == jnp.bfloat16
    assert_close(found, exact, 2**-6)


ALL_AXES = dict(data=2, fsdp=2, tensor=2)
MESHES = [  # every shape and every head, not each with each
  ("dense", dict(data=8)),
  ("dense", ALL_AXES),
  ("lora_on_tied", dict(fsdp=8)),
  ("lora_on_nf4", dict(tensor=2, fsdp=4)),
]


@pytest.mark.parametrize(("head", "shape"), few(MESHES, MESHES[1], MESHES[3]), ids=str)
def test_a_mesh_changes_nothing(head, shape):
  hidden, labels, g = problem(batch=8)
  (trained, build), mask = TRAINED[head](), np.tile(MASKS["ragged"], (2, 1))
  kept, packed = kept_of(labels)
  wanted = oracle(hidden, build(trained), labels, mask, g, softcap=2.0, kept=kept)

  @jax.jit
  def run(hidden, trained):
    score = lambda h, t: scored(h, build(t), labels, mask, softcap=2.0, kept=packed)
    loss = lambda h, t: jnp.sum(g * score(h, t).logp)
    both = jax.grad(loss, argnums=(0, 1))(hidden, trained)
    return score(hidden, trained), jax.grad(loss)(hidden, trained), both

  with jax.set_mesh(sharding.mesh(**shape)):
    scores, d_hidden, (beside, d_trained) = run(hidden, trained)
  for name in ("logp", "correct", "entropy"):
    assert_close(vars(scores)[name], wanted[name])
  assert_close(d_hidden, wanted["d_hidden"])
  assert_close(beside, wanted["d_hidden"])
  if head == "dense":
    assert_close(d_trained, wanted["d_head"])
  else:
    assert_close(d_trained.a, 1.7 * wanted["d_head"] @ np.asarray(trained.b, np.float64).T, 4e-6)


def products(jaxpr):
  """The output shapes of every matrix product in a jaxpr, those inside loops and calls included."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      yield equation.outvars[0].aval.shape
    for inner in core.jaxprs_in_params(equation.params):
      yield from products(inner)


@pytest.mark.parametrize("head", ["dense", "tied"])
def test_no_gradient_of_a_frozen_head_exists(head):
  hidden, labels, g = problem()
  trained, build = TRAINED[head]()
  loss = lambda h, t: weighted(h, build(t), labels, None, g)
  shapes = lambda argnums: [
    sorted(shape)
    for shape in products(jax.make_jaxpr(jax.grad(loss, argnums))(hidden, trained).jaxpr)
  ]
  weight = sorted((EMBED, VOCAB))
  assert weight in shapes((0, 1))  # what is looked for would be found
  assert weight not in shapes(0)
  # one product for the logits, one for the gradient: a recomputation would make three
  assert len(shapes(0)) == 2


@pytest.mark.parametrize("shape", few([None, dict(data=8), ALL_AXES], ALL_AXES), ids=str)
@pytest.mark.parametrize(("trained", "time"), [(False, 20), (True, 20), (False, 3)])
def test_logits_of_a_few_tokens_exist_at_once(shape, trained, time):
  """A chunk is CHUNK tokens a device, however the batch is made of rows and time."""
  batch, vocab = 32, 521  # rare enough a number to be found in the program's text
  hidden, labels, g = problem(batch=batch, time=time)
  head = normal(1, EMBED, vocab)
  loss = lambda h, w: weighted(h, w, labels, None, g)
  compile_ = lambda: jax.jit(jax.grad(loss, (0, 1) if trained else 0)).lower(hidden, head).compile()
  if shape is None:
    text, rows = compile_().as_text(), 1
  else:
    with jax.set_mesh(sharding.mesh(**shape)):
      text, rows = compile_().as_text(), shape["data"] * shape.get("fsdp", 1)
  widths = {vocab, -(-vocab // 2)}  # whole, or shared by the two devices of `tensor`
  found = [tuple(map(int, dims.split(","))) for dims in re.findall(r"\w\[([\d,]+)\]", text)]
  logits = [dims for dims in found if widths & {*dims} and EMBED not in dims]
  assert logits
  most = max(int(np.prod([d for d in dims if d not in widths])) for dims in logits)
  # at least one token of each row that a device holds
  assert most <= max(7, batch // rows)


PODS = [  # (devices along each axis, rows of a batch, tokens of a row)
  (dict(fsdp=256), 256, 2048),
  (dict(fsdp=256), 1024, 2048),
  (dict(data=4, fsdp=64), 256, 2048),
  (dict(fsdp=64, context=4), 64, 8192),
]


def a_pods(sizes, rows, time, vocab):
  """The loss of a frozen head and the shapes of its arguments."""
  labels, g = jnp.zeros((rows, time), jnp.int32), jnp.ones((rows, time))
  loss = lambda h, w: jnp.sum(g * logprob.token_logps(h, w, labels))
  return loss, (
    jax.ShapeDtypeStruct((rows, time, 8), jnp.float32),
    jax.ShapeDtypeStruct((8, vocab), jnp.float32),
  )


@pytest.mark.parametrize(("sizes", "rows", "time"), PODS, ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_on_a_pod_a_chunk_is_of_a_devices_own_tokens(monkeypatch, trained, sizes, rows, time):
  """Not of all devices', which would be two tokens each on 256, and a loop of a thousand turns."""
  monkeypatch.setattr(logprob, "CHUNK", 512)
  shape = {axis: sizes.get(axis, 1) for axis in sharding.AXES}
  mesh = jax.sharding.AbstractMesh(tuple(shape.values()), tuple(shape))
  loss, arguments = a_pods(sizes, rows, time, 521)
  with jax.sharding.use_abstract_mesh(mesh):
    made = jax.make_jaxpr(jax.grad(loss, (0, 1) if trained else 0))(*arguments)
  logits = [shape for shape in products(made.jaxpr) if shape[-1] == 521 and 8 not in shape]
  assert logits
  assert {int(np.prod(shape[:-1])) for shape in logits} == {256 * logprob.CHUNK}


@pytest.mark.parametrize("tied", few([False, True], True))
def test_logits_of_bfloat16_operands_are_not_rounded_to_bfloat16(tied):
  keys = jax.random.split(jax.random.key(0), 3)
  hidden = jax.random.normal(keys[0], (8, 64), jnp.bfloat16)
  head = jax.random.normal(keys[1], (64, 96), jnp.bfloat16)
  labels = jax.random.randint(keys[2], (8,), 0, 96)
  logps = logprob.token_logps(hidden, Transposed(head.T) if tied else head, labels)
  exact = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
  expected = exact[np.arange(8), labels] - np.log(np.exp(exact).sum(-1))
  np.testing.assert_allclose(logps, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("softcap", "mask"),
  few([(cap, mask) for cap in (None, 2.0) for mask in MASKS], (None, "none"), (2.0, "ragged")),
)
def test_the_kl_is_that_of_the_two_distributions(mask, softcap):
  """Against float64, from heads of two kinds; more tokens than a chunk holds."""
  hidden, other = normal(3, BATCH, TIME, EMBED) * 20, normal(4, BATCH, TIME, 32) * 20
  head, other_head = HEADS["tied"](), normal(5, 32, VOCAB)
  logits = lambda x, w: np.asarray(x, np.float64) @ np.asarray(dense(w), np.float64)
  cap = lambda z: z if softcap is None else softcap * np.tanh(z / softcap)
  logps = lambda z: z - np.log(np.exp(z).sum(-1, keepdims=True))
  log_p, log_q = logps(cap(logits(hidden, head))), logps(cap(logits(other, other_head)))
  expected = (np.exp(log_p) * (log_p - log_q)).sum(-1) * MASKS[mask]
  found = logprob.kl_divergence(
    hidden, head, other, other_head, mask=jnp.asarray(MASKS[mask]), softcap=softcap
  )
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)
  same = logprob.kl_divergence(hidden, head, hidden, head, softcap=softcap)
  assert float(jnp.abs(same).max()) == 0.0
  slope = jax.grad(lambda h: logprob.kl_divergence(h, head, other, other_head).sum())(hidden)
  assert float(jnp.abs(slope).max()) == 0.0
