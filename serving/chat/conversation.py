"""A conversation as a frozen value: every change makes a new one, so no visitor's page can change another's.

It comes back from the visitor's own browser after a reload, so it is checked like any other input.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from dataclasses import asdict, dataclass, field, replace

from almost_eval.types import JSONObject
from serving.gateway.events import joined

MAX_TURNS = 400
MAX_CHARACTERS = 200_000
"""Of one message."""
MAX_QUESTION = 10_000
"""Characters of a question to several systems at once."""
_MOST = 1e15
"""Of a figure that a browser sends: what no count, time or reward reaches, and what any arithmetic stands."""
ID = re.compile(r"[0-9a-f]{16}")
"""A conversation's own number."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How answers are drawn; of one visitor."""

    system: str = ""
    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 256
    best_of: int = 1

    @classmethod
    def checked(
        cls, system: object, temperature: object, top_p: object, max_tokens: object, best_of: object, *, most: int = 64
    ) -> Settings:
        """Settings from a browser: anything out of range, or no number, becomes the nearest that works."""
        base = cls()
        return cls(
            joined(str(system or ""))[:MAX_CHARACTERS],
            _within(temperature, 0.0, 2.0, base.temperature),
            _within(top_p, 0.01, 1.0, base.top_p),
            int(_within(max_tokens, 1, 8192, base.max_tokens)),
            int(_within(best_of, 1, max(1, most), 1)),
        )

    @classmethod
    def read(cls, record: object, defaults: Settings) -> Settings:
        """Settings as a browser kept them, by name; the defaults where they are anything else."""
        if not isinstance(record, dict) or not record.keys() <= asdict(defaults).keys():
            return defaults
        return cls.checked(**asdict(defaults) | record)


@dataclass(frozen=True, slots=True)
class ChatCandidate:
    """One of the answers drawn for best-of-N."""

    text: str
    reward: float | None
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class ChatReply:
    """An answer, and what is known of it."""

    text: str
    model: str = ""
    reward: float | None = None
    """Raw logit of the reward model."""
    candidates: tuple[ChatCandidate, ...] = ()
    """All that were drawn, this answer included; empty without best-of-N."""
    tokens: int | None = None
    """As the endpoint counts them, all candidates together."""
    seconds: float | None = None
    """From the request to the last token."""
    ending: str = "stop"
    """`stop`, `length` (out of tokens), `stopped` (by the visitor) or `broken` (by an error)."""
    percentile: float | None = None
    """Share of known answers with a lower reward, 0 to 100; None where there is no such scale."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer, if there is one yet."""

    user: str
    reply: ChatReply | None = None


def _new_id() -> str:
    return secrets.token_hex(8)


@dataclass(frozen=True, slots=True)
class Conversation:
    """The turns, oldest first."""

    turns: tuple[Turn, ...] = ()
    dropped: int = 0
    """Turns at the beginning that the model is no longer shown: the context was full."""
    id: str = field(default_factory=_new_id, compare=False)
    """Random; the name that it is kept under. What is made of a conversation keeps it; "" until the first question."""

    @property
    def open(self) -> bool:
        """Whether the last question waits for an answer."""
        return bool(self.turns) and self.turns[-1].reply is None

    def ask(self, text: str) -> Conversation:
        """One more question."""
        if len(self.turns) >= MAX_TURNS:
            return self
        return replace(self, turns=(*self.turns, Turn(joined(text)[:MAX_CHARACTERS])), id=self.id or _new_id())

    def answer(self, reply: ChatReply) -> Conversation:
        """The last question answered."""
        return replace(self, turns=(*self.turns[:-1], replace(self.turns[-1], reply=reply)))

    def reopen(self, number: int, text: str | None = None) -> Conversation:
        """Turn `number` without its answer, its question replaced by `text` where that is set; later turns are gone."""
        if not 0 <= number < len(self.turns):
            return self
        question = self.turns[number].user if text is None else joined(text)[:MAX_CHARACTERS]
        return replace(self, turns=(*self.turns[:number], Turn(question)), dropped=min(self.dropped, number))

    def undo(self) -> tuple[Conversation, str]:
        """Without the last turn, and that turn's question."""
        if not self.turns:
            return self, ""
        left = self.turns[:-1]
        return replace(self, turns=left, dropped=min(self.dropped, len(left))), self.turns[-1].user

    def drop_oldest(self, count: int = 1) -> Conversation:
        """Show the model `count` turns fewer; the last question always stays."""
        return replace(self, dropped=min(self.dropped + count, max(0, len(self.turns) - 1)))

    def messages(self, system: str, *, all_turns: bool = False) -> list[dict[str, str]]:
        """OpenAI's form: what the model is shown, or with `all_turns` everything."""
        messages = [{"role": "system", "content": system}] if system.strip() else []
        for turn in self.turns[0 if all_turns else self.dropped :]:
            messages.append({"role": "user", "content": turn.user})
            if turn.reply is not None and turn.reply.text:
                messages.append({"role": "assistant", "content": turn.reply.text})
        return messages

    def jsonl(self, system: str) -> str:
        """One line of an SFT data set in the `messages` form: up to the last answer; empty without any."""
        answered = [turn for turn in self.turns if turn.reply is not None and turn.reply.text]
        if not answered:
            return ""
        messages = Conversation(tuple(answered)).messages(system, all_turns=True)
        return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"

    def text(self) -> str:
        """Plain text, to paste somewhere."""
        parts = []
        for turn in self.turns:
            parts.append(f"Human: {turn.user}")
            if turn.reply is not None and turn.reply.text:
                parts.append(f"Assistant: {turn.reply.text}")
        return "\n\n".join(parts)

    def to_dict(self) -> JSONObject:
        """JSON, for the visitor's browser to keep."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: object) -> Conversation:
        """The inverse; what cannot be read is an empty conversation."""
        try:
            return _read(value) if isinstance(value, dict) else cls()
        except (TypeError, ValueError, KeyError, AttributeError, IndexError):
            return cls()


def _read(value: JSONObject) -> Conversation:
    turns = []
    for turn in value["turns"][:MAX_TURNS]:
        reply = turn.get("reply")
        turns.append(Turn(_text(turn["user"]), None if reply is None else _read_reply(reply)))
    if any(turn.reply is None for turn in turns[:-1]):
        raise ValueError("only the last question can be open")
    dropped = int(_number(value.get("dropped")) or 0)
    conversation = Conversation(tuple(turns), min(max(0, dropped), max(0, len(turns) - 1)))
    id = str(value.get("id", ""))
    return replace(conversation, id=id) if ID.fullmatch(id) else conversation


def _read_reply(reply: JSONObject) -> ChatReply:
    candidates = [
        ChatCandidate(_text(one["text"]), _number(one["reward"]), bool(one["chosen"]))
        for one in reply["candidates"][:64]
    ]
    tokens = _number(reply["tokens"])
    return ChatReply(
        _text(reply["text"]),
        _text(reply["model"])[:200],
        _number(reply["reward"]),
        tuple(candidates),
        None if tokens is None else int(tokens),
        _number(reply["seconds"]),
        _text(reply["ending"])[:20],
        _number(reply.get("percentile")),  # conversations of earlier versions have none
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a text must be a string")
    return joined(value)[:MAX_CHARACTERS]


def _number(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _MOST:  # true of NaN, too
        raise TypeError("a figure must be a number")
    return value


def _within(value: object, low: float, high: float, default: float) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return default
    return min(max(number, low), high) if math.isfinite(number) else default


def too_long(text: str, most: int = MAX_CHARACTERS) -> str:
    """A sentence for whoever wrote more than `most` characters; nothing for others."""
    sentence = f"That is more than {most:,} characters, the most of one message here: shorten it."
    return sentence if len(text) > most else ""
