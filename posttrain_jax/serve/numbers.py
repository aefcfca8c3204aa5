"""What the worker counts, for /metrics."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Numbers:
  """Gauges as they are now, and counters since the start; tokens are of prompts or of answers as their names say."""

  running: int  # rows that answer, or read a prompt
  waiting: int
  rows: int
  cache_usage: float  # the part of the rows' slots that hold tokens of texts under way
  prompt_tokens: int
  generation_tokens: int
  prefix_queries: int  # tokens of prompts that were looked for in the prefix cache
  prefix_hits: int
  prefix_bytes: int
  adapters_registered: int
  adapters_on_host: int
  adapters_in_slots: int
  adapters_in_use: int
  adapter_evictions: int
  adapter_host_bytes: int
  compiled_programs: int  # constant after the warm-up
