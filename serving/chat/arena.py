"""A blind round: two systems in random order, whose names the page gets after the vote.

Before the vote the page gets two texts and the letters A and B. The round with the names stays in the server's memory.
Errors are told without an address or a name. A round may have several turns; each side goes on with its own answers.
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
from serving.chat.names import names_itself
from serving.chat.session import ChatSystem

SENTENCES: dict[Kind, str] = {
    "context_full": "The question is too long for one of the two systems",
    "loading": "One of the two systems is still loading",
    "busy": "One of the two systems is busy",
}
"""What may be said of a failure without telling whose it is."""

SIDES = ("a", "b")
MAX_TURNS = 8
"""Of a round."""


@dataclass(frozen=True, slots=True)
class Round:
    """One question or several, two systems, their answers. Never leaves the server."""

    id: str
    questions: tuple[str, ...]
    source: str
    systems: tuple[str, str]
    """(A, B)."""
    settings: JSONObject
    replies: tuple[tuple[ChatReply, ChatReply], ...] = ()
    """(A's, B's) to each question so far."""
    named: str = ""
    """The sides that named their system: `a`, `b` or `ab`."""
    vote: str | None = None

    @property
    def votable(self) -> bool:
        """Whether all answers are whole and nobody has voted."""
        return bool(self.replies) and len(self.replies) == len(self.questions) and self.vote is None

    @property
    def goes_on(self) -> bool:
        """Whether one more question can be asked in it."""
        return self.votable and len(self.questions) < MAX_TURNS

    def ask(self, question: str) -> Round:
        """The next turn, not answered yet."""
        return replace(self, questions=(*self.questions, question))

    def take_back(self) -> Round | None:
        """Without the question that was not answered; None where it was the first: the round is void."""
        return replace(self, questions=self.questions[:-1]) if self.replies else None

    def answer(self, replies: tuple[ChatReply, ChatReply], systems: Sequence[str]) -> Round:
        """The last question answered by A and B; `systems` are all of the arena: an answer that says one is no blind
        answer.
        """
        naming = [side for side, reply in zip(SIDES, replies, strict=True) if names_itself(reply.text, systems)]
        named = "".join(side for side in SIDES if side in naming or side in self.named)
        return replace(self, replies=(*self.replies, replies), named=named)

    def messages(self, place: int, system: str) -> list[dict[str, str]]:
        """What the system at `place` is sent: all questions, and its own answers."""
        conversation = Conversation()
        for number, question in enumerate(self.questions):
            conversation = conversation.ask(question)
            if number < len(self.replies):
                conversation = conversation.answer(self.replies[number][place])
        return conversation.messages(system)


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

    @property
    def names(self) -> list[str]:
        """Of all systems."""
        return [system.name for system in self.systems]

    def begin(self, question: str, source: str) -> Round:
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
        return Round(uuid.uuid4().hex, (question,), source, names, settings)

    def vote(self, round_: Round, session: str, vote: str) -> Round:
        """Store the vote; when this returns it is on disk.

        Raises:
            InputError: the round has a vote already.
            RunError: it could not be stored.
        """
        assert round_.votable
        assert vote in VOTES
        a, b = round_.replies[-1]
        settings = dict(round_.settings)
        if len(round_.replies) > 1:
            settings["earlier"] = {
                side: [pair[place].text for pair in round_.replies[:-1]] for place, side in enumerate(SIDES)
            }
        if round_.named:
            settings["named"] = round_.named
        system = [{"role": "system", "content": self.settings.system}] if self.settings.system.strip() else []
        self.store.append(
            Vote(
                id=round_.id,
                session=session,
                prompt=(*system, *({"role": "user", "content": question} for question in round_.questions)),
                source=round_.source,
                system_a=round_.systems[0],
                system_b=round_.systems[1],
                text_a=a.text,
                text_b=b.text,
                vote=vote,
                reward_a=a.reward,
                reward_b=b.reward,
                settings=settings,
            )
        )
        return replace(round_, vote=vote)


def void_sentence(error: EndpointError) -> str:
    """Why a question is void, without saying whose fault it was."""
    return SENTENCES.get(error.kind, "One of the two systems did not answer")
