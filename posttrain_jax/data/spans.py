"""Where in a text what is trained begins and ends, and where in its tokens.

A border is a place where what stands before it is tokenised as it is alone, as a prompt is before it is answered.
Where a token lies across one, the text is cut there.
"""

import dataclasses
import functools
import itertools
from typing import Any

from posttrain_jax.data.errors import RowError

MANY_SPANS = 16  # of a text: more are found piece by piece, and not by what stands before each


@dataclasses.dataclass(frozen=True)
class Plan:
  """A text, and where in it what is trained begins and ends."""

  text: str
  spans: tuple[tuple[int, int], ...]
  is_chat: bool = False
  end: int | None = None  # the token that ends a turn
  ending: str = ""  # how it is written

  def prefixes(self) -> list[str]:
    """The text, and what of it stands before a border that is to be found in tokens."""
    if len(self.spans) > MANY_SPANS:
      return [self.text]
    borders = [start for start, _ in self.spans if start]
    if self.end is None:
      borders += [stop for _, stop in self.spans if stop < len(self.text)]
    return [self.text, *(self.text[:at] for at in borders)]


class Reader:
  """A tokenizer, told where texts have borders."""

  def __init__(self, tokenizer: Any):
    self.tokenizer = tokenizer

  def ids(self, texts):
    # add_special_tokens=False: a rendered template has its BOS already, plain text gets it below.
    return (
      self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    )

  def tokens(self, plan: Plan, ids: dict[str, list[int]], origin: str):
    """(the tokens of the plan's text, its spans in them); `ids` has those of its prefixes.

    Raises:
      RowError: the tokenizer cannot write the text with a border in it.
    """
    tokens = ids[plan.text]
    spans = self._found(plan, tokens, ids)
    return self._cut(plan, origin) if spans is None else (tokens, spans)

  def _found(self, plan, tokens, ids):
    """The spans in tokens; None where a token lies across the beginning or the end of one, or they are many."""
    spans = []
    if len(plan.spans) > MANY_SPANS:
      return None
    for start, stop in plan.spans:
      before = ids[plan.text[:start]] if start else []
      first = len(before)
      if tokens[:first] != before:
        return None
      if stop == len(plan.text):
        last = len(tokens)
      elif plan.end is not None:
        last = first
        for _ in range(plan.text.count(plan.ending, start, stop)):
          if plan.end not in tokens[last:]:
            return None
          last = tokens.index(plan.end, last) + 1
      else:
        before = ids[plan.text[:stop]]
        last = len(before)
        if tokens[:last] != before:
          return None
      spans.append((first, last))
    return spans

  def _cut(self, plan, origin):
    """(tokens, spans) of a text whose pieces are tokenised one by one, as a prompt is before its answer is written."""
    places = sorted({0, len(plan.text), *(at for span in plan.spans for at in span)})
    pieces = [plan.text[a:b] for a, b in itertools.pairwise(places)]
    ids = [
      self.ids([piece])[0] if i == 0 else self._going_on(piece) for i, piece in enumerate(pieces)
    ]
    tokens = list(itertools.chain.from_iterable(ids))
    at = dict(zip(places, itertools.accumulate(map(len, ids), initial=0)))
    if self.decoded([tokens]) != self.decoded(self.ids([plan.text])):
      raise RowError(
        "no border",
        origin,
        f"the tokenizer has no way to write {pieces[0][-20:]!r} and {pieces[-1][:20]!r} apart; put a space or a line"
        " break between the prompt and its answer",
      )
    return tokens, [(at[start], at[stop]) for start, stop in plan.spans]

  def _going_on(self, text):
    """The tokens of a text that others come before."""
    (ids,) = self.ids([text])
    if self._joins:
      return ids
    # SentencePiece puts a space before what begins a text; behind a line break it does not
    line, both = self.ids(["\n", "\n" + text])
    return both[len(line) :] if both[: len(line)] == line else ids

  @functools.cached_property
  def _joins(self):
    """Whether the tokens of two texts, one behind the other, are those two texts."""
    return self.decoded([self.ids(["a"])[0] * 2]) == ["aa"]

  def decoded(self, some):
    return self.tokenizer.backend_tokenizer.decode_batch(some, skip_special_tokens=False)

  def says(self, ids, read, text):
    """Whether tokens say a text, for tokenizers that do not keep every space, or change letters on the way."""
    unknown = self.tokenizer.unk_token_id
    if unknown is not None and ids.count(unknown) > text.count(self.tokenizer.unk_token):
      return False
    if read.lstrip(" ") == text.lstrip(" "):
      return True
    (again,) = self.decoded(self.ids([text]))
    return again.strip() == read.strip()
