"""A review as plain text: one spelling of what typography, markdown, LaTeX and other languages write in many ways.

Only what means the same is changed. What is quoted from elsewhere loses its digits, so that no score is read in it.
"""

from __future__ import annotations

import re

from almost_eval.judge.records import Unparsed
from almost_eval.models.reasoning import split_reasoning

PLAIN = str.maketrans(
    {
        **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # the wide forms of ASCII
        **dict.fromkeys("\u2018\u2019\u201b\u2032", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u2033", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
        **dict.fromkeys("\u00a0\u202f\u3000\t", " "),
        **dict.fromkeys(map(chr, range(0x2000, 0x200B)), " "),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\r`", None),  # invisible, or markdown's code
        **dict.fromkeys("\ufe0f\u20e3", None),  # what makes a digit an emoji
        "\u3001": ",",
        "\u2044": "/",
    }
)
"""Typography that means the same as plain text."""
EMPHASIS = re.compile(
    r"(?<!\d)\*\*+|\*\*+(?!\d)|(?<![^\s(])\*(?=\S)|(?<=\S)\*(?![^\s.,;:)])|(?<![A-Za-z0-9_])_+|_+(?![A-Za-z0-9_])"
)
"""Markdown's stars and underscores, but not those of 2*3, 2**3, 5 * 8 and a_1."""
_BOXED = re.compile(r"\$*\\boxed\{((?:[^{}]|\\text\{[^{}]*\})*)\}\$*")
_BOXES_ALONE = re.compile(rf"(?:\W*{_BOXED.pattern})+\W*")
_SCORES = re.compile(r"\b(?:scor|rating|grade|verdict)|/ ?10\b", re.I)
_HTML = re.compile(r"</?(?:b|strong|em|i|u|p|span|code)>", re.I)
_NATIVE_LABEL = re.compile(
    r"(?:\u52a9\u624b|\u52a9\u7406|\u30a2\u30b7\u30b9\u30bf\u30f3\u30c8|\uc5b4\uc2dc\uc2a4\ud134\ud2b8"
    r"|\b(?:assistent|asistente|assistente|\u0430\u0441\u0441\u0438\u0441\u0442\u0435\u043d\u0442))"
    r" ?([12])(?!\d)"
    r"( ?(?:\u7684|\u306e)? ?(?:\u8bc4\u5206|\u5f97\u5206|\u5206\u6570|\u30b9\u30b3\u30a2|\u70b9\u6570))?",
    re.I,
)
"""The assistants by name in Chinese, Japanese, Korean, German, Spanish, Italian, Russian, and a word for score."""
_NATIVE_POINTS = re.compile(r"(?<=\d) ?(?:\u5206|\u70b9|\uc810)(?!\w)")

_ECHO_WORD = re.compile(r"\w+")
_FENCE = re.compile(r" *(?:python|json|text|plaintext)? *", re.I)
"""What is left of the first line of a code block."""


def without_thoughts(review: str) -> str | Unparsed:
    """A review without what its judge thought before it; `thinking_cut` or `only_thinking` where it holds no more."""
    split = split_reasoning(review)
    if split.is_cut:
        return Unparsed("thinking_cut")
    return split.answer if split.thought is None or split.answer.strip() else Unparsed("only_thinking")


def plain_text(text: str) -> str:
    """The text in plain letters, digits and lines, without markup."""
    text = re.sub(r"\\([()\[\]_*])", r"\1", text.translate(PLAIN).replace("\u2028", "\n").replace("\u2029", "\n"))
    text = _HTML.sub("", re.sub(r"<br ?/?>", "\n", text, flags=re.I))
    text = EMPHASIS.sub("", _unboxed(text))
    text = _NATIVE_LABEL.sub(lambda match: f"Assistant {match[1]}{chr(39) + 's score' if match[2] else ''}", text)
    text = _NATIVE_POINTS.sub("", text)
    # Less the signs of headings, quotes, lists, tables and code blocks.
    lines = (re.sub(r"^[ >#|~\u2022]+|^ *[-+*] +(?=\S)|[ |#]+$", "", line) for line in text.split("\n"))
    return "\n".join("" if _FENCE.fullmatch(line) else re.sub(r" {2,}", " ", line) for line in lines)


def _unboxed(text: str) -> str:
    """Without LaTeX's boxes in the first line, and where a line speaks of scores; elsewhere a box holds a solution."""
    lines = text.split("\n")
    first = next((at for at, line in enumerate(lines) if line.strip()), 0)
    for at, line in enumerate(lines):
        if "\\boxed" in line and (_SCORES.search(line) or (at == first and _BOXES_ALONE.fullmatch(line))):
            lines[at] = _BOXED.sub(lambda match: re.sub(r"\\text\{([^{}]*)\}|\\[,;]", r"\1", match[1]), line)
    return "\n".join(lines)


def without_quotes(text: str, quoted: str) -> str:
    """The review with the digits struck out of every run of three or more words that `quoted` holds as well."""
    words = [word.casefold() for word in _ECHO_WORD.findall(quoted)]
    if not words or not any(c.isdigit() for c in quoted):
        return text
    n = min(3, len(words))
    runs = {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
    spoken = list(_ECHO_WORD.finditer(text))
    heard = [match[0].casefold() for match in spoken]
    struck = {j for i in range(len(heard) - n + 1) if tuple(heard[i : i + n]) in runs for j in range(i, i + n)}
    if not struck:
        return text
    letters = list(text)
    for j in struck:
        if any(c.isdigit() for c in heard[j]):
            letters[spoken[j].start() : spoken[j].end()] = "\u25a1" * len(spoken[j][0])
    return "".join(letters)
