"""The only place that reads a config: each section of one becomes the thing it names, a file a section."""
