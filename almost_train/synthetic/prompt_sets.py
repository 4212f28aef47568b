"""Seed prompts and demonstrations: what makes a vanilla language model ask and answer.

A prompt set holds an instruction, seed prompts and named sets of demonstrations. `official` is ALMoST's own
(naver-ai/ALMoST `assets/`), read at run time and checked by sha256; `builtin` is our wording, in
`almost_train/prompts`; `nano` is drawn from the built-in world, whose qualities are the names of its sets.

Departures from the official code: a demonstration is a list of turns, so one space stands after `Human:`, where the
official files have two. The text that a model continues ends in `Assistant:`, without the official space after it: a
tokenizer joins the space to the first word of the answer.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from almost_eval.data.prompt_sets import official_text
from almost_eval.data.sources import DataSource
from almost_eval.errors import DataError, did_you_mean
from almost_eval.models.chat import dialogue_text, parse_dialogue
from almost_eval.types import Conversation

PROMPT_SETS = ("official", "builtin", "nano")
SEPARATOR = "\n\n-----"
"""Between the dialogues of a document, as in the official files; the next turn brings its own blank line."""

_OFFICIAL = {
    "assets/seed_prompts.txt": "2db6b8542282125b92bf156cd8df29a173ba7eaaaa51f5e4229327dd23b40983",
    "assets/HHH_prompt.txt": "51dd74e1c2ba9bc14173b20db4d9c3a6b6196b0c477da11811dd42cfe585cfba",
    "assets/Faithful_prompt.txt": "ae8a02a8643e04d2db68cd391f3153810af098060048f2432605b78491344979",
}
"""File of the official repository -> sha256."""
_BUILTIN = Path(__file__).parents[1] / "prompts"
_SHORT, _LONG = 384, 768  # new tokens for an answer; the official code gives the Faithful set twice as many

_NANO_SEEDS = 120
_NANO_DEMONSTRATIONS = 60


@dataclass(frozen=True, slots=True)
class DemonstrationSet:
    """Dialogues that show a language model how to answer."""

    header: str
    """Text before the first dialogue; may be empty."""
    conversations: tuple[Conversation, ...]
    """Each begins with a user turn and alternates."""
    max_new_tokens: int = _SHORT
    """How long an answer in the manner of these may become."""

    def document(self, conversation: Conversation, shots: Sequence[Conversation]) -> str:
        """The text whose continuation is the next assistant turn of `conversation`: header, shots, conversation.

        Without a header and without shots it is the conversation alone.
        """
        before = [part for part in (self.header, *map(dialogue_text, shots)) if part]
        return SEPARATOR.join([*before, dialogue_text(conversation, add_generation_prompt=True)])


@dataclass(frozen=True)
class SeedSet:
    """A prompt set of the recipe."""

    name: str
    instruction: str
    """The line above the shots when prompts are mined; may be empty."""
    seed_prompts: tuple[str, ...]
    demonstrations: dict[str, DemonstrationSet]

    @cached_property
    def digest(self) -> str:
        """sha256 of the whole content as canonical JSON, hex."""
        content = {
            "instruction": self.instruction,
            "seed_prompts": self.seed_prompts,
            "demonstrations": {
                name: [d.header, d.max_new_tokens, [[m.to_dict() for m in c] for c in d.conversations]]
                for name, d in self.demonstrations.items()
            },
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def demonstration_set(self, name: str) -> DemonstrationSet:
        """The set of that name; raises DataError where there is none."""
        if name not in self.demonstrations:
            known = did_you_mean(name, self.demonstrations)
            raise DataError(f"prompt set {self.name!r} has no demonstrations {name!r}; {known}")
        return self.demonstrations[name]


def load_seed_set(name: str, data: DataSource) -> SeedSet:
    """The prompt set `official`, `builtin` or `nano`; official files are looked for in `data` first.

    Raises:
        DataError: an unknown name; or official files that cannot be had or are not the pinned ones.
    """
    if name == "nano":
        return _nano()
    if name == "official":
        seeds, hhh, faithful = (official_text(path, sha256, data) for path, sha256 in _OFFICIAL.items())
        sets = {"HHH": parse_demonstrations(hhh, _SHORT), "Faithful": parse_demonstrations(faithful, _LONG)}
    elif name == "builtin":
        seeds, hhh, better = (
            (_BUILTIN / f"{file}.txt").read_text(encoding="utf-8") for file in ("seed_prompts", "HHH", "better")
        )
        sets = {"HHH": parse_demonstrations(hhh, _SHORT), "better": parse_demonstrations(better, _LONG)}
    else:
        raise DataError(f"unknown prompt set {name!r}; {did_you_mean(name, PROMPT_SETS)}")
    instruction, *prompts = (line.strip() for line in seeds.split("\n") if line.strip())
    return SeedSet(name, instruction, tuple(prompts), sets)


def parse_demonstrations(text: str, max_new_tokens: int = _SHORT) -> DemonstrationSet:
    """A demonstration file: a header, then dialogues, `-----` lines between them.

    Raises:
        DataError: no dialogue, or one that does not alternate between the user and the assistant.
    """
    header, *dialogues = (part.strip("\n ") for part in text.split(SEPARATOR))
    conversations = [parse_dialogue(dialogue) for dialogue in dialogues if dialogue]
    for number, conversation in enumerate(conversations, 1):
        roles = [message.role for message in conversation]
        # The last turn may be the user's: the official set has a dialogue that ends so.
        if len(roles) < 2 or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)):
            raise DataError(
                f"dialogue {number} of a demonstration file has the turns {', '.join(roles) or 'of nobody'}; it must "
                "begin with Human: and alternate with Assistant:"
            )
    if not conversations:
        raise DataError(f"a demonstration file has no dialogue; separate them with lines of {SEPARATOR.strip()}")
    return DemonstrationSet(header, tuple(conversations), max_new_tokens)


def _nano() -> SeedSet:
    from almost_eval.nano.world import World

    world = World()

    def rng(what: str) -> random.Random:
        return random.Random(f"{world.seed}/prompt-set/{what}")  # the same in every process

    sets = {
        quality: DemonstrationSet("", tuple(world.demonstrations(rng(quality), quality, _NANO_DEMONSTRATIONS)))
        for quality in ("good", "weak", "bad")
    }
    return SeedSet("nano", "", tuple(world.seed_prompts(rng("seeds"), _NANO_SEEDS)), sets)
