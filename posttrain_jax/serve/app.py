"""The application: each route of the wire, from a body to an answer.

Nothing here touches the device.  What takes a while (a template, a tokenizer, a schema, an adapter's files) runs in a
few threads, the answers come from the worker, and the event loop carries bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
import time
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.routing import Route, Router

from posttrain_jax.serve import asked as asking
from posttrain_jax.serve import guard, streams, wire, wire_chat, wire_completions, wire_tokens
from posttrain_jax.serve.answering import Answering, Choice
from posttrain_jax.serve.asked import Asked
from posttrain_jax.serve.errors import BUSY, ENDING, MISSING, Refused, unknown_model, wrong
from posttrain_jax.serve.fields import Fields, parsed
from posttrain_jax.serve.grammar import Grammars
from posttrain_jax.serve.limits import Limits
from posttrain_jax.serve.metrics import Metrics
from posttrain_jax.serve.models import Model, Models
from posttrain_jax.serve.spelling import Spelling

THREADS = 4
LARGE = 1 << 16  # bytes of a body that is not parsed beside the others' bytes


class App:
  """Routes over a worker.

  allow_loading: whether requests may load and unload adapters.
  """

  def __init__(
    self, models: Models, *, limits: Limits, metrics: Metrics, allow_loading: bool = False
  ) -> None:
    self.models, self.worker, self.limits, self.metrics = models, models.worker, limits, metrics
    self.allow_loading = allow_loading
    self.grammars = Grammars()
    self._threads = ThreadPoolExecutor(THREADS, "posttrain-wire")
    self._readers = ThreadPoolExecutor(THREADS, "posttrain-adapters")
    self._under_way = 0
    metrics.watch(self.worker)

  def asgi(self, *, keys: tuple[str, ...] = (), local: bool = True) -> Any:
    """The application as uvicorn runs it, guarded."""
    post = {
      "/v1/chat/completions": self.chat,
      "/v1/completions": self.completions,
      "/tokenize": self.tokenize,
      "/detokenize": self.detokenize,
      "/v1/load_lora_adapter": self.load_adapter,
      "/v1/unload_lora_adapter": self.unload_adapter,
    }
    get = {
      "/v1/models": self.list_models,
      "/v1/models/{name:path}": self.show_model,
      "/tokenizer_info": self.tokenizer_info,
      "/health": self.health,
      "/metrics": self.tell_metrics,
    }
    routes = [Route(path, _Endpoint(do), methods=["POST"]) for path, do in post.items()]
    routes += [Route(path, _Endpoint(do), methods=["GET"]) for path, do in get.items()]
    made = Router(routes, redirect_slashes=False)
    return guard.Guard(made, keys=keys, local=local, limits=self.limits, metrics=self.metrics)

  def close(self) -> None:
    """What waits for a thread is not begun any more."""
    for threads in (self._threads, self._readers):
      threads.shutdown(wait=False, cancel_futures=True)

  async def in_thread(self, work: Callable[..., Any], *args: Any) -> Any:
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(self._threads, functools.partial(work, *args))

  @contextlib.contextmanager
  def _counted(self) -> Generator[None]:
    """A request under way; the next beyond the bound is told to come again."""
    if self._under_way >= self.limits.requests:
      raise Refused(429, "too many requests are under way", None, BUSY, None, 1.0)
    self._under_way += 1
    try:
      yield
    finally:
      self._under_way -= 1

  async def _asked(
    self, receive: guard.Receive, *, needs_model: bool = True
  ) -> tuple[Fields, Model]:
    """(the body, the model that it names)."""
    self._check_state()
    data = await guard.body(receive, self.limits)
    body = Fields(parsed(data) if len(data) < LARGE else await self.in_thread(parsed, data))
    name = body.text("model")
    if name is None and needs_model:
      raise wrong("the body names no model; GET /v1/models lists them", "model")
    return body, await self._model(self.models.name if name is None else name)

  async def _model(self, name: str) -> Model:
    if name == self.models.name:
      return self.models.find(name)
    # whoever waits for an adapter's files takes no thread from the others
    threads = self._threads if self.models.is_at_hand(name) else self._readers
    return await asyncio.get_running_loop().run_in_executor(threads, self.models.find, name)

  def _check_state(self) -> None:
    if self.worker.state != "ready":
      what = "still compiling its programs" if self.worker.state == "warming" else "ending"
      raise Refused(503, f"the server is {what}", None, ENDING, None, 5.0)

  async def chat(self, scope: guard.Scope, receive: guard.Receive, send: guard.Send) -> None:
    with self._counted():
      body, model = await self._asked(receive)
      chat = wire_chat.read(body, self.limits, model.voice)
      prompt = await self.in_thread(self._conversation, chat, model)
      masks = [
        await self.in_thread(wire_chat.allowed, chat, model.voice, self.grammars)
        for _ in range(chat.wanted.n)
      ]
      keep = frozenset()
      if chat.calls is not None:  # their marks may be special tokens
        marks = model.voice.marks
        keep = frozenset(marks[at] for at in (chat.calls.begin, chat.calls.end) if at in marks)
      choices = [
        self._choice(model, chat.wanted, prompt, at, at, allowed=masks[at], keep=keep)
        for at in range(chat.wanted.n)
      ]
      head = _head("chatcmpl", model.name)
      if not chat.wanted.stream:
        await self._whole(
          receive,
          send,
          choices,
          lambda: [wire_chat.choice(one, chat, model.voice) for one in choices],
          dict(head, object="chat.completion"),
          chat.wanted.n,
        )
        return
      pieces = {one.index: wire_chat.Pieces(one, chat, model.voice) for one in choices}
      chunk = dict(head, object="chat.completion.chunk")
      first = [part.first() for part in pieces.values()]
      told = lambda news: pieces[news.choice.index].of(news)
      await self._streamed(receive, send, choices, first, told, chunk, chat.wanted)

  def _conversation(self, chat: wire_chat.Chat, model: Model) -> list[int]:
    return model.voice.conversation(chat.messages, chat.tools, model.room, **chat.variables)

  async def completions(self, scope: guard.Scope, receive: guard.Receive, send: guard.Send) -> None:
    with self._counted():
      body, model = await self._asked(receive)
      asked = wire_completions.read(body, self.limits, model.voice)
      prompts = await self.in_thread(
        lambda: [wire_completions.tokens(one, model.voice, model.room) for one in asked.prompts]
      )
      wanted, choices = asked.wanted, []
      for at, prompt in enumerate(prompts):
        for sample in range(wanted.n):
          index = at * wanted.n + sample
          one = self._choice(model, wanted, prompt, index, sample, echo=asked.echo, field="prompt")
          choices.append(one)
      texts = {one.index: self._texts(one, asked, model) for one in choices}
      head = dict(_head("cmpl", model.name), object="text_completion")
      if not wanted.stream:
        whole = lambda: [texts[one.index].whole() for one in choices]
        await self._whole(receive, send, choices, whole, head, wanted.n)
        return
      told = lambda news: texts[news.choice.index].of(news)
      await self._streamed(receive, send, choices, [], told, head, wanted)

  def _texts(
    self, one: Choice, asked: wire_completions.Completion, model: Model
  ) -> wire_completions.Texts:
    given = asked.prompts[one.index // asked.wanted.n]
    prompt = ""
    if asked.echo:
      prompt = given if isinstance(given, str) else model.voice.text(given)
    return wire_completions.Texts(one, asked, prompt, model.voice)

  def _choice(
    self,
    model: Model,
    wanted: wire.Wanted,
    prompt: list[int],
    index: int,
    sample: int,
    *,
    allowed: Any = None,
    echo: bool = False,
    keep: frozenset[int] = frozenset(),
    field: str = "messages",
  ) -> Choice:
    """An answer to be written: sample s of a request is drawn by (its seed, s), whatever stands beside it.

    field: of the body, that has the prompt.
    """
    left = model.room - len(prompt)
    new = left if wanted.max_new is None else wanted.max_new
    if new > left or (wanted.max_new is None and left < 1):
      asks = "an answer" if wanted.max_new is None else f"max_tokens={wanted.max_new}"
      raise Refused(
        400,
        f"the prompt has {len(prompt):,} tokens; with {asks} that is more than the {model.room:,} positions"
        f" of {model.name}",
        "max_tokens" if left > 0 else field,
        code="context_length_exceeded",
      )
    ends = wanted.ends if wanted.ignore_eos else wanted.ends | set(model.voice.ends)
    one = Asked(
      prompt=tuple(prompt),
      max_new=new,
      sampling=wanted.sampling,
      min_new=min(wanted.min_new, new),
      stop_ids=frozenset(ends),
      stop_strings=wanted.stops,
      tokenizer=model.voice.tokenizer,
      adapter=model.adapter,
      top=wanted.top or 0,
      echo_logprobs=echo and wanted.top is not None,
      allowed=allowed,
      seed=wanted.seed % 2**32,
      number=wanted.seed >> 32,
      sample=sample,
    )
    return Choice(index, one, Spelling(model.voice.decoder(keep), wanted.stops))

  async def _submitted(self, choices: list[Choice]) -> Answering:
    answering = Answering(self.worker, choices, self.metrics)
    adapter = choices[0].asked.adapter
    try:
      await self.in_thread(answering.submit)
    except asking.Full as full:
      raise Refused(429, str(full), None, BUSY, None, full.retry_after) from None
    except asking.Closed as closed:
      raise Refused(503, str(closed), None, ENDING, None, 5.0) from None
    except asking.UnknownAdapter:
      raise unknown_model(adapter or "", self.models.names()) from None
    except asking.BadAdapter as error:
      raise self.models.bad(error, "model") from None
    except ValueError as error:
      raise wrong(str(error)) from None
    return answering

  async def _whole(
    self,
    receive: guard.Receive,
    send: guard.Send,
    choices: list[Choice],
    told: Callable[[], list[dict]],
    head: dict[str, Any],
    n: int,
  ) -> None:
    answering = await self._submitted(choices)

    async def written() -> None:
      async for _ in answering.news():
        pass

    try:
      await streams.attended(receive, written())
    finally:
      answering.cancel()
      self.metrics.dropped(choices)
    body = lambda: guard.dumps(dict(head, choices=told(), usage=_usage(choices, n)))
    await guard.respond(send, 200, await self.in_thread(body))

  async def _streamed(
    self,
    receive: guard.Receive,
    send: guard.Send,
    choices: list[Choice],
    first: list[dict],
    told: Callable[[Any], list[dict]],
    head: dict[str, Any],
    wanted: wire.Wanted,
  ) -> None:
    n, with_usage = wanted.n, wanted.usage
    answering = await self._submitted(choices)
    empty = dict(usage=None) if with_usage else {}

    async def pieces() -> AsyncIterator[dict[str, Any]]:
      for piece in first:
        yield dict(head, choices=[piece], **empty)
      async for news in answering.news():
        for piece in told(news):
          yield dict(head, choices=[piece], **empty)
      if with_usage:
        yield dict(head, choices=[], usage=_usage(choices, n))

    try:
      await streams.attended(receive, streams.events(send, pieces()))
    finally:
      answering.cancel()
      self.metrics.dropped(choices)

  async def tokenize(self, scope: guard.Scope, receive: guard.Receive, send: guard.Send) -> None:
    with self._counted():
      body, model = await self._asked(receive, needs_model=False)
      work = functools.partial(wire_tokens.tokenize, body, model, self.limits)
      await guard.respond(send, 200, await self.in_thread(work))

  async def detokenize(self, scope: guard.Scope, receive: guard.Receive, send: guard.Send) -> None:
    with self._counted():
      body, model = await self._asked(receive, needs_model=False)
      await guard.respond(send, 200, await self.in_thread(wire_tokens.detokenize, body, model))

  async def tokenizer_info(
    self, scope: guard.Scope, receive: guard.Receive, send: guard.Send
  ) -> None:
    await guard.respond(send, 200, wire_tokens.info(self.models.voice, self.models.length))

  async def load_adapter(
    self, scope: guard.Scope, receive: guard.Receive, send: guard.Send
  ) -> None:
    name, body = await self._named_adapter(receive)
    path = body.text("lora_path")
    body.flag("load_inplace")
    body.take("base_model_name")
    body.close()
    if not path:
      raise wrong(
        "lora_path is missing: the adapter's folder, under the server's root", "lora_path"
      )
    await self.in_thread(self.models.load, name, path)
    await guard.respond(send, 200, f"Success: LoRA adapter '{name}' added successfully.")

  async def unload_adapter(
    self, scope: guard.Scope, receive: guard.Receive, send: guard.Send
  ) -> None:
    name, body = await self._named_adapter(receive)
    body.take("lora_int_id")
    body.close()
    try:
      await self.in_thread(self.worker.adapters.unload, name)
    except asking.UnknownAdapter:
      raise Refused(404, f"no adapter is called {name!r}", "lora_name", MISSING) from None
    await guard.respond(send, 200, f"Success: LoRA adapter '{name}' removed successfully.")

  async def _named_adapter(self, receive: guard.Receive) -> tuple[str, Fields]:
    if not self.allow_loading:
      raise Refused(
        403,
        "adapters are loaded and unloaded by requests only with posttrain serve --allow_loading",
      )
    self._check_state()
    body = Fields(parsed(await guard.body(receive, self.limits)))
    name = body.text("lora_name")
    if not name:
      raise wrong("lora_name is missing: the name under which requests ask for it", "lora_name")
    return name, body

  async def list_models(self, scope: guard.Scope, receive: guard.Receive, send: guard.Send) -> None:
    cards = await self.in_thread(self.models.cards)  # which looks into the folder of adapters
    await guard.respond(send, 200, dict(object="list", data=cards))

  async def show_model(self, scope: guard.Scope, receive: guard.Receive, send: guard.Send) -> None:
    name = scope["path_params"]["name"]
    model = await self._model(name)
    await guard.respond(send, 200, self.models.card(model.name))

  async def health(self, scope: guard.Scope, receive: guard.Receive, send: guard.Send) -> None:
    """200 once every program is compiled; 503 before, and while the server ends."""
    self._check_state()
    await guard.respond(send, 200, dict(status="ready"))

  async def tell_metrics(
    self, scope: guard.Scope, receive: guard.Receive, send: guard.Send
  ) -> None:
    await guard.respond(send, 200, self.metrics.text())


class _Endpoint:
  """An ASGI application of one method: Starlette takes functions for something else."""

  def __init__(self, do: Callable[..., Any]) -> None:
    self._do = do

  async def __call__(self, scope: guard.Scope, receive: guard.Receive, send: guard.Send) -> None:
    await self._do(scope, receive, send)


def _head(kind: str, model: str) -> dict[str, Any]:
  """What every piece of an answer says."""
  return dict(id=f"{kind}-{secrets.token_hex(16)}", created=int(time.time()), model=model)


def _usage(choices: list[Choice], n: int) -> dict[str, Any]:
  """Each prompt counts once, however many answers it has."""
  firsts = choices[::n]
  read = sum(len(one.asked.prompt) for one in firsts)
  cached = sum(one.cached for one in firsts)
  return wire.usage(read, sum(one.drawn for one in choices), cached)
