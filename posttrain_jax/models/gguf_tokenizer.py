"""The tokenizer inside a GGUF file becomes `tokenizer.json` and its companions.

transformers can do this too, but only with PyTorch installed.  A tokenizer that is almost right
trains a model that is almost right, so a kind that we have not compared with its original is
refused by name.
"""

import dataclasses
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from posttrain_jax.core import files

# Values of tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_LLAMA3_PATTERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_PATTERN = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


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


def _required(fields: dict, key: str):
  if key not in fields:
    raise ValueError(f"the GGUF file has no {key!r}, without which it has no usable tokenizer")
  return fields[key]
