"""Tiny tokenizers of the kinds that matter: with and without a BOS, with pad equal to EOS."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

MARKERS = {
  "chatml": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
  "llama3": (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
  ),
  "sentence": ("<s>", "</s>"),
  "gemma": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
}
BOS_EOS = {
  "chatml": (None, "<|endoftext|>"),
  "llama3": ("<|begin_of_text|>", "<|end_of_text|>"),
  "sentence": ("<s>", "</s>"),
  "gemma": ("<bos>", "<eos>"),
}
CORPUS = [
  "What is the capital of France? The capital of France is Paris.",
  "user system assistant model USER: ASSISTANT: [INST] [/INST] <<SYS>> <</SYS>>",
  "Hello hello there there, how are you? I am fine. Two and two is four.",
]


def make_tokenizer(family):
  """A byte-level BPE of some 400 tokens; its padding token is its EOS."""
  bos, eos = BOS_EOS[family]
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=list(MARKERS[family]),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(CORPUS, trainer)
  if bos is not None:
    tokenizer.post_processor = processors.TemplateProcessing(
      single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos
  )


@pytest.fixture(scope="session")
def tokenizers():
  return {family: make_tokenizer(family) for family in MARKERS}
