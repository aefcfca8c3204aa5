"""The verbs of `posttrain`, a file each: `add(parser)` says what it takes, `run(args, overrides)` does it."""
