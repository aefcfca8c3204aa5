"""Plain values as JSON, both ways: what arrives is exactly a builtin type, or a handle of what stayed where it is.

JSON because reading it runs no code, whoever wrote it; pickle would.  A subclass arrives as what it is a kind of, a
numpy array as lists; an integer beyond 2**63 in hexadecimal.
"""

import json

MAX_MESSAGE = 16 << 20  # bytes of one message


class NotPlain(TypeError):
  """A value that is no number, text, or container of these."""


def dumps(value, keep=None) -> bytes:
  """keep(object) -> number of a handle, for objects that are not plain; without it they raise NotPlain."""
  return json.dumps(_encoded(value, keep)).encode() + b"\n"


def loads(line: bytes, remote=None):
  """remote(number, name of its type) makes what stands for a handle."""
  return _decoded(json.loads(line), remote)


def _encoded(value, keep):
  kind = type(value)
  if value is None or kind in (bool, str, float):
    return value
  if isinstance(value, bool | str):
    return str(value)
  if isinstance(value, int):
    return int(value) if -(1 << 63) <= value < 1 << 63 else {"i": hex(value)}
  if isinstance(value, float):
    return float(value)
  if isinstance(value, list):
    return [_encoded(v, keep) for v in list.__iter__(value)]
  if isinstance(value, dict):
    return {"d": [[_encoded(k, keep), _encoded(v, keep)] for k, v in dict.items(value)]}
  for tag, container in (("t", tuple), ("s", set), ("z", frozenset)):
    if isinstance(value, container):
      return {tag: [_encoded(v, keep) for v in container.__iter__(value)]}
  if isinstance(value, bytes | bytearray):
    return {"b": value.hex()}
  if kind is complex:
    return {"c": [value.real, value.imag]}
  if kind.__module__ == "numpy":
    return _encoded(value.tolist(), keep)
  if keep is None:
    raise NotPlain(f"a {kind.__name__} cannot be given to the program: use numbers, text, lists")
  return {"h": keep(value), "n": kind.__name__}


def _decoded(value, remote):
  if isinstance(value, list):
    return [_decoded(v, remote) for v in value]
  if not isinstance(value, dict):
    return value
  if "h" in value:
    if remote is None:
      raise NotPlain("a handle where none can be")
    return remote(int(value["h"]), str(value.get("n", "object")))
  (tag, held) = next(iter(value.items()))
  if tag == "i":
    return int(held, 16)
  if tag == "b":
    return bytes.fromhex(held)
  if tag == "c":
    return complex(*held)
  if tag == "d":
    return {_decoded(k, remote): _decoded(v, remote) for k, v in held}
  return {"t": tuple, "s": set, "z": frozenset}[tag](_decoded(v, remote) for v in held)
