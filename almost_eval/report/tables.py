"""Tables in a terminal: how they look, and how figures are written in them. A name from outside is a `Text`.

`console` stands by itself: a run enters few files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

METRIC = ("value", "95 % interval", "n", "unscored")
"""Headings of a metric."""


def titled(title: str, texts: Iterable[str | Text], numbers: Iterable[str | Text] = ()) -> Table:
    """An empty table with columns of texts, then of numbers."""
    table = Table(title=Text(title), title_justify="left", title_style="bold")
    for heading in texts:
        table.add_column(heading)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def text_of(value: float | None, form: str = ".1%") -> str:
    """A figure; a dash where there is none."""
    return "-" if value is None else f"{value:{form}}"


def span_of(ends: Sequence[float] | None, form: str = ".1%", scale: float = 1) -> str:
    """An interval."""
    return " to ".join(f"{scale * end:{form}}" for end in ends) if ends else "-"
