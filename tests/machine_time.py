"""How long a program takes on a machine that others use too: the wall time less the time it stood in line for a core.

Linux counts for each process how long its main thread was ready to run and had no core (`/proc/PID/schedstat`).
Sleeping, reading and waiting for another process are not in that count: they are time that the program took.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path


def seconds_taken(command: Sequence[str], *, holds: str) -> float:
    """Seconds between start and end of a program, which must end with code 0 and print a text that holds `holds`."""
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _await_end(process.pid)
        seconds = time.perf_counter() - began - _in_line(process.pid)
    assert process.returncode == 0, output
    assert holds in output
    return seconds


def seconds_to_end(pid: int) -> float:
    """Seconds from now until a process ends; it is left for its parent to wait for."""
    began, in_line = time.perf_counter(), _in_line(pid)
    _await_end(pid)
    return time.perf_counter() - began - (_in_line(pid) - in_line)


def _await_end(pid: int) -> None:
    while Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.002)


def _in_line(pid: int) -> float:
    """Seconds that the main thread of a process was ready and had no core so far; 0 where nobody counts them."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text(encoding="utf-8").split()[1]) / 1e9
    except OSError:
        return 0.0
