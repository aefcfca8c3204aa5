"""transformers and we: the same greedy text of the embedded model, the same tokens kept by every filter."""

import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax.models import fetch, hf
from posttrain_jax.rollout import engine, sampling

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
  found = sampling.penalised(jnp.asarray(logits), text, np.full(4, 40), how)
  np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)
