"""How servers are asked in token ids: OpenAI's completions with vLLM's `return_token_ids`, and SGLang's own route.

A prompt goes as its ids, and an answer comes as its ids with the log-probability of each.  What a server would fill in
by a file of its own is said, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from posttrain_jax.core import words
from posttrain_jax.core.api import Unread
from posttrain_jax.rollout.requests import FULL, STOPPED, Answer, Request

SEEDS = 2**31
Told = tuple[list[Any], list[Any], Any]


@dataclasses.dataclass(frozen=True)
class Wire:
  """Routes, bodies and replies of a kind of server.

  above: its routes lie above `/v1`, with which its address ends.
  asked: the body of a request to a model of that name.
  told: (token ids, their log-probabilities, why it ended) of a reply.
  is_unknown: whether a refusal, by its status and its words, says that there is no such adapter.
  """

  above: bool
  models: str
  answer: str
  asked: Callable[[Request, str], dict[str, Any]]
  told: Callable[[Any], Told]
  is_unknown: Callable[[int | None, str], bool]
  load: str = "/load_lora_adapter"
  unload: str = "/unload_lora_adapter"


def seed(request: Request) -> int:
  """One for each of (seed, number, sample): what a server draws by."""
  mixed = np.random.SeedSequence([request.seed, request.number, request.sample])
  return int(mixed.generate_state(1, np.uint32)[0]) % SEEDS


def _drawn(request: Request) -> dict[str, Any]:
  """What both call alike."""
  return {
    "temperature": float(request.sampling.temperature),
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "n": 1,
    "stop_token_ids": [int(token) for token in request.stop_tokens],
  }


def _asked_openai(request: Request, model: str) -> dict[str, Any]:
  return {
    **_drawn(request),
    "model": model,
    "prompt": [int(token) for token in request.prompt],
    "max_tokens": int(request.max_new_tokens),
    "min_tokens": int(request.min_new_tokens),
    "top_k": 0,
    "seed": seed(request),
    # the stop tokens that are named end it, and no other that the server knows as its model's
    "ignore_eos": True,
    "logprobs": 0,
    "return_token_ids": True,
  }


def _told_openai(said: Any) -> Told:
  (choice,) = said["choices"]
  tokens = choice.get("token_ids")
  if tokens is None:
    raise Unread(
      "it has no token_ids, without which a text would have to be read again; is it a server that honours"
      " return_token_ids (vLLM 0.10.2 and later, posttrain serve)?"
    )
  return tokens, choice["logprobs"]["token_logprobs"], choice["finish_reason"]


def _asked_sglang(request: Request, model: str) -> dict[str, Any]:
  drawn = {
    **_drawn(request),
    "max_new_tokens": int(request.max_new_tokens),
    "min_new_tokens": int(request.min_new_tokens),
    "top_k": -1,
    "sampling_seed": seed(request),  # which --enable-deterministic-inference draws by
    "ignore_eos": False,  # there it would leave out the stop tokens that are named, too
  }
  prompt = [int(token) for token in request.prompt]
  return {"input_ids": prompt, "lora_path": model, "return_logprob": True, "sampling_params": drawn}


def _told_sglang(said: Any) -> Told:
  """Each token stands beside its log-probability in `meta_info`, the one that ended the answer with the others."""
  about = said["meta_info"]
  each = about["output_token_logprobs"]
  return [one[1] for one in each], [one[0] for one in each], about["finish_reason"]["type"]


OPENAI = Wire(
  above=False,
  models="/models",
  answer="/completions",
  asked=_asked_openai,
  told=_told_openai,
  is_unknown=lambda status, why: status == 404,
)
SGLANG = Wire(
  above=True,
  models="/v1/models",
  answer="/generate",
  asked=_asked_sglang,
  told=_told_sglang,
  is_unknown=lambda status, why: (
    status == 400 and ("are not loaded" in why or "does not exist" in why)
  ),
)
WIRES: Mapping[str, Wire] = {"openai": OPENAI, "sglang": SGLANG}


def answered(request: Request, told: Told, vocab: int) -> Answer:
  """The answer that a reply holds.

  Raises:
    One of api.UNREADABLE: it holds none.
  """
  tokens, logps, reason = told
  if not tokens or len(tokens) != len(logps):
    raise Unread(f"{len(tokens)} token ids with {len(logps)} log-probabilities")
  if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
    raise Unread(f"token_ids are {words.shown(tokens, 60)}")
  if beyond := [token for token in tokens if not 0 <= token < vocab]:
    raise Unread(
      f"token {beyond[0]} is none of the {vocab:,} of this run's model; does it serve another one?"
    )
  if len(tokens) > request.max_new_tokens:
    raise Unread(f"{len(tokens)} tokens, where {request.max_new_tokens} were asked")
  values = np.asarray(logps, np.float32)
  if values.shape != (len(tokens),) or not np.isfinite(values).all() or (values > 1e-3).any():
    raise Unread("its log-probabilities are no numbers up to 0")
  if reason not in ("stop", "length"):
    raise Unread(f"finish_reason is {words.shown(reason, 40)}")
  is_stopped = tokens[-1] in request.stop_tokens
  if reason == "stop" and not is_stopped:
    raise Unread("it leaves out the token that ended the answer, of which is to be learned, too")
  return Answer(request, [*tokens], values, STOPPED if is_stopped else FULL)
