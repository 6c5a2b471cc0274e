import resource
import subprocess
import sys

import pytest

from contrastive_mm.training.allocation import keep_freed_memory

COUNT_FAULTS = """
import resource, sys, torch
from contrastive_mm.training.allocation import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def touch():
    torch.ones(40 << 20, dtype=torch.uint8)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way):
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS, way], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not keep_freed_memory(), reason="needs glibc")
def test_blocks_are_used_again_and_not_cleared_by_the_system_each_time():
    pages = 20 * (40 << 20) // resource.getpagesize()
    assert faults("keep") < 0.2 * pages
    assert faults("leave") > faults("keep")
