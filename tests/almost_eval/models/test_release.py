"""Memory of a model that nobody needs goes back to the system."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import psutil, torch
from almost_eval.models.loading import release_memory

def resident():
    return psutil.Process().memory_info().rss // 2**20

def tensors():
    return [torch.ones(2**21) for _ in range(64)]  # 8 MiB each

for _ in range(2):  # glibc's heap takes what has been freed once
    model = tensors()
    last = torch.ones(2**16)  # lies above the others, so that the heap does not shrink by itself
    before = resident()
    del model
freed = resident()
release_memory()
print(before, freed, resident())
"""


def test_what_was_freed_goes_back() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    before, freed, released = map(int, done.stdout.split())
    assert released <= before - 400
    assert released <= freed
