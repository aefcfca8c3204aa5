"""8-bit Adam against bitsandbytes itself, GaLore with PyTorch's SVD, LoRA+ against PEFT's groups."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.adapters.lora import LoRA
from posttrain_jax.optim import adam8bit, galore
from tests.optim import cases, test_galore

torch = pytest.importorskip("torch", reason="needs .venv-oracle (make oracle)")
bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs .venv-oracle (make oracle)")
peft = pytest.importorskip("peft", reason="needs .venv-oracle (make oracle)")

pytestmark = pytest.mark.oracle
STEPS, RATE, BETAS, EPS = 20, 0.01, (0.9, 0.99), 1e-8
SHAPES = {"rows_of_blocks": (32, 512), "across_rows": (48, 100), "small": (63, 65)}


def gradients(shape):
  """Twenty, over several decades, with zeros."""
  rng = np.random.default_rng(1)
  drawn = rng.normal(size=(STEPS, *shape)) * 10.0 ** rng.uniform(-5, 0, size=(STEPS, *shape))
  drawn[:, ::7] = 0
  return drawn.astype(np.float32)


def bnb(w, decay):
  """(parameter, bitsandbytes' AdamW with 8-bit moments on its CPU kernel)."""
  p = torch.nn.Parameter(torch.from_numpy(w.copy()))
  return p, bitsandbytes.optim.AdamW8bit([p], lr=RATE, betas=BETAS, eps=EPS, weight_decay=decay)


def theirs(p, optimizer, g):
  p.grad = torch.from_numpy(g.copy())
  optimizer.step()
  return optimizer.state[p]


def ours(decay, semantics="cpu"):
  return adam8bit.adamw(
    lambda _: RATE,
    b1=BETAS[0],
    b2=BETAS[1],
    eps=EPS,
    weight_decay=decay,
    mask=lambda params: jax.tree.map(lambda _: True, params),
    semantics=semantics,
  )


def as_ours(state, shape):
  """bitsandbytes' state as ours, bit for bit."""
  array = lambda name, *shape: jnp.asarray(state[name].numpy().copy()).reshape(*shape)
  if "absmax1" not in state:
    return adam8bit.State(
      *[jnp.int32(state["step"]), *[{"w": array(f"state{i}", *shape)} for i in (1, 2)]]
    )
  blocks = (shape[0], -1) if shape[-1] % 256 == 0 else (-1,)
  moment = lambda i: adam8bit.Blockwise(
    array(f"state{i}", *shape), array(f"absmax{i}", *blocks), signed=i == 1, stacked=False
  )
  return adam8bit.State(jnp.int32(state["step"]), {"w": moment(1)}, {"w": moment(2)})


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("name", SHAPES)
def test_each_of_20_steps_is_bitsandbytes(name, decay):
  """From its own state and parameter at every step: equal parameters and block scales, codes at least as near.

  Its CPU kernel looks codes up in a table of 2^16 entries, so that 0 is stored as 1.9e-5 of the block's largest; its
  order of decay is that of `semantics="cpu"`.
  """
  shape = SHAPES[name]
  w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  (p, optimizer), update = bnb(w, decay), jax.jit(ours(decay).update)
  before, state = {"w": jnp.asarray(w)}, ours(decay).init({"w": w})
  for g in gradients(shape):
    exact, _ = jax.jit(moments)(g, state)
    changes, found = update({"w": jnp.asarray(g)}, state, before)
    their = theirs(p, optimizer, g)
    wanted = as_ours(their, shape)
    after = p.detach().numpy()
    np.testing.assert_allclose(before["w"] + changes["w"], after, rtol=2e-6, atol=1e-6)
    for ours_, theirs_, value in zip((found.mu, found.nu), (wanted.mu, wanted.nu), exact):
      near, far = (np.asarray(adam8bit.value(x["w"])) for x in (ours_, theirs_))
      if name == "small":
        np.testing.assert_allclose(near, far, rtol=1e-5, atol=1e-7 * np.abs(far).max())
        continue
      np.testing.assert_allclose(ours_["w"].absmax, theirs_["w"].absmax, rtol=1e-6)
      largest = np.abs(value).max()
      differ = np.asarray(ours_["w"].codes) != np.asarray(theirs_["w"].codes)
      assert np.all(np.abs(near - value)[differ] <= np.abs(far - value)[differ] + 1e-6 * largest)
      assert np.max(np.abs(far - value) - np.abs(near - value)) < 2**-15 * largest
      assert np.mean(differ[np.abs(value) > 0.01 * largest]) < 0.01
    before, state = {"w": jnp.asarray(after.copy())}, wanted


def moments(g, state):
  """The moments after g, before they are rounded."""
  m = BETAS[0] * adam8bit.value(state.mu["w"]) + (1 - BETAS[0]) * g
  v = BETAS[1] * adam8bit.value(state.nu["w"]) + (1 - BETAS[1]) * g * g
  return (m, v), None


@pytest.mark.parametrize("semantics", adam8bit.SEMANTICS)
@pytest.mark.parametrize("name", SHAPES)
def test_20_steps_on_their_own_end_where_bitsandbytes_does(name, semantics):
  """Gradients of one size, for which its table is fine enough; no decay, whose order differs by 1e-2 of the step."""
  w = np.random.default_rng(0).normal(size=SHAPES[name]).astype(np.float32)
  grads = np.random.default_rng(1).normal(size=(STEPS, *w.shape)).astype(np.float32)
  p, optimizer = bnb(w, 0.0)
  for g in grads:
    theirs(p, optimizer, g)
  made = [{"w": jnp.asarray(g)} for g in grads]
  found, _ = cases.after(ours(0.0, semantics), {"w": jnp.asarray(w)}, made)
  wanted = p.detach().numpy()
  assert np.linalg.norm(found["w"] - wanted) < 0.01 * np.linalg.norm(wanted - w)


@pytest.mark.parametrize("shape", test_galore.SHAPES)
@pytest.mark.parametrize("projection", galore.PROJECTIONS)
def test_galore_with_pytorchs_svd(shape, projection):
  """Three steps with a new projector at the third; signs of singular vectors made the same."""

  def svd(g, full_matrices):
    return [x.numpy() for x in torch.linalg.svd(torch.from_numpy(g), full_matrices=full_matrices)]

  rng = np.random.default_rng(2)
  w, *grads = rng.normal(size=(4, 2, *test_galore.SHAPES[shape]))
  found, _ = test_galore.ours(w, grads, projection)
  for layer in range(2):
    wanted, _ = test_galore.authors(w[layer].T, [g[layer].T for g in grads], projection, svd=svd)
    np.testing.assert_allclose(found[layer], wanted.T, rtol=2e-4, atol=2e-5)


def test_lora_plus_has_pefts_groups():
  """Rates of A, B and an adapted embedding after one step of SGD, whose update is the rate itself."""

  from peft.optimizers import create_loraplus_optimizer

  class Model(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.embed_tokens = torch.nn.Embedding(11, 8)
      self.q_proj = torch.nn.Linear(8, 6, bias=False)

    def forward(self, ids):
      return self.q_proj(self.embed_tokens(ids))

  chosen = peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], use_dora=False)
  model = peft.get_peft_model(Model(), chosen)
  optimizer = create_loraplus_optimizer(
    model, torch.optim.SGD, lr=0.25, loraplus_lr_ratio=16.0, loraplus_lr_embedding=0.125
  )
  before = {name: p.detach().clone() for name, p in model.named_parameters()}
  for p in model.parameters():
    p.grad = torch.ones_like(p)
  optimizer.step()
  moved = {name: float((before[name] - p.detach()).mean()) for name, p in model.named_parameters()}
  rate = lambda part: next(v for name, v in moved.items() if part in name)

  one = lambda *lead: LoRA(jnp.ones((*lead, 8, 2)), jnp.ones((*lead, 2, 6)), None)
  params = {"embed_tokens": {"weight": one()}, "layers": {"q_proj": {"weight": one(1)}}}
  options = dict(lr=0.25, weight_decay=0.0, clip=None, b1=0.0, loraplus_lr_ratio=16.0)
  ours_ = cases.made("sgd", **options, loraplus_lr_embedding=0.125)
  found, _ = cases.after(ours_, params, [jax.tree.map(jnp.ones_like, params)])
  step = lambda node: (float(1 - node.a.mean()), float(1 - node.b.mean()))
  layer, embedding = found["layers"]["q_proj"]["weight"], found["embed_tokens"]["weight"]
  assert step(layer) == pytest.approx((rate("q_proj.lora_A"), rate("q_proj.lora_B")))
  wanted = (rate("lora_embedding_A"), rate("lora_embedding_B"))
  assert step(embedding) == pytest.approx(wanted)
  assert step(layer) == pytest.approx((0.25, 4.0))
  assert math.isclose(wanted[0], 0.125, rel_tol=1e-6)
