"""What is asked of the engine, and what comes back."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from posttrain_jax.core import bits, seeds, words
from posttrain_jax.models.config import ModelConfig
from posttrain_jax.rollout.sampling import GREEDY, Sampling

MOST_STOPS = 64  # stop tokens of a request
STOPPED, STRING, FULL = "stop_token", "stop_string", "max_new_tokens"


@dataclasses.dataclass(frozen=True)
class Request:
  """A text to be continued.  Token t is drawn by (seed, number, sample, t), and by nothing else.

  prompt: token ids, at least one.
  min_new_tokens: so many are drawn before one that ends the text, a stop token or the end of a stop string.
  stop_tokens: ids that end the text; the one drawn is its last token.
  stop_strings: the text ends with the token by which it holds one of them.
  tokenizer: writes the text that those are looked for in; None: the engine's.
  seed, number, sample: each from 0 to 2^32 - 1; the latter two say which prompt of a run it is, and which of the
    answers to it.
  row: which entry of the parameters' rows it is for, where they are bound with rows; else 0.
  bound: how many slots of that entry's stand before the first token, where entries differ; None: all that there are.
  whose: what that entry's parameters are known by, as long as they are the same: what was read under it may be read
    again under it, whichever row has them.  None: by the row.
  top: how many most likely tokens the answer tells at each place, None for as many as the engine can.
  scores_prompt: the answer has the log-probabilities of the prompt's tokens, all of which are read for it.
  allowed: which ids may come next, given those drawn: [vocab] of booleans, or their bits (`core.bits.pack`).
  """

  prompt: Sequence[int]
  max_new_tokens: int
  min_new_tokens: int = 0
  sampling: Sampling = GREEDY
  stop_tokens: Sequence[int] = ()
  stop_strings: Sequence[str] = ()
  seed: int = 0
  number: int = 0
  sample: int = 0
  row: int = 0
  bound: int | None = None
  whose: Hashable = None
  top: int | None = None
  scores_prompt: bool = False
  allowed: Callable[[Sequence[int]], np.ndarray] | None = None
  tokenizer: Any = None

  @property
  def known_by(self) -> Hashable:
    """What the parameters that read its prompt are known by."""
    return ("row", self.row) if self.whose is None else self.whose


@dataclasses.dataclass(frozen=True)
class Scores:
  """Of a prompt's tokens from the second on: logps [tokens - 1], top as an answer's."""

  logps: np.ndarray
  top: tuple[np.ndarray, np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
  """What was drawn for a request.

  tokens: the new ids, the stop token included where one was drawn.
  logps: their log-probabilities, float32: under the softmax at the request's temperature (greedy: 1), before any
    filter or penalty; under the kept tokens alone where the engine records those.  A stop token that min_new_tokens
    holds off has no part in either, and is not kept.
  ended: why it ends, STOPPED, STRING or FULL.
  kept: [tokens, ceil(vocab / 32)] bits of the tokens that the filters kept, where the engine records them.
  top: (ids, log-probabilities), [tokens, n] each, of the n most likely at each place, where the engine gives them.
  """

  request: Request
  tokens: list[int]
  logps: np.ndarray
  ended: str
  kept: np.ndarray | None = None
  top: tuple[np.ndarray, np.ndarray] | None = None
  prompt: Scores | None = None  # where the request asks for them

  @property
  def drawn(self) -> int:
    """How many tokens the model wrote."""
    return len(self.tokens)

  @property
  def finished(self) -> bool:
    """Whether the text came to an end of its own, not to that of its room."""
    return self.ended != FULL


def check(request: Request, config: ModelConfig, length: int, bound: int, rows: int | None) -> None:
  """Raises ValueError for what cannot be answered; messages name the prompt by the request's number.

  length: the most positions of a text that there is room for; bound: those that are taken before its first token.
  """
  name = f"prompt {request.number}"
  check_ids(request.prompt, config, name)
  _check_kinds(request, name)
  if request.max_new_tokens < 1:
    raise ValueError(f"max_new_tokens must be at least 1, found {request.max_new_tokens}")
  if not 0 <= request.min_new_tokens <= request.max_new_tokens:
    raise ValueError(
      f"min_new_tokens must be from 0 to max_new_tokens={request.max_new_tokens}, found {request.min_new_tokens}"
    )
  if len(request.stop_tokens) > MOST_STOPS:
    raise ValueError(f"{len(request.stop_tokens)} stop tokens: a request has {MOST_STOPS} at most")
  if outside := [int(at) for at in request.stop_tokens if not 0 <= at < config.vocab_size]:
    raise ValueError(
      f"{name} ends with stop_tokens {outside}, which are none of the vocabulary's 0..{config.vocab_size - 1}"
    )
  if outside := [at for at, _ in request.sampling.bias if not 0 <= at < config.vocab_size]:
    raise ValueError(
      f"{name} has a bias for tokens {outside}, which are none of the vocabulary's 0..{config.vocab_size - 1}"
    )
  if not 0 <= request.row < (rows or 1):
    raise ValueError(f"{name} asks for row {request.row}, the parameters have {rows or 1}")
  if bound + len(request.prompt) + request.max_new_tokens > length:
    soft = f" and {bound} of a soft prompt or prefix" if bound else ""
    whose = (
      f"the {length} positions of the model"
      if length == config.max_length
      else f"the engine's length={length} (the model has {config.max_length} positions)"
    )
    raise ValueError(
      f"{name} has {len(request.prompt)} tokens{soft}; with max_new_tokens={request.max_new_tokens} that is more than"
      f" {whose}"
    )


def _check_kinds(request: Request, name: str) -> None:
  """Raises ValueError where a field holds no value of its kind."""
  for field, value in (
    ("seed", request.seed),
    ("number", request.number),
    ("sample", request.sample),
  ):
    seeds.check(value, field)
  for field, value in (
    ("max_new_tokens", request.max_new_tokens),
    ("min_new_tokens", request.min_new_tokens),
    ("row", request.row),
  ):
    if not seeds.is_whole(value):
      raise ValueError(f"{name} has {field}={words.shown(value, 40)}: write a whole number")
  if not isinstance(request.sampling, Sampling):
    how = words.shown(request.sampling, 40)
    raise ValueError(f"{name} has sampling={how}: write Sampling(temperature=...)")
  several = (("stop_tokens", request.stop_tokens), ("stop_strings", request.stop_strings))
  for field, value in several:
    if isinstance(value, str) or not isinstance(value, Iterable):
      raise ValueError(
        f"{name} has {field}={words.shown(value, 40)}: write several, as ({value!r},)"
      )
  if not all(map(seeds.is_whole, request.stop_tokens)):
    stops = words.shown(list(request.stop_tokens), 40)
    raise ValueError(f"{name} has stop_tokens={stops}: they are token ids, texts are stop_strings")
  if not all(isinstance(text, str) for text in request.stop_strings):
    stops = words.shown(list(request.stop_strings), 40)
    raise ValueError(f"{name} has stop_strings={stops}: they are texts, ids are stop_tokens")


def check_ids(prompt: Sequence[int], config: ModelConfig, name: str = "the prompt") -> None:
  """Raises ValueError where a prompt is empty, no list of token ids, or one has no row in the embedding."""
  if isinstance(prompt, str | bytes):
    text = words.shown(prompt, 40)
    raise ValueError(f"{name} is the text {text}: give its token ids, tokenizer(text)['input_ids']")
  tokens = np.asarray(prompt).tolist() if isinstance(prompt, np.ndarray | jax.Array) else prompt
  if not isinstance(tokens, Sequence):
    raise ValueError(f"{name} is {words.shown(prompt, 40)}: give a list of token ids")
  if len(tokens) == 0:
    raise ValueError(f"{name} is empty; give it at least the token that starts a text")
  for at, token in enumerate(tokens):
    if not seeds.is_whole(token):
      raise ValueError(
        f"{name} holds {words.shown(token, 40)} at place {at}: token ids are whole numbers"
      )
  if min(prompt) < 0 or max(prompt) >= config.vocab_size:
    raise ValueError(
      f"{name} holds ids outside 0..{config.vocab_size - 1}: {min(prompt)}..{max(prompt)}"
    )


def check_whole(
  value: int, name: str, low: int, of: str, high: int | None = None, whose: str = ""
) -> None:
  """Raises ValueError unless value is a whole number from low to high; `of` and `whose` say what each bound counts."""
  if not seeds.is_whole(value):
    raise ValueError(f"{name}={value!r}: write a whole number")
  if value < low:
    raise ValueError(f"{name}={value}: write at least {low} ({of})")
  if high is not None and value > high:
    raise ValueError(f"{name}={value} is more than the {high} {whose} ({of})")


def packed(allowed: Any, vocab: int) -> np.ndarray:
  """[words] uint32: what a grammar says, booleans or bits, as `core.bits` lays them.

  Raises:
    ValueError: it is neither, or allows nothing.
  """
  said, count = np.asarray(allowed), bits.words(vocab)
  if said.dtype == bool and said.shape == (vocab,):
    padded = np.packbits(np.pad(said, (0, count * bits.WORD - vocab)), bitorder="little")
    said = padded.view("<u4")
  elif said.shape == (count,) and said.dtype in (np.uint32, np.int32):
    said = said.view(np.uint32)
  else:
    raise ValueError(
      f"a grammar allows by [{vocab}] booleans or [{count}] words of 32 bits, found {said.dtype} {said.shape}"
    )
  last = said[-1] & np.uint32(2 ** (vocab % bits.WORD or bits.WORD) - 1)
  if not said[:-1].any() and not last:
    raise ValueError("the grammar allows no token, and no end either")
  return said


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str:
  """What stop strings are looked for in."""
  return tokenizer.decode(
    list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
  )


def check_strings(strings: Sequence[str], tokenizer: Any) -> None:
  """Raises ValueError for a stop string that no text holds, or every text.

  A string can be made where the tokenizer takes it apart and puts it together again, alone or amid a text.
  """
  for string in strings:
    if not string:
      raise ValueError('an empty stop string ends every text: leave "" out of stop_strings')
    if not any(_is_made(string, around, tokenizer) for around in ("", "a", "\n", " ")):
      raise ValueError(
        f"the tokenizer cannot make the stop string {string!r}, so no text would end with it: give a string of its"
        " letters, or stop_tokens for a special token"
      )


def parted(strings: Sequence[str], tokenizer: Any) -> tuple[set[int], list[str]]:
  """(ids, strings) that end a text where any string is given: a special token ends it by its id, since no text has it,
  and what the tokenizer cannot make is left out.

  Raises:
    ValueError: a string is empty.
  """
  special = {
    token.content: at for at, token in tokenizer.added_tokens_decoder.items() if token.special
  }
  ids = {special[string] for string in strings if string in special}
  made = []
  for string in strings:
    if not string:
      raise ValueError("an empty stop string ends every text: leave it out")
    if string not in special:
      with contextlib.suppress(ValueError):
        check_strings([string], tokenizer)
        made.append(string)
  return ids, made


def _is_made(string: str, around: str, tokenizer: Any) -> bool:
  whole = f"{around}{string}{around}"
  try:
    whole.encode()
  except UnicodeEncodeError:  # half of a surrogate pair
    return False
  ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
  return string in text_of(tokenizer, ids)


def string_end(
  tokens: Sequence[int], read: int, least: int, strings: Sequence[str], tokenizer: Any
) -> int | None:
  """After how many tokens the text holds one of the strings, None where it does not; the first `read` hold none.

  least: a string that the first so many hold does not count.
  """
  before = len(text_of(tokenizer, tokens[:least])) if least else 0

  def holds(count: int) -> bool:
    text = text_of(tokenizer, tokens[:count])
    return any(text.find(string, max(0, before - len(string) + 1)) >= 0 for string in strings)

  if not holds(len(tokens)):
    return None
  return next((n for n in range(max(read, least) + 1, len(tokens) + 1) if holds(n)), None)
