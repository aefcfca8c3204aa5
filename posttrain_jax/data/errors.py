"""A row that cannot be used."""

SHORTEN = "shorten the row, or leave it out of the file"  # of one that is too long


class RowError(ValueError):
  """A row that cannot be used: `origin` says where it stands, `reason` is what to count it under.

  `cure` is what to write instead, where that depends on who asked for the row.
  """

  def __init__(self, reason: str, origin: str, detail: str, cure: str = ""):
    super().__init__(f"{origin}: {detail}" + (f"; {cure}" if cure else ""))
    self.reason, self.origin, self.detail, self.cure = reason, origin, detail, cure

  def instead(self, cure: str) -> "RowError":
    """The same of a row that is too long, where settings of the data cannot be written."""
    if self.reason != "too long":
      return self
    return RowError(self.reason, self.origin, self.detail, cure)

  def within(self, name: str) -> "RowError":
    """The same of a row in the source of that name."""
    return RowError(self.reason, f"{name}: {self.origin}", self.detail, self.cure)
