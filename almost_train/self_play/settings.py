"""The settings of self-play."""

from __future__ import annotations

from dataclasses import dataclass

from almost_train.common.config import MOST_SEED, option


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
