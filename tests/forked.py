"""`almost-eval ...` and other programs as real processes, forked from one that imported all: each starts at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PARENT = """
import gc, json, os, sys
gc.disable()  # what is imported is there to stay
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has begun with it ignored
from almost_eval.cli.command_line import import_transformers
import_transformers()
import almost_eval.cli.main, filelock
from almost_eval.run import provenance
from importlib import import_module
for name in sys.argv[1:]:
    import_module(name)
gc.freeze()  # a collection in a child would copy every page that it shares
gc.enable()
provenance.commit = lambda: "0"  # this tree may be edited meanwhile, and a resumed run would say so
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child == 0:
        os.chdir(order["cwd"])
        for stream, file in enumerate(["/dev/null", order["out"], order["err"]]):
            os.dup2(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), stream)
        sys.argv = [order["program"], *order["arguments"]]
        os.environ.update(order["environment"])
        exec(order["code"], {"__name__": "__main__"})
        sys.exit()
    print(child, flush=True)
"""


ALMOST_EVAL = "import almost_eval.cli.main; almost_eval.cli.main.main()"
ALMOST_TRAIN = "import almost_train.cli.main; almost_train.cli.main.main()"
"""Programs: what runs in a process that was forked, with its arguments in `sys.argv`."""


class Forks:
    """Starts the processes."""

    def __init__(self, parent: subprocess.Popen[str]) -> None:
        self._parent = parent

    def ask(self, order: dict[str, Any]) -> int:
        """What the parent answers to an order."""
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(json.dumps(order) + "\n")
        self._parent.stdin.flush()
        return int(self._parent.stdout.readline())

    def __call__(
        self, *arguments: object, cwd: Path, err: str = "", code: str = ALMOST_EVAL, **environment: str
    ) -> Process:
        """Start one in `cwd`.

        Args:
            arguments: of the program.
            cwd: its folder; what it says stands beside it.
            err: a terminal for stderr, in place of a file.
            code: the program.
            environment: variables that it gets beside those of the parent.
        """
        program = "almost-train" if code == ALMOST_TRAIN else "almost-eval"
        about = {"program": program, "code": code, "environment": environment}
        return Process(self, arguments, cwd, err, about)


class Process:
    """One of them."""

    def __init__(self, forks: Forks, arguments: Sequence[object], cwd: Path, err: str, about: dict[str, Any]) -> None:
        self._forks = forks
        self.out, self.err = cwd.parent / f"{cwd.name}.out", Path(err or cwd.parent / f"{cwd.name}.err")
        for file in (self.out, self.err):
            if not file.is_char_device():
                file.write_text("")
        order = {"arguments": [str(a) for a in arguments], "cwd": str(cwd), "out": str(self.out), "err": str(self.err)}
        self.pid = forks.ask(order | about)
        self.began = time.perf_counter()

    def wait(self) -> int:
        """Its exit code; minus the signal that ended it."""
        return self._forks.ask({"wait": self.pid})

    def send(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def runs(self) -> bool:
        """Whether it has not ended."""
        return Path(f"/proc/{self.pid}/stat").read_text().split()[2] != "Z"

    def until_lines(self, samples: Path, wanted: int) -> bool:
        """Wait for so many lines; False where the process ended before."""
        while self.runs():
            if samples.exists() and samples.read_bytes().count(b"\n") >= wanted:
                return True
            time.sleep(0.002)
        return False


@contextmanager
def forks(*modules: str, **environment: str) -> Iterator[Forks]:
    """The parent, with these modules imported and these variables set."""
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, *modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    yield Forks(parent)
    parent.stdin.close()
    parent.wait()
