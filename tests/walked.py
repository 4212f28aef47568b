"""Runs a command line and prints which files of the packages it enters: `python walked.py PROGRAM ARGUMENTS...`.

A file counts where one of its functions runs. What runs while a module is being imported does not count: class bodies,
tables, decorators. The last line of stdout is JSON: a list of {file, caller}, in the order the files are entered;
`caller` is the file whose function called first.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = tuple(f"{ROOT / package}/" for package in ("almost_eval", "almost_train", "serving"))
entered: dict[str, str | None] = {}
"""File -> the file that called into it first."""


def enter(frame: FrameType, event: str, _: object) -> None:
    """A trace function: note the file of a call. It gives back None: the lines of the call are not traced."""
    code = frame.f_code
    if event != "call" or code.co_filename in entered or not code.co_filename.startswith(PACKAGES):
        return
    caller, at = None, frame
    while at is not None:
        if at.f_code.co_filename.startswith(PACKAGES):
            if at.f_code.co_name == "<module>":
                return
            if caller is None and at is not frame:
                caller = at.f_code.co_filename
        at = at.f_back  # type: ignore[assignment]
    entered[code.co_filename] = caller


def main() -> None:
    """Run the command line, whatever its end, and print the files."""
    sys.path[0] = str(ROOT)  # this file's own folder holds folders of the packages' names
    package = sys.argv[1].replace("-", "_")
    import torch  # noqa: F401  # as below: millions of calls, none of them in a file of ours

    from almost_eval.cli.command_line import import_transformers

    import_transformers()
    program = importlib.import_module(f"{package}.cli.main")
    sys.argv = sys.argv[1:]
    code: str | int | None = 0
    sys.settrace(enter)
    try:
        program.main()
    except SystemExit as error:
        code = error.code
    finally:
        sys.settrace(None)
    rows = [{"file": _name(file), "caller": caller and _name(caller)} for file, caller in entered.items()]
    print(json.dumps(rows))
    sys.exit(code)


def _name(file: str) -> str:
    return Path(file).relative_to(ROOT).as_posix()


if __name__ == "__main__":
    main()
