"""Post-training of language models in JAX."""
