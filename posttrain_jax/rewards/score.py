"""A score is a value, or missing with a reason."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Score:
  """What a verifier says of an answer; None is missing: it is tried again, counted, and never 0."""

  value: float | None
  reason: str = ""
