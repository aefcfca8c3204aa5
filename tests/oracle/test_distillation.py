"""Divergences from a teacher against TRL's GKD, distillation and SDPO, on the same logits with ragged masks."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: run `make oracle`")
pytest.importorskip("trl", reason="TRL is not installed: run `make oracle`")

from trl.experimental.gkd.gkd_trainer import GKDTrainer  # noqa: E402
from trl.experimental.sdpo import loss_utils as sdpo  # noqa: E402
from trl.trainer.distillation_trainer import _chunked_divergence_loss  # noqa: E402

from posttrain_jax.losses import distillation, policy  # noqa: E402
from posttrain_jax.losses.distillation import Likeliest, Loss, Options, Whole  # noqa: E402

pytestmark = pytest.mark.oracle

ROWS, TIME, VOCAB, EMBED, WIDER = 4, 9, 50, 12, 20
# TRL's beta -> what it is called here
BETAS = {0.0: Loss("forward_kl"), 1.0: Loss("reverse_kl"), 0.3: Loss("jsd", 0.3), 0.5: Loss("jsd")}
beta_and_loss = pytest.mark.parametrize(("beta", "loss"), BETAS.items(), ids=map(str, BETAS))


@pytest.fixture(scope="module")
def arrays():
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(0, 1.5, shape).astype(np.float32)
  return types.SimpleNamespace(
    student=normal(ROWS, TIME, EMBED),
    teacher=normal(ROWS, TIME, WIDER),
    head=normal(EMBED, VOCAB) / 2,
    teacher_head=normal(WIDER, VOCAB) / 3,
    labels=rng.integers(0, VOCAB, (ROWS, TIME)),
    mask=np.arange(TIME) < np.array([9, 3, 1, 6])[:, None],
  )


def ours(arrays, loss, items, hidden, head, teacher=None, **how):
  """The loss of a batch that may be a part of one with so many items; of whole hidden states, or of a teacher's top."""
  told = distillation.compared(
    hidden,
    head,
    Whole(jnp.asarray(arrays.teacher)) if teacher is None else teacher,
    jnp.asarray(arrays.teacher_head) if teacher is None else None,
    jnp.asarray(arrays.labels),
    mask=jnp.asarray(arrays.mask),
    options=Options(loss, **how),
  )
  return jnp.sum(told.divergence) / items


@beta_and_loss
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_loss_of_gkd(arrays, beta, loss, temperature):
  logits = torch.tensor(arrays.student @ arrays.head, requires_grad=True)
  labels = torch.tensor(np.where(arrays.mask, arrays.labels, -100))
  theirs = GKDTrainer.generalized_jsd_loss(
    logits,
    torch.tensor(arrays.teacher @ arrays.teacher_head),
    labels,
    beta=beta,
    temperature=temperature,
    num_items_in_batch=torch.tensor(31),
  )
  theirs.backward()
  of_logits = lambda z: ours(arrays, loss, 31, z, jnp.eye(VOCAB), temperature=temperature)
  value, gradient = jax.jit(jax.value_and_grad(of_logits))(arrays.student @ arrays.head)
  assert float(value) == pytest.approx(theirs.item(), rel=1e-5)
  np.testing.assert_allclose(gradient, logits.grad.numpy(), rtol=1e-3, atol=1e-6)


@beta_and_loss
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_chunked_divergence_of_two_widths_and_its_head(arrays, beta, loss, softcap):
  hidden = torch.tensor(arrays.student, requires_grad=True)
  head = torch.tensor(arrays.head.T.copy(), requires_grad=True)
  theirs, _, count = _chunked_divergence_loss(
    hidden,
    torch.tensor(arrays.teacher),
    head,
    torch.tensor(arrays.teacher_head.T.copy()),
    torch.tensor(arrays.mask.astype(np.int64)),
    beta,
    student_final_logit_softcapping=softcap,
    teacher_final_logit_softcapping=softcap,
    temperature=1.3,
  )
  theirs.backward()
  assert int(count) == arrays.mask.sum()
  how = dict(temperature=1.3, softcap=softcap, teacher_softcap=softcap)
  of = lambda h, w: ours(arrays, loss, arrays.mask.sum(), h, w, **how)
  value, (of_hidden, of_head) = jax.jit(jax.value_and_grad(of, (0, 1)))(arrays.student, arrays.head)
  assert float(value) == pytest.approx(theirs.item(), rel=1e-4)
  np.testing.assert_allclose(of_hidden, hidden.grad.numpy(), rtol=2e-3, atol=1e-6)
  np.testing.assert_allclose(of_head, head.grad.numpy().T, rtol=2e-3, atol=1e-6)


@beta_and_loss
def test_some_tokens_and_a_tail(arrays, beta, loss):
  """TRL takes the student's likeliest, we the teacher's, which are known beforehand: here both are given the former."""
  logits = torch.tensor(arrays.student @ arrays.head, requires_grad=True)
  taught = torch.tensor(arrays.teacher @ arrays.teacher_head)
  each = sdpo.compute_topk_self_distillation_loss(
    logits, taught, distillation_topk=6, distillation_alpha=beta, distillation_add_tail=True
  )
  theirs = (each * torch.tensor(arrays.mask)).sum()
  theirs.backward()
  _, ids = jax.lax.top_k(jnp.asarray(arrays.student @ arrays.head), 6)
  logps = jax.nn.log_softmax(jnp.asarray(arrays.teacher @ arrays.teacher_head))
  among = jnp.take_along_axis(logps, ids, -1)
  rest = jnp.log1p(-jnp.sum(jnp.exp(among), axis=-1, keepdims=True))
  teacher = Likeliest(ids, jnp.concatenate([among, rest], -1))
  of_logits = lambda z: ours(arrays, loss, 1, z, jnp.eye(VOCAB), teacher)
  value, gradient = jax.jit(jax.value_and_grad(of_logits))(arrays.student @ arrays.head)
  assert float(value) == pytest.approx(theirs.item(), rel=1e-4)
  np.testing.assert_allclose(gradient, logits.grad.numpy(), rtol=5e-3, atol=1e-5)


def test_the_reverse_kl_of_drawn_tokens_as_an_advantage(arrays):
  logits = torch.tensor(arrays.student @ arrays.head, requires_grad=True)
  each = sdpo.compute_sampled_token_self_distillation_loss(
    logits,
    torch.tensor(arrays.teacher @ arrays.teacher_head),
    torch.tensor(arrays.labels),
    distillation_alpha=1.0,
  )
  (each * torch.tensor(arrays.mask)).sum().backward()
  label = lambda z: jnp.take_along_axis(
    jax.nn.log_softmax(z), jnp.asarray(arrays.labels)[..., None], -1
  )[..., 0]
  taught = label(jnp.asarray(arrays.teacher @ arrays.teacher_head))

  def loss(z):
    logps = label(z)
    advantages = -jax.lax.stop_gradient(logps - taught)
    return jnp.sum(policy.reinforce(logps, advantages, jnp.asarray(arrays.mask))[0])

  gradient = jax.jit(jax.grad(loss))(arrays.student @ arrays.head)
  np.testing.assert_allclose(gradient, logits.grad.numpy(), rtol=1e-3, atol=1e-5)
