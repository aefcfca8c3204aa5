"""The folder that a run leaves: claimed, written to, read again."""
