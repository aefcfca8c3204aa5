"""transformers and we: the same greedy text of the embedded model, the same tokens kept by every filter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.models import decoder, fetch, hf
from posttrain_jax.rollout import engine, sampling
from posttrain_jax.rollout.requests import Request
from tests.models import families

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle

QUESTIONS = [
  "What is the capital of France?",
  "Write two sentences about rain.",
  "Give me three fruits, each with its colour, and then tell me in one sentence which of them "
  "grows furthest north.",
]
NEW = 32


def test_greedy_text_of_the_embedded_model_is_that_of_transformers():
  folder = fetch.resolve("smollm2")
  params, config = hf.load(folder)
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  prompts = [
    tokenizer.apply_chat_template(
      [dict(role="user", content=question)], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    for question in QUESTIONS
  ]
  stops = engine.stop_tokens(config, tokenizer, folder)
  found = engine.generate(params, config, prompts, max_new_tokens=NEW, stop_tokens=stops)
  for prompt, tokens, finished in zip(prompts, found.tokens, found.finished):
    out = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
    assert tokens == out[0, len(prompt) :].tolist()
    assert finished == (tokens[-1] in stops)
  assert any(found.finished)
  assert tokenizer.decode(found.tokens[0], skip_special_tokens=True) == (
    "The capital of France is Paris."
  )


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 50])
@pytest.mark.parametrize("top_p", [0.05, 0.9, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.2])
def test_filters_are_those_of_transformers(temperature, top_k, top_p, min_p):
  logits = np.random.default_rng(1).normal(0, 3, (8, 2000)).astype(np.float32)
  warpers = [transformers.TemperatureLogitsWarper(temperature)]
  warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
  warpers += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
  warpers += [transformers.MinPLogitsWarper(min_p)] if min_p else []
  expected = torch.from_numpy(logits)
  for warper in warpers:
    expected = warper(None, expected)
  how = sampling.Rows.of([sampling.Sampling(top_k=top_k, top_p=top_p, min_p=min_p)] * 8)
  found = sampling.filtered(jnp.asarray(logits) / np.float32(temperature), how)
  np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


def test_the_repetition_penalty_is_that_of_transformers():
  rng = np.random.default_rng(2)
  logits = rng.normal(0, 3, (4, 500)).astype(np.float32)
  text = rng.integers(0, 500, (4, 40))
  expected = transformers.RepetitionPenaltyLogitsProcessor(1.3)(
    torch.from_numpy(text), torch.from_numpy(logits.copy())
  )
  how = sampling.Rows.of([sampling.Sampling(repetition_penalty=1.3)] * 4)
  found = sampling.penalised(jnp.asarray(logits), text, np.full(4, 40), np.zeros(4, int), how)
  np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


HOWS = {
  "greedy": sampling.GREEDY,
  "temperature": sampling.Sampling(1.3),
  "top_k": sampling.Sampling(1.0, top_k=20),
  "top_p": sampling.Sampling(0.8, top_p=0.9),
  "min_p and a penalty": sampling.Sampling(1.0, min_p=0.05, repetition_penalty=1.3),
}


@pytest.mark.parametrize("family", ["llama3", "gemma3"])
def test_what_the_engine_draws_is_what_a_plain_decode_draws_token_by_token(family):
  """Fourteen requests through three rows; plainly the whole text is read again for each token, without a cache."""
  config, params = families.make(family)
  rng, hows = np.random.default_rng(0), list(HOWS.values())
  requests = [
    Request(
      families.tokens(int(rng.integers(1, 30)), seed=i).tolist(),
      int(rng.integers(5, 25)),
      sampling=hows[i % len(hows)],
      stop_tokens=(5, 6, 7),
      seed=i // 4,
      number=i,
      sample=int(rng.integers(4)),
    )
    for i in range(14)
  ]
  machine = engine.Engine(params, config, rows=3, length=64, window=4)
  answers = dict(machine.run(requests))
  forward = jax.jit(lambda tokens: decoder.forward(params, tokens, config)[0])
  compared = 0
  for i, request in enumerate(requests):
    text, how = list(request.prompt), sampling.Rows.of([request.sampling])
    for place, token in enumerate(answers[i].tokens):
      padded = np.zeros((1, 64), np.int32)
      padded[0, : len(text)] = text
      logits = forward(padded)[len(text) - 1][None]
      heat = request.sampling.temperature or 1.0
      logp = jax.nn.log_softmax(logits[0] / heat)[token]
      logits = sampling.penalised(logits, padded, np.array([len(text)]), np.array([place]), how)
      identity = jnp.asarray([request.seed, request.number, request.sample], jnp.uint32)
      drawn, _ = sampling.sample(sampling.key(identity, place)[None], logits, how)
      assert int(drawn[0]) == token, (i, place)
      assert answers[i].logps[place] == pytest.approx(float(logp), abs=1e-3)
      text.append(token)
      compared += 1
    stopped = text[-1] in request.stop_tokens
    assert stopped or len(answers[i].tokens) == request.max_new_tokens
    assert not set(answers[i].tokens[:-1]) & set(request.stop_tokens)
  assert compared > 100
