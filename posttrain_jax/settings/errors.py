"""What is the user's to mend."""


class ConfigError(ValueError):
  """The user's mistake in a config file, its arguments or an override."""
