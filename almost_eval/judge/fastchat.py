"""Files of FastChat, pinned: the questions of Vicuna and MT-Bench, their review prompts, MT-Bench's reference answers.

They are other people's words, so they are read at run time: from the data root, then the cache, then the pinned tag,
and taken only where their sha256 is the one written here.
"""

from __future__ import annotations

from almost_eval.data.sources import DataSource, pinned_text
from almost_eval.files import parse_lines
from almost_eval.types import JSONObject

REPOSITORY = "lm-sys/FastChat"
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
    "arena-hard-200": 0.0,
}
"""Of an answer to a question of MT-Bench, by its category; any other category has 0.7. `temperature_config` of
`fastchat/llm_judge/common.py` at v0.2.36."""
PINNED = {
    "fastchat/eval/table/question.jsonl": (
        "v0.2.1",
        "590c39157bc561eadd7f03cad4be18c2b597f93029780af65f86718f39eafa87",
    ),
    "fastchat/eval/table/prompt.jsonl": (
        "v0.2.1",
        "475f1ff9e2872fe0ffd43db38fd5c3277f46fe6b2d62fcd2f968a0c9e59391a3",
    ),
    "fastchat/eval/table/reviewer.jsonl": (
        "v0.2.1",
        "f9bbe8afca441761cbbe5ed3298101e63e8e2d42a2f1dea0ce2c5c991b8d5893",
    ),
    "fastchat/llm_judge/data/judge_prompts.jsonl": (
        "v0.2.36",
        "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
    ),
    "fastchat/llm_judge/data/mt_bench/question.jsonl": (
        "v0.2.36",
        "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    ),
    "fastchat/llm_judge/data/mt_bench/reference_answer/gpt-4.jsonl": (
        "v0.2.36",
        "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
    ),
}
"""Path in the repository -> (tag, sha256 of the bytes)."""


def fastchat_text(path: str, data: DataSource, *, instead: str) -> str:
    """A pinned file.

    Args:
        path: one of `PINNED`.
        data: where the data root is.
        instead: what else the user can do, the end of an error's line.

    Raises:
        DataError: it cannot be had, or is another file.
    """
    tag, sha256 = PINNED[path]
    return pinned_text(REPOSITORY, tag, path, sha256, data, instead=instead)


def fastchat_rows(path: str, data: DataSource) -> list[JSONObject]:
    """The rows of a pinned file of prompts; see `fastchat_text`."""
    return [row for _, row in parse_lines(path, fastchat_text(path, data, instead="use --prompt-set builtin"))]
