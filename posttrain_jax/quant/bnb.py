"""bitsandbytes' files: the tensors of one quantised matrix, both ways, and the `quantization_config` beside them.

A 4-bit matrix `X.weight` [out, in] is bytes of its row-major values, [n / 2, 1], with `X.weight.absmax`, `.quant_map`,
`.quant_state.bitsandbytes__nf4` (or `__fp4`: JSON as bytes) and, where the scales are quantised too, `.nested_absmax`
and `.nested_quant_map`.  A matrix of LLM.int8() is int8 [out, in] with `X.SCB` and `X.weight_format`.

Nothing is computed on the way: what is read stands for the values that bitsandbytes dequantises, bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from posttrain_jax.core import words
from posttrain_jax.quant import blockwise, fourbit, fp4, int8, nf4

KINDS: dict[str, type[fourbit.FourBit]] = {"nf4": nf4.NF4, "fp4": fp4.FP4}
STATE = "quant_state.bitsandbytes__"
BESIDE = SCALES, FORMAT = "SCB", "weight_format"  # of LLM.int8(): beside the weight, not under it
UNDER = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE + "nf4", STATE + "fp4")
STATE_KEYS = ("quant_type", "blocksize", "dtype", "shape")

Entry = tuple[tuple[int, ...], str, Callable[[], np.ndarray]]  # shape, dtype, maker


# Names


def parts(name: str, held: Any) -> dict[str, str]:
  """{part: tensor name} of what is stored for the weight `name`; {"": name} for a plain one.

  >>> parts("q.weight", {"q.weight", "q.SCB", "k.SCB"})
  {'': 'q.weight', 'SCB': 'q.SCB'}
  """
  known = {part: tensor(name, part) for part in (*UNDER, *BESIDE)}
  return {
    "": name,
    **{part: tensor_name for part, tensor_name in known.items() if tensor_name in held},
  }


def tensor(name: str, part: str) -> str:
  """The name of the tensor that holds a part of the weight `name`.

  >>> tensor("q.weight", "absmax"), tensor("q.weight", "SCB")
  ('q.weight.absmax', 'q.SCB')
  """
  if part in BESIDE:
    return name.removesuffix("weight") + part
  return f"{name}.{part}" if part else name


def storage(parts: Mapping[str, Any]) -> str:
  """What the parts of a weight say it is: dense, nf4, fp4 or int8."""
  if SCALES in parts:
    return "int8"
  return next((kind for kind in KINDS if STATE + kind in parts), "dense")


def check_config(described: Mapping[str, Any]) -> None:
  """Raises ValueError where a model's `config.json` names a quantisation that is not read."""
  config = described.get("quantization_config")
  if config is None:
    return
  if not isinstance(config, Mapping):
    raise ValueError(f"quantization_config={words.shown(config)}: expected an object, or null")
  method = config.get("quant_method", "bitsandbytes")
  four, eight = config.get("load_in_4bit"), config.get("load_in_8bit")
  if method != "bitsandbytes" or not (four or eight):
    raise ValueError(
      f"the weights are quantised with {words.shown(method)}; read are bitsandbytes' nf4, fp4 and LLM.int8(): load the "
      "unquantised model and quantise it with base=nf4"
    )
  kind = config.get("bnb_4bit_quant_type", "fp4")
  if four and kind not in tuple(KINDS):
    raise ValueError(
      f"bnb_4bit_quant_type={words.shown(kind)} is not read; known are {', '.join(KINDS)}: load the unquantised model"
    )


def config(weight: Any, skipped: list[str]) -> dict[str, Any]:
  """The `quantization_config` of a folder of weights like this one.

  Args:
    skipped: endings of the names of the linear modules that are plain.
  """
  eight = isinstance(weight, int8.Int8)
  said = dict(
    quant_method="bitsandbytes",
    load_in_4bit=not eight,
    load_in_8bit=eight,
    llm_int8_skip_modules=skipped,
    llm_int8_threshold=6.0,
  )
  if eight:
    return said
  return dict(
    said,
    bnb_4bit_quant_type=weight.name,
    bnb_4bit_use_double_quant=weight.nested_absmax is not None,
    bnb_4bit_compute_dtype=str(jnp.dtype(weight.dtype)),
    bnb_4bit_quant_storage="uint8",
  )


# Reading


def shape(tensors: Mapping[str, np.ndarray]) -> tuple[int, int]:
  """(out, in) as the parts themselves say it."""
  kind = storage(tensors)
  if kind == "int8":
    out, rows = tensors[""].shape
  else:
    out, rows = _state(tensors[STATE + kind], kind)["shape"]
  return out, rows


def read(name: str, tensors: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> Any:
  """The weight, [in, out] in host memory, whose parts these are.

  Args:
    name: of the weight, for errors.
    tensors: part -> array, as `parts` names them.
    shape: (out, in), as the model's config asks for.

  Raises:
    ValueError: the parts do not fit one another or the shape, or hold what we have no layout for.
  """
  try:
    if storage(tensors) == "int8":
      return _read_int8(tensors, shape)
    return _read_fourbit(tensors, shape)
  except ValueError as problem:
    raise ValueError(f"{name}: {problem}") from None


def _read_int8(tensors, shape):
  codes, absmax = tensors[""], tensors[SCALES]
  if codes.dtype != np.int8 or codes.shape != shape:
    raise ValueError(f"holds {codes.dtype} {codes.shape}, the config asks for int8 {shape}")
  if FORMAT in tensors and int(tensors[FORMAT]) != 0:
    raise ValueError(
      f"weight_format is {int(tensors[FORMAT])}, read is 0 (row): bitsandbytes before 0.45 wrote others; load and "
      "save it with a newer one"
    )
  absmax = _scales(SCALES, absmax, shape[0], np.float32)
  return int8.Int8(codes.T, absmax)  # of the dtype before quantisation the file says nothing


def _read_fourbit(tensors, shape):
  kind = storage(tensors)
  state = _state(tensors[STATE + kind], kind)
  out, rows = shape
  block, dtype = state["blocksize"], state["dtype"]
  if tuple(state["shape"]) != shape:
    raise ValueError(f"its quant_state says shape {state['shape']}, the config asks for {shape}")
  if block not in fourbit.BLOCK_SIZES:
    raise ValueError(f"blocksize {block} is not read; known are {fourbit.BLOCK_SIZES}")
  if rows % block:
    raise ValueError(
      f"in = {rows} is no multiple of its blocksize {block}, so that blocks run over from one row to the next, "
      "which our layout has no place for: dequantise it with transformers (model.dequantize(), save_pretrained) "
      "and load that folder"
    )
  _same("quant_map", tensors, KINDS[kind].CODEBOOK)
  packed = np.ascontiguousarray(tensors[""]).reshape(-1).view(np.uint8)
  if packed.size != out * rows // 2:
    raise ValueError(f"holds {packed.size} bytes, {shape} in 4 bits takes {out * rows // 2}")
  turn = lambda x: x.reshape(out, -1).T
  blocks = out * rows // block
  if "nested_absmax" not in tensors:
    scales = turn(_scales("absmax", _part("absmax", tensors), blocks, np.float32))
    return KINDS[kind](turn(packed), scales, block_size=block, dtype=jnp.dtype(dtype))
  _same("nested_quant_map", tensors, blockwise.dynamic_map())
  if state.get("nested_blocksize") != fourbit.NESTED_BLOCK:
    raise ValueError(
      f"nested_blocksize {state.get('nested_blocksize')} is not read; known is {fourbit.NESTED_BLOCK}"
    )
  if state.get("nested_dtype") != "float32":
    raise ValueError(f"nested_dtype {state.get('nested_dtype')!r} is not read; known is float32")
  offset = state.get("nested_offset")
  if not isinstance(offset, int | float) or not math.isfinite(offset):
    raise ValueError(f"its quant_state says nested_offset {offset!r}, expected a finite number")
  nested = tensors["nested_absmax"]
  return KINDS[kind](
    turn(packed),
    turn(_scales("absmax", _part("absmax", tensors), blocks, np.uint8)),
    _scales("nested_absmax", nested, -(-blocks // fourbit.NESTED_BLOCK), np.float32),
    np.asarray(offset, np.float32),
    block_size=block,
    dtype=jnp.dtype(dtype),
  )


def _state(packed: np.ndarray, kind: str) -> dict[str, Any]:
  """The object in `quant_state`, of the kind that its name says."""
  try:
    state = json.loads(packed.astype(np.uint8).tobytes())
    lacking = [key for key in STATE_KEYS if key not in state]
  except (ValueError, TypeError) as error:
    raise ValueError(f"its quant_state is not JSON: {error}") from None
  if lacking or not state["shape"]:
    raise ValueError(f"its quant_state lacks {lacking[0] if lacking else 'shape'!r}")
  if state["quant_type"] != kind:
    raise ValueError(
      f"its quant_state says quant_type {state['quant_type']!r} under the name of {kind}"
    )
  if state["dtype"] not in ("float32", "float16", "bfloat16"):
    raise ValueError(f"its quant_state says dtype {state['dtype']!r}: float32, float16 or bfloat16")
  return state


def _part(part: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
  if part not in tensors:
    raise ValueError(f"the file lacks its {part}; fetch it again")
  return tensors[part]


def _scales(part: str, x: np.ndarray, count: int, dtype: Any) -> np.ndarray:
  x = x.reshape(-1)
  if x.dtype != dtype or x.size != count:
    raise ValueError(
      f"its {part} holds {x.size} {x.dtype} values, expected {count} of {np.dtype(dtype)}"
    )
  if x.dtype == np.float32 and not np.isfinite(x).all():
    raise ValueError(f"its {part} holds numbers that are not finite")
  return x


def _same(part: str, tensors: Mapping[str, np.ndarray], wanted: np.ndarray) -> None:
  stored = _part(part, tensors).reshape(-1)
  if not np.array_equal(stored, wanted):
    raise ValueError(
      f"its {part} is not bitsandbytes' own, so that our table would give other values; load the unquantised model"
    )


# Writing


def write(weight: Any, at: tuple[int, ...] = ()) -> dict[str, Entry]:
  """part -> (shape, dtype, maker) of a matrix [in, out], or of the one at an index of a stack.

  The makers take the arrays from the device, when the file is written.
  """
  of_layer = lambda x: np.asarray(x[at] if at else x)
  rows, out = weight.shape[-2:]
  if isinstance(weight, int8.Int8):
    return {
      "": ((out, rows), "int8", lambda: of_layer(weight.codes).T),
      SCALES: ((out,), "float32", lambda: of_layer(weight.absmax)),
      FORMAT: _whole(np.zeros((), np.uint8)),
    }
  blocks = rows * out // weight.block_size
  flat = lambda x: of_layer(x).T.reshape(-1)
  scales = str(np.dtype(weight.scales.dtype))
  entries: dict[str, Entry] = {
    "": ((rows * out // 2, 1), "uint8", lambda: flat(weight.codes)[:, None]),
    "absmax": ((blocks,), scales, lambda: flat(weight.scales)),
    "quant_map": ((16,), "float32", lambda: weight.CODEBOOK),
  }
  state = dict(
    quant_type=weight.name,
    blocksize=weight.block_size,
    dtype=str(jnp.dtype(weight.dtype)),
    shape=[out, rows],
  )
  if weight.nested_absmax is not None:
    nested = (weight.nested_absmax.shape[-1],)
    entries["nested_absmax"] = (nested, "float32", lambda: of_layer(weight.nested_absmax))
    entries["nested_quant_map"] = _whole(blockwise.dynamic_map())
    state.update(
      nested_blocksize=fourbit.NESTED_BLOCK,
      nested_dtype="float32",
      nested_offset=float(of_layer(weight.offset)),
    )
  entries[STATE + weight.name] = _whole(np.frombuffer(json.dumps(state).encode(), np.uint8))
  return entries


def _whole(x: np.ndarray) -> Entry:
  return x.shape, str(x.dtype), lambda: x
