"""From a source to batches: reading, columns, chat templates, tokens, packing, mixing."""
