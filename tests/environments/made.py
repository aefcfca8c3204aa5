"""Environments and tools as people write them, for tests: TRL's, OpenEnv's, GEM's; and such as fail."""

import dataclasses
import subprocess
import time


class Counter:
  """TRL's: methods are tools, and reward functions read `reward`."""

  def __init__(self):
    self.reward = 0.0
    self._secret = object()

  def reset(self, start=0, **kwargs):
    self.total, self.reward = start, 0.0
    return f" The count is {start}."

  def add(self, number: int) -> int:
    """
    Adds to the count.

    Args:
      number: What to add.
    """
    self.total += number
    self.reward = float(self.total)
    return self.total

  def wait(self, seconds: float) -> str:
    """
    Waits.

    Args:
      seconds: How long.
    """
    time.sleep(seconds)
    return "waited"

  def fail(self) -> str:
    """Fails."""
    raise KeyError("no such thing")


class Owns(Counter):
  def get_reward(self):
    return self.reward / 2


@dataclasses.dataclass
class Guess:
  word: str


@dataclasses.dataclass
class Seen:
  text: str
  reward: float | None = None
  done: bool = False


class Guessing:
  """OpenEnv's: typed actions, observations with reward and done."""

  def reset(self, seed=None, episode_id=None):
    self.left, self.seed, self.episode = 3, seed, episode_id
    return Seen("Guess a colour.")

  def step(self, action: Guess) -> Seen:
    self.left -= 1
    if action.word == "red":
      return Seen("right", 1.0, True)
    return Seen("wrong", -0.25, self.left == 0)


class Texts:
  """GEM's: text in, five things out."""

  def reset(self):
    return "say x", {}

  def step(self, action):
    return f"heard {action}", float(action == "x"), action == "x", False, {}


class Starts:
  """Has a program of its own, as an environment that talks to a server may."""

  def reset(self):
    return str(subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL).pid)

  def step(self, action: str):
    return "", 0.0, True, False, {}


class Raises:
  def reset(self, **row):
    if row.get("fine"):
      return None
    raise RuntimeError("no room left")

  def step(self, action: str):
    raise ValueError("out of order")


class Closes:
  """As a client whose connection is lost: it is of no use from then on."""

  def __init__(self):
    self.is_open = True

  def reset(self):
    self.step("reset")

  def step(self, action: str):
    self.is_open = self.is_open and action != "lose"
    if not self.is_open:
      raise ConnectionError("closed")
    return "heard", 1.0, True, False, {}


class Half:
  """Whatever it says has half of a surrogate pair."""

  def reset(self):
    return "say \ud83d"

  def step(self, action: str):
    if action == "raise":
      raise ValueError("no \ud83d")
    return "heard \ud83d", 1.0, False, False, {}


class Hangs:
  def reset(self):
    return None

  def step(self, action: str):
    time.sleep(60)


class Neither:
  def reset(self):
    return None


class NoReset:
  def step(self, action):
    return action


def double(number: int) -> int:
  """
  Doubles a number.

  Args:
    number: The number.
  """
  return 2 * number


def sleeps() -> str:
  """Sleeps."""
  time.sleep(60)
  return ""


def half() -> str:
  """Says half of a surrogate pair."""
  return "a\ud83d"


def floods() -> str:
  """Says more than anybody reads."""
  return "word " * 20_000_000


def echo(text: str) -> str:
  """
  Says what it is told.

  Args:
    text: What to say.
  """
  return text


def bare(number):
  return number
