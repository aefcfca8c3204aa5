"""How sure a share is that was counted on so many questions."""

from __future__ import annotations

import math


def wilson(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
  """Wilson's interval of a share, 95 % for the default z.  Wilson 1927.

  >>> [round(x, 4) for x in wilson(8, 10)]
  [0.4902, 0.9433]
  """
  if total == 0:
    return 0.0, 1.0
  share = correct / total
  centre = share + z * z / (2 * total)
  half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
  scale = 1 + z * z / total
  return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
