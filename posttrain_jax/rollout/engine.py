"""The engine: the only place where a model writes.  Requests in, answers as they finish.

A fixed number of rows is under way; a row that ends is given the next request at once, while the others go on.  Tokens
are drawn in windows on the device, between which the host reads what was drawn.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax.adapters import layout
from posttrain_jax.core import bits, files, sharding, struct, tree, weight
from posttrain_jax.models import before, cache, decoder
from posttrain_jax.models.config import ModelConfig, as_ids
from posttrain_jax.rollout import piecewise, programs, requests, seats
from posttrain_jax.rollout import prefixes as kept_prefixes
from posttrain_jax.rollout import sampling as samplers
from posttrain_jax.rollout import storage as storage_lib
from posttrain_jax.rollout.prefixes import Prefixes
from posttrain_jax.rollout.requests import Answer, Request, Scores
from posttrain_jax.rollout.sampling import GREEDY, Sampling

log = logging.getLogger(__name__)
Params = Any
WINDOW = 16  # tokens drawn between two looks of the host
OVERFLOW = (
  "what the model writes says nothing: its log-probabilities are no numbers; its weights overflow"
)


class CompilationError(RuntimeError):
  """A program was compiled after the engine said that it had all of them."""


@struct.dataclass
class Ready:
  """Parameters as the engine wants them, made by `prepare`: once, where they are used for several engines."""

  # reads prompts: a scan compiles in a tenth of the time that separate layers take
  stacked: Params
  # draws; where it is another form than `stacked`, without the layers' adapters, which have their seats (`seats`)
  layers_apart: Params


@dataclasses.dataclass
class _Row:
  """A row under way."""

  ticket: int
  request: Request
  tokens: list[int] = dataclasses.field(default_factory=list)
  logps: list[np.ndarray] = dataclasses.field(default_factory=list)
  kept: list[np.ndarray] = dataclasses.field(default_factory=list)
  top: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)
  cached: int = 0
  prompt: Scores | None = None
  is_told: bool = False  # of its prompt


@dataclasses.dataclass(frozen=True)
class Progress:
  """What a window brought to a request: new tokens, and the answer where it is whole.

  logps, top: of the new tokens, as an answer's.
  prompt: what its prompt's tokens were worth, with the first window, where the request asks for it.
  cached: how many tokens of its prompt had been read before.
  """

  ticket: int
  tokens: list[int]
  answer: Answer | None
  logps: np.ndarray | None = None
  top: tuple[np.ndarray, np.ndarray] | None = None
  prompt: Scores | None = None
  cached: int = 0


class Engine:
  """Requests in, answers as they finish.

  A token depends on its request's (seed, number, sample) and its place in the text: the same text comes out whatever
  else is under way, in which row, and in which order rows are filled.  Sums are those of one program whatever the
  neighbours do, so on one CPU it is the same bit by bit.  Another number of rows or devices is another program, and so
  is, on accelerators, a prompt that is read beside others: its logits differ by rounding, a few 1e-6 of their size in
  float32, which moves a token where two are as close as that.

  is_strict: a compilation after `warm_up` is an error and not a warning, as in our tests.
  """

  is_strict = False

  def __init__(
    self,
    params: Params | Ready,
    config: ModelConfig,
    *,
    rows: int = 16,
    length: int,
    window: int = WINDOW,
    dtype: Any = None,
    cache_dtype: Any = None,
    records_kept: bool = False,
    top: int = 0,
    tokenizer: Any = None,
    reuses_written: bool = False,
    serves: bool = False,
    pieces: Sequence[int] = piecewise.PIECES,
    at_once: int | None = None,
    prefixes: Prefixes | None = None,
  ) -> None:
    """Rows that hold nothing.

    Args:
      params: as for `decoder`, adapters bound or (faster) merged, or what `prepare` made of them.  Bound with rows, a
        request names its row.
      rows: how many texts are under way at once.
      length: the most tokens of a text, prompt and answer, with what is bound to stand before it.
      window: the most tokens drawn between two looks of the host.
      dtype: of the computation; default the embedding's.
      cache_dtype: of keys and values; default that of the computation's products.
      records_kept: answers say which tokens the filters kept, and log-probabilities are those among the kept.  Then a
        request has no repetition penalty, which changes numbers that whoever trains computes without it.
      top: answers give the log-probabilities of so many most likely tokens at each place.
      tokenizer: for requests with stop strings.
      reuses_written: what a row wrote itself counts as read where a prompt begins with it, as in a dialogue; then a
        text depends, by rounding, on how its beginning was read.
      serves: requests may have a grammar and may ask for the log-probabilities of their prompts; log-probabilities are
        the model's own at temperature 1, before any bias, penalty or filter.
      pieces: in how many tokens prompts are read, falling; what prompts share is shared in whole pieces of the first.
      at_once: so many tokens of prompts are read between two windows, a piece more at most; None: all that wait.
      prefixes: keeps what prompts begin with for those that come later.
    """
    requests.check_whole(rows, "rows", 1, "texts under way at once")
    requests.check_whole(window, "window", 1, "tokens drawn between two looks of the host")
    requests.check_whole(
      top, "top", 0, "most likely tokens", config.vocab_size, "of the vocabulary"
    )
    self.config, self.rows, self.length, self.width = config, rows, length, window
    self.dtype, self.tokenizer, self.reuses_written = dtype, tokenizer, reuses_written
    self.records_kept, self.top = records_kept, top
    self.compiled: list[str] = []  # what was compiled for this engine, in order
    self.programs: dict[str, None] = {}  # what it has run, compiled for it or for another before it
    self.is_warm = False
    self._tickets = itertools.count()
    self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
    self._busy: dict[int, _Row] = {}
    self._held: list[piecewise.Held | None] = [None] * rows
    self._finished: dict[int, Answer] = {}  # that nobody was given yet
    self._of_runs: set[int] = set()  # tickets whose answers `run` gives
    self._cut: set[int] = set()  # rows that are free, and still draw on the device
    self._spoilt: set[int] = set()  # free rows whose keys and values may not be finite
    self._readings: dict[int, piecewise.Reading] = {}  # rows that are not free, and not live yet
    self._unbegun: set[int] = set()  # rows that wait for what stands before their tokens
    self.serves, self.pieces, self.at_once = serves, tuple(pieces), at_once
    self._none_allowed = self._allowed({}) if serves else None
    self.prefixes: Prefixes | None = None
    self.load(params)
    self._check_length(length)
    self._cache_dtype = cache_dtype or self._multiplied_in(dtype)
    self._slots = self._empty()
    self.prefixes = prefixes
    if prefixes is not None:
      prefixes.make(self._slots.cache, self.pieces[0])

  def _multiplied_in(self, dtype: Any) -> Any:
    """Of keys and values: what the products of a computation in dtype are in, as those of whoever trains."""
    dtype = dtype or self._ready.stacked["embed_tokens"]["weight"].dtype
    layers = self._ready.stacked["layers"]
    one = layers[0] if isinstance(layers, tuple) else layers
    of_products = weight.multiplied(dtype, one["self_attn"]["q_proj"]["weight"].dtype)
    in_bits = of_products == jnp.bfloat16 and jax.default_backend() == "cpu"
    return weight.BITS if in_bits else of_products

  def _empty(self) -> programs.Slots:
    """Rows that hold nothing."""
    room = cache.fitting(self.length + piecewise.SPARE)
    make = lambda: programs.empty(self.config, self.rows, room, self._cache_dtype, self._plan({}))
    return jax.jit(make)()

  def _check_length(self, length: int) -> None:
    """Raises ValueError for room that holds no text, or that the model has no positions for."""
    least = self._bound + 2  # a prompt and an answer of a token each
    positions = self.config.max_length
    requests.check_whole(
      length,
      "length",
      least,
      "tokens of a prompt and its answer",
      positions,
      "positions of the model",
    )

  def load(self, params: Params | Ready) -> None:
    """Other weights of the same shapes: no program is compiled anew.

    Rows under way go on with them and with the keys and values that they have; what is read later is read anew.

    Raises:
      ValueError: they are not this model's; the engine keeps those that it had.
    """
    ready = prepare(params, self.config)
    decoder.check(ready.stacked, self.config)
    self._ready, self._tells_overflow = ready, True
    self._nodes = {} if ready.layers_apart is ready.stacked else seats.nodes(ready.stacked)
    self._leave_seats()
    for index, row in self._busy.items():
      self._seat(index, row.request.row)
    self._held = [None] * self.rows
    if self.prefixes is not None:
      self.prefixes.clear()
    self._bound = before.slots(self._ready.stacked)
    self._bound_rows = weight.batch_rows(self._ready.stacked)

  def swap(self, ready: Ready, row: int) -> None:
    """The same parameters but for those of `row`, which no request under way has: what was read is kept.

    A request says by `whose` which parameters its row has; what was read under a name is read again under no other.
    """
    self._ready = ready
    if self._nodes:
      self._nodes = seats.nodes(ready.stacked)
    self._seated = [None if seated == row else seated for seated in self._seated]

  def _leave_seats(self) -> None:
    make = jax.jit(seats.empty, static_argnums=(1, 2))
    self._seats = make(self._nodes, self.rows, seats.NARROW)
    self._seated: list[int | None] = [None] * self.rows  # whose adapter each seat has

  def _seat(self, index: int, row: int) -> None:
    """The row of that index with the adapter of the parameters' row."""
    if self._nodes and self._seated[index] != row:
      args = (self._seats, self._nodes, np.int32(index), np.int32(row))
      self._seats = self._call(seats.seat, "seating of an adapter", *args)
      self._seated[index] = row

  def submit(self, request: Request) -> int:
    """The ticket of a request, by which its answer is known; it waits until a row is free.

    Raises:
      ValueError: it cannot be answered by this model, or in this length.
    """
    at = next(self._tickets)
    bound = self._bound if request.bound is None else request.bound
    requests.check(request, self.config, self.length, bound, self._bound_rows)
    tokenizer = self._tokenizer(request)
    if request.stop_strings and tokenizer is None:
      raise ValueError("a request with stop_strings needs an engine with tokenizer=")
    requests.check_strings(request.stop_strings, tokenizer)
    if self.records_kept and request.sampling.is_penalised:
      raise ValueError(
        f"{_penalties(request.sampling)} with records_kept: the log-probabilities would be"
        " those of penalised logits, which no set of kept tokens says; leave one of them out"
      )
    if not self.serves and (request.scores_prompt or request.allowed is not None):
      raise ValueError("a request with scores_prompt or a grammar needs an engine with serves=True")
    if (request.top or 0) > self.top:
      raise ValueError(
        f"prompt {request.number} asks for the {request.top} most likely tokens, the engine tells top={self.top}"
      )
    self._waiting.append((at, request))
    return at

  @property
  def is_idle(self) -> bool:
    """Whether there is nothing to be written, and no answer that nobody was given."""
    return not self._waiting and not self._busy and next(self._left(), None) is None

  def _left(self) -> Iterator[int]:
    """The tickets of answers that nobody was given, but for those that `run` gives."""
    return (ticket for ticket in self._finished if ticket not in self._of_runs)

  def answers(self) -> Iterator[tuple[int, Answer]]:
    """(ticket, answer) of everything submitted, each when it is whole; more may be submitted meanwhile.

    Whoever stops reading loses nothing: the next to ask for answers is given those that are left.
    """
    while True:
      if (ticket := next(self._left(), None)) is not None:
        yield ticket, self._finished.pop(ticket)
      elif self._waits_for(lambda ticket: ticket not in self._of_runs):
        self._write()
      else:
        return

  def run(
    self, asked: Iterable[Request], before_window: Callable[[], None] | None = None
  ) -> Iterator[tuple[int, Answer]]:
    """(place in `asked`, answer), each when it is whole; requests are taken as rows fall free.

    What was submitted beside goes on meanwhile, and `answers` gives it.  Where the iterator is closed or dropped,
    nothing more is written for it.

    before_window: called before each window; it may raise, where nobody waits for the rest.
    """
    left, places = enumerate(asked), {}
    try:
      while True:
        room = self.rows + 1 - len(self._busy) - len(self._waiting)
        for place, request in itertools.islice(left, max(room, 0 if places else 1)):
          ticket = self.submit(request)
          places[ticket] = place
          self._of_runs.add(ticket)
        if (ticket := next((t for t in self._finished if t in places), None)) is not None:
          self._of_runs.remove(ticket)
          yield places.pop(ticket), self._finished.pop(ticket)
        elif self._waits_for(places.__contains__):
          if before_window is not None:
            before_window()
          self._write()
        else:
          return
    finally:
      self._drop(places)
      self._of_runs -= places.keys()

  def _waits_for(self, is_wanted: Callable[[int], bool]) -> bool:
    """Whether one of those tickets is waiting or under way."""
    under_way = (row.ticket for row in self._busy.values())
    return any(map(is_wanted, under_way)) or any(is_wanted(ticket) for ticket, _ in self._waiting)

  def _write(self) -> None:
    """The next window; what it ended is kept until somebody is given it."""
    for progress in self._advance(None):
      if progress.answer is not None:
        self._finished[progress.ticket] = progress.answer

  def advance(self, most: int | None = None, *, wanted: bool = False) -> list[Progress]:
    """What the next window brings: `most` tokens of each row at most, fewer where rows ended that others wait for.

    wanted: whether somebody waits for a row who has not submitted yet.

    First the answers that `answers` left, without new tokens.  What interrupts it (Ctrl-C) ends every row under way:
    what their last window drew is known to nobody.
    """
    left = [Progress(ticket, [], self._finished.pop(ticket)) for ticket in list(self._left())]
    told = self._advance(most, wanted)
    for progress in told:
      if progress.answer is not None and progress.ticket in self._of_runs:
        self._finished[progress.ticket] = progress.answer
    return left + told

  def _advance(self, most: int | None, wanted: bool = False) -> list[Progress]:
    try:
      self._settle()
      self._admit()
      is_live = len(self._busy) > len(self._readings)
      return self._collect(self._window(most, wanted)) if is_live else []
    except BaseException:
      self._busy, self._held, self._readings = {}, [None] * self.rows, {}
      self._cut, self._spoilt = set(), set()
      self._slots = self._empty()
      self._leave_seats()
      if self.prefixes is not None:  # whose blocks may have been on their way
        self.prefixes.make(self._slots.cache, self.pieces[0])
      raise

  def _window(self, most: int | None, wanted: bool = False) -> programs.Drawn:
    """The next window, on the host."""
    most = self.width if most is None else min(most, self.width)
    grammars = {
      index: row
      for index, row in self._busy.items()
      if row.request.allowed is not None and index not in self._readings
    }
    allowed = self._allowed(grammars) if grammars else self._none_allowed
    most = min(most, 1) if grammars else most  # which the host reads token by token
    enough = max(1, self.rows // 8) if self._waiting or wanted else self.rows
    self._slots, drawn = self._call(
      programs.window,
      f"window of {self.width} tokens, {self.rows} rows of {self._slots.cache.slots} slots",
      self._ready.layers_apart,
      self._slots,
      jnp.int32(most),
      jnp.int32(enough),
      self.config,
      self.width,
      self.dtype,
      self.records_kept,
      self.top,
      allowed,
      self.serves,
      self._seats,
    )
    return jax.device_get(drawn)

  def _allowed(self, grammars: dict[int, _Row]) -> programs.Allowed:
    """What the grammars of those rows allow next."""
    has = np.isin(np.arange(self.rows), list(grammars))
    words = np.zeros((self.rows, bits.words(self.config.vocab_size)), np.uint32)
    for index, row in grammars.items():
      assert row.request.allowed is not None
      words[index] = requests.packed(row.request.allowed(row.tokens), self.config.vocab_size)
    return programs.Allowed(jnp.asarray(has), jnp.asarray(words))

  def drop(self, ticket: int) -> None:
    """Forgets a request, waiting or under way; nothing comes of it."""
    self._drop([ticket])

  def _drop(self, tickets: Collection[int]) -> None:
    """As `drop`.  Nothing runs on the device: an iterator may be collected anywhere, at the end of the process too."""
    self._waiting = collections.deque(pair for pair in self._waiting if pair[0] not in tickets)
    for ticket in tickets:
      self._finished.pop(ticket, None)
    indices = {index for index, row in self._busy.items() if row.ticket in tickets}
    self._cut |= indices
    for index in indices & self._readings.keys():
      del self._readings[index]
      self._held[index] = None
      for other in self._readings.values():
        if other.source == index:  # what it waits for is not read: it reads for itself
          other.source, other.at = None, 0
          self._unbegun.add(other.index)
    self._free(indices)

  def _settle(self) -> None:
    """On the device too the rows that are free draw no more and hold nothing that would spoil the next."""
    if self._cut:
      self._end(self._cut)
      self._cut = set()
    for index in self._spoilt:  # 0 * NaN would reach whoever has the row next
      self._clear(index)
    self._spoilt = set()
    for index in self._unbegun & self._readings.keys():
      self._start(index, self._busy[index].request)
    self._unbegun = set()

  def grow(self, length: int) -> None:
    """Room for texts of `length` tokens; what is held stays.  The programs are compiled anew."""
    self._check_length(length)
    slots_then = cache.fitting(length + piecewise.SPARE)
    self.length = max(self.length, length)
    if slots_then <= self._slots.cache.slots:
      return
    held = self._slots
    self._slots = dataclasses.replace(
      held,
      cache=held.cache.grown(slots_then),
      text=jnp.pad(held.text, ((0, 0), (0, slots_then - held.cache.slots))),
    )

  def warm_up(self, lengths: Iterable[int] | None = None) -> list[str]:
    """Compiles every program that texts can need, and names them; a later compilation is told, or an error under test.

    Args:
      lengths: of all prompts there will be; None: any that there is room for.

    Raises:
      ValueError: rows are under way, which it would spoil.
    """
    if self._busy:
      raise ValueError(f"{len(self._busy)} rows are under way: warm an engine up while it is idle")
    self._held = [None] * self.rows
    self._window(0)  # first, so that the others are given what a program left, as they are later on
    self._seat(0, 0)
    if self._bound:
      self._begin(0, 0)
      self._begin_bare(0)
    for size in self._sizes(lengths):
      for count in piecewise.counts(size, self.rows):
        self._read_pieces(size, count, [])
      if self.serves:
        self._score_piece(size, None)
    if self.rows > 1:
      self._copy(0, 1)
    self._enter({})
    if self.at_once is not None:
      self._reserve()
    if self.prefixes is not None:
      self._restore(0, [])
      self._keep(0, None, [])
    self._end(set())
    self._clear(0)
    self._window(0)
    self.is_warm = True
    return list(self.programs)

  def _sizes(self, lengths: Iterable[int] | None) -> list[int]:
    """Of the pieces that prompts of these lengths are read in; what they have in common is whole pieces."""
    longest = self.length - self._bound - 1
    if lengths is None or self.reuses_written:  # which goes on from anywhere
      lengths = range(2, min(longest, self.pieces[0] + 2) + 1)
    # the window reads the last token
    cut = lambda length: piecewise.pieces(0, length - 1, self.pieces)
    return sorted({size for length in set(lengths) for _, size, _ in cut(length)})

  def _admit(self) -> None:
    """Waiting requests into the rows that are free; those whose prompts are read are live."""
    free = [index for index in range(self.rows) if index not in self._busy]
    while free and self._waiting:
      ticket, request = self._waiting.popleft()
      reading = self._place(request, free)
      free.remove(reading.index)
      self._busy[reading.index] = _Row(ticket, request, cached=reading.at)
      self._readings[reading.index] = reading
    if not self._readings:
      return
    self._read()
    whole = {i: reading for i, reading in self._readings.items() if not reading.left}
    for index, reading in whole.items():
      del self._readings[index]
      row = self._busy[index]
      if reading.following is not None:
        row.prompt = piecewise.scores(reading)
      elif self.prefixes is not None:
        self._keep(index, row.request.known_by, reading.prompt)
    if whole:
      self._enter({index: self._busy[index].request for index in whole})
    if self._readings:
      self._reserve()

  def _enter(self, chosen: dict[int, Request]) -> None:
    """The rows of those requests, whose prompts are read, are under way."""
    lengths, last = np.zeros(self.rows, np.int32), np.zeros(self.rows, np.int32)
    text = np.zeros(self._slots.text.shape, np.int32)
    for index, request in chosen.items():
      lengths[index], last[index] = len(request.prompt) - 1, request.prompt[-1]
      text[index, : len(request.prompt)] = request.prompt
      self._seat(index, request.row)
    mask = np.isin(np.arange(self.rows), list(chosen))
    args = (self._slots, mask, lengths, text, last, self._plan(chosen))
    self._slots = self._call(programs.admit, "admission", *args)

  def _place(self, request: Request, free: list[int]) -> piecewise.Reading:
    """The row that will hold the request's prompt but for its last token, which the window reads."""
    prompt = [int(token) for token in request.prompt[:-1]]
    wanted = piecewise.Held(
      request.known_by, prompt, list(piecewise.ends(len(prompt), self.pieces))
    )
    shares = [
      -1 if held is None else held.shared(wanted, anywhere=self.reuses_written)
      for held in self._held
    ]
    if request.scores_prompt:  # by a program of its own, from the first token on
      index = min(free, key=lambda index: (shares[index], index))
      self._start(index, request)
      self._held[index] = None
      return piecewise.Reading(
        index, request.row, prompt, 0, following=list(map(int, request.prompt[1:]))
      )
    known = request.known_by
    alike = [index for index, held in enumerate(self._held) if held and held.known_by == known]
    source = max(alike, key=lambda index: shares[index], default=None)
    index = min(free, key=lambda index: (index != source, shares[index], index))
    kept = [] if self.prefixes is None else self.prefixes.matching(known, prompt)
    reading = piecewise.Reading(index, request.row, prompt, 0 if source is None else shares[source])
    if len(kept) * self.pieces[0] > reading.at:
      self._start(index, request)
      self._restore(index, kept)
      reading.at = len(kept) * self.pieces[0]
    elif source is None:
      self._start(index, request)
    elif source != index and (shares[source] > 0 or self._bound):
      if source in self._readings:  # which is still to be read itself
        reading.source = source
      else:
        self._copy(source, index)
    self._held[index] = wanted
    return reading

  def _start(self, index: int, request: Request) -> None:
    """The row of that index with what is bound to stand before the request's tokens."""
    if self._bound and request.bound != 0:
      self._begin(index, request.row)
    elif self._bound:
      self._begin_bare(index)

  def _read(self) -> None:
    """Every prompt, pieces of one size together, as far as `at_once` goes."""
    left, readings = self.at_once, self._readings
    while self._copied() and (left is None or left > 0):
      by_size: dict[tuple[int, bool], list[piecewise.Reading]] = {}
      for reading in readings.values():
        if reading.source is None and reading.at < len(reading.prompt):
          _, size, _ = next(piecewise.pieces(reading.at, len(reading.prompt), self.pieces))
          by_size.setdefault((size, reading.following is not None), []).append(reading)
      for (size, is_scored), some in by_size.items():
        most = 1 if is_scored else max(1, piecewise.TOGETHER // size)
        for start in range(0, len(some), most):
          batch = some[start : start + most]
          count = 1 if is_scored else piecewise.together(size, len(batch))
          for at in range(0, len(batch), count):
            if left is not None and left <= 0:
              break
            if is_scored:
              self._score_piece(size, batch[at])
            else:
              self._read_pieces(size, count, batch[at : at + count])
            left = left if left is None else left - size * count

  def _copied(self) -> bool:
    """Whether anything is left to be read, once every row has a copy of what it waits for and what is read."""
    waits = True
    while waits:
      waits = False
      for reading in self._readings.values():
        source = self._readings.get(-1 if reading.source is None else reading.source)
        if source is not None and source.source is None and source.at >= reading.at:
          self._copy(source.index, reading.index)
          reading.source, waits = None, True
    return any(reading.left for reading in self._readings.values())

  def _read_pieces(self, size: int, count: int, readings: list[piecewise.Reading]) -> None:
    """The next piece of each, which has that size; `count` rows in all."""
    pieces = self._cut_pieces(size, count, readings)
    self._slots = self._call(
      programs.read,
      f"{count} piece{'s' if count > 1 else ''} of {size} tokens, {self._shape()}",
      *(self._ready.stacked, self._slots, pieces, self.config, self.dtype),
    )

  def _cut_pieces(
    self, size: int, count: int, readings: list[piecewise.Reading]
  ) -> programs.Pieces:
    """The next pieces, which count as read."""
    # what only fills the batch is written to rows that there are not
    index = self.rows + np.arange(count, dtype=np.int32)
    row, start, counts = np.zeros((3, count), np.int32)
    tokens = np.zeros((count, size), np.int32)
    for i, reading in enumerate(readings):
      at, _, length = next(piecewise.pieces(reading.at, len(reading.prompt), self.pieces))
      index[i], row[i], start[i], counts[i] = reading.index, reading.row, at, length
      tokens[i, :length] = reading.prompt[at : at + length]
      reading.at += length
    return programs.Pieces(*map(jnp.asarray, (index, row, start, counts, tokens)))

  def _score_piece(self, size: int, reading: piecewise.Reading | None) -> None:
    """The next piece of a prompt, and what its tokens say of those behind them."""
    at = 0 if reading is None else reading.at
    pieces = self._cut_pieces(size, 1, [] if reading is None else [reading])
    behind = np.zeros((1, size), np.int32)
    if reading is not None and reading.following is not None:
      behind[0, : reading.at - at] = reading.following[at : reading.at]
    self._slots, logps, top = self._call(
      programs.score,
      f"piece of {size} tokens scored, {self._shape()}",
      *(self._ready.stacked, self._slots, pieces, jnp.asarray(behind)),
      *(self.config, self.dtype, self.top),
    )
    if reading is not None:
      part = lambda x: np.asarray(x)[0, : reading.at - at]
      reading.logps.append(part(logps))
      if top is not None:
        reading.top.append((part(top[0]), part(top[1])))

  def _shape(self) -> str:
    return f"{self.rows} rows of {self._slots.cache.slots} slots"

  def _reserve(self) -> None:
    """Rows that are being read are as long as they will be, so that windows meanwhile write behind them."""
    chosen = np.isin(np.arange(self.rows), list(self._readings))
    lengths = np.zeros(self.rows, np.int32)
    for index, reading in self._readings.items():
      lengths[index] = len(reading.prompt)
    self._slots = self._call(programs.reserve, "reservation", self._slots, chosen, lengths)

  def _restore(self, index: int, blocks: Sequence[int]) -> None:
    assert self.prefixes is not None
    args = self.prefixes.to_restore(self._slots, index, blocks)
    self._slots = self._call(kept_prefixes.restore, "blocks of a prefix read again", *args)

  def _keep(self, index: int, known_by: Hashable, prompt: Sequence[int]) -> None:
    """The blocks that the prompt in that row begins with, for whoever comes later; warming up (None) none."""
    assert self.prefixes is not None
    args = self.prefixes.to_keep(self._slots, index, known_by, prompt)
    if args is not None or not prompt:
      args = args or self.prefixes.nothing(self._slots)
      self.prefixes.pool = self._call(kept_prefixes.keep, "blocks of a prefix kept", *args)

  def _begin(self, index: int, row: int) -> None:
    args = (self._ready.stacked, self._slots, np.int32(index), np.int32(row), self.config)
    self._slots = self._call(programs.begin, "beginning of a row", *args)

  def _begin_bare(self, index: int) -> None:
    args = (self._slots, np.int32(index))
    self._slots = self._call(programs.begin_bare, "beginning of a bare row", *args)

  def _clear(self, index: int) -> None:
    self._slots = self._call(programs.clear, "clearing of a row", self._slots, np.int32(index))

  def _copy(self, source: int, index: int) -> None:
    args = (self._slots, np.int32(source), np.int32(index))
    self._slots = self._call(programs.copy, "copy of a row", *args)

  def _collect(self, drawn: programs.Drawn) -> list[Progress]:
    """What a window drew, row by row; rows that ended are free."""
    told, ended = [], set()
    for index, row in self._busy.items():
      if index in self._readings:
        continue
      count = int(drawn.counts[index])
      new = drawn.tokens[index, :count].tolist()
      row.tokens += new
      part = lambda x, index=index, count=count: np.asarray(x)[index, :count]
      row.logps.append(part(drawn.logps))
      if drawn.kept is not None:
        row.kept.append(part(drawn.kept))
      if drawn.top is not None and self._wants_top(row.request):
        row.top.append((part(drawn.top[0]), part(drawn.top[1])))
      reason = self._reason(row, bool(drawn.live[index]), len(row.tokens) - count)
      why, length = reason or (None, len(row.tokens))
      left = count - (len(row.tokens) - length)
      answer = None if why is None else _answer(row, why, length)
      top = (row.top[-1][0][:left], row.top[-1][1][:left]) if row.top else None
      told.append(
        Progress(row.ticket, new[:left], answer, row.logps[-1][:left], top, _first(row), row.cached)
      )
      if why is None:
        continue
      ended.add(index)
      if drawn.live[index]:
        self._cut.add(index)
    self._free(ended)
    return told

  def _reason(self, row: _Row, is_live: bool, read: int) -> tuple[str, int] | None:
    """(why a row has ended, after how many tokens), None where it goes on."""
    request, tokens = row.request, row.tokens
    if request.stop_strings:
      least = request.min_new_tokens
      tokenizer = self._tokenizer(request)
      length = requests.string_end(tokens, read, least, request.stop_strings, tokenizer)
      if length is not None:
        return requests.STRING, length
    if is_live:
      return None
    stopped = tokens[-1] in request.stop_tokens
    return (requests.STOPPED if stopped else requests.FULL), len(tokens)

  def _tokenizer(self, request: Request) -> Any:
    """What stop strings are looked for with."""
    return self.tokenizer if request.tokenizer is None else request.tokenizer

  def _wants_top(self, request: Request) -> bool:
    return self.top > 0 and request.top != 0

  def _end(self, indices: set[int]) -> None:
    """Those rows draw no more."""
    mask = np.isin(np.arange(self.rows), list(indices))
    self._slots = self._call(programs.end, "end of rows", self._slots, mask)

  def _free(self, indices: set[int]) -> None:
    for index in indices:
      row = self._busy.pop(index)
      if not all(np.isfinite(logps).all() for logps in row.logps):
        self._spoilt.add(index)
        self._held[index] = None
        if self._tells_overflow:
          log.warning("%s", OVERFLOW)
          self._tells_overflow = False
      held = self._held[index]
      if held is not None and self.reuses_written:
        # the last token drawn was not read
        held.tokens = [*map(int, row.request.prompt), *row.tokens][:-1]

  def _plan(self, chosen: dict[int, Request]) -> programs.Plan:
    """Of each row what its request asks for; of the others nothing that matters."""
    idle = Request([0], 1)
    each = [chosen.get(index, idle) for index in range(self.rows)]
    stops = np.full((self.rows, requests.MOST_STOPS), -1, np.int32)
    for index, request in chosen.items():
      stops[index, : len(request.stop_tokens)] = list(request.stop_tokens)
    of = lambda name: jnp.asarray([getattr(request, name) for request in each], jnp.int32)
    identity = [(r.seed, r.number, r.sample) for r in each]
    return programs.Plan(
      how=samplers.Rows.of([request.sampling for request in each]),
      least=of("min_new_tokens"),
      most=of("max_new_tokens"),
      stops=jnp.asarray(stops),
      identity=jnp.asarray(identity, jnp.uint32),
      row=of("row"),
      tops=jnp.asarray([self._wants_top(request) for request in each]),
    )

  def _call(self, program: Any, name: str, *args: Any) -> Any:
    """A program's result; a new compilation is kept in `compiled`, and told once the engine is warm."""
    before_call = program._cache_size()
    result = sharding.told_alike(program(*args))
    self.programs[name] = None
    if program._cache_size() > before_call:
      self.compiled.append(name)
      if self.is_strict and self.is_warm:
        raise CompilationError(f"compiled after the warm-up: {name}")
      if self.is_warm:
        log.warning("compiled after the warm-up: %s", name)
    return result


def _first(row: _Row) -> Scores | None:
  """What the prompt's tokens were worth, where it has not been told yet."""
  if row.is_told:
    return None
  row.is_told = True
  return row.prompt


def _penalties(how: Sampling) -> str:
  """The penalties in use, as they were asked for."""
  names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
  off = dict(repetition_penalty=1)
  used = [f"{n}={getattr(how, n):g}" for n in names if getattr(how, n) != off.get(n, 0)]
  return ", ".join([*used, *(["bias"] if how.bias else [])])


def _answer(row: _Row, why: str, length: int) -> Answer:
  whole = lambda parts: np.concatenate(parts)[:length]
  return Answer(
    request=row.request,
    tokens=row.tokens[:length],
    logps=whole(row.logps),
    ended=why,
    prompt=row.prompt,
    kept=whole(row.kept) if row.kept else None,
    top=(whole([ids for ids, _ in row.top]), whole([lps for _, lps in row.top]))
    if row.top
    else None,
  )


@dataclasses.dataclass(frozen=True)
class Generation:
  """What was generated, one entry a text, in the order of the prompts, the samples of a prompt together.

  tokens: the new ids, the stop token included where one was drawn.
  logps: their log-probabilities as in `requests.Answer`, float32.
  finished: True where the text came to an end of its own, False where max_new_tokens cut it.
  """

  tokens: list[list[int]]
  logps: list[np.ndarray]
  finished: list[bool]


def generate(
  params: Params | Ready,
  config: ModelConfig,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int | Sequence[int],
  sampling: Sampling = GREEDY,
  stop_tokens: Sequence[int] = (),
  stop_strings: Sequence[str] = (),
  min_new_tokens: int = 0,
  tokenizer: Any = None,
  seed: int = 0,
  samples: int = 1,
  batch_size: int = 16,
  dtype: Any = None,
  progress: Callable[[int, int], None] | None = None,
) -> Generation:
  """Continuations of ragged prompts, `samples` of each; one does not depend on what is written beside it.

  Args:
    params: as for `Engine`.  Bound with rows, there is one for each prompt.
    prompts: token ids, at least one each.
    max_new_tokens: of every answer, or of each prompt's.
    stop_tokens: ids that end a text, see `stop_tokens`; () for none.
    stop_strings: a text ends with the token by which it holds one; they need `tokenizer`.
    min_new_tokens: before a text may end so; at most max_new_tokens.
    seed: token t of sample s of prompt i is drawn by (seed, i, s, t).
    batch_size: the most texts under way at once.
    dtype: of the computation and the cache; default the embedding's.
    progress: called with (answers done, answers wanted).
  """
  if batch_size < 1:
    raise ValueError(f"batch_size must be at least 1, found {batch_size}")
  if samples < 1:
    raise ValueError(f"samples must be at least 1, found {samples}")
  ready = prepare(params, config)
  rows = weight.batch_rows(ready.stacked)
  if rows is not None and rows != len(prompts):
    raise ValueError(f"{len(prompts)} prompts, but the parameters are bound for {rows} rows")
  single = isinstance(max_new_tokens, int | np.integer)
  most = [max_new_tokens] * len(prompts) if single else list(max_new_tokens)
  asked = [
    Request(
      prompt=prompts[i],
      max_new_tokens=int(most[i]),
      min_new_tokens=min(min_new_tokens, int(most[i])),
      sampling=sampling,
      stop_tokens=stop_tokens,
      stop_strings=stop_strings,
      seed=seed,
      number=i,
      sample=sample,
      row=0 if rows is None else i,
    )
    for i in range(len(prompts))
    for sample in range(samples)
  ]
  bound = before.slots(ready.stacked)
  for request in asked:
    requests.check(request, config, config.max_length, bound, rows)
  if not asked:
    return Generation([], [], [])
  length = bucket(max(bound + len(r.prompt) + r.max_new_tokens for r in asked))
  engine = Engine(
    ready,
    config,
    rows=min(batch_size, len(asked)),
    length=min(length, config.max_length),
    dtype=dtype,
    tokenizer=tokenizer,
  )
  # texts of like length side by side, the answers to one prompt together
  order = sorted(range(len(asked)), key=lambda i: -len(asked[i].prompt) - asked[i].max_new_tokens)
  answers: dict[int, Answer] = {}
  for place, answer in engine.run(asked[i] for i in order):
    answers[order[place]] = answer
    if progress is not None:
      progress(len(answers), len(asked))
  ordered = [answers[i] for i in range(len(asked))]
  return Generation(
    [answer.tokens for answer in ordered],
    [answer.logps for answer in ordered],
    [answer.finished for answer in ordered],
  )


def prepare(params: Params | Ready, config: ModelConfig, storage: str = storage_lib.AUTO) -> Ready:
  """params in the two forms that the engine wants, their matrices kept as `storage` says (`storage.store`).

  On a mesh they are whole along fsdp, where each token would gather them again, and cut along tensor alone.

  On a CPU the second form is a copy: there a scan copies each layer's weights out of the stack at every step.  With the
  layers apart a step of SmolLM2-135M takes 45 ms of processor time instead of 87 (batch 1), 190 instead of 270 (16).
  """
  if isinstance(params, Ready):
    return params
  decoder.check(params, config)
  if sharding.active():
    whole = lambda path, leaf: sharding.gather(leaf, sharding.spec_for(path, layout.RULES))
    params = tree.unflatten((path, whole(path, leaf)) for path, leaf in tree.items(params))
  if storage != storage_lib.AUTO:
    params = storage_lib.store(params, config, storage)
  if jax.default_backend() != "cpu" or isinstance(params["layers"], tuple):
    return Ready(params, params)
  params = tree.unflatten((path, layout.frozen(path, leaf)) for path, leaf in tree.items(params))
  return Ready(params, storage_lib.drawing(seats.bare(params), config))


def stop_tokens(
  config: ModelConfig, tokenizer: Any = None, folder: str | Path | None = None
) -> tuple[int, ...]:
  """Every id that ends a text and can be drawn: of config.json, generation_config.json and the tokenizer, rising."""
  ids = set(config.eos_token_ids)
  if tokenizer is not None and tokenizer.eos_token_id is not None:
    ids.add(tokenizer.eos_token_id)
  if folder is not None and (path := Path(folder) / "generation_config.json").exists():
    ids.update(as_ids(files.read_json(path).get("eos_token_id")))
  # some files name an end that their model has no row for
  return tuple(sorted(at for at in ids if 0 <= at < config.vocab_size))


def bucket(length: int) -> int:
  """The least of 32, 48, 64, 96, 128, 192, ... that is no less than length: few shapes, each compiled once.

  >>> [bucket(n) for n in (1, 33, 64, 65, 100)]
  [32, 48, 64, 96, 128]
  """
  size = 32
  while size < length:
    size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
  return size
