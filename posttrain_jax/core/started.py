"""What a start took, from the command to its first step, by part."""

from __future__ import annotations

import dataclasses
import time

from posttrain_jax.core.progress import took

SHORT = 0.05  # seconds: what took less is not told


@dataclasses.dataclass
class Started:
  """Seconds of each part; one ends where the next begins.

  >>> started = Started(began=time.monotonic() - 2.0)
  >>> started.ends("imports"), started.ends("model")
  (None, None)
  >>> started.told()
  'started in 2.0 s: imports 2.0'
  """

  began: float = dataclasses.field(default_factory=time.monotonic)
  parts: dict[str, float] = dataclasses.field(default_factory=dict)

  def ends(self, part: str) -> None:
    """What was done since the last part ended was this; a part may come in several pieces."""
    so_far = sum(self.parts.values())
    since = time.monotonic() - self.began - so_far
    self.parts[part] = self.parts.get(part, 0.0) + since

  def told(self) -> str:
    long = [f"{part} {sec:.1f}" for part, sec in self.parts.items() if sec >= SHORT]
    return f"started in {took(sum(self.parts.values()))}: {', '.join(long)}"

  def seconds(self) -> dict[str, float]:
    return {part: round(sec, 2) for part, sec in self.parts.items()}
