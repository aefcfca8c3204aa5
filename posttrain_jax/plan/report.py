"""The figures of a plan as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def written(facts: dict[str, Any]) -> str:
  """The figures as people read them."""
  memory, epochs = facts["device_gib"], facts["epochs"]
  lines = [
    f"{facts['model']}, {facts['base']} base, adapter {facts['adapter']}, {facts['rows']} rows x "
    f"{facts['length']} tokens, remat {facts['remat']}",
    f"on {facts['devices']} x {facts['target']}"
    + (f" in {facts['slices']} slices" if facts["slices"] > 1 else "")
    + (f", {memory:g} GiB each" if memory is not None else ", memory not known"),
    *([] if epochs is None else [f"epochs={epochs:g}: how many steps these are changes nothing"]),
    "",
    "by arithmetic, GiB a device:",
    *_rows(facts["arithmetic_gib"]),
    f"  {'sum':<14}{sum(facts['arithmetic_gib'].values()):>9.3f}",
    "",
  ]
  if facts["compiled"] is None:
    return "\n".join([*lines, f"DOES NOT FIT: {facts['out_of_memory']}", *_advice(facts)])
  sizes = {
    name.removesuffix("_gib"): size
    for name, size in facts["compiled"].items()
    if name.endswith("_gib")
  }
  verdict = {True: "fits", False: "DOES NOT FIT", None: "whether it fits is not known"}
  return "\n".join(
    [
      *lines,
      f"as compiled by {facts['compiler']}, GiB a device:",
      *_rows(sizes),
      f"  compiled in {facts['compiled']['compile_seconds']} s",
      "",
      "the same by what it is for (activations: with all that lies between):",
      *_rows(facts["by_kind_gib"]),
      "",
      *_sent(facts["collectives"], facts["lighter"]),
      *_time(facts),
      *_writing(facts),
      verdict[facts["fits"]]
      + (f": {facts['peak_gib']:.2f} of {memory:g} GiB" if memory is not None else ""),
      *_advice(facts),
    ]
  )


def _sent(collectives: Sequence[dict[str, Any]], lighter: Sequence[dict[str, Any]]) -> list[str]:
  """What a device sends in a step, and with what it would send less."""
  if not collectives:
    return []
  lines = ["sent by a device in a step, MB (over the network: between slices or hosts):"]
  for one in collectives:
    sizes = f"{one['sent'] / 1e6:>12.3f}{one['network'] / 1e6:>12.3f}"
    least = "" if one["exact"] else "  at least: the program does not tell how often"
    lines.append(f"  {one['kind']:<20}{one['axis']:<14}{one['count']:>6} x{sizes}{least}")
  network = sum(one["network"] for one in collectives)
  lines.append(f"  over the network together {network / 1e6:.3f} MB")
  for one in lighter:
    lines.append(
      f"  links bind it: with {one['field']} it would send {one['sends'] / 1e6:.0f} MB by arithmetic, and a device have"
      " the rows of others beside its own; plan that"
    )
  return [*lines, ""]


def _time(facts: dict[str, Any]) -> list[str]:
  """FLOPs, and the least time that the peaks allow."""
  flops = facts["flops"]
  lines = [
    f"by arithmetic a step takes {flops['model'] / 1e12:.1f} TFLOP, {flops['computed'] / 1e12:.1f} with what is"
    " computed again"
  ]
  if (roofline := facts["roofline"]) is not None:
    parts = ", ".join(f"{name} {value:.4f}" for name, value in roofline["seconds"].items() if value)
    lines.append(
      f"at the peaks at least {roofline['step_seconds']:.4f} s ({roofline['bound']}), at most "
      f"{roofline['tokens_per_second']:.0f} tokens a second; seconds of {parts}"
    )
  return [*lines, ""]


def _advice(facts: dict[str, Any]) -> list[str]:
  """Single changes that make it smaller."""
  if not facts.get("advice"):
    return []
  return [
    "what would make it smaller, by arithmetic:",
    *(f"  {one['field']}  saves {one['saves_gib']:.2f} GiB" for one in facts["advice"]),
  ]


def _writing(facts: dict[str, Any]) -> list[str]:
  """What an online run needs to write, beside the arguments of its step."""
  if (writes := facts.get("writing")) is None:
    return []
  lines = [
    f"to write {writes['rows']} answers at once, of {writes['length']} tokens with their prompts:"
  ]
  for name, sizes in writes["programs"].items():
    lines.append(f"  {name}, {sizes['compile_seconds']} s to compile")
    lines += _rows(
      {key.removesuffix("_gib"): v for key, v in sizes.items() if key.endswith("_gib")}
    )
  lines.append("  beside them lie the arguments of the step")
  if facts["refused"]:
    lines.append(
      f"`posttrain train` does not run on these {facts['hosts']} hosts: {facts['refused']}"
    )
  return [*lines, ""]


def _rows(sizes):
  return [f"  {name:<14}{size:>9.3f}" for name, size in sizes.items()]
