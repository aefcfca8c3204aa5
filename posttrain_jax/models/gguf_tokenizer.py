"""The tokenizer inside a GGUF file becomes `tokenizer.json` and its companions, and a tokenizer the metadata of a file.

transformers can read it too, but only with PyTorch installed.  A tokenizer that is almost right
trains a model that is almost right, so a kind that we have not compared with its original is
refused by name.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from posttrain_jax.core import files

log = logging.getLogger(__name__)

# Values of tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_LLAMA3_PATTERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_PATTERN = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


# What tokenizers differ about: spaces, line ends, digits, contractions, accents, other scripts, emoji.
_PROBES = (
  "",
  " a",
  "  two  spaces\n\n \n\tand a tab\r\n ",
  "It's we'LL they'd I'M 'quoted' a.b...c,,d--e==f",
  "0 12 345 6789 3.14 1,000,000 v2 ٣٤ ½",
  "naïve cafe\u0301 Ångström Straße ﬁ Ω",
  "漢字かな交じり文 한국어 Привет العربية ไทย हिन्दी",
  "🙂👩🏽‍🚀🇫🇷 ✅~~ \u00a0\u200b\ufeff\x00",
)


@dataclasses.dataclass(frozen=True)
class _Splitting:
  """How a byte-level BPE cuts text into words before merging."""

  digits: bool = False  # every digit a word of its own
  pattern: str | None = None  # None: GPT-2's own expression
  nfc: bool = False
  ignore_merges: bool = False  # a word that is in the vocabulary needs no merges
  add_bos: bool = False  # where the file does not say


_SPLITTINGS = {
  "gpt-2": _Splitting(),
  "smollm": _Splitting(digits=True),
  "llama-bpe": _Splitting(pattern=_LLAMA3_PATTERN, ignore_merges=True, add_bos=True),
  "qwen2": _Splitting(pattern=_QWEN2_PATTERN, nfc=True),
}


def write(fields: dict, out_dir: Path, *, max_length: int) -> None:
  """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json.

  `fields` are the metadata of the GGUF file, by key.
  """
  tokenizer, add_bos, add_eos = _build(fields)
  tokenizer.save(str(out_dir / "tokenizer.json"))
  special = {
    name: tokenizer.id_to_token(fields[f"tokenizer.ggml.{key}"])
    for name, key in (
      ("bos_token", "bos_token_id"),
      ("eos_token", "eos_token_id"),
      ("unk_token", "unknown_token_id"),
      ("pad_token", "padding_token_id"),
    )
    if f"tokenizer.ggml.{key}" in fields
  }
  extra = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
  config = {
    **special,
    "add_bos_token": add_bos,
    "add_eos_token": add_eos,
    "add_prefix_space": False,
    "additional_special_tokens": [t for t in extra if t not in special.values()],
    "clean_up_tokenization_spaces": False,
    "model_max_length": max_length,
    # The backend that takes tokenizer.json as it is; a named class would rebuild parts of it.
    "tokenizer_class": "PreTrainedTokenizerFast",
  }
  if templates := _templates(fields):
    config["chat_template"] = templates
  files.write_json(out_dir / "tokenizer_config.json", config)
  files.write_json(out_dir / "special_tokens_map.json", special)


def _templates(fields: dict) -> str | list[dict[str, str]] | None:
  """The chat template, or where there are several, as `tool_use` beside the default, each with its name."""
  named = {"default": fields.get("tokenizer.chat_template")}
  names = fields.get("tokenizer.chat_templates", ())
  named |= {name: fields.get(f"tokenizer.chat_template.{name}") for name in names}
  written = [{"name": name, "template": text} for name, text in named.items() if text is not None]
  return written if len(written) > 1 else named["default"]


def _build(fields: dict) -> tuple[tokenizers.Tokenizer, bool, bool]:
  model = _required(fields, "tokenizer.ggml.model")
  if model != "gpt2":
    raise ValueError(
      f"cannot convert a GGUF tokenizer of model {model!r}; supported: 'gpt2' (byte-level BPE)"
    )
  pre = _required(fields, "tokenizer.ggml.pre")
  if pre not in _SPLITTINGS:
    raise ValueError(
      f"cannot convert a GGUF tokenizer with pre-tokenizer {pre!r}; "
      f"supported: {', '.join(sorted(_SPLITTINGS))}"
    )
  splitting = _SPLITTINGS[pre]
  tokens = _required(fields, "tokenizer.ggml.tokens")
  vocab = {token: i for i, token in enumerate(tokens)}
  for i, token in enumerate(tokens):
    if vocab[token] != i:
      raise ValueError(f"the GGUF vocabulary holds {token!r} twice, as {i} and {vocab[token]}")
  merges = [tuple(merge.split(" ")) for merge in _required(fields, "tokenizer.ggml.merges")]
  for merge in merges:
    if len(merge) != 2 or not {*merge, "".join(merge)} <= vocab.keys():
      raise ValueError(f"the GGUF merge {' '.join(merge)!r} is not of two tokens that make a third")
  tokenizer = _plain(splitting, vocab, merges)

  types = fields.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
  # One call: the library rebuilds its index at every call.
  tokenizer.add_tokens(
    [
      tokenizers.AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
      for token, kind in zip(tokens, types, strict=True)
      if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
  )

  add_bos = fields.get("tokenizer.ggml.add_bos_token", splitting.add_bos)
  add_eos = fields.get("tokenizer.ggml.add_eos_token", False)
  before, after = (
    [_required(fields, f"tokenizer.ggml.{name}_token_id")] if adds else []
    for name, adds in (("bos", add_bos), ("eos", add_eos))
  )
  if before or after:
    framed = [[*(tokens[i] for i in before), text, *(tokens[i] for i in after)] for text in "AB"]
    first = [f"${part}" if part == "A" else part for part in framed[0]]
    second = [f"${part}:1" if part == "B" else f"{part}:1" for part in framed[1]]
    tokenizer.post_processor = processors.TemplateProcessing(
      single=first,
      pair=first + second,
      special_tokens=[(tokens[i], i) for i in {*before, *after}],
    )
  return tokenizer, add_bos, add_eos


def _plain(splitting: _Splitting, vocab, merges) -> tokenizers.Tokenizer:
  """Without added tokens."""
  tokenizer = tokenizers.Tokenizer(
    models.BPE(vocab=vocab, merges=merges, ignore_merges=splitting.ignore_merges)
  )
  if splitting.nfc:
    tokenizer.normalizer = tokenizers.normalizers.NFC()
  words = []
  if splitting.digits:
    words.append(pre_tokenizers.Digits(individual_digits=True))
  if splitting.pattern:
    pattern = tokenizers.Regex(splitting.pattern)
    words.append(pre_tokenizers.Split(pattern, behavior="isolated", invert=False))
  words.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splitting.pattern))
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def _required(fields: dict, key: str):
  if key not in fields:
    raise ValueError(f"the GGUF file has no {key!r}, without which it has no usable tokenizer")
  return fields[key]


def describe(
  tokenizer: tokenizers.Tokenizer,
  rows: int,
  *,
  ids: Mapping[str, int | None],
  stops: Sequence[int],
  template: str | None,
) -> dict[str, Any]:
  """The metadata of a GGUF file whose tokenizer is this one; `write` makes the same of them.

  Args:
    rows: of the embedding; ids beyond the tokenizer's become unused tokens.
    ids: of "bos", "eos", "unknown" and "padding", None where there is none.
    stops: what ends an answer, the end of a turn first; three have a place: the end of a text, of a turn, of a message.
    template: the chat template.

  Raises:
    ValueError: it is no byte-level BPE, cuts text into words as none of the kinds that are read, or a file could not
      say how it treats a token.
  """
  described = json.loads(tokenizer.to_str())
  pre = _kind(described)
  vocab = tokenizer.get_vocab(with_added_tokens=True)
  if len(vocab) > rows or max(vocab.values()) >= rows:
    raise ValueError(f"the tokenizer has {len(vocab)} tokens, the model's embedding {rows} rows")
  tokens = [f"[PAD{i}]" for i in range(rows)]
  kinds = [_UNUSED] * rows
  added = {i: token.special for i, token in tokenizer.get_added_tokens_decoder().items()}
  for token, i in vocab.items():
    tokens[i], kinds[i] = token, _NORMAL
  for i, special in added.items():
    kinds[i] = _CONTROL if special else _USER_DEFINED
  merges = described["model"]["merges"]
  if not merges:
    raise ValueError("the tokenizer merges nothing; llama.cpp reads no vocabulary without merges")
  bos, eos = ids["bos"], ids["eos"] if ids["eos"] is not None else next(iter(stops), None)
  others = [i for i in dict.fromkeys(stops) if i != eos]
  if len(others) > 2:
    unsaid = ", ".join(repr(tokens[i]) for i in others[2:])
    log.warning("a GGUF file names three ends of an answer; %s is not among them", unsaid)
  named = {
    "bos": bos,
    "eos": eos,
    "unknown": ids["unknown"],
    "padding": ids["padding"],
    **dict(zip(("eot", "eom"), others)),
  }
  fields = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": pre,
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.token_type": kinds,
    "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
    "tokenizer.ggml.add_bos_token": bos is not None and tokenizer.encode("a").ids[:1] == [bos],
    **{f"tokenizer.ggml.{name}_token_id": i for name, i in named.items() if i is not None},
    **({} if template is None else {"tokenizer.chat_template": template}),
  }
  _check_equal(tokenizer, _build(fields)[0], [tokens[i] for i in added])
  return fields


def _kind(described: Mapping[str, Any]) -> str:
  """The name of the way that it cuts text into words, a key of _SPLITTINGS."""
  model = described["model"]
  odd = [
    key
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    if model.get(key)
  ]
  if model["type"] != "BPE" or model.get("byte_fallback") or odd:
    what = f"a {model['type']} with {odd[0]}" if odd else f"a {model['type']} over characters"
    raise ValueError(
      f"the tokenizer is {what}; what is written as GGUF is a byte-level BPE, as of SmolLM2, Llama 3 and Qwen 2 and 3"
    )
  for name, splitting in _SPLITTINGS.items():
    known = json.loads(_plain(splitting, {}, []).to_str())
    if _cutting(known) == _cutting(described):
      return name
  raise ValueError(
    "the tokenizer cuts text into words in none of the ways that are written as GGUF, which are those of "
    + ", ".join(sorted(_SPLITTINGS))
  )


def _cutting(described: Mapping[str, Any]) -> Any:
  """What decides about words: normalizer, pre-tokenizer and whether whole words need merges."""
  inner = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}
  parts = []
  for key, name in inner.items():
    part = described[key]
    steps = [] if part is None else part.get(name, [part])
    # offsets are not ids
    parts.append([{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps])
  return parts, described["model"].get("ignore_merges", False)


def _check_equal(
  ours: tokenizers.Tokenizer, theirs: tokenizers.Tokenizer, added: list[str]
) -> None:
  """Both give the same ids for text of every kind, and for each added token between words."""
  for text in (*_PROBES, *(f"one {token} two{token}three" for token in added)):
    if ours.encode(text).ids != theirs.encode(text).ids:
      raise ValueError(
        f"the tokenizer that a GGUF file can hold cuts {text!r} otherwise than this one: {theirs.encode(text).tokens} "
        f"for {ours.encode(text).tokens}"
      )
