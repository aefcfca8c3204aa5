"""What comparisons with PEFT share."""

import functools
import warnings

import jax
import numpy as np
import torch

from posttrain_jax import adapters
from posttrain_jax.models import decoder


def quiet(function, *args, **kwargs):
  """PEFT warns of tied weights and missing configs; errors still surface."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return function(*args, **kwargs)


@functools.partial(jax.jit, static_argnums=3)
def logits_of(params, adapter, tokens, config):
  return decoder.forward(adapters.bind(params, adapter), tokens, config)


def torch_logits(model, tokens):
  with torch.no_grad():
    return model(torch.tensor(tokens)).logits.numpy()


def close(ours, theirs, rtol=1e-4):
  """Equal to rtol of the largest value."""
  np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * np.abs(theirs).max())
