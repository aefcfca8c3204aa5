"""Eight virtual CPU devices for every test, quick compilation, and a compile cache that outlives the run."""

import functools
import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import signal

# What a shell's background or nohup has ignored, the processes of tests would ignore too: a signal that is caught here
# is an ordinary one to them.
for number in (signal.SIGINT, signal.SIGHUP):
  if signal.getsignal(number) is signal.SIG_IGN:
    signal.signal(number, lambda *_: None)

# Each of several processes of tests has its own part of the cores: two that share two take a fifth more of their time.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
  number, count = (
    int(os.environ["PYTEST_XDIST_WORKER"][2:]),
    int(os.environ["PYTEST_XDIST_WORKER_COUNT"]),
  )
  cores = sorted(os.sched_getaffinity(0))
  os.sched_setaffinity(0, cores[number::count] or cores)

# Set before jax starts; what is asked for from outside stays.  Tests compile more than they compute: without LLVM's
# optimisations a tiny model's gradient takes 2.7 s of a core instead of 6.3, and in one part for LLVM instead of 32 a
# sixth less again.
FLAGS = {
  "xla_force_host_platform_device_count": 8,
  "xla_backend_optimization_level": 0,
  "xla_cpu_parallel_codegen_split_count": 1,
}
# The older emitters of fused loops compile twice as fast.
# A jaxlib without them would end on the flag, and libtpu does.
KNOWN = importlib.metadata.version("jaxlib").startswith("0.10.")
KNOWN = KNOWN and importlib.util.find_spec("libtpu") is None
if KNOWN:
  FLAGS["xla_cpu_use_fusion_emitters"] = "false"
asked = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
  [asked, *(f"--{name}={value}" for name, value in FLAGS.items() if name not in asked)]
).strip()

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update(
  "jax_compilation_cache_dir", str(pathlib.Path(__file__).parent.parent / ".cache" / "jax-tests")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)

# A test compiles some five programs of a few operations.  Over two files (98 tests) the first of these took a fifth of
# the CPU time, the other two a sixth: an MLIR context for each program, where one holds as many; the Python lines that
# operations come from; and the collector, which looks through all of jax whenever a program has been traced.
if KNOWN:
  from jax._src.interpreters import mlir

  vars(mlir)["make_ir_context"] = functools.cache(mlir.make_ir_context)
jax.config.update("jax_include_full_tracebacks_in_locations", False)
jax.config.update("jax_traceback_in_locations_limit", 0)
gc.collect()
gc.freeze()
gc.set_threshold(50_000, 20, 50)

from posttrain_jax.build import decisions  # noqa: E402
from posttrain_jax.rollout import engine  # noqa: E402

# model.dtype=auto is not what the CPU has that tests run on: float32, or what is asked for here.
PRODUCTS = os.environ.get("TESTS_PRODUCTS", "float32")
vars(decisions)["processor"] = lambda: "amx_bf16" if PRODUCTS == "bfloat16" else None


@pytest.fixture
def in_float32(monkeypatch):
  """Products are float32 whatever is asked for: of tests that compare numbers tightly."""
  monkeypatch.setattr(decisions, "processor", lambda: None)


@pytest.fixture
def one_device(monkeypatch):
  """A command sees the first of the eight devices alone."""
  devices = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda *args: devices)


engine.Engine.is_strict = True  # a program that is compiled after the warm-up is an error


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
  """A folder with a model and rows to train it on."""
  from tests import tiny

  folder = tmp_path_factory.mktemp("shared")
  tiny.tiny_model_folder(folder / "model")
  tiny.write_jsonl(folder / "rows.jsonl", tiny.rows(40))
  return folder
