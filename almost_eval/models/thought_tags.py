"""Tags around thoughts: which are a model's own, and which are words, examples or code of its answer.

A tag is a tag only where a model would write one: at the start of the text or of a line. Thoughts are taken from the
front of a text one after the other, and what stands before one has no part in reading the next. All tags, fences and
backticks are found once, so that a text of n thoughts takes O(n log n) and not O(n^2).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

_NAMES = "think|thinking|thought|thoughts|reasoning|seed:think|antthinking"
TAG = re.compile(
    rf"(?P<close></\s*(?:{_NAMES})\s*>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|END_THINKING\|>|<\|inner_suffix\|>"
    rf"|<unused95>|<channel\|>)"
    rf"|(?:<(?:{_NAMES})(?:\s[^<>]*)?(?<!/)>|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\|START_THINKING\|>"
    rf"|<\|inner_prefix\|>|<unused94>|<\|channel>)",
    re.IGNORECASE,
)
_QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”", "\u2018": "\u2019", "«": "»", "(": ")"}
_FENCE = re.compile(r" {0,3}(```+|~~~+)[^\n]*")
_FENCES = re.compile(rf"^{_FENCE.pattern}$", re.MULTILINE)
_CLOSING_FENCES = re.compile(r"^ {0,3}(```+|~~~+)[`~]*[ \t]*$", re.MULTILINE)
_INFO = re.compile(r" {0,3}(?:```|~~~)[^`\n]*")
_INLINE_CODE = re.compile(r"(`+)(?!`)[^\n]*?(?<!`)\1(?!`)")
_WORD_BEFORE = re.compile(r"[\w,] +\Z")
_SENTENCE_AFTER = re.compile(r" +[a-z(]|[.,;:?!)]")


@dataclass(frozen=True, slots=True)
class Thought:
    """Where a thought is in a text: what is before `start` and from `after` on is the answer's."""

    start: int
    body: int
    end: int
    after: int
    is_cut: bool = False


class TaggedText:
    """A text from whose front thoughts are taken."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._tags = [tag for tag in TAG.finditer(text) if not _is_quoted(text, tag)]
        self._starts = [tag.start() for tag in self._tags]
        self._closing = _closing_tags(self._tags)
        self._code = _Code(text)

    def first_thought(self, at: int, opened: bool) -> Thought | None:
        """The first thought from `at` on, where the text begins; `opened` says that it begins inside one."""
        text, first = self.text, bisect_left(self._starts, at)
        head = self._tags[first] if first < len(self._tags) else None
        if head is not None and head["close"] is None and not text[at : head.start()].strip():
            return self._thought(first, self._closing[first])
        if opened:
            return self._opened_thought(first, at)
        passed = at  # up to here the tags are of a sentence or an example
        for number in range(first, len(self._tags)):
            tag = self._tags[number]
            if tag.start() < passed or self._code.holds(tag.start(), at):
                continue
            if tag["close"] is not None:
                if not _is_prose(text, tag, at):  # the opening tag was the template's
                    return Thought(at, at, tag.start(), tag.end())
            elif not text[self._line_start(tag.start(), at) : tag.start()].strip():
                thought = self._thought(number, self._shown_closing(number, at))
                is_example = self._ends_with_colon(tag.start(), at) or self._code.is_open(tag.start(), at)
                if not is_example and (not thought.is_cut or not self._rest_of_line(tag.end()).strip()):
                    return thought
                passed = thought.after
            else:  # a sentence on tags; the closing one that it may name is on its line
                passed = tag.end() + len(self._rest_of_line(tag.end()))
        return None

    def _thought(self, number: int, closing: int | None) -> Thought:
        """The thought that the tag `number` opens and the tag `closing` ends."""
        body = self._tags[number].end()
        if closing is None:
            return Thought(self._tags[number].start(), body, len(self.text), len(self.text), is_cut=True)
        return Thought(self._tags[number].start(), body, self._tags[closing].start(), self._tags[closing].end())

    def _opened_thought(self, first: int, at: int) -> Thought:
        """The thought in which the text begins."""
        closing = _end_of_thought((i, self._tags[i]) for i in range(first, len(self._tags)))
        if closing is None:
            return Thought(at, at, len(self.text), len(self.text), is_cut=True)
        return Thought(at, at, self._tags[closing].start(), self._tags[closing].end())

    def _shown_closing(self, number: int, at: int) -> int | None:
        """The tag that ends the thought of tag `number`; those in code count for nothing."""
        if self._code.is_absent:
            return self._closing[number]
        # A count that has not come out after so many tags does not: else each of n thoughts would look at all of them.
        later = range(number + 1, min(number + 100, len(self._tags)))
        return _end_of_thought((i, self._tags[i]) for i in later if not self._code.holds(self._starts[i], at))

    def _line_start(self, position: int, at: int) -> int:
        return max(at, self.text.rfind("\n", at, position) + 1)

    def _rest_of_line(self, position: int) -> str:
        end = self.text.find("\n", position)
        return self.text[position : len(self.text) if end < 0 else end]

    def _ends_with_colon(self, position: int, at: int) -> bool:
        """Whether what stands before introduces it (`like this:`)."""
        while position > at and self.text[position - 1].isspace():
            position -= 1
        return position > at and self.text[position - 1] == ":"


class _Code:
    """Fenced blocks and inline code of a text, as it reads from a place on."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._ticks = [match.start() for match in re.finditer("`", text)]
        self._fences = [(match.start(), match[1]) for match in _FENCES.finditer(text)]
        self._opening = [start for start, _ in self._fences]
        self._ends: dict[str, list[tuple[int, int]]] = {}
        for match in _CLOSING_FENCES.finditer(text):
            self._ends.setdefault(match[1], []).append(match.span())
        self._infos = [start for start in self._opening if self._is_info(start)]
        self.is_absent = not self._ticks and not self._fences
        self._at = -1
        self._blocks: list[tuple[int, int]] = []
        self._more: Iterator[tuple[int, int]] = iter(())

    def holds(self, position: int, at: int) -> bool:
        """Whether a place is in code, where the text begins at `at`."""
        return not self.is_absent and (self._in_block(position, at) or self._in_line(position, at))

    def is_open(self, position: int, at: int) -> bool:
        """Whether an odd number of fences stands before: a block that was cut before its end."""
        lines = bisect_left(self._infos, position) - bisect_left(self._infos, at + 1)
        return (lines + self._is_info(at)) % 2 == 1

    def _is_info(self, start: int) -> bool:
        """Whether a fence with nothing but a language's name stands alone on the line that begins here."""
        match = _INFO.match(self._text, start)
        return match is not None and (match.end() == len(self._text) or self._text[match.end()] == "\n")

    def _in_block(self, position: int, at: int) -> bool:
        if at != self._at:
            self._at, self._blocks, self._more = at, [], self._blocks_from(at)
        while not self._blocks or self._blocks[-1][1] <= position:
            block = next(self._more, None)
            if block is None:
                break
            self._blocks.append(block)
        after = bisect_left(self._blocks, (position + 1,))
        return after > 0 and position < self._blocks[after - 1][1]

    def _blocks_from(self, at: int) -> Iterator[tuple[int, int]]:
        """(start, end) of the fenced blocks that have an end."""
        number, end = bisect_left(self._opening, at + 1), at
        first = _FENCE.match(self._text, at)  # the text may begin in the middle of a line
        openings = iter([(at, first[1])] if first else [])
        while True:
            start, kind = next(openings, (None, ""))
            if start is None:
                if number == len(self._fences):
                    return
                start, kind = self._fences[number]
                number += 1
            if start < end:
                continue
            if (closing := self._fence_after(start, kind)) is not None:
                end = closing
                yield start, end
                number = max(number, bisect_left(self._opening, end))

    def _fence_after(self, start: int, fence: str) -> int | None:
        """Where the block that `fence` opens ends: at one as long or longer; where there is none, at a shorter one."""
        for length in range(len(fence), 2, -1):
            ends = [self._ends[kind] for kind in self._ends if kind.startswith(fence[:length])]
            at = [(places, bisect_left(places, (start + 1,))) for places in ends]
            if later := [places[place][1] for places, place in at if place < len(places)]:
                return min(later)
        return None

    def _in_line(self, position: int, at: int) -> bool:
        start = max(at, self._text.rfind("\n", at, position) + 1)
        tick = bisect_left(self._ticks, start)
        if tick == len(self._ticks) or self._ticks[tick] >= position:
            return False
        end = self._text.find("\n", position)
        spans = _INLINE_CODE.finditer(self._text, self._ticks[tick], len(self._text) if end < 0 else end)
        for span in spans:
            if span.start() > position:
                return False
            if position < span.end():
                return True
        return False


def _closing_tags(tags: list[re.Match[str]]) -> list[int | None]:
    """Opening tag -> the tag that ends its thought; see `_end_of_thought`."""
    closing: list[int | None] = [None] * len(tags)
    opened: list[int] = []
    for number, tag in enumerate(tags):
        if tag["close"] is None:
            opened.append(number)
        elif opened:
            closing[opened.pop()] = number
    later = None
    for number in range(len(tags) - 1, -1, -1):
        if tags[number]["close"] is not None:
            later = number
        elif closing[number] is None:
            closing[number] = later
    return closing


def _end_of_thought(tags: Iterator[tuple[int, re.Match[str]]]) -> int | None:
    """Which of the tags after an opening one ends its thought.

    Tags inside are counted, so that a thought in a thought ends with it. Where the count does not come out (a thought
    that mentions a tag), the first closing tag ends it.
    """
    depth, first = 1, None
    for number, tag in tags:
        if tag["close"] is None:
            depth += 1
            continue
        first = number if first is None else first
        depth -= 1
        if depth == 0:
            return number
    return first


def _is_quoted(text: str, tag: re.Match[str]) -> bool:
    """Between two quotation marks or backticks, with nothing else there."""
    before, after = text[max(0, tag.start() - 1) : tag.start()], text[tag.end() : tag.end() + 1]
    return before in _QUOTES and _QUOTES[before] == after


def _is_prose(text: str, tag: re.Match[str], at: int) -> bool:
    """In the middle of a sentence: a word and a space before it, and the sentence goes on or ends after it."""
    before = text[max(at, tag.start() - 40) : tag.start()]
    return bool(_WORD_BEFORE.search(before) and _SENTENCE_AFTER.match(text, tag.end()))
