"""What a compiled program sends between devices: read from its text, by kind, axis of the mesh and bytes.

Bytes are those that one device sends in a step, of a ring: an all-gather's result R is received whole but for the share
that is here, R (n - 1) / n; a reduce-scatter sends as much of its operand, and an all-reduce is the two together.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
SCATTERED = "all-reduce-scatter"  # libtpu's fusion of a sum and of what a device takes of it: a reduce-scatter
ACROSS = "slices"  # the axis of what XLA itself sends from slice to slice
BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b(pred|token|[suf]\d+\w*|bf16|c64|c128)\[([\d,]*)\]")
_COUNT = re.compile(r"[su]32\[\]\S* constant\((\d+)\)")
# whatever an attribute names may be a computation: body=%a, branch_computations={%a, %b}, ...
_NAMED = re.compile(r"\b\w+=\{?(%?[\w.\-]+(?:, ?%[\w.\-]+)*)")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One kind of transfer over one axis, all of a step together."""

  kind: str
  axis: str  # axes of the mesh, with + between
  count: int
  sent: int  # bytes of a device, over the links of its slice
  network: int  # bytes of a device that cross from slice to slice
  exact: bool = (
    True  # False: how often some of it is done the program does not tell, and it is counted once
  )


def read(
  text: str, mesh: Any = None, slice_of: Mapping[int, int] | None = None
) -> list[Collective]:
  """The collectives of a compiled program, the largest first.

  Args:
    text: `compiled.as_text()`.
    mesh: whose devices the program's partitions are, in order.
    slice_of: {id of a device: its slice}.
  """
  devices = [0] if mesh is None else [device.id for device in mesh.devices.flat]
  slices = np.asarray([(slice_of or {}).get(device, 0) for device in devices])
  sums: dict[tuple[str, str], list[int]] = {}
  guessed: set[tuple[str, str]] = set()
  seen: set[tuple[str, str]] = set()
  for kind, (times, exact), line in _instructions(text):
    if (transfer := _transfer(line)) is not None:
      if (kind, transfer) in seen:
        continue
      seen.add((kind, transfer))
    axis, sent, network = _sizes(kind, line, mesh, slices)
    if not sent and not network:
      continue
    total = sums.setdefault((kind, axis), [0, 0, 0])
    for place, value in enumerate((1, sent, network)):
      total[place] += times * value
    if not exact:
      guessed.add((kind, axis))
  found = [Collective(*key, *total, exact=key not in guessed) for key, total in sums.items()]
  return sorted(found, key=lambda one: -(one.sent + one.network))


def _transfer(line: str) -> str | None:
  """What names a transfer whose parts are printed as an instruction each; None where an instruction is all of it.

  Parts of an asynchronous one have one channel.  Channel 1 is that of everything that a `shard_map` sends: there parts
  have one chain, on a TPU.
  """
  channel = re.search(r"channel_id=(\d+)", line)
  if channel is not None and channel[1] != "1":
    return channel[1]
  chain = re.search(r'chain_id="(\d+)"', line)
  return None if chain is None else f"chain {chain[1]}"


def _instructions(text: str) -> Iterator[tuple[str, tuple[int, bool], str]]:
  """(kind, how often a step does it and whether that is known, its line) of everything that is sent."""
  bodies, entry = _computations(text)
  times = _times(bodies, entry)
  for name, lines in bodies.items():
    for line in lines:
      if (match := _INSTRUCTION.match(line)) is None:
        continue
      opcode = match[3].removesuffix("-start")
      if opcode == "all-reduce" and name.startswith(SCATTERED):
        yield "reduce-scatter", times[name], line
      elif opcode in KINDS:
        yield opcode, times[name], line
      elif opcode == "send" and "megascale" in line:
        kind = re.search(r'transfer_type="(\w+)"', line)
        yield "send " + (kind[1].lower().replace("_", "-") if kind else ""), times[name], line


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """({name: its lines}, the name that the program begins with)."""
  bodies: dict[str, list[str]] = {}
  entry, name = "", ""
  for line in text.splitlines():
    if (match := _COMPUTATION.match(line)) is not None:
      name = match[2]
      bodies[name] = []
      entry = name if match[1] else entry
    elif name and line.startswith("  "):
      bodies[name].append(line)
    elif name and bodies[name]:
      # attributes of a kernel go on at the margin, and may begin with a brace there
      bodies[name][-1] += line
  return bodies, entry


def _times(bodies: Mapping[str, list[str]], entry: str) -> dict[str, tuple[int, bool]]:
  """{computation: (how often a step runs it, whether that is known)}; both sides of a branch count.

  What no call that is understood leads to, and a loop whose end is not read, run once and are not known.
  """
  calls: dict[str, list[tuple[str, int | None]]] = {name: [] for name in bodies}
  for name, lines in bodies.items():
    for line in lines:
      trips = _trips(line, bodies) if " while(" in line else 1
      named = (one.lstrip("% ") for group in _NAMED.findall(line) for one in group.split(","))
      calls[name] += [(other, trips) for other in named if other in bodies]
  times: dict[str, tuple[int, bool]] = {}

  def run(name: str, count: int, exact: bool) -> None:  # the calls have no cycle
    before, was_exact = times.get(name, (0, True))
    times[name] = before + count, exact and was_exact
    for other, trips in calls[name]:
      run(other, count * (trips or 1), exact and trips is not None)

  if entry:
    run(entry, 1, True)
  left = bodies.keys() - times.keys()
  called = {other for name in left for other, _ in calls[name]}
  for name in left - called:
    run(name, 1, False)
  return times


def _trips(line: str, bodies: Mapping[str, list[str]]) -> int | None:
  """How often a loop runs: as the compiler says, or as its counter does, from 0 to a constant; None: neither."""
  if (known := re.search(r'known_trip_count":\{"n":"(\d+)"', line)) is not None:
    return int(known[1])
  names = [re.search(rf"{part}=%?([\w.\-]+)", line) for part in ("condition", "body")]
  condition, body = (bodies.get(name[1], []) if name is not None else [] for name in names)
  bounds = [int(found[1]) for one in condition if (found := _COUNT.search(one)) is not None]
  return math.ceil(max(bounds) / _step(condition, body)) if bounds else None


def _step(condition: list[str], body: list[str]) -> int:
  """What a turn adds to the counter that the condition reads: 2 where a turn does what two did; 1 if it is not read."""
  asked, done = (
    {match[1]: line for line in lines if (match := _INSTRUCTION.match(line))}
    for lines in (condition, body)
  )
  results = dict(enumerate(_operands(body, "ROOT")))
  for name in _operands(condition, "ROOT"):
    if (place := re.search(r"\), index=(\d+)", asked.get(name, ""))) is not None:
      added = results.get(int(place[1]), "")
      parts = [_COUNT.search(done.get(one, "")) for one in _operands(body, f"%{added} =")]
      return next((int(part[1]) for part in parts if part is not None), 1)
  return 1


def _operands(lines: list[str], begins: str) -> list[str]:
  """The names that the instruction takes whose line begins like that."""
  line = next((line for line in lines if line.lstrip().startswith(begins)), "")
  match = _INSTRUCTION.match(line)
  return [] if match is None else re.findall(r"%([\w.\-]+)", match[4].partition(")")[0])


def _sizes(kind: str, line: str, mesh: Any, slices: np.ndarray) -> tuple[str, int, int]:
  """(axis, bytes over links, bytes over the network) of one run of an instruction."""
  match = _INSTRUCTION.match(line)
  assert match is not None
  size = _bytes(_result(match[2], match[3]))
  is_share = match[3].startswith("reduce-scatter")  # that it is printed with, and not the whole
  if kind.startswith("send"):
    return ACROSS, 0, size
  groups = _groups(line, len(slices))
  axis = _axis(groups, mesh)
  members = groups.shape[1]
  parts = len(set(slices[groups[0]].tolist()))
  factor = {"all-reduce": 2.0, "reduce-scatter": float(members) if is_share else 1.0}
  whole = size * factor.get(kind, 1.0)  # bytes that would be sent to infinitely many
  if kind == "collective-permute":
    crosses = any(slices[a] != slices[b] for a, b in groups)
    return axis, 0 if crosses else size, size if crosses else 0
  # between slices each device sends its share of what its slice has summed or gathered
  inside = members // parts
  network = whole * (parts - 1) / parts / inside if parts > 1 else 0.0
  sent = whole * (inside - 1) / inside if inside > 1 else 0.0
  return axis, int(sent), int(network)


def _result(shape: str, opcode: str) -> str:
  """The part of an instruction's type that is its result: the last of (operands, results, contexts)."""
  if not opcode.endswith("-start") or not shape.startswith("("):
    return shape.partition(", u32[]")[0] if opcode == "send" else shape
  parts = _parts(shape[1:-1])
  return parts[1] if len(parts) > 1 and opcode != "all-reduce-start" else shape


def _parts(text: str) -> list[str]:
  """What commas outside of brackets divide."""
  parts, depth = [""], 0
  for letter in text:
    depth += (letter in "([{") - (letter in ")]}")
    if letter == "," and depth == 0:
      parts.append("")
    else:
      parts[-1] += letter
  return parts


def _bytes(shape: str) -> int:
  bits = 0
  for dtype, sizes in _SHAPE.findall(shape):
    width = BITS.get(dtype) if dtype in BITS else int(re.findall(r"\d+", dtype)[0])
    bits += (width or 0) * math.prod(int(size) for size in sizes.split(",") if size)
  return math.ceil(bits / 8)


def _groups(line: str, count: int) -> np.ndarray:
  """[groups, members] of partitions; of a permutation its pairs."""
  if (pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", line)) is not None:
    return np.asarray([[int(x) for x in one.split(",")] for one in _braces(pairs[1])])
  if (listed := re.search(r"replica_groups=\{(\{.*?\})\}", line)) is not None:
    return np.asarray([[int(x) for x in one.split(",")] for one in _braces(listed[1])])
  if (iota := re.search(r"replica_groups=(\[[\d,]+\])<=(\S+?)(?:, |$)", line)) is not None:
    return _iota("<=" + iota[2]).reshape(_numbers(iota[1]))
  named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", line)
  if named is None:
    return np.arange(count)[None]
  sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
  ids = np.arange(count) if named[2] is None else _iota("<=" + named[2])
  over = re.findall(r"'(\w+)'", named[3])
  names = list(sizes)
  rest = [name for name in names if name not in over]
  order = [names.index(name) for name in (*rest, *over)]
  members = math.prod(sizes[name] for name in over)
  return ids.reshape(list(sizes.values())).transpose(order).reshape(-1, members)


def _iota(text: str) -> np.ndarray:
  """`<=[2,4]T(1,0)`: 0, 1, ... in that shape, its axes turned."""
  shape = _numbers(text)
  ids = np.arange(math.prod(shape)).reshape(shape)
  turned = re.search(r"T\(([\d,]+)\)", text)
  return (ids if turned is None else ids.transpose(_numbers(turned[0]))).ravel()


def _numbers(text: str) -> list[int]:
  first = re.search(r"[\[(]([\d,]+)[\])]", text)
  return [int(x) for x in first[1].split(",")] if first is not None else []


def _braces(text: str) -> list[str]:
  return re.findall(r"\{([\d,]*)\}", text)


def _axis(groups: np.ndarray, mesh: Any) -> str:
  """The axes of the mesh along which a group's members differ."""
  if mesh is None:
    return ""
  group = max(groups, key=lambda group: len(set(group.tolist())))
  places = np.stack(np.unravel_index(np.unique(group), mesh.devices.shape), axis=1)
  differ = [name for name, column in zip(mesh.axis_names, places.T) if len(set(column)) > 1]
  return "+".join(differ)
