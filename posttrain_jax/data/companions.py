"""Answers to other prompts, from which KTO estimates how far the policy is from its reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from posttrain_jax.data.answers import Answers, join, with_values
from posttrain_jax.data.encoded import Example


def beside(examples: Sequence[Answers], limit: int, *, share: bool = True) -> list[Answers]:
  """Each example with a companion: the answers of the nearest one before it that has another prompt, behind its own.

  TRL takes the one before it, which of a pair told apart into labels has the same prompt.  Pairs say their labels,
  1 and 0, and 1 of a gold answer.

  Args:
    limit: tokens of a row; where prompt and answers do not fit, less of the prompt is there.
    share: whether answers to a prompt share its tokens, or repeat them.

  Raises:
    ValueError: all prompts are one.
  """
  if "label" not in examples[0].values:
    examples = with_values(examples, "label", ((1.0, 0.0, 1.0)[: e.count] for e in examples))
  prompts = [example.prompt(0).tobytes() for example in examples]
  if len(set(prompts)) < 2:
    raise ValueError(
      "all answers are to one prompt: KTO estimates its KL from answers to other prompts; add rows with others, or"
      " leave the estimate out (--config.objective.estimate_kl=false, of KTO)"
    )
  result, other = [], 0
  # the nearest before the first is looked for from the end
  for at in range(len(examples) - 1, -1, -1):
    if prompts[at] != prompts[0]:
      other = at
      break
  for at, example in enumerate(examples):
    if at and prompts[at - 1] != prompts[at]:
      other = at - 1
    companion = _companion(example, examples[other], limit, share)
    result.append(dataclasses.replace(example, companion=companion))
  return result


def _companion(example: Answers, other: Answers, limit: int, share: bool) -> Answers:
  """The answers of `other` behind the prompt of `example`; where they do not fit, less of the prompt."""
  answers = [other.tokens[other.mask & (other.answer == i)] for i in range(example.count)]
  # a prompt is what can be spared: of the answers all is scored; its last token stands before each of them
  left = limit - sum(map(len, answers))
  room = left - example.count + 1 if share else left // example.count
  parts = []
  for i, answer in enumerate(answers):
    prompt = example.prompt(i)[-room:]
    mask = np.arange(len(prompt) + len(answer)) >= len(prompt)
    parts.append(Example(np.concatenate([prompt, answer]), mask, origin=example.origin))
  return join(parts, share=share)
