"""A config, or the points of its sweep, become jobs of a scheduler: files that its own tool is given."""
