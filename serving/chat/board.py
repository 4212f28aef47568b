"""The arena's board as HTML: how often each system wins, with its interval, after every vote."""

from __future__ import annotations

from html import escape

from almost_eval.arena.report import Board
from almost_eval.types import Metric

EMPTY = "No vote yet: the first one opens the board."


def board_html(board: Board) -> str:
    """The board, the best system first."""
    if not board.rates:
        return f'<section class="board"><h3>Board</h3><p class="aside">{EMPTY}{_named(board.named)}</p></section>'
    rows = "".join(_row(place, name, rate) for place, (name, rate) in enumerate(board.rates.items(), 1))
    people = (
        f"{board.sessions} voters; intervals are clustered by voter"
        if board.sessions > 1
        else ("one voter; the intervals take the votes as independent")
    )
    votes = "1 vote" if board.votes == 1 else f"{board.votes} votes"
    return (
        '<section class="board"><h3>Board</h3><table><thead><tr><th scope="col"><span class="hidden">Place</span></th>'
        '<th scope="col">System</th><th scope="col">Win rate, 95 % interval</th>'
        f'<th scope="col" class="figure">Rounds</th></tr></thead><tbody>{rows}</tbody></table>'
        f'<p class="aside">{votes} by {people}. A tie, and both bad, are half a win for each.{_named(board.named)}</p>'
        "</section>"
    )


def _row(place: int, name: str, rate: Metric) -> str:
    assert rate.value is not None
    share, interval = f"{100 * rate.value:.0f} %", ""
    whisker = ""
    if rate.ci95 is not None:
        low, high = (100 * end for end in rate.ci95)
        whisker = f'<span class="whisker" style="left:{low:.1f}%;width:{max(high - low, 0.5):.1f}%"></span>'
        interval = f"[{low:.0f}, {high:.0f}]"
    return (
        f'<tr><td class="figure">{place}</td><th scope="row">{escape(name)}</th><td><div class="rate">'
        f'<span class="track" aria-hidden="true"><span class="half"></span>{whisker}'
        f'<span class="dot" style="left:{100 * rate.value:.1f}%"></span></span>'
        f'<b>{share}</b> <span class="interval">{interval or "one vote: no interval"}</span></div></td>'
        f'<td class="figure">{rate.n}</td></tr>'
    )


def _named(count: int) -> str:
    if not count:
        return ""
    what = "1 vote more is" if count == 1 else f"{count} votes more are"
    return f" {what} kept and not counted, as a system named itself."
