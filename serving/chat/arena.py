"""A blind round: two systems in random order, whose names the page gets after the vote.

Before the vote the page gets two texts and the letters A and B. The round with the names stays in the server's memory.
Errors are told without an address or a name.
"""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from almost_eval.arena.votes import VOTES, Vote, VoteStore
from almost_eval.types import JSONObject
from serving.chat.client import EndpointError, Kind
from serving.chat.conversation import ChatReply, Conversation, Settings
from serving.chat.session import ChatSystem

SENTENCES: dict[Kind, str] = {
    "context_full": "The question is too long for one of the two systems",
    "loading": "One of the two systems is still loading",
    "busy": "One of the two systems is busy",
}
"""What may be said of a failure without telling whose it is."""


@dataclass(frozen=True, slots=True)
class Round:
    """One question, two systems, their answers. Never leaves the server."""

    id: str
    prompt: str
    source: str
    systems: tuple[str, str]
    """(A, B)."""
    settings: JSONObject
    replies: tuple[ChatReply, ChatReply] | None = None
    vote: str | None = None

    @property
    def votable(self) -> bool:
        """Whether both answers are whole and nobody has voted."""
        return self.replies is not None and self.vote is None


@dataclass(slots=True)
class Arena:
    """Draws rounds and stores votes.

    Args:
        systems: two or more.
        store: where votes go.
        settings: how every answer is drawn, the same for all.
        seed: of the shuffling; None draws one, which is stored with every vote.
    """

    systems: Sequence[ChatSystem]
    store: VoteStore
    settings: Settings
    seed: int | None = None
    _random: random.Random = field(init=False, repr=False)
    _lock: threading.Lock = field(init=False, repr=False, default_factory=threading.Lock)
    _rounds: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.seed = random.SystemRandom().getrandbits(48) if self.seed is None else self.seed
        self._random = random.Random(self.seed)

    def begin(self, prompt: str, source: str) -> Round:
        """A round: two systems, in an order that only the seed decides."""
        with self._lock:
            first, second = self._random.sample(range(len(self.systems)), 2)
            self._rounds += 1
            number = self._rounds
        settings = {
            "system": self.settings.system,
            "temperature": self.settings.temperature,
            "top_p": self.settings.top_p,
            "max_tokens": self.settings.max_tokens,
            "seed": self.seed,
            "round": number,
        }
        names = (self.systems[first].name, self.systems[second].name)
        return Round(uuid.uuid4().hex, prompt, source, names, settings)

    def messages(self, prompt: str) -> list[dict[str, str]]:
        """What both systems are sent."""
        return Conversation().ask(prompt).messages(self.settings.system)

    def vote(self, round_: Round, session: str, vote: str) -> Round:
        """Store the vote; when this returns it is on disk.

        Raises:
            InputError: the round has a vote already.
            RunError: it could not be stored.
        """
        assert round_.replies is not None
        assert vote in VOTES
        a, b = round_.replies
        self.store.append(
            Vote(
                id=round_.id,
                session=session,
                prompt=tuple(self.messages(round_.prompt)),
                source=round_.source,
                system_a=round_.systems[0],
                system_b=round_.systems[1],
                text_a=a.text,
                text_b=b.text,
                vote=vote,
                reward_a=a.reward,
                reward_b=b.reward,
                settings=round_.settings,
            )
        )
        return replace(round_, vote=vote)


def sentence(error: EndpointError) -> str:
    """Why a round is void, without saying whose fault it was."""
    return f"{SENTENCES.get(error.kind, 'One of the two systems did not answer')}: this round does not count."
