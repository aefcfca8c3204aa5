"""Eight virtual CPU devices for every test, and a compile cache that outlives the run."""

import os
import pathlib
import re

# Both must be set before jax starts; a number of devices asked for from outside stays.
flags = os.environ.get("XLA_FLAGS", "")
if not re.search("xla_force_host_platform_device_count", flags):
  os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

import jax  # noqa: E402

jax.config.update(
  "jax_compilation_cache_dir", str(pathlib.Path(__file__).parent.parent / ".cache" / "jax-tests")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
