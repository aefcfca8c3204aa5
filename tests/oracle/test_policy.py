"""Policy-gradient losses against TRL's `_compute_loss` on the same log-probabilities, with ragged masks."""

import collections
import inspect
import math
import textwrap
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: run `make oracle`")
pytest.importorskip("trl", reason="TRL is not installed: run `make oracle`")

from posttrain_jax.losses import kl, policy, spans  # noqa: E402

pytestmark = pytest.mark.oracle

ROWS, TIME, LONGEST = 6, 9, 12
KL_WEIGHT = 0.3


@pytest.fixture(scope="module")
def arrays():
  rng = np.random.default_rng(0)
  logps = rng.normal(-2, 0.6, (ROWS, TIME)).astype(np.float32)
  return types.SimpleNamespace(
    logps=logps,
    old=(logps + rng.normal(0, 0.3, logps.shape)).astype(np.float32),
    ref=(logps + rng.normal(0, 0.5, logps.shape)).astype(np.float32),
    advantages=rng.normal(0, 1, ROWS).astype(np.float32),
    mask=np.arange(TIME) < np.array([9, 3, 1, 6, 8, 2])[:, None],
  )


def trl_loss(trainer, arrays, *, items=None, ratio=None, **options):
  """(loss, gradient with respect to the log-probabilities).

  items: the tokens that count in the whole of what was written, default those of arrays.
  ratio: TRL's importance_sampling_ratio.
  """
  rows = len(arrays.logps)
  logps = torch.tensor(arrays.logps, requires_grad=True)
  tensors = {name: torch.tensor(value) for name, value in vars(arrays).items()}
  args = dict(use_bias_correction_kl=False, delta=None, steps_per_generation=1)
  args |= {name: options.pop(name) for name in list(options) if name in args}
  fields = dict(
    aux_loss_enabled=False,
    top_entropy_quantile=1.0,
    off_policy_mask_threshold=None,
    importance_sampling_level="token",
    beta=0.0,
    epsilon_low=0.2,
    epsilon_high=0.2,
    use_vllm=False,
    _entropy_bonus_enabled=False,
    current_gradient_accumulation_steps=1,
    max_completion_length=LONGEST,
    loss_type="grpo",
  )
  stand_in = mock.MagicMock(
    args=types.SimpleNamespace(**args),
    _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
    **(fields | options),
  )
  stand_in.accelerator.num_processes = 1
  stand_in.accelerator.gather = lambda x: x
  stand_in.accelerator.reduce = lambda x, reduction=None: x
  stand_in._get_per_token_logps_and_entropies = lambda *_, **__: (
    logps,
    torch.zeros_like(logps),
    None,
  )
  mask = tensors["mask"].float()
  inputs = dict(
    prompt_ids=torch.zeros(rows, 1, dtype=torch.long),
    prompt_mask=torch.ones(rows, 1),
    completion_ids=torch.zeros(rows, TIME, dtype=torch.long),
    completion_mask=mask,
    advantages=tensors["advantages"],
    old_per_token_logps=tensors["old"],
    ref_per_token_logps=tensors["ref"],
    old_logps=(tensors["old"] * mask).sum(1),
    num_items_in_batch=mask.sum() if items is None else torch.tensor(float(items)),
  )
  if ratio is not None:
    stand_in.use_vllm = stand_in.vllm_importance_sampling_correction = True
    inputs["importance_sampling_ratio"] = ratio
  loss = trainer._compute_loss(stand_in, None, inputs)
  loss.backward()
  return loss.item(), logps.grad.numpy()


def our_loss(arrays, each, weights):
  loss = lambda logps: jnp.sum(each(logps) * weights)
  return jax.value_and_grad(loss)(jnp.asarray(arrays.logps))


def agree(ours, theirs):
  """(loss, gradient) of each."""
  np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
  np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-4, atol=1e-7)


def surrogates(arrays):
  """name -> (TRL's options, the loss per token)."""
  a = arrays
  token = lambda **options: (
    lambda logps: policy.clipped_surrogate(logps, a.old, a.advantages, a.mask, **options)[0]
  )
  return {
    "plain": (dict(), token(epsilon=0.2)),
    "asymmetric": (dict(epsilon_high=0.28), token(epsilon=0.2, epsilon_high=0.28)),
    "two-sided": (dict(delta=1.3), token(epsilon=0.2, ceiling=1.3)),
    "sequence": (
      dict(importance_sampling_level="sequence", epsilon_low=3e-2, epsilon_high=4e-2),
      lambda logps: policy.sequence_surrogate(
        logps, a.old, a.advantages, spans.whole(a.mask), epsilon=3e-2, epsilon_high=4e-2
      )[0],
    ),
    "kl": (
      dict(beta=KL_WEIGHT),
      lambda logps: token(epsilon=0.2)(logps) + KL_WEIGHT * kl.k3(logps, a.ref, a.mask),
    ),
    "kl, corrected": (
      dict(beta=KL_WEIGHT, use_bias_correction_kl=True),
      lambda logps: (
        token(epsilon=0.2)(logps) + KL_WEIGHT * jnp.exp(logps - a.old) * kl.k3(logps, a.ref, a.mask)
      ),
    ),
  }


def aggregations(arrays):
  """TRL's loss type -> our weights."""
  rows, answers = spans.whole(arrays.mask), len(arrays.mask)
  return {
    "grpo": policy.sequence_mean(rows, answers=answers),
    "bnpo": policy.token_mean(rows, tokens=arrays.mask.sum()),
    "dr_grpo": policy.constant_length(rows, answers=answers, length=LONGEST),
    "dapo": policy.token_mean(rows, tokens=arrays.mask.sum()),
    "luspo": policy.sequence_sum(rows, answers=answers),
  }


NAMES = ["plain", "asymmetric", "two-sided", "sequence", "kl", "kl, corrected"]


@pytest.mark.parametrize("aggregation", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"])
@pytest.mark.parametrize("name", NAMES)
def test_group_relative_losses(name, aggregation, arrays):
  import trl

  options, each = surrogates(arrays)[name]
  expected = trl_loss(trl.GRPOTrainer, arrays, loss_type=aggregation, **options)
  agree(our_loss(arrays, each, aggregations(arrays)[aggregation]), expected)


def test_cispo(arrays):
  import trl

  expected = trl_loss(trl.GRPOTrainer, arrays, loss_type="cispo", epsilon_high=1.2)
  each = lambda logps: policy.cispo(logps, arrays.old, arrays.advantages, arrays.mask, ceiling=1.2)[
    0
  ]
  agree(our_loss(arrays, each, aggregations(arrays)["dapo"]), expected)


def test_rloo_is_one_ratio_and_one_loss_an_answer(arrays):
  import trl

  expected = trl_loss(trl.RLOOTrainer, arrays)
  each = lambda logps: policy.sequence_surrogate(
    logps, arrays.old, arrays.advantages, spans.whole(arrays.mask), epsilon=0.2, normalise=False
  )[0]
  agree(our_loss(arrays, each, aggregations(arrays)["grpo"]), expected)


ACCUMULATED = {  # micro-batches of two rows in an update, of the three that were written
  "all three": slice(0, 6),
  "the last two": slice(2, 6),
}


@pytest.mark.parametrize("update", ACCUMULATED)
@pytest.mark.parametrize("aggregation", ["grpo", "dr_grpo", "dapo", "luspo"])
def test_accumulated_micro_batches_of_unlike_lengths(aggregation, update, arrays):
  """The sum of TRL's losses of 12, 7 and 10 tokens is ours of the update at once.

  In an update that is shorter than what was written TRL's token mean takes the mean number of tokens for the number
  there are; ours counts them.
  """
  import trl

  part = lambda rows: types.SimpleNamespace(**{n: v[rows] for n, v in vars(arrays).items()})
  whole = part(ACCUMULATED[update])
  count = len(whole.logps) // 2
  options = dict(current_gradient_accumulation_steps=count, steps_per_generation=3)
  items = arrays.mask.sum()
  begins = range(ACCUMULATED[update].start, 6, 2)
  each = [
    trl_loss(
      trl.GRPOTrainer,
      part(slice(at, at + 2)),
      items=items,
      loss_type=aggregation,
      **options,
    )
    for at in begins
  ]
  counted = whole.mask.sum() / (items * count / 3) if aggregation == "dapo" else 1.0
  ours = our_loss(whole, surrogates(whole)["plain"][1], aggregations(whole)[aggregation])
  expected = sum(loss for loss, _ in each), np.concatenate([grads for _, grads in each])
  agree([part * counted for part in ours], expected)


def trl_ratio(old, sampling, mask, mode, low, high):
  """The lines of TRL that make `importance_sampling_ratio`."""
  import trl

  source = inspect.getsource(trl.GRPOTrainer._generate_and_score_completions)
  begin = "                mask = completion_mask if tool_mask is None"
  end = "            # Compute the per-token log probabilities for the reference model"
  assert source.count(begin) == source.count(end) == 1
  names = dict(
    self=types.SimpleNamespace(
      vllm_importance_sampling_mode=mode,
      vllm_importance_sampling_clip_min=low,
      vllm_importance_sampling_clip_max=high,
    ),
    torch=torch,
    math=math,
    tool_mask=None,
    completion_mask=torch.tensor(mask).float(),
    old_per_token_logps=torch.tensor(old),
    sampling_per_token_logps=torch.tensor(sampling),
  )
  exec(textwrap.dedent(source[source.index(begin) : source.index(end)]), names)
  return names["vllm_importance_sampling_ratio"]


@pytest.mark.parametrize(
  "mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
)
@pytest.mark.parametrize(("low", "high"), [(None, 1.1), (0.9, 1.2)])
def test_importance_weights(mode, low, high, arrays):
  """Weights and weighted loss; a token whose sampler said nothing counts 1."""
  import trl

  sampling = arrays.old + np.random.default_rng(1).normal(0, 0.2, arrays.old.shape).astype(
    np.float32
  )
  sampling[0, 2] = np.nan
  ratio = trl_ratio(arrays.old, sampling, arrays.mask, mode, low, high)
  level, outside = mode.split("_")
  weights = policy.importance_weights(
    arrays.old,
    sampling,
    spans.whole(arrays.mask),
    level=level,
    ceiling=high,
    floor=low,
    outside=outside,
  )
  theirs = np.broadcast_to(ratio.numpy(), weights.shape)
  np.testing.assert_allclose(weights, np.where(arrays.mask, theirs, 0), rtol=1e-5)
  beyond = (theirs == 0) | (theirs == np.float32(high))
  assert beyond[arrays.mask].any()
  assert not beyond[arrays.mask].all()
  plain = surrogates(arrays)["plain"][1]
  ours = our_loss(arrays, lambda logps: plain(logps) * weights, aggregations(arrays)["dapo"])
  agree(ours, trl_loss(trl.GRPOTrainer, arrays, loss_type="dapo", ratio=ratio))
