"""Tokens that become text as they come, for tokenizers of both kinds."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from posttrain_jax.serve import spelling
from tests import tiny

BYTES = tiny.tokenizer()


def pieces_tokenizer():
  """As Llama 2's: words behind a lower block, bytes by their names, the first word without its space."""
  words = [
    "<s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    "▁",
    "▁Hello",
    "▁world",
    "lo",
    "!",
    "a",
  ]
  made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
  made.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  made.add_special_tokens(["<s>"])
  return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


PIECES = pieces_tokenizer()


def fed(tokenizer, tokens, silent=()):
  decoder = spelling.Decoder(tokenizer, silent, byte_level=spelling.is_byte_level(tokenizer))
  return [*(decoder.feed(token) for token in tokens), decoder.close()]


def test_the_kind_of_a_tokenizer_is_known():
  assert spelling.is_byte_level(BYTES)
  assert not spelling.is_byte_level(PIECES)


def by_name(*names):
  return PIECES.convert_tokens_to_ids(list(names))


CASES = [
  by_name("▁Hello", "▁world", "!"),
  by_name("▁", "▁Hello", "lo"),
  by_name("▁Hello", *(f"<0x{byte:02X}>" for byte in "😀é".encode()), "▁world"),
  by_name("a", "<0xC3>"),
]


@pytest.mark.parametrize("tokens", CASES, ids=str)
def test_pieces_add_up_to_the_whole_text(tokens):
  whole = PIECES.decode(tokens, clean_up_tokenization_spaces=False)
  assert "".join(fed(PIECES, tokens)) == whole


def test_a_character_of_several_tokens_is_told_with_its_last():
  tokens = by_name(*(f"<0x{byte:02X}>" for byte in "😀".encode()))
  assert fed(PIECES, tokens) == ["", "", "", "😀", ""]
  letters = BYTES("😀", add_special_tokens=False)["input_ids"]
  assert fed(BYTES, letters) == ["", "", "", "😀", ""]


@pytest.mark.parametrize("seed", range(20))
def test_any_bytes_are_spelled_as_the_tokenizer_decodes_them(seed):
  tokens = random.Random(seed).choices(range(256), k=60)
  assert "".join(fed(BYTES, tokens)) == BYTES.decode(tokens, clean_up_tokenization_spaces=False)


def test_silent_tokens_write_nothing_and_part_nothing():
  first, *rest = BYTES("é", add_special_tokens=False)["input_ids"]
  assert fed(BYTES, [first, 257, *rest], silent={257}) == ["", "", "é", ""]


@pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["bytes", "pieces"])
def test_every_token_has_the_bytes_that_it_writes(tokenizer):
  byte_level = spelling.is_byte_level(tokenizer)
  for text in ("Hello", "é", "😀"):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    data = b"".join(spelling.token_bytes(tokenizer, at, byte_level=byte_level) for at in ids)
    assert data.decode().lstrip() == text


def test_an_id_beyond_the_tokenizer_writes_nothing():
  assert spelling.token_bytes(BYTES, 10_000, byte_level=True) == b""


@pytest.mark.parametrize("seed", range(30))
def test_a_text_is_cut_at_its_first_stop_string_however_it_is_parted(seed):
  draw = random.Random(seed)
  text = "".join(draw.choices("ab", k=40))
  stops = ["".join(draw.choices("ab", k=draw.randint(2, 5))) for _ in range(3)]
  cut = min((text.index(stop) for stop in stops if stop in text), default=len(text))
  told, at, by = "", 0, spelling.Spelling(spelling.Decoder(BYTES, (), byte_level=True), stops)
  while at < len(text):
    step = draw.randint(1, 4)
    told += by.add(text[at : at + step])
    at += step
    assert text.startswith(told)  # nothing is told that is taken back
  assert told + by.close() == text[:cut]
  assert (by.matched is not None) == any(stop in text for stop in stops)


@pytest.mark.parametrize("seed", range(30))
def test_a_stop_string_ends_no_text_within_what_must_come_first(seed):
  draw = random.Random(seed)
  text, least = draw.choices("ab", k=40), draw.randint(0, 30)
  stops = ["".join(draw.choices("ab", k=draw.randint(1, 5))) for _ in range(3)]
  ends = [n for n in range(least + 1, 41) for stop in stops if "".join(text[:n]).endswith(stop)]
  by = spelling.Spelling(None, stops)
  told = "".join(by.add(letter, may_end=at >= least) for at, letter in enumerate(text))
  if ends:
    whole = "".join(text[: ends[0]])
    cut = max(len(stop) for stop in stops if whole.endswith(stop))
    assert (told, by.matched) == (whole[: ends[0] - cut], whole[ends[0] - cut :])
  else:
    assert by.matched is None
