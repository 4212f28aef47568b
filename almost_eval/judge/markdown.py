"""How much markdown an answer holds: headers, list items and bold passages, counted outside code.

What counts is that of arena-hard-auto (`utils/add_markdown_info.py`): a line that begins with one to six `#` and a
blank, a line that begins with `1.` or one of `-*+` and a blank, and a passage between `**` or `__` on one line. There
are three departures. A fenced block may be opened by `~~~` too and, as in CommonMark, runs to the end where nothing
closes it. Code in backticks within a line is left out (`__init__` is not bold there). `1)` begins a list item as `1.`
does. Code that is marked by indentation alone is not told from a nested list, and is not left out.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class MarkdownCounts(NamedTuple):
    """Markdown of one text."""

    headers: int
    lists: int
    """List items, of any depth."""
    bold: int
    """Bold passages."""


_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_INLINE_CODE = re.compile(r"(`+)[^`\n]+\1(?!`)")
_HEADER = re.compile(r"^ {0,3}#{1,6}[ \t]", re.MULTILINE)
_LIST = re.compile(r"^[ \t]*(?:[-*+]|\d{1,9}[.)])[ \t]", re.MULTILINE)
_BOLD = re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__")


def count_markdown(text: str) -> MarkdownCounts:
    """The counts of a text, as it was judged."""
    prose = _INLINE_CODE.sub("", without_code_blocks(text))
    return MarkdownCounts(*(sum(1 for _ in pattern.finditer(prose)) for pattern in (_HEADER, _LIST, _BOLD)))


def without_code_blocks(text: str) -> str:
    """The lines that stand in no fenced block."""
    kept, fence = [], ""
    for line in text.split("\n"):
        opening = _FENCE.match(line)
        if not fence:
            if opening:
                fence = opening[1]
            else:
                kept.append(line)
        elif opening and opening[1].startswith(fence) and not line[opening.end() :].strip():
            fence = ""
    return "\n".join(kept)
