"""What /metrics tells, in Prometheus' text, under vLLM's names with another prefix.

A dashboard made for vLLM reads it when `vllm:` is replaced by `posttrain:`.  Times are of one monotonic clock.  There
is no label of an adapter: names come from requests, and each would be a series for ever.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
  from posttrain_jax.serve.answering import Choice
  from posttrain_jax.serve.asked import Started

log = logging.getLogger(__name__)
PREFIX = "posttrain:"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
_LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000)


class Metrics:
  """Counts and times of answers; what the worker knows itself is asked of it when somebody reads."""

  def __init__(self, model: str) -> None:
    self.registry = prometheus.CollectorRegistry()
    self._model = model
    self.success = self._counter("request_success", "answers that ended", "finished_reason")
    self.failures = self._counter("request_failure", "answers that came to nothing")
    self.refused = self._counter("request_refused", "requests that were refused", "status")
    self.first = self._times("time_to_first_token_seconds", "from the request to its first token")
    self.between = self._times("inter_token_latency_seconds", "between tokens, mean of a window")
    self.whole = self._times("e2e_request_latency_seconds", "from the request to its end")
    self.queued = self._times("request_queue_time_seconds", "until a row was free")
    self.reading = self._times("request_prefill_time_seconds", "from its row to the first tokens")
    self.loading = self._times("adapter_load_seconds", "an adapter's files read")
    self.decoding = self._times("request_decode_time_seconds", "from the first token to the end")
    self.prompts = self._lengths("request_prompt_tokens", "tokens of a prompt")
    self.lengths = self._lengths("request_generation_tokens", "tokens of an answer")
    self._first_at: dict[int, float] = {}
    self._loaded: list[float] = []

  def _counter(self, name: str, what: str, *labels: str) -> Any:
    made = prometheus.Counter(PREFIX + name, what, ("model_name", *labels), registry=self.registry)
    return made if labels else made.labels(self._model)

  def _times(self, name: str, what: str) -> Any:
    return self._histogram(name, what, _SECONDS)

  def _lengths(self, name: str, what: str) -> Any:
    return self._histogram(name, what, _LENGTHS)

  def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Any:
    made = prometheus.Histogram(
      PREFIX + name, what, ("model_name",), buckets=buckets, registry=self.registry
    )
    return made.labels(self._model)

  def started(self, choice: Choice, event: Started) -> None:
    """A row is its own: it has left the queue."""
    self.queued.observe(event.waited)
    self.prompts.observe(len(choice.asked.prompt))

  def tokens(self, choice: Choice, count: int, now: float, since: float) -> None:
    if not count:
      return
    if choice.latest is None:
      self.first.observe(now - since)
      self.reading.observe(max(0.0, now - since - choice.waited))
      self._first_at[id(choice)] = now
    else:
      self.between.observe((now - choice.latest) / count)

  def ended(self, choice: Choice, seconds: float) -> None:
    self.success.labels(self._model, choice.reason).inc()
    self.whole.observe(seconds)
    self.lengths.observe(choice.drawn)
    first = self._first_at.pop(id(choice), None)
    if first is not None and choice.latest is not None:
      self.decoding.observe(choice.latest - first)

  def failed(self, error: Exception) -> None:
    self.failures.inc()
    log.error("an answer failed: %s: %s", type(error).__name__, error)

  def dropped(self, choices: list[Choice]) -> None:
    """Answers whose reader is gone."""
    for choice in choices:
      self._first_at.pop(id(choice), None)
      if choice.reason is None:
        self.success.labels(self._model, "abort").inc()

  def refuse(self, status: int) -> None:
    self.refused.labels(self._model, str(status)).inc()

  def watch(self, worker: Any) -> None:
    """The worker's own numbers are told too, as they are when somebody asks."""
    self._loaded = worker.adapters.load_seconds
    self.registry.register(_OfWorker(worker, self._model))

  def text(self) -> str:
    while self._loaded:
      self.loading.observe(self._loaded.pop())
    return prometheus.generate_latest(self.registry).decode()


class _OfWorker:
  """`Worker.numbers()` as families: a field of it each."""

  GAUGES = {  # noqa: RUF012  (a table)
    "running": ("num_requests_running", "answers being written"),
    "waiting": ("num_requests_waiting", "answers that wait for a row"),
    "cache_usage": ("kv_cache_usage_perc", "part of the rows' positions in use, 0 to 1"),
    "compiled_programs": (
      "compiled_programs",
      "programs that were run; constant after the warm-up",
    ),
    "rows": ("rows", "answers that can be written at once"),
    "prefix_bytes": ("prefix_cache_bytes", "keys and values kept of what prompts begin with"),
    "adapter_host_bytes": ("adapter_host_bytes", "adapters on the host"),
  }
  COUNTERS = {  # noqa: RUF012
    "prompt_tokens": ("prompt_tokens", "tokens of prompts that were read"),
    "generation_tokens": ("generation_tokens", "tokens that were drawn"),
    "prefix_queries": ("prefix_cache_queries", "tokens of prompts looked for in the prefix cache"),
    "prefix_hits": ("prefix_cache_hits", "tokens of prompts found in the prefix cache"),
    "adapter_evictions": ("adapter_evictions", "adapters that made room for another in a slot"),
  }

  def __init__(self, worker: Any, model: str) -> None:
    self._worker, self._model = worker, model

  def describe(self) -> list[Any]:
    return []

  def collect(self) -> Any:
    numbers = self._worker.numbers()
    for kinds, family in ((self.GAUGES, GaugeMetricFamily), (self.COUNTERS, CounterMetricFamily)):
      for field, (name, what) in kinds.items():
        made = family(PREFIX + name, what, labels=["model_name"])
        made.add_metric([self._model], float(getattr(numbers, field)))
        yield made
    made = GaugeMetricFamily(
      PREFIX + "adapters", "adapters by state", labels=["model_name", "state"]
    )
    for state in ("registered", "on_host", "in_slots", "in_use"):
      made.add_metric([self._model, state], float(getattr(numbers, f"adapters_{state}")))
    yield made
