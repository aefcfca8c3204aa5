"""A model for lm-evaluation-harness, in this process: `pip install 'posttrain-jax[harness]'`.

  model = harness.language_model(use.writer(use.load("smollm2")))
  lm_eval.simple_evaluate(model=model, tasks=["mine"], task_manager=lm_eval.tasks.TaskManager(include_path="tasks/"))

Its numbers are those of the harness's own transformers model on the same weights: texts are tokenized, cut and added up
as it does.  `docs/regress.md` has tasks that need no network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from posttrain_jax.core import progress
from posttrain_jax.data import templates
from posttrain_jax.evals import likelihood
from posttrain_jax.evals.likelihood import Scores
from posttrain_jax.evals.samples import Writer
from posttrain_jax.models import before
from posttrain_jax.rollout import engine, requests
from posttrain_jax.rollout.requests import Request
from posttrain_jax.rollout.sampling import GREEDY, Sampling
from posttrain_jax.settings import ConfigError

MOST = 256  # tokens of an answer whose request does not say; the harness's own
# of generation_kwargs: what is read, and what says nothing that is not said elsewhere
READ = ("until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p")
KNOWN = (*READ, "min_p", "repetition_penalty")


class Asked:
  """What the harness asks of a model, in its three forms; rows: answers that are written at once."""

  def __init__(self, writer: Writer, *, rows: int = 16, seed: int = 0):
    self.writer, self.rows, self.seed = writer, rows, seed
    self.scores = Scores(writer.params, writer.config, writer.dtype)

  def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """(sum of log p of the continuation, whether each of its tokens is the likeliest) of (context, continuation)."""
    rows = [self._row(context, continuation) for context, continuation in pairs]
    with progress.counter("scoring continuations") as count:
      found = self.scores.of(rows, count)
    return [(float(logps.sum()), bool(greedy.all())) for logps, greedy in found]

  def _row(self, context: str, continuation: str) -> tuple[list[int], list[bool]]:
    tokenizer = self.writer.tokenizer
    if context:
      ids, count = likelihood.parts(tokenizer, context, continuation)
      began = len(templates.opening(tokenizer, context + continuation)) - len(ids)
      ids, count = [tokenizer.bos_token_id] * began + ids, count + began
    else:
      start = [likelihood.start_of(tokenizer)]
      ids = tokenizer(continuation, add_special_tokens=False)["input_ids"]
      ids, count = ids if ids[:1] == start else start + ids, 1
    return likelihood.continued(ids, count, self.scores.longest)

  def rolling(self, texts: Sequence[str]) -> list[float]:
    """sum of log p of every token of a text, each scored once behind as many as the model can read."""
    tokenizer = self.writer.tokenizer
    start = likelihood.start_of(tokenizer)
    longest = self.scores.longest
    each = [
      list(likelihood.windows(templates.opening(tokenizer, text), start, longest)) for text in texts
    ]
    with progress.counter("scoring texts") as count:
      found = iter(self.scores.of([row for rows in each for row in rows], count))
    return [sum(float(next(found)[0].sum()) for _ in rows) for rows in each]

  def generate(self, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """The text behind each context, up to the first of `until`.

    Raises:
      ConfigError: a request asks for what the engine does not do.
    """
    if not asked:
      return []
    made = [self._request(i, context, how) for i, (context, how) in enumerate(asked)]
    longest = max(len(request.prompt) + request.max_new_tokens for request in made)
    bound = before.slots(self.writer.params)
    machine = engine.Engine(
      self.writer.params,
      self.writer.config,
      rows=min(self.rows, len(made)),
      length=min(engine.bucket(bound + longest), self.writer.config.max_length),
      dtype=self.writer.dtype,
      tokenizer=self.writer.tokenizer,
    )
    texts: dict[int, str] = {}
    with progress.counter("answering") as count:
      for place, answer in machine.run(made):
        texts[place] = _up_to(self.writer.text(answer.tokens), _until(asked[place][1]))
        count(len(texts), len(made))
    return [texts[i] for i in range(len(made))]

  def _request(self, number: int, context: str, how: dict[str, Any]) -> Request:
    if unknown := [name for name in how if name not in KNOWN]:
      raise ConfigError(f"generation_kwargs has {unknown[0]!r}; there are {', '.join(KNOWN)}")
    most = int(how.get("max_gen_toks", how.get("max_new_tokens", MOST)))
    room = self.scores.longest - most
    if room < 1:
      raise ConfigError(f"max_gen_toks={most}: the model reads {self.scores.longest} tokens in all")
    ids = templates.opening(self.writer.tokenizer, context)
    ends, strings = requests.parted(_until(how), self.writer.tokenizer)
    return Request(
      prompt=ids[-room:] or [likelihood.start_of(self.writer.tokenizer)],
      max_new_tokens=most,
      sampling=_sampling(how),
      stop_tokens=(*self.writer.ends, *sorted(ends.difference(self.writer.ends))),
      stop_strings=strings,
      seed=self.seed,
      number=number,
    )


def _until(how: dict[str, Any]) -> list[str]:
  until = how.get("until", [])
  return [text for text in ([until] if isinstance(until, str) else until) if text]


def _sampling(how: dict[str, Any]) -> Sampling:
  """Greedy unless `do_sample` says otherwise, or a temperature above 0 without it."""
  temperature = float(how.get("temperature", 0.0))
  if not how.get("do_sample", temperature > 0):
    return GREEDY
  return Sampling(
    temperature or 1.0,
    int(how.get("top_k", 0)),
    float(how.get("top_p", 1.0)),
    float(how.get("min_p", 0.0)),
    float(how.get("repetition_penalty", 1.0)),
  )


def _up_to(text: str, until: Sequence[str]) -> str:
  """The text before the first of several.

  >>> _up_to("It is 4.\\nQ: 5", ["\\n", "Q:"])
  'It is 4.'
  """
  for end in until:
    text = text.partition(end)[0]
  return text


def _open(text: str, last: str) -> str:
  """A rendered conversation up to the end of what its last message says, which the answer goes on (`gen_prefix`).

  >>> _open("<user>Hi<end><model>Well,<end>", "Well, ")
  '<user>Hi<end><model>Well,'

  Raises:
    ConfigError: the template does not write that message as it is.
  """
  said = last.strip()
  before, found, _ = text.rpartition(said)
  if not found:
    raise ConfigError(f"the chat template does not write {said!r}, which an answer is to go on")
  kept = last.lstrip()  # with the white space at its end, where the template writes it
  return before + (kept if text.startswith(kept, len(before)) else said)


def language_model(writer: Writer, *, rows: int = 16, seed: int = 0) -> Any:
  """An `lm_eval.api.model.LM` of a model.

  Args:
    writer: as `build.use.writer` makes it.
    rows: answers that are written at once.
    seed: of answers that are drawn.

  Raises:
    ConfigError: lm-evaluation-harness is not installed.
  """
  try:
    from lm_eval.api.model import LM
  except ImportError as error:
    raise ConfigError(
      "lm-evaluation-harness is not installed: pip install 'posttrain-jax[harness]'"
    ) from error
  asked = Asked(writer, rows=rows, seed=seed)
  each: Callable[[Any], list[Any]] = lambda wanted: [request.args for request in wanted]

  class Model(LM):
    tokenizer_name = getattr(writer.tokenizer, "name_or_path", "").replace("/", "__")

    def loglikelihood(self, requests, disable_tqdm=False):
      return asked.loglikelihood(each(requests))

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
      return asked.rolling([text for (text,) in each(requests)])

    def generate_until(self, requests, disable_tqdm=False):
      return asked.generate(each(requests))

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
      if writer.template is None:
        raise ConfigError("the model has no chat template: leave apply_chat_template out")
      job = templates.job(list(chat_history), add_generation_prompt)
      (text,) = writer.template.render_all([job])
      if isinstance(text, Exception):
        raise text
      return text if add_generation_prompt else _open(text, chat_history[-1]["content"])

    def chat_template(self, chat_template=False):
      return writer.template.text if chat_template and writer.template is not None else ""

  return Model()
