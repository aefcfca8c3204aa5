"""/tokenize, /detokenize and /tokenizer_info, in vLLM's shapes, as lm-evaluation-harness asks for them."""

from __future__ import annotations

from typing import Any

from posttrain_jax.data import templates
from posttrain_jax.serve import wire, wire_chat
from posttrain_jax.serve.errors import wrong
from posttrain_jax.serve.fields import Fields
from posttrain_jax.serve.limits import Limits
from posttrain_jax.serve.models import Model
from posttrain_jax.serve.voice import Voice


def tokenize(body: Fields, model: Model, limits: Limits) -> dict[str, Any]:
  """The tokens of a text, or of a conversation as its template writes it."""
  voice = model.voice
  names = body.flag("return_token_strs")
  special = body.take("add_special_tokens")
  if body.has("messages"):
    messages = wire_chat.messages(body)
    generates = body.flag("add_generation_prompt", True)
    variables = wire_chat.variables(body)
    if special:
      raise wrong("the template writes what special tokens there are", "add_special_tokens")
    written = voice.written(messages, [], generates=generates, **variables)
    ids = voice.encode(_bounded(written, limits, "messages"), limits.body, opening=False)
  else:
    text = body.text("prompt")
    if text is None:
      raise wrong("there is neither prompt nor messages", "prompt")
    opening = body.flag("add_special_tokens", True)
    ids = voice.encode(_bounded(text, limits, "prompt"), limits.body, opening=opening)
  body.close()
  told: dict[str, Any] = dict(tokens=ids, count=len(ids), max_model_len=model.room)
  return told | (dict(token_strs=voice.tokenizer.convert_ids_to_tokens(ids)) if names else {})


def _bounded(text: str, limits: Limits, param: str) -> str:
  if len(text) > limits.text:
    raise wrong(f"a text of {len(text):,} characters, at most {limits.text:,} at once", param)
  return text


def detokenize(body: Fields, model: Model) -> dict[str, Any]:
  """The text of tokens, special ones by their names."""
  tokens = body.listed("tokens")
  body.take("tokens")
  body.close()
  if not all(wire.is_id(token, model.voice.vocab) for token in tokens):
    raise wrong(f"tokens must be ids from 0 to {model.voice.vocab - 1}", "tokens")
  return dict(prompt=model.voice.text(tokens))


def info(voice: Voice, length: int) -> dict[str, Any]:
  """What a client must know to write the same prompts itself."""
  tokenizer = voice.tokenizer
  return dict(
    eos_token=tokenizer.eos_token,
    bos_token=tokenizer.bos_token if templates.adds_bos(tokenizer) else None,
    pad_token=tokenizer.pad_token,
    chat_template=None if voice.template is None else voice.template.text,
    model_max_length=length,
    vocab_size=voice.vocab,
  )
