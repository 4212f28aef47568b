"""What a page of documentation shows, held against the programs and the files: for the tests of README and `docs/`."""

from __future__ import annotations

import re
import runpy
import shlex
from functools import cache
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
_REFERENCE = runpy.run_path(str(ROOT / "docs" / "make_cli_reference.py"))
PROGRAMS: dict[str, str] = _REFERENCE["PROGRAMS"]
"""Program -> where its click command is."""


@cache
def contexts() -> dict[str, click.Context]:
    """`almost-eval judge report` -> its context, for every command. As the reference makes them, with their parents:
    click keeps the help option of the first context that asks a command for its options.
    """
    return {context.command_path: context for context in _REFERENCE["contexts"]()}


_LINE = re.compile(
    rf"^(?:\$ )?(?:({'|'.join(PROGRAMS)})|accelerate launch .*?-m (almost_train)\.cli) (.+)$", flags=re.MULTILINE
)
_SHELL = ("", "sh", "console")


def shown(page: str) -> list[tuple[str, str]]:
    """(program, its arguments) of every command in the page's code blocks; a closing backslash goes on."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r" *\\\n +", " ", "\n".join(block for language, block in blocks if language in _SHELL))
    return [(program or "almost-train", line) for program, _, line in _LINE.findall(text)]


def options_of(context: click.Context) -> set[str]:
    """Every way to write an option of a command."""
    own = context.command.get_params(context)
    return {name for param in own if isinstance(param, click.Option) for name in (*param.opts, *param.secondary_opts)}


def check_command(program: str, line: str) -> None:
    """Assert that the command exists and takes the options and as many arguments as the line gives it."""
    words, path = shlex.split(line, comments=True), program
    while words and f"{path} {words[0]}" in contexts():
        path = f"{path} {words.pop(0)}"
    context = contexts()[path]
    command = context.command
    assert not isinstance(command, click.Group) or words == ["--help"], f"no such command: {program} {line}"
    try:
        # The parser alone: nothing is run, and no value is looked at.
        _, left, _ = command.make_parser(context).parse_args(words)
    except click.UsageError as error:
        raise AssertionError(f"{program} {line}: {error.format_message()}") from None
    assert not left, f"{program} {line}: takes no {left}"


def check_links(page: str, folder: Path) -> None:
    """Assert that every relative link leads to a file, and to a heading where it names one."""
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page):
        path, _, anchor = target.partition("#")
        file = folder / path if path else None
        assert file is None or file.exists(), target
        if anchor:
            text = page if file is None else file.read_text(encoding="utf-8")
            headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target
