"""Writes `docs/cli.md`: the `--help` of every command, from the commands themselves.

    python docs/make_cli_reference.py            write the page
    python docs/make_cli_reference.py --check    exit with 1 where the page is out of date; write nothing

Nothing is listed here by hand but the four programs: a new command is on the page when the script is run again.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click

PAGE = Path(__file__).parent / "cli.md"
MEND = "python docs/make_cli_reference.py"
PROGRAMS = {
    "almost-eval": "almost_eval.cli.main:cli",
    "almost-train": "almost_train.cli.main:cli",
    "almost-serve": "serving.cli.main:cli",
    "almost-chat": "serving.cli.chat:chat",
}
"""Program -> where its click command is."""
WIDTH = 100
"""Columns of a help text."""
HEAD = f"""# Command-line reference

Every command and option, as `--help` shows them. This page is made by `{MEND}`: change the commands, not the page.
"""


def load(program: str) -> click.Command:
    """The click command of a program."""
    module, _, name = PROGRAMS[program].partition(":")
    found: click.Command = getattr(import_module(module), name)
    return found


def walk(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[click.Context]:
    """A context for a command and, in the order of its help, for all below it."""
    settings = {**command.context_settings, "terminal_width": WIDTH, "max_content_width": WIDTH}
    context = click.Context(command, info_name=name, parent=parent, **settings)
    yield context
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            if found is not None and not found.hidden:
                yield from walk(found, below, context)


def contexts() -> list[click.Context]:
    """All commands of all programs."""
    return [context for program in PROGRAMS for context in walk(load(program), program)]


def reference() -> str:
    """The page."""
    found = contexts()
    links = []
    for context in found:
        path = context.command_path
        indent = "  " * path.count(" ")
        links.append(f"{indent}- [`{path}`](#{path.replace(' ', '-')}): {context.command.get_short_help_str(200)}")
    parts = [HEAD, "\n".join(links) + "\n"]
    for context in found:
        depth = 2 + context.command_path.count(" ")
        # click indents by its own columns and leaves blanks at the ends of lines.
        text = re.sub(r"[ \t]+$", "", context.get_help(), flags=re.MULTILINE).strip("\n")
        parts.append(f"{'#' * depth} {context.command_path}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def main(arguments: list[str]) -> int:
    """Write the page, or say whether it is out of date."""
    text = reference()
    if arguments == ["--check"]:
        if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
            return 0
        print(f"{PAGE.name} is out of date; mend it with: {MEND}", file=sys.stderr)
        return 1
    if arguments:
        print(f"usage: {MEND} [--check]", file=sys.stderr)
        return 2
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
