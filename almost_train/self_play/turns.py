"""The turns of self-play: completions are sampled and scored, and one is chosen. Each step is stored at once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from almost_eval.engines.base import GenerationEngine, LoglikelihoodEngine, SamplingParams
from almost_eval.errors import InputError
from almost_eval.files import Row
from almost_eval.models.chat import dialogue_text
from almost_eval.progress import Progress
from almost_eval.rewards.base import RewardModel
from almost_eval.types import Completion, Conversation, LoglikelihoodRequest, Message
from almost_train.common.config import MOST_SEED, option
from almost_train.common.held_out import HeldOut, is_held_out
from almost_train.common.resume import RowLog
from almost_train.self_play.rules import broken_rule, end_at_user, is_empty
from almost_train.synthetic.sampling import derived_seed

_MARKERS = {"assistant": "\n\nAssistant:", "user": "\n\nHuman:"}
_STOPS = {"assistant": ("\n\nHuman:", "\n-----"), "user": ("\n\nAssistant:", "\n\nHuman:", "\n-----")}
CHUNK = 16
"""Dialogues, counted from the first prompt, whose candidates are scored, and are on disk, together. A shard has whole
chunks, so its rewards come from the batches of the whole stage."""


@dataclass(frozen=True, slots=True)
class SelfPlaySettings:
    """How self-play is played."""

    assistant_model: str = option("nano/vanilla-large", "Model that answers: checkpoint, hub id or built-in name.")
    user_model: str = option("nano/vanilla-large", "Model that asks.")
    assistant_demonstrations: str = option("HHH", "Demonstrations of the assistant: a name in the prompt set.")
    user_demonstrations: str = option("HHH", "Demonstrations of the user: a name in the prompt set.")
    shots: int = option(3, "Demonstrations in front of a dialogue: the first of the set.", least=0)
    candidates: int = option(4, "Answers to choose from at each assistant turn.", least=1)
    max_turns: int = option(2, "Assistant turns of the longest dialogues.", least=1)
    unguided: bool = option(False, "Keep the first valid candidate, not the best: the comparison to guided play.")
    min_reward: float | None = option(None, "Reject dialogues whose last answer has a lower reward (raw logit).")
    temperature: float = option(1.0, "Sampling temperature of both; 0 is greedy.", least=0)
    top_p: float = option(0.9, "Nucleus of both.", above=0, most=1)
    max_new_tokens: int = option(384, "Token budget of one answer.", least=1)
    user_max_new_tokens: int = option(128, "Token budget of one user turn.", least=1)
    goodbyes: tuple[str, ...] = option(
        ("bye", "goodbye", "thanks", "thank you", "that is all", "that's all", "see you"),
        "Phrases that end a dialogue, in a short user turn without a question.",
    )
    seed: int = option(0, "Seed of every draw.", least=0, most=MOST_SEED)


@dataclass(slots=True)
class Dialogue:
    """One dialogue so far."""

    id: str
    messages: list[Message]
    rewards: list[float | None] = field(default_factory=list)
    """Of each answer."""
    ended: str | None = None
    place: int = 0
    """Of its prompt among all prompts of the stage."""

    @property
    def turns(self) -> list[str]:
        """What was said, first to last."""
        return [message.content for message in self.messages]


@dataclass(slots=True)
class Play:
    """The turns so far, and what is needed to make the next ones."""

    settings: SelfPlaySettings
    few_shot: Mapping[str, str]
    engines: Mapping[str, GenerationEngine]
    judge: RewardModel | None
    log: RowLog
    progress: Progress
    held_out: HeldOut = frozenset()
    known: dict[tuple[str, int, str], Row] = field(init=False)
    candidates: list[Row] = field(default_factory=list)
    user_turns: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.known = {(row["step"], row["turn"], row["id"]): row for row in self.log.rows}

    def assistant_turn(self, turn: int, dialogues: Sequence[Dialogue]) -> None:
        """Sample, score, choose: every live dialogue gets its answer, or ends."""
        # 1. Candidates and their rewards.
        completions = self._complete("assistant", turn, dialogues, self.settings.candidates)
        live = [dialogue for dialogue in dialogues if dialogue.ended is None]
        scores = self._score(turn, live, completions)
        # 2. Of each dialogue the best candidate that breaks no rule.
        for dialogue in live:
            rows: list[Row] = []
            chosen = None
            for number, completion in enumerate(completions[dialogue.id]):
                reward, unscored = scores[dialogue.id][number]
                broken = broken_rule(completion, dialogue.turns) or (None if self.settings.unguided else unscored)
                text, ended = completion.text.strip(), completion.finish_reason
                rows.append({"text": text, "finish_reason": ended, "reward": reward, "rejected": broken})
                if broken is None and (chosen is None or self._beats(reward, rows[chosen]["reward"])):
                    chosen = number
            self.candidates.append({"id": dialogue.id, "turn": turn, "candidates": rows, "chosen": chosen})
            if chosen is None:
                dialogue.ended = "no_candidate"
                continue
            dialogue.messages.append(Message("assistant", rows[chosen]["text"]))
            dialogue.rewards.append(rows[chosen]["reward"])
            if turn == self.settings.max_turns:
                dialogue.ended = "max_turns"

    def user_turn(self, turn: int, dialogues: Sequence[Dialogue]) -> None:
        """The user goes on, or ends the dialogue."""
        completions = self._complete("user", turn, dialogues, 1)
        for dialogue in dialogues:
            if dialogue.ended is not None:
                continue
            completion = completions[dialogue.id][0]
            text = completion.text.strip()
            dialogue.ended = end_at_user(completion, dialogue.turns, self.settings.goodbyes)
            if dialogue.ended is None and is_held_out(text, self.held_out):
                dialogue.ended = "held_out"
            row = {"id": dialogue.id, "turn": turn, "text": text, "finish_reason": completion.finish_reason}
            self.user_turns.append({**row, "ended": dialogue.ended})
            if dialogue.ended is None:
                dialogue.messages.append(Message("user", text))

    def _beats(self, reward: float | None, best: float | None) -> bool:
        # Strictly higher: of equal candidates the first is kept. Their order is random, so no candidate is favoured.
        return not self.settings.unguided and reward is not None and best is not None and reward > best

    def _complete(self, role: str, turn: int, dialogues: Sequence[Dialogue], n: int) -> dict[str, list[Completion]]:
        """Completions of every live dialogue; those whose context is full are ended instead."""
        live = [dialogue for dialogue in dialogues if dialogue.ended is None]
        engine, settings = self.engines[role], self.settings
        budget = settings.max_new_tokens if role == "assistant" else settings.user_max_new_tokens
        texts = {d.id: self.few_shot[role] + dialogue_text(tuple(d.messages)) + _MARKERS[role] for d in live}
        full = {id for id, fits in zip(texts, _fit(engine, list(texts.values()), budget), strict=True) if not fits}
        if turn == 1 and live and len(full) == len(live):
            raise InputError(
                f"no dialogue fits the context of the {role}'s model: {settings.shots} demonstrations, a prompt and "
                f"{budget} new tokens are too long; take fewer shots or fewer new tokens"
            )
        for dialogue in live:
            if dialogue.id in full:
                dialogue.ended = "context_full"
        live = [dialogue for dialogue in live if dialogue.ended is None]
        missing = [dialogue.id for dialogue in live if (role, turn, dialogue.id) not in self.known]
        if missing:
            seed = derived_seed(settings.seed, f"{role}/{turn}")  # one for each turn: a prompt may occur again later
            params = SamplingParams(budget, settings.temperature, settings.top_p, n, _STOPS[role], seed=seed)
            with self.progress.track(f"turn {turn}: {role}", len(live), len(live) - len(missing)) as advance:
                for index, completions in engine.stream_completions([texts[id] for id in missing], params):
                    said = [[completion.text, completion.finish_reason] for completion in completions]
                    self._add({"step": role, "turn": turn, "id": missing[index], "completions": said})
                    advance()
        return {
            d.id: [Completion(text, (), reason) for text, reason in self.known[role, turn, d.id]["completions"]]
            for d in live
        }

    def _score(
        self, turn: int, live: Sequence[Dialogue], completions: Mapping[str, Sequence[Completion]]
    ) -> dict[str, list[tuple[float | None, str | None]]]:
        """(reward, why there is none) of every candidate."""
        if self.judge is None:
            return {id: [(None, "no_reward_model")] * len(said) for id, said in completions.items()}
        done = sum(("rewards", turn, dialogue.id) in self.known for dialogue in live)
        with self.progress.track(f"turn {turn}: rewards", len(live), done) as advance:
            # Chunks of all live dialogues, not of those without a reward: a resumed run then has the same batches, and
            # its rewards are equal to the last bit.
            for _, together in itertools.groupby(live, key=lambda dialogue: dialogue.place // CHUNK):
                chunk = list(together)
                missing = [dialogue for dialogue in chunk if ("rewards", turn, dialogue.id) not in self.known]
                if not missing:
                    continue
                talks = [tuple(d.messages) for d in chunk for _ in completions[d.id]]
                answers = [said.text.strip() for d in chunk for said in completions[d.id]]
                scores = iter(_rewards(self.judge, talks, answers))
                by_id = {dialogue.id: [next(scores) for _ in completions[dialogue.id]] for dialogue in chunk}
                for dialogue in missing:
                    self._add({"step": "rewards", "turn": turn, "id": dialogue.id, "scores": by_id[dialogue.id]})
                    advance()
        return {d.id: [(reward, why) for reward, why in self.known["rewards", turn, d.id]["scores"]] for d in live}

    def _add(self, row: Row) -> None:
        self.log.append(row)
        self.known[row["step"], row["turn"], row["id"]] = row


def _rewards(
    judge: RewardModel, talks: Sequence[Conversation], answers: Sequence[str]
) -> Iterator[tuple[float | None, str | None]]:
    """(reward, why there is none) of each answer at the end of its conversation; no conversation is truncated."""
    whole = [(*talk, Message("assistant", answer)) for talk, answer in zip(talks, answers, strict=True)]
    unscored = ["empty" if is_empty(answer) else None for answer in answers]
    lengths, limit = getattr(judge, "lengths", None), getattr(judge, "context_length", None)
    if lengths is not None and limit is not None:
        for at, length in enumerate(lengths(whole)):
            unscored[at] = unscored[at] or ("too_long_to_score" if length > limit else None)
    rewards = iter(judge.score([talk for talk, why in zip(whole, unscored, strict=True) if why is None]))
    for why in unscored:
        reward = None if why else next(rewards)
        finite = reward is not None and math.isfinite(reward)
        yield (reward, None) if finite else (None, why or "non_finite_reward")


def _fit(engine: GenerationEngine, texts: Sequence[str], new_tokens: int) -> list[bool]:
    """Whether each prompt leaves room for the new tokens; True where the engine cannot say."""
    if not isinstance(engine, LoglikelihoodEngine) or engine.context_length is None:
        return [True] * len(texts)
    encoded = engine.encode([LoglikelihoodRequest(text, (" a",)) for text in texts])
    return [request.n_positions + new_tokens <= engine.context_length for request in encoded]
