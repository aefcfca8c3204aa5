"""What must hold before the first step, cheap to see and fatal where it does not; objectives have `check_start`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.data import encoded, templates
from posttrain_jax.data.templates import Template
from posttrain_jax.models import decoder
from posttrain_jax.objectives import Context, policy

if TYPE_CHECKING:
  from posttrain_jax.build.run import Pieces

TOLERANCE = 1e-5  # of a fresh adapter's logits against the base's, relative to their size


def fresh_adapter(pieces: Pieces, say: Callable[[str], None]) -> None:
  """A fresh adapter leaves the logits unchanged; what stands before the text may not, and says so.

  What took its start out of the base was compared with the original as that was read (`build.start`).
  """
  trees, base = pieces.trees, pieces.model
  if trees.adapter_config is None or base.started is not None:
    return
  tokens = jnp.asarray(np.arange(16, dtype=np.int32)[None] % base.config.vocab_size)
  logits = lambda params: decoder.forward(params, tokens, base.config, dtype=base.dtype)

  @jax.jit  # in one program: apart, with what compares them, they are ten
  def compared(trainable: Any, context: Context) -> tuple[Any, Any]:
    bound, plain = logits(policy(trainable, context)), logits(context.base)
    change = jnp.max(jnp.abs(bound - plain)) / jnp.max(jnp.abs(plain))
    return jnp.isfinite(plain).all(), change

  context = dataclasses.replace(trees.context, fixed=trees.carried)
  is_finite, change = map(float, compared(trees.trainable, context))
  if not is_finite:
    raise ValueError(
      f"{base.folder}: the base gives logits that are not finite; its weights hold NaN or are too large for"
      f" {jnp.dtype(base.dtype).name}, and nothing can be trained on it"
    )
  method = trees.adapter_config.method
  if base.earlier is not None and base.earlier.goes_on is not None:
    say(f"the {method} that goes on changes the base's logits by {change:.2g} of their size")
  elif not trees.adapter_config.in_weights:
    say(f"the fresh {method} changes the logits by {change:.2f} of their size")
  elif not change <= TOLERANCE:
    raise ValueError(
      f"the fresh adapter changes the logits by {change:.1e} of their size before any training"
    )


def end_of_turn(
  examples: Iterable[Any],
  tokenizer: Any,
  template: Template | None = None,
  stops: Collection[int] = (),
) -> None:
  """Raises unless each trained span ends with the token that ends a turn (or the EOS of a text).

  A model that never trains on it never learns to stop.  Examples that were cut are exempt.

  Args:
    stops: what ends whatever the model writes; an answer that was drawn may end in any of them.
  """
  ending = None if template is None else templates.end_of_turn(tokenizer, template)
  for example in examples:
    wanted = ending if example.is_chat else tokenizer.eos_token_id
    if example.is_chat and template is None:
      raise ValueError(
        f"{example.origin} is a conversation: pass the chat template it was made with"
      )
    if _is_drawn(example) and _spans_end_with(example, {*stops, wanted} - {None}):
      continue
    if wanted is None and template is not None:
      raise ValueError(
        f"template {template.name!r} ends an assistant's turn with {template.turn_ending!r}, which starts with no"
        " special token; a model trained on it would not learn to stop"
      )
    if not example.is_cut and not _spans_end_with(example, {wanted}):
      raise ValueError(
        f"{example.origin}: a trained span does not end with {tokenizer.decode([wanted])!r}, so the"
        f" model would not learn to stop:\n{encoded.describe(example, tokenizer)}"
      )


def _is_drawn(example):
  return isinstance(example, encoded.Example) and example.is_drawn


def _spans_end_with(example, tokens):
  ends = np.flatnonzero(example.mask & ~np.append(example.mask[1:], False))
  return len(ends) > 0 and bool(np.isin(example.tokens[ends], [*tokens]).all())
