"""Gives memory back that a model no longer needs."""

from __future__ import annotations

import ctypes
import gc
import sys


def release_memory() -> None:
    """Give what nobody holds any more back to the system, and to other processes on a GPU.

    Python frees a model when nothing names it, but for cycles. The memory stays with the process all the same: glibc
    keeps tensors below 32 MB in its heap (13 GB of them after a reward model of 270 M had been trained on a CPU), and
    torch keeps what it has on a GPU.
    """
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Give back what is free in the heap of glibc: 345 MB after a vocabulary of 262,144 tokens was read."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library
        return
    trim(0)
