"""An answer of several turns: what the model wrote, and between its turns what tools and environments said."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from posttrain_jax.rollout.requests import Answer

# why an episode ends, beside the reasons of its last turn
UNPARSED = "unparsed"  # a turn that cannot be read
MAX_TURNS = (
  "max_turns"  # the last turn that it may have called a tool, or did not end the environment
)
DONE = "done"  # the environment says so
FAILED = "environment"  # it raised, died or was too slow


@dataclasses.dataclass(frozen=True)
class Episode(Answer):
  """An answer whose tokens are all that stands behind the prompt, in order.

  written: [tokens] True where the model wrote the token; elsewhere logps are 0 and no filter kept anything.
  turns: of the model.  calls, failures: of tools, and those that raised, were unknown or too slow.
  messages: the turns and what was said between them.
  final: the words of the last turn, where it ended the episode by itself; "" where it was cut, unparsed or a call.
  problem: why it failed or cannot be parsed, in words.
  reward: the environment's own; None where it has none.
  left: what is known of the environment when the episode has ended.
  """

  written: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, bool))
  turns: int = 0
  calls: int = 0
  failures: int = 0
  messages: Sequence[Mapping[str, Any]] = ()
  final: str = ""
  problem: str = ""
  reward: float | None = None
  left: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def drawn(self) -> int:
    """How many tokens the model wrote."""
    return int(self.written.sum())

  @property
  def beside(self) -> dict[str, Any]:
    """What a journal keeps of it beside its tokens, as JSON."""
    kept = ("turns", "calls", "failures", "messages", "final", "problem", "reward", "left")
    runs = np.flatnonzero(np.diff(self.written.astype(int), prepend=0, append=0)).tolist()
    prompt = [*map(int, self.request.prompt)]
    return {**{name: getattr(self, name) for name in kept}, "written": runs, "prompt": prompt}


def restored(request: Any, kept: Mapping[str, Any]) -> Answer:
  """The answer that a journal kept, an Episode where it has several turns."""
  fields = dict(kept)
  beside = fields.pop("beside", None)
  if beside is None:
    return Answer(request, **fields)
  beside = dict(beside)
  runs = np.asarray(beside.pop("written"), int).reshape(-1, 2)
  written = np.zeros(len(fields["tokens"]), bool)
  for start, stop in runs:
    written[start:stop] = True
  request = dataclasses.replace(request, prompt=beside.pop("prompt"))
  return Episode(request, **fields, written=written, **beside)
