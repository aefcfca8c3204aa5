"""Scores: verifiers of what a model writes, and the sandbox that its programs run in."""
