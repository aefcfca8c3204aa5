"""One decoder for every family, its config, and the folders and files that it is read from."""
