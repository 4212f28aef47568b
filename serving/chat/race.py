"""What the first tab shows, as HTML: two answers with their rewards, and a race of candidates with its winner."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from serving.chat.render import badge, markdown
from serving.chat.session import Step

FACTS = '<div class="facts">'


def side_html(title: str, about: str, step: Step | None, *, idle: bool = False) -> str:
    """One of the two answers.

    Args:
        title: what the side is.
        about: the model behind it.
        step: how far its answer is; None before its first word.
        idle: whether nothing has been asked yet.
    """
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
