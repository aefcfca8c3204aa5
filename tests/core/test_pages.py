"""What the system counts of pages, in a process of its own: an allocator's settings are the process's."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
from posttrain_jax.core import pages
assert pages.keep_freed()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
  before = faults()
  array = b"x" * (64 << 20)
  print(faults() - before)
  del array
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the settings")
def test_what_is_freed_is_used_again():
  command = [sys.executable, "-c", FAULTS]
  said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
  first, second = map(int, said.split())
  assert second < first / 2
