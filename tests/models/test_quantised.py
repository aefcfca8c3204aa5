"""Quantised folders without bitsandbytes: what is written comes back, memory while loading, and what is refused."""

import json
import os
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from posttrain_jax import quant
from posttrain_jax.adapters import layout
from posttrain_jax.core import files, sharding, shards, tree
from posttrain_jax.models import decoder, hf
from posttrain_jax.quant import blockwise, bnb
from tests.marks import few, slow
from tests.models import families

SIZES = dict(hidden_size=64, intermediate_size=128)
Q = "model.layers.1.self_attn.q_proj.weight"
STORAGES = pytest.mark.parametrize("storage", few(quant.STORAGES, "nf4"))


def make(name="llama", **changes):
  config = families.config(name, **SIZES, **changes)
  return config, families.params(config)


def stored(params, storage="nf4", **options):
  return quant.quantize_params(params, storage=storage, **options)


def assert_equal(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture
def folder(tmp_path):
  config, params = make()
  hf.save(tmp_path / "model", stored(params), config)
  return tmp_path / "model"


def change(folder, edit):
  """Rewrites the folder's tensors after edit(tensors)."""
  tensors = safetensors_numpy.load_file(folder / "model.safetensors")
  edit(tensors)
  safetensors_numpy.save_file(tensors, folder / "model.safetensors")


def change_state(folder, **changes):
  """Rewrites the quant_state of one matrix."""

  def edit(tensors):
    key = f"{Q}.{bnb.STATE}nf4"
    state = {**json.loads(tensors[key].tobytes()), **changes}
    tensors[key] = np.frombuffer(json.dumps(state).encode(), np.uint8)

  change(folder, edit)


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, dict(double_quant=False, block_size=32)], ids=str)
@pytest.mark.parametrize("storage", few(["nf4", "fp4"], "nf4"))
@pytest.mark.parametrize("name", ["llama", slow("qwen2"), slow("gemma3")])
def test_saved_weights_return_exactly(tmp_path, monkeypatch, name, storage, options):
  monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
  config, params = make(name)
  params = stored(params, storage, exclude=["k_proj"], **options)
  hf.save(tmp_path / "out", params, config)
  assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
  loaded, again = hf.load(tmp_path / "out")
  assert_equal(loaded, params)
  assert again.hidden_size == config.hidden_size
  said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
  assert said["bnb_4bit_quant_type"] == storage
  assert set(said["llm_int8_skip_modules"]) == {"self_attn.k_proj", "lm_head"}


def test_codes_may_travel_as_numbers_that_are_none(folder):
  """What FSDP needs: four codes of 15 in a row are NaN where bytes are stored as bfloat16."""

  def spread(tensors):
    tensors[Q] = np.concatenate([np.full((4, 1), 255, np.uint8), tensors[Q][4:]])

  change(folder, spread)
  expected, _ = hf.load(folder)
  change(
    folder, lambda tensors: tensors.update({Q: tensors[Q].reshape(1, -1).view(ml_dtypes.bfloat16)})
  )
  assert_equal(hf.load(folder)[0], expected)


def test_saved_int8_weights_return_exactly(tmp_path):
  config, params = make()
  params = stored(params, "int8")
  hf.save(tmp_path / "out", params, config)
  assert_equal(hf.load(tmp_path / "out")[0], params)
  tensors = safetensors_numpy.load_file(tmp_path / "out/model.safetensors")
  leaf = params["layers"]["self_attn"]["q_proj"]["weight"]
  np.testing.assert_array_equal(tensors[Q], leaf.codes[1].T)
  np.testing.assert_array_equal(tensors[bnb.tensor(Q, "SCB")], leaf.absmax[1])


@STORAGES
def test_quantised_while_loading_is_quantised_after(tmp_path, storage):
  config, params = make("qwen2")
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  hf.save(tmp_path / "plain", params, config)
  loaded, _ = hf.load(tmp_path / "plain", storage=storage, exclude=["o_proj", r"mlp\.up_proj"])
  assert_equal(loaded, stored(params, storage, exclude=["o_proj", r"mlp\.up_proj"]))
  wide, _ = hf.load(tmp_path / "plain", storage=storage, dtype=jnp.float32)
  assert_equal(wide, stored(jax.tree.map(lambda x: x.astype(jnp.float32), params), storage))


def test_dtype_is_that_of_the_values(folder):
  _, params = make()
  leaf = hf.load(folder, dtype=jnp.bfloat16)[0]["layers"]["mlp"]["up_proj"]["weight"]
  assert leaf.dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    leaf.codes, stored(params)["layers"]["mlp"]["up_proj"]["weight"].codes
  )


@STORAGES
def test_made_plain_on_request(tmp_path, caplog, storage):
  config, params = make()
  params = stored(params, storage)
  hf.save(tmp_path / "out", params, config)
  with caplog.at_level("INFO"):
    plain, _ = hf.load(tmp_path / "out", storage="dense")
  assert f"{storage} weights made plain" in caplog.text
  dense = jax.jit(lambda leaf: leaf.dense())
  expected = {p: dense(x) if hasattr(x, "dense") else x for p, x in tree.items(params)}
  assert_equal(plain, tree.unflatten(expected))


def test_place_takes_weights_of_host_arrays(folder):
  seen = {}
  hf.load(folder, place=lambda path, leaf: seen.setdefault(path, leaf))
  leaf = seen["layers/mlp/down_proj/weight"]
  assert leaf.shape == (3, 128, 64)
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(leaf))


def test_a_quantised_folder_computes(folder):
  config, params = make()
  expected = decoder.forward(stored(params), families.tokens(2, 9), config)
  found = decoder.forward(hf.load(folder)[0], families.tokens(2, 9), config)
  np.testing.assert_array_equal(found, expected)


@STORAGES
def test_sharded_over_eight_devices_it_computes_the_same(tmp_path, storage):
  config, params = make()
  hf.save(tmp_path / "plain", params, config)
  mesh = sharding.mesh(fsdp=4, tensor=2)

  def place(path, leaf):
    return layout.place(path, leaf, mesh=mesh)

  placed, _ = hf.load(tmp_path / "plain", storage=storage, place=place)
  codes = placed["layers"]["mlp"]["up_proj"]["weight"].codes
  assert codes.sharding.shard_shape(codes.shape)[2] == 64
  tokens = families.tokens(4, 9)
  forward = jax.jit(decoder.forward, static_argnums=2)
  with jax.set_mesh(mesh):
    found = forward(placed, tokens, config)
  expected = forward(stored(params, storage), tokens, config)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


# --- memory ----------------------------------------------------------------------------------------------------------

LOAD = """
import sys, time
import jax, numpy as np, ml_dtypes
jax.config.update("jax_platforms", "cpu")
from posttrain_jax import quant
from posttrain_jax.models import hf
for shape in ((512, 512), (512, 2048), (2048, 512)):  # compiled before memory is counted
  jax.block_until_ready(quant.quantize("warm/up", np.ones(shape, ml_dtypes.bfloat16), sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
params, _ = hf.load(sys.argv[1], storage=sys.argv[2])
jax.block_until_ready(params)
print(sum(x.nbytes for x in jax.tree.leaves(params)), flush=True)
time.sleep(0.05)
"""


def anonymous(pid):
  """Bytes of a process that are no file's pages; those of the mapped checkpoint can be dropped at any time."""
  try:
    with open(f"/proc/{pid}/status") as f:
      found = re.search(r"RssAnon:\s+(\d+) kB", f.read())
  except (FileNotFoundError, ProcessLookupError):
    return 0
  return int(found[1]) * 1024 if found else 0


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_loading_takes_the_result_and_some_matrices(tmp_path, monkeypatch):
  """268 MB of bfloat16, its largest leaf 67 MB, become 70 MB of NF4 with some 50 MB besides."""
  monkeypatch.setattr(shards, "SHARD_BYTES", 50_000_000)
  config = families.config(
    "llama",
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=32,
    num_key_value_heads=4,
    head_dim=128,
  )
  draw = np.random.default_rng(0)
  random = lambda shape: draw.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
  leaves = {
    path: np.broadcast_to(random(spec.shape[1:]), spec.shape)
    if "layers" in path
    else random(spec.shape)
    for path, spec in tree.items(decoder.specs(config))
  }
  hf.save(tmp_path / "model", tree.unflatten(leaves), config)
  largest = max(leaf.nbytes for leaf in leaves.values())
  whole = sum(leaf.nbytes for leaf in leaves.values())
  command = [sys.executable, "-c", LOAD, str(tmp_path / "model"), "nf4"]
  with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
    assert child.stdout.readline() == "ready\n"
    before = peak = anonymous(child.pid)
    child.stdin.write("go\n")
    child.stdin.flush()
    while child.poll() is None:
      peak = max(peak, anonymous(child.pid))
      time.sleep(0.002)
    result = int(child.stdout.readline())
  taken = peak - before
  print(
    f"{taken / 1e6:.0f} MB at the peak for a result of {result / 1e6:.0f}; dense {whole / 1e6:.0f}"
  )
  assert child.returncode == 0
  assert result < 0.27 * whole
  # 109 to 129 MB were seen, and 218 where each leaf was read whole before it was quantised
  assert result < taken < result + 1.5 * largest


# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_cannot_become_the_storage_is_named(folder, tmp_path):
  config, params = make()
  hf.save(tmp_path / "plain", params, config)
  for where, options, message in (
    (
      folder,
      dict(storage="int8"),
      r"holds nf4 weights, and int8 of them would lose twice; write 'nf4'",
    ),
    (folder, dict(storage="nf4", exclude=["q_proj"]), r"exclude=\['q_proj'\] .*quantised already"),
    (tmp_path / "plain", dict(storage="int3"), r"storage='int3': known are dense, nf4, fp4, int8"),
    (tmp_path / "plain", dict(exclude=["q_proj"]), r"exclude=.*storage=None"),
    (tmp_path / "plain", dict(storage="nf4", exclude=["w_proj"]), r"no parameter matches 'w_proj'"),
  ):
    with pytest.raises(ValueError, match=message):
      hf.load(where, **options)


def test_a_matrix_that_does_not_fit_into_blocks_is_named(tmp_path):
  config, params = families.make("llama")  # rows of 32 and 48
  hf.save(tmp_path / "plain", params, config)
  with pytest.raises(
    ValueError, match=r"q_proj/weight: .*in = 32 is no multiple of block_size=64.*exclude="
  ):
    hf.load(tmp_path / "plain", storage="nf4")
  loaded, _ = hf.load(tmp_path / "plain", storage="int8")  # which has no blocks
  assert_equal(loaded, stored(params, "int8"))


def test_layers_stored_in_two_ways_are_made_plain_and_said(folder, caplog):
  plain = np.asarray(make()[1]["layers"]["self_attn"]["q_proj"]["weight"][1].T)

  def one_layer_plain(tensors):
    for part in bnb.UNDER:
      tensors.pop(bnb.tensor(Q, part), None)
    tensors[Q] = plain

  change(folder, one_layer_plain)
  with caplog.at_level("INFO"):
    loaded, _ = hf.load(folder)
  assert "q_proj/weight is nf4 in layer 0 and dense in layer 1" in caplog.text
  assert type(loaded["layers"]["self_attn"]["k_proj"]["weight"]).__name__ == "NF4"
  np.testing.assert_array_equal(loaded["layers"]["self_attn"]["q_proj"]["weight"][1], plain.T)


def test_two_types_in_one_folder_are_refused(tmp_path):
  config, params = make()
  mixed = stored(stored(params, "nf4", exclude=["mlp.*"]), "int8", exclude=["self_attn.*"])
  with pytest.raises(ValueError, match=r"a folder says one type for all"):
    hf.save(tmp_path / "out", mixed, config)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(shape=[64, 63]), r"says shape \[64, 63\], the config asks for \(\d+, 64\)"),
    (dict(blocksize=48), "blocksize 48 is not read"),
    (dict(blocksize=128), "no multiple of its blocksize 128.*model.dequantize"),
    (dict(quant_type="fp4"), "says quant_type 'fp4' under the name of nf4"),
    (dict(dtype="float8"), "says dtype 'float8'"),
    (dict(nested_blocksize=64), "nested_blocksize 64 is not read"),
    (dict(nested_dtype="float16"), "nested_dtype 'float16' is not read"),
    (dict(shape=None), "quant_state lacks 'shape'"),
  ],
)
def test_a_state_that_we_have_no_layout_for_is_named(folder, changes, message):
  change_state(folder, **changes)
  with pytest.raises(ValueError, match=rf"{re.escape(Q)}: .*{message}"):
    hf.load(folder)


@pytest.mark.parametrize(
  ("part", "damage", "message"),
  [
    ("quant_map", lambda x: x[::-1].copy(), "its quant_map is not bitsandbytes' own"),
    ("nested_quant_map", lambda x: np.sort(-x), "its nested_quant_map is not bitsandbytes' own"),
    ("absmax", lambda x: x[1:], r"its absmax holds 63 uint8 values, expected 64"),
    ("absmax", lambda x: x.astype(np.float32), "its absmax holds 64 float32 values"),
    ("", lambda x: x[2:], r"holds 2046 bytes, \(64, 64\) in 4 bits takes 2048"),
    ("quant_state.bitsandbytes__nf4", lambda x: x[3:], "its quant_state is not JSON"),
    ("absmax", None, "the file lacks its absmax"),
    ("quant_map", None, "the file lacks its quant_map"),
  ],
)
def test_a_damaged_part_is_named(folder, part, damage, message):
  name = bnb.tensor(Q, part)
  change(folder, lambda t: t.pop(name) if damage is None else t.update({name: damage(t[name])}))
  with pytest.raises(ValueError, match=rf"{re.escape(Q)}: {message}"):
    hf.load(folder)


@pytest.mark.parametrize(
  ("kind", "part"), [("nf4", "nested_absmax"), ("nf4", "offset"), ("int8", bnb.SCALES)]
)
def test_a_scale_that_is_no_number_is_named(tmp_path, kind, part):
  """One of them makes a block of NaN, or all of a matrix."""
  config, params = make()
  hf.save(tmp_path / "model", quant.quantize_params(params, storage=kind), config)
  name = bnb.tensor(Q, part)

  def spoil(tensors):
    if part == "offset":
      state = tensors[f"{Q}.{bnb.STATE}nf4"]
      said = json.loads(state.tobytes()) | {"nested_offset": float("nan")}
      tensors[f"{Q}.{bnb.STATE}nf4"] = np.frombuffer(json.dumps(said).encode(), np.uint8)
    else:
      tensors[name] = np.concatenate([tensors[name][:-1], np.full(1, np.nan, np.float32)])

  change(tmp_path / "model", spoil)
  said = "nested_offset nan" if part == "offset" else f"{re.escape(name)}' holds 1 NaN of"
  with pytest.raises(ValueError, match=said):
    hf.load(tmp_path / "model")


def test_old_int8_formats_are_named(tmp_path):
  config, params = make()
  hf.save(tmp_path / "out", stored(params, "int8"), config)
  name = bnb.tensor(Q, "weight_format")
  change(tmp_path / "out", lambda t: t.update({name: np.uint8([2]).reshape(())}))
  with pytest.raises(ValueError, match=rf"{re.escape(Q)}: weight_format is 2, read is 0"):
    hf.load(tmp_path / "out")


@pytest.mark.parametrize(
  ("said", "message"),
  [
    (dict(quant_method="gptq", bits=4), "quantised with 'gptq'; read are bitsandbytes'"),
    (dict(quant_method="bitsandbytes"), "quantised with 'bitsandbytes'; read are"),
    (
      dict(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="af4"),
      "bnb_4bit_quant_type='af4' is not read; known are nf4, fp4",
    ),
  ],
)
def test_other_quantisations_are_refused_by_name(folder, said, message):
  path = folder / "config.json"
  files.write_json(path, {**json.loads(path.read_text()), "quantization_config": said})
  with pytest.raises(ValueError, match=message):
    hf.load(folder)


def test_nested_map_is_the_dynamic_one(folder):
  tensors = safetensors_numpy.load_file(folder / "model.safetensors")
  np.testing.assert_array_equal(tensors[f"{Q}.nested_quant_map"], blockwise.dynamic_map())
