"""Objectives on arrays, and the log-probabilities that they start from."""
