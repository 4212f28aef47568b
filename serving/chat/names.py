"""Answers that say whose they are: a round of the arena with one of them is not blind.

Two things count. A name that nothing else is called by (it holds a digit, a slash or a hyphen) counts wherever it
stands. A name that is a word too ("almost", "claude", "falcon", which is an animal of the built-in world) counts where
the answer introduces itself by it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

FAMILIES = (
    *("alpaca", "baichuan", "bard", "chatglm", "chatgpt", "claude", "command r", "copilot", "deepseek", "dolly"),
    *("falcon", "gemini", "gemma", "gpt", "grok", "hermes", "kimi", "koala", "lamda", "llama", "mistral", "mixtral"),
    *("nova", "olmo", "openassistant", "open assistant", "palm", "phi", "pythia", "qwen", "smollm", "vicuna", "yi"),
    *("almost", "tulu", "zephyr"),
)
MAKERS = (
    *("ai2", "alibaba", "amazon", "anthropic", "cohere", "databricks", "deepmind", "deepseek", "google"),
    *("hugging face", "lmsys", "meta", "microsoft", "mistral", "moonshot", "naver", "openai", "stability ai"),
    *("xai", "zhipu"),
)

_INTRODUCTION = r"\b(?:i am|i['\u2019]m|my name is|this is|call me)\s+"
"""Without an article: "I am a falcon" plays an animal, "I am Falcon" is a model."""
_MADE = (
    r"\b(?:i (?:am|was|have been)|i['\u2019]m|an? (?:ai|assistant|language|chat)[\w ]{0,40})[\w ,]{0,40}"
    r"\b(?:made|created|trained|developed|built|designed)(?: and \w+)? (?:by|at)\s+(?:the )?"
)
_WORDLIKE = re.compile(r"[^\W\d_]+")


def names_itself(text: str, systems: Iterable[str]) -> bool:
    """Whether an answer says which of all systems of the arena wrote it, or which family or maker it is of."""
    lower = " ".join(text.lower().split())
    names = {part for system in systems for part in _parts(system.lower())}
    plain = {name for name in names if _WORDLIKE.fullmatch(name)}
    if any(_stands(name, lower) for name in names - plain):
        return True
    introduced = "|".join(sorted(map(re.escape, {*plain, *FAMILIES}), key=len, reverse=True))
    makers = "|".join(map(re.escape, MAKERS))
    # After a family's name a version may follow: "GPT-4", "Qwen2.5".
    return bool(
        re.search(rf"{_INTRODUCTION}(?:{introduced})(?:[-\s]?\d[\w.]*)?\b", lower)
        or re.search(rf"{_MADE}(?:{makers})\b", lower)
    )


def _parts(system: str) -> set[str]:
    """What a system may call itself: `org/name-7b` is also `name-7b`, and introduces itself as `name`."""
    last = system.rpartition("/")[2]
    first = re.split(r"[-_\s.:]", last)[0]
    return {name for name in (system, last, first) if len(name) > 2}


def _stands(name: str, text: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) is not None
