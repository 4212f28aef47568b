"""The devices that a plan is made for: this machine's, or what the flags say.

How fast GPUs are is in `almost_eval.suite.hardware`; `--measure` replaces that by a measurement on this machine.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from almost_eval.errors import InputError
from almost_eval.suite.hardware import GB, gpu_named

CONTEXT = int(1.0 * GB)
"""Bytes of a GPU that a process needs beside tensors: CUDA's context, cuBLAS's workspace."""
HEAP_MATTERS = GB
"""Bytes of activations below which no more is said of the allocator."""
RESERVE = 0.05
"""Share of a GPU's memory that stays free: the allocator's blocks have gaps."""


@dataclass(frozen=True, slots=True)
class Devices:
    """What a stage runs on."""

    count: int
    memory: int
    """Bytes of each."""
    on_gpu: bool
    sharding: str = "full"
    """`full` or `none`; see `needs`."""
    gpu: str | None = None
    _runtimes: dict[str, int] = field(default_factory=dict)
    _libraries: dict[str, int] = field(default_factory=dict)
    """Module -> what its import took of this process, once it is imported here."""

    @property
    def room(self) -> int:
        """Bytes that may be used of each."""
        return int(self.memory * (1 - RESERVE)) if self.on_gpu else self.memory

    def runtime(self, model: str, *libraries: str) -> int:
        """Bytes of a process before it holds a tensor: on a CPU what this one has, with the model's tokenizer.

        Args:
            model: whose tokenizer it has.
            libraries: modules that it imports besides what every stage does, in this order.
        """
        if self.on_gpu:
            return CONTEXT
        if model not in self._runtimes:
            # What was imported for another stage is none of this one's.
            self._runtimes[model] = _runtime_here(model) - sum(self._libraries.values())
        for library in libraries:
            if library not in self._libraries:
                before = _resident()
                import_module(library)
                self._libraries[library] = _resident() - before
        return self._runtimes[model] + sum(self._libraries[library] for library in libraries)

    @property
    def old_heap(self) -> str:
        """The version of a glibc that holds more than is alive; "" elsewhere.

        glibc before 2.38 finds no room for an aligned block where one of the same size was freed (its bug 14581), and
        torch aligns every block: 1.4 to 2.3 times the activations were measured (benchmarks/LOG.md).
        """
        name, version = platform.libc_ver()
        numbers = [int(number) for number in re.findall(r"\d+", version)[:2]]
        is_old = name == "glibc" and numbers < [2, 38] and "malloc" not in os.environ.get("LD_PRELOAD", "")
        return version if is_old and not self.on_gpu else ""

    def heap_note(self, activations: int) -> str:
        """A sentence where the allocator may hold far more than is alive; "" elsewhere."""
        if not self.old_heap or activations < HEAP_MATTERS:
            return ""
        return (
            f"glibc {self.old_heap} may hold twice the activations, {activations / GB:.1f} GB more; another allocator, "
            "or --gradient-checkpointing, saves that (docs/train.md)"
        )

    def describe(self) -> str:
        """`8 GPUs of 80 GB each, weights divided`."""
        kind = (self.gpu or "GPU") if self.on_gpu else "CPU"
        name = f"{self.count} x {kind}" if self.count > 1 else f"one {kind}"
        divided = f", {'weights divided' if self.sharding == 'full' else 'weights whole on each'}"
        return f"{name} of {self.memory / GB:.4g} GB{divided if self.count > 1 else ''}"


def devices(memory: str | None, count: int | None, gpu: str | None, sharding: str) -> Devices:
    """What the flags say, the rest as this machine has it.

    Raises:
        InputError: no size of memory, or no such GPU.
    """
    import torch

    named = None if gpu is None else gpu_named(gpu)
    if memory is not None or named is not None:
        size = parse_memory(memory) if memory is not None else named.memory  # type: ignore[union-attr]
        return Devices(count or 1, size, True, sharding, gpu)
    if torch.cuda.is_available():
        size = int(torch.cuda.get_device_properties(0).total_memory)
        return Devices(count or torch.cuda.device_count(), size, True, sharding)
    return Devices(count or 1, _machine_memory(), False, sharding)


def parse_memory(text: str) -> int:
    """Bytes of `24GB` (10**9) or `24GiB` (2**30).

    >>> parse_memory("24GB"), parse_memory("1.5 GiB")
    (24000000000, 1610612736)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GiB)\s*", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise InputError(f"--device-memory is {text!r}; it must be a size such as 24GB or 80GiB")
    return int(float(match[1]) * (2**30 if "i" in match[2].lower() else GB))


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _runtime_here(model: str) -> int:
    """Measured on this process, once it has the libraries and the tokenizer."""
    import accelerate  # noqa: F401

    from almost_eval.models.checkpoint import find_checkpoint
    from almost_eval.models.loading import load_tokenizer, release_memory
    from almost_train.pipeline.shapes import ANY, local_folder

    kept = load_tokenizer(find_checkpoint(model, architectures=ANY)) if local_folder(model) else None
    release_memory()  # what reading a large vocabulary leaves free is filled again, or given back
    size = _resident()
    del kept
    return size


def _resident() -> int:
    """Bytes of this process in memory; where the system does not say, the most that they were."""
    import resource
    import sys

    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
