"""Conversations as HTML. What a model or a visitor wrote is shown as text and can do nothing, whatever it looks like.

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

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.renderer import RendererHTML
    from markdown_it.token import Token
    from markdown_it.utils import EnvType, OptionsDict

_ENDINGS = {
    "length": "cut at the token limit",
    "stopped": "stopped",
    "broken": "broken off",
}


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
    """All turns; with `live` the last question stands without its answer, which is being written elsewhere.

    Args:
        conversation: what was said.
        live: whether the last answer is being written.
        editing: the turn whose question is being edited.
    """
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


def panel_html(reply: ChatReply | None, *, live: bool, heading: str = "", note: str = "") -> str:
    """One side of a comparison."""
    if reply is None:
        body = f'<p class="aside">{escape(note)}</p>' if note else ""
    elif live and not reply.text:
        body = '<p class="aside pulse">Thinking</p>'
    else:
        body = reply_html(reply, live=live)
    title = f"<h3>{escape(heading)}</h3>" if heading else ""
    return f'<article class="panel">{title}{body}</article>'


def _button(action: str, index: int, label: str, title: str) -> str:
    return f'<button type="button" data-act="{action}" data-turn="{index}" title="{title}">{label}</button>'
