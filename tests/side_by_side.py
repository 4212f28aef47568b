"""`make test`: the tests on several cores, then those that need the machine for themselves, and one summary of both.

The first part is `pytest -n JOBS --dist loadfile`: the tests of a file stay in one process, so its fixtures are built
once, and so do all that need a real vLLM (`scope_of`).
The second part is what has the mark `alone`: it measures time, and would measure its neighbours too. The exit
code is 0 where both parts ran and nothing failed.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree


@dataclass(frozen=True, slots=True)
class Part:
    """How one call of pytest ended."""

    name: str
    code: int
    """Of the process; 0 is that tests ran and all passed."""
    seconds: float
    tests: int
    failures: int
    """Errors too."""
    skipped: int

    @property
    def passed(self) -> int:
        """Tests that ran and did not fail."""
        return self.tests - self.failures - self.skipped


def marks(project: Path) -> str:
    """The mark expression that pytest has by default (`addopts`), which one on the command line replaces."""
    options = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    words = shlex.split(options["addopts"])
    return words[words.index("-m") + 1]


def scope_of(nodeid: str) -> str:
    """The tests of one scope run in one process of `make test`: a file, or all files that need a real vLLM.

    A process starts its two servers once, which takes it 40 s: when each process had some of these files, each did.
    """
    file = nodeid.split("::", 1)[0]
    text = (Path(__file__).parents[1] / file).read_text(encoding="utf-8") if file.startswith("tests/serving/") else ""
    return "vLLM" if "policy_server: " in text or "reward_server: " in text else file


def run(name: str, *arguments: str, environment: dict[str, str]) -> Part:
    """Run pytest in a process of its own."""
    print(f"--- {name} ---", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        began = time.monotonic()
        command = [sys.executable, "-m", "pytest", *arguments, f"--junitxml={report}"]
        code = subprocess.run(command, env=environment, check=False).returncode
        seconds = time.monotonic() - began
        counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
        if report.is_file():  # pytest that was killed, or refused its arguments, writes none
            for suite in ElementTree.parse(report).iter("testsuite"):
                counts = {key: count + int(suite.get(key, 0)) for key, count in counts.items()}
    return Part(name, code, seconds, counts["tests"], counts["failures"] + counts["errors"], counts["skipped"])


def main(arguments: list[str]) -> int:
    """Both parts; the first argument is the number of processes, the others are for pytest."""
    jobs, *rest = arguments or ["2"]
    chosen = marks(Path.cwd())
    # One thread for each process: two processes of two threads on two cores wait for each other.
    shared = {"OMP_NUM_THREADS": "1", **os.environ}
    side_by_side = ("-n", jobs, "--dist", "loadfile", "-m", f"{chosen} and not alone")
    parts = [
        run(f"on {jobs} cores", *side_by_side, *rest, environment=shared),
        run("alone", "-m", f"{chosen} and alone", *rest, environment=dict(os.environ)),
    ]
    total = [sum(getattr(part, key) for part in parts) for key in ("passed", "failures", "skipped", "seconds")]
    print("--- {:.0f} passed, {:.0f} failed, {:.0f} skipped or expected to fail in {:.0f} s ---".format(*total))
    for part in parts:
        ended = "" if part.code in (0, 1) else f"; pytest ended with code {part.code}"
        print(f"{part.name}: {part.passed} passed, {part.failures} failed in {part.seconds:.0f} s{ended}")
    return int(any(part.code for part in parts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
