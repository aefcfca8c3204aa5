"""Built-in tasks: questions with answers that a program can check."""
