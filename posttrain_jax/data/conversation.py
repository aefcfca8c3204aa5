"""A conversation's turns: what a template is asked for each that is trained, and where it stands in the text."""

import dataclasses
import re

from posttrain_jax.data import said, templates


@dataclasses.dataclass(frozen=True)
class Turns:
  """A conversation up to its last trained message, and the indices of those that are trained."""

  messages: list[dict]
  first: int  # the first message of the completion
  trained: tuple[int, ...]
  variables: dict
  shape: said.Shape

  def jobs(self) -> list[dict]:
    """For each trained turn the prompt before it, and the text with it."""
    jobs = []
    for at in self.trained:
      jobs.append(templates.job(self.messages[:at], True, **self.variables))
      jobs.append(templates.job(self.messages[: at + 1], False, **self.variables))
    return jobs

  def where(self, at: int, field: str = "") -> str:
    """The place of a message in its row, or of a field such as tool_calls[0] in it."""
    name, bracket, rest = field.partition("[")
    return place(self.first, at) + (f"[{name!r}]{bracket}{rest}" if field else "")


def place(first, at):
  """A message of a row whose completion begins at `first`, 0 where the row is one conversation."""
  if not first:
    return f"messages[{at}]"
  return f"prompt[{at}]" if at < first else f"completion[{at - first}]"


def without_ending(message, ending):
  """The message without the end of turn that an answer may bring along: the template writes it."""
  if message["role"] != "assistant" or not ending or "content" not in message:
    return message
  words = message["content"].rstrip()
  return {**message, "content": words.removesuffix(ending)} if words.endswith(ending) else message


def ended(text, start, shared, ending):
  """Where the turn that begins at `start` ends; None where that is not in what the texts share.

  Some templates close the last turn with more.
  """
  if not ending:
    return shared if len(text.rstrip()) <= shared and start < shared else None
  at = text.rfind(ending)
  return at + len(ending) if start <= at and at + len(ending) <= shared else None


def before_opening(whole, start):
  """Where a turn begins whose prompt has the first tag of it: `<think>`."""
  near = max(start - 64, 0)
  opened = _OPENS_THOUGHT.search(whole[near:start])
  return start if opened is None else near + opened.start()


_OPENS_THOUGHT = re.compile(r"<(\w+)>\s*\Z")


def after_thoughts(prompt, whole, message):
  """The text of an answer that goes on from a prompt that opens its thoughts; None where the prompt opens none.

  Such templates ask with `<think>` and write an answer without it, because it is past to them.  What follows is the
  row's own thoughts, or as Qwen's template has it none: the block is closed at once.
  """
  opened = _OPENS_THOUGHT.search(prompt)
  if opened is None or not whole.startswith(prompt[: opened.start()]):
    return None
  opening, closing = f"<{opened[1]}>", f"</{opened[1]}>"
  words = message.get("content") or ""
  _, closed, answer = words.rpartition(closing)
  answer = answer.strip()
  rest = whole[opened.start() :]
  at = rest.rfind(answer) if answer else 0
  is_said = bool(answer or message.get("tool_calls"))
  if not is_said or at < 0 or (rest[:at].strip() and not said.holds(words, rest[:at])):
    return None
  if closed:
    said_before = words[: len(words.rstrip()) - len(answer)].lstrip().removeprefix(opening)
    block = said_before.removeprefix("\n") if opened[0].endswith("\n") else said_before
  else:
    reasoning = next((message[key] for key in said.REASONING if message.get(key)), "")
    block = f"{reasoning.strip(chr(10))}\n{closing}\n\n"
  return prompt + block + rest[at:]


def common(a, b):
  """How many leading characters two texts share."""
  if b.startswith(a):
    return len(a)
  return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
