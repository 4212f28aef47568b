"""What a model thought before it answered, told apart from its answer: `split_reasoning`, a pure function of the text.

Models mark a thought in one of three ways:

- Tags around it: `<think>` (Qwen, DeepSeek and most others), `<thinking>`, `<thought>`, `<reasoning>`, `[THINK]`
  (Mistral), `<|begin_of_thought|>`, `<|START_THINKING|>` (Cohere), `<|channel>` (Gemma) and a few more.
- The closing tag alone, as the chat template wrote the opening one: `opened` says so where the prompt is known, and
  `opens_thought` tells it of a prompt.
- Channels (gpt-oss): `<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...`, which
  a decoder that skips special tokens leaves as `analysis...assistantfinal...`.

A tag is a tag only where a model would write one: at the start of the text or of a line. In a code block, in quotes
and in the middle of a sentence it is the answer's own words. A text without a thought comes back as it is, byte for
byte; whitespace between a thought and the answer goes with the thought.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_NAMES = "think|thinking|thought|thoughts|reasoning|seed:think|antthinking"
_TAG = re.compile(
    rf"(?P<close></\s*(?:{_NAMES})\s*>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|END_THINKING\|>|<\|inner_suffix\|>"
    rf"|<unused95>|<channel\|>)"
    rf"|(?:<(?:{_NAMES})(?:\s[^<>]*)?(?<!/)>|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\|START_THINKING\|>"
    rf"|<\|inner_prefix\|>|<unused94>|<\|channel>)",
    re.IGNORECASE,
)
_FENCE = re.compile(r"^ {0,3}(```+|~~~+)[^\n]*$(?:.*?^ {0,3}\1[`~]*[ \t]*$)", re.MULTILINE | re.DOTALL)
_OPEN_FENCE = re.compile(r"^ {0,3}(?:```|~~~)[^`\n]*$", re.MULTILINE)
_INLINE_CODE = re.compile(r"(`+)(?!`)[^\n]*?(?<!`)\1(?!`)")
_QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”", "\u2018": "\u2019", "«": "»", "(": ")"}

_CHANNELS = re.compile(r"\s*(?:<\|start\|>assistant\s*)?<\|channel\|>")
_LATER_CHANNEL = re.compile(r"(?:<\|end\|>\s*)?<\|start\|>assistant\s*<\|channel\|>|<\|end\|>\s*<\|channel\|>")
_HEADER = r"(?:<\|start\|>[^<\n]*)?<\|channel\|>(?P<channel>[^<\n]*)(?:<\|constrain\|>[^<\n]*)?<\|message\|>"
_MESSAGE = re.compile(
    rf"{_HEADER}(?P<body>.*?)(?=\s*{_HEADER.replace('?P<channel>', '?:')}|<\|end\|>|<\|return\|>|<\|call\|>|\Z)",
    re.DOTALL,
)
_BARE_CHANNELS = re.compile(r"\s*analysis(?=\S)(?P<thought>.*?)assistant\s?final(?P<answer>.*)", re.DOTALL)
_CHANNEL_TOKEN = re.compile(r"<\|(?:start|channel|message|end|constrain|return|call)\|>")
_BARE_CUT = re.compile(r"\s*analysis(?=[A-Z])")


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A model's text in two parts."""

    answer: str
    """The text without its thoughts; the text itself where it holds none."""
    thought: str | None
    """Its thoughts, a blank line between two; None where it holds none, empty where the model thought nothing."""
    is_cut: bool
    """True where a thought has no end, so that the model never came to its answer."""


@dataclass(frozen=True, slots=True)
class _Thought:
    """Where a thought is in a text: what is before `start` and from `after` on is the answer's."""

    start: int
    body: int
    end: int
    after: int
    is_cut: bool = False


def split_reasoning(text: str, opened: bool = False) -> Reasoning:
    """Tell the thoughts of a text from its answer.

    Args:
        text: what a model wrote.
        opened: the prompt ended inside a thought (`opens_thought`), so that the text begins with the rest of it. Such a
            text with no end of a thought is all thought.
    """
    if (reasoning := _split_channels(text, opened)) is not None:
        return reasoning
    answer: list[str] = []
    thoughts: list[str] = []
    rest, is_cut = text, False
    while (thought := _first_thought(rest, opened)) is not None:
        if thoughts and not rest[thought.after :].strip() and thought.start == thought.body and not thought.is_cut:
            # A closing tag after the whole answer closes nothing: what stands before it is the answer.
            rest = rest[: thought.end].rstrip()
            break
        answer.append(rest[: thought.start].strip())
        thoughts.append(rest[thought.body : thought.end].strip())
        is_cut, rest, opened = thought.is_cut, rest[thought.after :].lstrip(), False
    if not thoughts:
        return Reasoning(text, None, False)
    return Reasoning(_paragraphs([*answer, rest]), _paragraphs(thoughts), is_cut)


def opens_thought(prompt: str) -> bool:
    """Whether a prompt ends inside a thought, as some templates end it: with the opening tag."""
    end = prompt.rstrip()
    if re.search(r"<\|channel\|>analysis(?:<\|message\|>)?\Z", end):
        return True
    tags = list(_TAG.finditer(end, max(0, len(end) - 200)))
    last = tags[-1] if tags else None
    return last is not None and last.end() == len(end) and last["close"] is None


def marker_tokens(special_tokens: Iterable[str]) -> frozenset[str]:
    """Those of a tokenizer's special tokens that mark a thought: a decoder that skips them makes it part of the answer.

    `<|end|>` and its like are of a channel only where there are channels; elsewhere they end a turn.
    """
    tokens = set(special_tokens)
    channels = {token for token in tokens if "<|channel|>" in tokens and _CHANNEL_TOKEN.fullmatch(token)}
    return frozenset(channels | {token for token in tokens if _TAG.fullmatch(token)})


def _paragraphs(parts: list[str]) -> str:
    return "\n\n".join(part for part in parts if part)


# --- tags ---


def _first_thought(text: str, opened: bool) -> _Thought | None:
    """The first thought of a text; `opened` says that the text begins inside one."""
    tags = [tag for tag in _TAG.finditer(text) if not _is_quoted(text, tag)]
    head = next((tag for tag in tags if not text[: tag.start()].strip()), None)
    if head is not None and head["close"] is None:
        return _closed(text, tags, head)
    if opened:
        return _closed(text, tags, None)
    if not tags:
        return None
    code = [match.span() for match in _FENCE.finditer(text)] + [match.span() for match in _INLINE_CODE.finditer(text)]
    shown = [tag for tag in tags if not any(start <= tag.start() < end for start, end in code)]
    passed = 0  # up to here the tags are of a sentence or an example
    for tag in shown:
        if tag.start() < passed:
            continue
        if tag["close"] is not None:
            if not _is_prose(text, tag):  # the opening tag was the template's
                return _Thought(0, 0, tag.start(), tag.end())
        elif _begins_line(text, tag):
            thought = _closed(text, shown, tag)
            if not _is_example(text, tag) and (not thought.is_cut or _stands_alone(text, tag)):
                return thought
            passed = thought.after
        else:  # a sentence on tags; the closing one that it may name is on its line
            passed = tag.end() + len(text[tag.end() :].partition("\n")[0])
    return None


def _closed(text: str, tags: list[re.Match[str]], opening: re.Match[str] | None) -> _Thought:
    """The thought that begins with `opening`, or with the text.

    Tags inside are counted, so that a thought in a thought ends with it. Where the count does not come out (a thought
    that mentions a tag), the first closing tag ends it.
    """
    start, body = (0, 0) if opening is None else (opening.start(), opening.end())
    inside = [tag for tag in tags if tag.start() >= body]
    depth = 1
    first = None
    for tag in inside:
        if tag["close"] is None:
            depth += 1
            continue
        first = first or tag
        depth -= 1
        if depth == 0:
            return _Thought(start, body, tag.start(), tag.end())
    if first is not None:
        return _Thought(start, body, first.start(), first.end())
    return _Thought(start, body, len(text), len(text), is_cut=True)


def _is_quoted(text: str, tag: re.Match[str]) -> bool:
    """Between two quotation marks or backticks, with nothing else there."""
    before, after = text[max(0, tag.start() - 1) : tag.start()], text[tag.end() : tag.end() + 1]
    return before in _QUOTES and _QUOTES[before] == after


def _is_prose(text: str, tag: re.Match[str]) -> bool:
    """In the middle of a sentence: a word and a space before it, and the sentence goes on or ends after it."""
    before, after = text[: tag.start()], text[tag.end() :]
    return bool(re.search(r"[\w,] +\Z", before[-40:]) and re.match(r" +[a-z(]|[.,;:?!)]", after))


def _begins_line(text: str, tag: re.Match[str]) -> bool:
    """No word stands before it on its line."""
    return not text[: tag.start()].rpartition("\n")[2].strip()


def _is_example(text: str, tag: re.Match[str]) -> bool:
    """The line above introduces it (`like this:`), or it is in a code block that was cut before its end."""
    before = text[: tag.start()]
    return before.rstrip().endswith(":") or len(_OPEN_FENCE.findall(before)) % 2 == 1


def _stands_alone(text: str, tag: re.Match[str]) -> bool:
    """Its line holds nothing else."""
    return not text[tag.end() :].partition("\n")[0].strip()


# --- channels ---


def _split_channels(text: str, opened: bool) -> Reasoning | None:
    """A text in gpt-oss's channels; None where it has none."""
    if bare := _BARE_CHANNELS.fullmatch(text):
        return Reasoning(bare["answer"].lstrip(), bare["thought"].strip(), False)
    if cut := _BARE_CUT.match(text):
        return Reasoning("", text[cut.end() :].strip(), True)
    head = ""
    if not _CHANNELS.match(text):
        later = _LATER_CHANNEL.search(text)
        if later is None or not _MESSAGE.search(text, later.start()):
            return None
        # The template opened a channel, and the text begins with the message in it: a thought, as another one follows.
        head, text = text[: later.start()].strip(), text[later.start() :]
    messages = list(_messages(text))
    answer = [body for channel, body in messages if channel == "final"]
    thoughts = [head, *(body for channel, body in messages if channel != "final")]
    if not messages:  # the header itself was cut
        return Reasoning("", "", True)
    thought = _paragraphs([thought.strip() for thought in thoughts]) if any(thoughts) or not answer else None
    return Reasoning("\n\n".join(answer).lstrip(), thought, is_cut=not answer)


def _messages(text: str) -> Iterator[tuple[str, str]]:
    """Channel and text of each message; what a tool is sent (`commentary to=...`) is in a channel too."""
    for message in _MESSAGE.finditer(text):
        yield (message["channel"].split() or [""])[0], message["body"]
