"""What the page shows, as HTML. What a model or a visitor wrote is text and can do nothing, whatever it looks like.

Answers are Markdown without HTML and without images: markdown-it writes every tag itself, escapes all text, and
refuses `javascript:`, `data:` and their like in links. An image would fetch from whatever address an answer names.
Formulas and code leave here as text; the page's script (`assets/rich.js`) sets and colours them. Questions are plain
text. The page's Content-Security-Policy forbids the same things once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from html import escape
from typing import TYPE_CHECKING

from serving.chat.conversation import ChatCandidate, ChatReply, Conversation, Turn
from serving.chat.maths import with_maths
from serving.chat.scale import GOOD, POOR
from serving.chat.session import Step

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.renderer import RendererHTML
    from markdown_it.token import Token
    from markdown_it.utils import EnvType, OptionsDict

    from almost_eval.arena.report import Board
    from almost_eval.types import Metric

_ENDINGS = {"length": "cut at the token limit", "stopped": "stopped", "broken": "broken off"}


@cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    parser = (
        MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"]).disable("image")
    )

    def link(self: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType) -> str:
        tokens[index].attrSet("target", "_blank")
        tokens[index].attrSet("rel", "noopener noreferrer nofollow")
        return str(self.renderToken(tokens, index, options, env))

    parser.add_render_rule("link_open", link)
    return with_maths(parser)


def markdown(text: str) -> str:
    """An answer as HTML."""
    return str(_parser().render(text))


def number(reward: float) -> str:
    """A reward as it is shown: sign and two decimals, a real minus."""
    return f"{reward:+.2f}".replace("-", "\u2212")


def badge(reward: float | None, percentile: float | None = None) -> str:
    """A reward as a small badge; nothing where there is none.

    Its colour comes from the percentile among known answers: without one the badge is grey, as a raw logit by itself
    says nothing.
    """
    if reward is None:
        return ""
    if percentile is None:
        title = "The raw logit of the reward model. It has no scale for this question: only differences mean something"
        return f'<span class="badge" title="{title}"><i>reward</i> {number(reward)}</span>'
    tone = "good" if percentile >= GOOD else "poor" if percentile < POOR else "middle"
    title = (
        f"The reward {number(reward)} is higher than that of {percentile:.0f} % of answers known to be good or bad, "
        "half of each: bad ones are at the left, good ones at the right"
    )
    return (
        f'<span class="badge {tone}" title="{title}"><i>reward</i> {number(reward)}'
        f'<span class="scale" aria-hidden="true"><span style="left:{percentile:.0f}%"></span></span>'
        f"<i>{_ordinal(round(percentile))} percentile</i></span>"
    )


def _ordinal(number: int) -> str:
    ending = "th" if number // 10 % 10 == 1 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def reply_html(reply: ChatReply, *, live: bool = False, actions: str = "") -> str:
    """An answer, and under it what is known of it and what can be done with it."""
    body = f'<div class="md">{markdown(reply.text)}</div>' if reply.text else ""
    if live:
        return body + '<span class="caret" aria-hidden="true"></span>'
    foot = f'<div class="facts">{badge(reply.reward, reply.percentile)}{facts(reply)}{actions}</div>'
    return body + candidates_html(reply.candidates) + foot


def facts(reply: ChatReply) -> str:
    """Speed and ending."""
    parts = []
    if reply.ending in _ENDINGS:
        parts.append(_ENDINGS[reply.ending])
    if reply.candidates:
        parts.append(f"best of {len(reply.candidates)}")
    if reply.tokens and reply.seconds:
        parts.append(f"{reply.tokens / reply.seconds:.0f} tokens/s")
    elif reply.seconds:
        parts.append(f"{reply.seconds:.1f} s")
    return "".join(f"<span>{escape(part)}</span>" for part in parts)


def candidates_html(candidates: Sequence[ChatCandidate]) -> str:
    """All candidates, best first, each of which can be opened."""
    if not candidates:
        return ""
    ranked = sorted(candidates, key=lambda one: (one.reward is None, -(one.reward or 0.0)))
    known = [one.reward for one in ranked if one.reward is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    rows = []
    for place, one in enumerate(ranked, 1):
        share = 100 if high == low or one.reward is None else round(100 * (one.reward - low) / (high - low))
        reward = "unscored" if one.reward is None else number(one.reward)
        first = " ".join(one.text.split())
        rows.append(
            f'<details class="candidate{" chosen" if one.chosen else ""}"><summary>'
            f'<b>{place}</b><span class="score">{reward}</span>'
            f'<span class="bar"><span style="width:{max(share, 2)}%"></span></span>'
            f'<span class="first">{escape(first[:160])}</span></summary>'
            f'<div class="md">{markdown(one.text)}</div></details>'
        )
    return (
        f'<details class="candidates"><summary>{len(ranked)} candidates</summary>'
        f'<div class="list">{"".join(rows)}</div></details>'
    )


def turn_html(turn: Turn, index: int, *, last: bool, shown: bool, live: bool = False, editing: bool = False) -> str:
    """One question and its answer, with their buttons."""
    note = "" if shown else '<p class="aside">Not shown to the model any more</p>'
    ask = (
        f'<article class="turn user{" editing" if editing else ""}"><header><h3>You</h3><div class="actions">'
        f"{_button('edit', index, 'Edit', 'Edit this message and ask again')}</div></header>"
        f'<div class="text">{escape(turn.user)}</div></article>'
    )
    if live:
        return note + ask
    if turn.reply is None:
        retry = _button("retry", index, "Retry", "Ask again") if last else ""
        return f'{note}{ask}<article class="turn open"><p class="aside">No answer yet</p>{retry}</article>'
    again = _button("retry", index, "Retry", "Draw another answer") if last else ""
    copy = (
        f'<button type="button" data-copy="{escape(turn.reply.text, quote=True)}" '
        'aria-label="Copy this answer">Copy</button>'
    )
    body = reply_html(turn.reply, actions=f'<div class="actions">{copy}{again}</div>')
    return f'{note}{ask}<article class="turn model"><h3>{escape(turn.reply.model or "Model")}</h3>{body}</article>'


def past_html(conversation: Conversation, *, live: bool = False, editing: int | None = None) -> str:
    """All turns; with `live` the last question stands without its answer, which is being written elsewhere."""
    count = len(conversation.turns)
    return "".join(
        turn_html(
            turn,
            i,
            last=i == count - 1,
            shown=i >= conversation.dropped,
            live=live and i == count - 1,
            editing=i == editing,
        )
        for i, turn in enumerate(conversation.turns)
    )


def live_html(name: str, text: str, *, waiting: str = "Thinking") -> str:
    """The answer that is being written."""
    body = reply_html(ChatReply(text), live=True) if text else f'<p class="aside pulse">{escape(waiting)}</p>'
    return f'<article class="turn model live"><h3>{escape(name)}</h3>{body}</article>'


def notice_html(sentence: str, kind: str = "error") -> str:
    """A sentence for the visitor; nothing for an empty one."""
    role = "alert" if kind == "error" else "status"
    return f'<div class="notice {kind}" role="{role}">{escape(sentence)}</div>' if sentence else ""


def panel_html(reply: ChatReply | None, *, live: bool, note: str = "") -> str:
    """One side of a comparison."""
    if reply is None:
        body = f'<p class="aside">{escape(note)}</p>' if note else ""
    elif live and not reply.text:
        body = '<p class="aside pulse">Thinking</p>'
    else:
        body = reply_html(reply, live=live)
    return f'<article class="panel">{body}</article>'


def _button(action: str, index: int, label: str, title: str) -> str:
    return f'<button type="button" data-act="{action}" data-turn="{index}" title="{title}">{label}</button>'


# --- the first tab: two answers with their rewards, and a race of candidates with its winner

FACTS = '<div class="facts">'


def side_html(title: str, about: str, step: Step | None, *, idle: bool = False) -> str:
    """One of the two answers, by the model `about`; `step` is None before its first word, `idle` before a question."""
    head = f'<header><h3>{escape(title)}</h3><span class="aside">{escape(about)}</span></header>'
    return f'<article class="panel side">{head}{_answer(step, idle=idle)}</article>'


def _answer(step: Step | None, *, idle: bool) -> str:
    if idle:
        return '<p class="aside">The answer appears here</p>'
    if step is None or not (step.reply.text or step.done):
        return '<p class="aside pulse">Thinking</p>'
    caret = "" if step.done else '<span class="caret" aria-hidden="true"></span>'
    text = f'<div class="md{"" if step.done else " live"}">{markdown(step.reply.text)}</div>{caret}'
    return text + f"{FACTS}{_verdict(step)}</div>"


def _verdict(step: Step) -> str:
    if not step.done:
        return ""
    if step.error is not None:
        return "<span>no answer</span>"
    return badge(step.reply.reward, step.reply.percentile) + (
        "<span>stopped</span>" if step.reply.ending == "stopped" else ""
    )


def race_html(steps: Sequence[Step | None], before: str, *, idle: bool = False) -> str:
    """All candidates as they grow; once all have a reward, the winner is lifted out and the others step back."""
    winner = None if idle else winner_of(steps)
    head = f"<header><h3>Best of {len(steps)}</h3>" + (
        f'<span class="aside">{escape(before)} answers {len(steps)} times, and the reward model picks one: better '
        "answers from the same model, with no training.</span></header>"
    )
    if idle:
        return f'<section class="race idle">{head}</section>'
    lanes = "".join(_lane(steps, place, winner) for place in range(len(steps)))
    state = "done" if winner is not None else "running"
    return f'<section class="race {state}">{head}<div class="lanes">{lanes}</div></section>'


def winner_of(steps: Sequence[Step | None]) -> int | None:
    """The candidate with the highest reward, the first of equal ones; None until all are done, or without rewards."""
    if not all(step and step.done for step in steps):
        return None
    rewards = {place: step.reply.reward for place, step in enumerate(steps) if step}
    scored = {place: reward for place, reward in rewards.items() if reward is not None}
    return max(scored, key=lambda place: (scored[place], -place)) if scored else None


def _lane(steps: Sequence[Step | None], place: int, winner: int | None) -> str:
    step = steps[place]
    if place == winner:
        assert step is not None
        known = step.reply.percentile is not None  # without a scale the highest reward may stand beside nonsense
        kind, crown = (" winner", "Picked by the reward model") if known else (" leader", "The highest reward")
        mark = f'<span class="crown">{crown}</span>'
    else:
        kind, mark = " beaten" if winner is not None else "", ""
    same = _repeats(steps, place)
    answer = _answer(step, idle=False)
    if same is not None and place != winner:
        answer = f"{answer.partition(FACTS)[0]}{FACTS}<span>the same words as {same + 1}</span></div>"
    return f'<article class="lane{kind}"><b aria-hidden="true">{place + 1}</b>{mark}{answer}</article>'


def _repeats(steps: Sequence[Step | None], place: int) -> int | None:
    """An earlier candidate that has said the same, once both are done."""
    step = steps[place]
    if step is None or not step.done or not step.reply.text:
        return None
    earlier = enumerate(steps[:place])
    return next((i for i, one in earlier if one and one.done and one.reply.text == step.reply.text), None)


# --- the arena's board

EMPTY = "No vote yet: the first one opens the board."


def board_html(board: Board) -> str:
    """The board, the best system first."""
    if not board.rates:
        return f'<section class="board"><h3>Board</h3><p class="aside">{EMPTY}{_marked(board.named)}</p></section>'
    rows = "".join(_row(place, name, rate) for place, (name, rate) in enumerate(board.rates.items(), 1))
    people = "one voter; the intervals take the votes as independent"
    if board.sessions > 1:
        people = f"{board.sessions} voters; intervals are clustered by voter"
    votes = "1 vote" if board.votes == 1 else f"{board.votes} votes"
    return (
        '<section class="board"><h3>Board</h3><table><thead><tr><th scope="col"><span class="hidden">Place</span></th>'
        '<th scope="col">System</th><th scope="col">Win rate, 95 % interval</th>'
        f'<th scope="col" class="figure">Rounds</th></tr></thead><tbody>{rows}</tbody></table>'
        f'<p class="aside">{votes} by {people}. A tie, and both bad, are half a win for each.{_marked(board.named)}</p>'
        "</section>"
    )


def _row(place: int, name: str, rate: Metric) -> str:
    assert rate.value is not None
    interval, whisker = "one vote: no interval", ""
    if rate.ci95 is not None:
        low, high = (100 * end for end in rate.ci95)
        whisker = f'<span class="whisker" style="left:{low:.1f}%;width:{max(high - low, 0.5):.1f}%"></span>'
        interval = f"[{low:.0f}, {high:.0f}]"
    return (
        f'<tr><td class="figure">{place}</td><th scope="row">{escape(name)}</th><td><div class="rate">'
        f'<span class="track" aria-hidden="true"><span class="half"></span>{whisker}'
        f'<span class="dot" style="left:{100 * rate.value:.1f}%"></span></span>'
        f'<b>{100 * rate.value:.0f} %</b> <span class="interval">{interval}</span></div></td>'
        f'<td class="figure">{rate.n}</td></tr>'
    )


def _marked(count: int) -> str:
    if not count:
        return ""
    what = "1 vote more is" if count == 1 else f"{count} votes more are"
    return f" {what} kept and not counted, as a system named itself."
