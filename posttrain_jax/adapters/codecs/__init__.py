"""How each kind of adapter is told to PEFT: its keys of `adapter_config.json` and its tensors, one file a kind."""
