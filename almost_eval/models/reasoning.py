"""What a model thought before it answered, told apart from its answer: `split_reasoning`, a pure function of the text.

Models mark a thought in one of four ways:

- Tags around it: `<think>` (Qwen, DeepSeek and most others), `<thinking>`, `<thought>`, `<reasoning>`, `[THINK]`
  (Mistral), `<|begin_of_thought|>`, `<|START_THINKING|>` (Cohere), `<|channel>` (Gemma) and a few more.
- The closing tag alone, as the chat template wrote the opening one: `opened` says so where the prompt is known, and
  `opens_thought` tells it of a prompt.
- A sentence before each part (Granite 3.2): `Here is my thought process: ... Here is my response: ...`.
- Channels (gpt-oss): `<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...`, which
  a decoder that skips special tokens leaves as `analysis...assistantfinal...`.

A tag is a tag only where a model would write one: at the start of the text or of a line. In a code block, in quotes
and in the middle of a sentence it is the answer's own words. A text without a thought comes back as it is, byte for
byte; whitespace between a thought and the answer goes with the thought. Marks that some models write around an answer
after a thought (`<|begin_of_solution|>`) are no part of it; `<answer>` is, as a prompt may have asked for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from almost_eval.models.thought_tags import TAG, TaggedText

_CHANNELS = re.compile(r"\s*(?:<\|start\|>assistant\s*)?<\|channel\|>")
_LATER_CHANNEL = re.compile(r"(?:<\|end\|>\s*)?<\|start\|>assistant\s*<\|channel\|>|<\|end\|>\s*<\|channel\|>")
_HEADER = r"(?:<\|start\|>[^<\n]*)?<\|channel\|>(?P<channel>[^<\n]*)(?:<\|constrain\|>[^<\n]*)?<\|message\|>"
_MESSAGE = re.compile(
    rf"{_HEADER}(?P<body>.*?)(?=\s*{_HEADER.replace('?P<channel>', '?:')}|<\|end\|>|<\|return\|>|<\|call\|>|\Z)",
    re.DOTALL,
)
_BARE_CHANNELS = re.compile(r"\s*analysis(?=\S)(?P<thought>.*?)assistant\s?final(?P<answer>.*)", re.DOTALL)
_MY_THOUGHT = re.compile(r"\s*Here(?: is|'s) my thought process:")
_MY_RESPONSE = re.compile(r"(?:\n[ \t]*|(?<=[.!?]) )Here(?: is|'s) my response:")
_AROUND_ANSWER = {"<|begin_of_solution|>": "<|end_of_solution|>", "<|START_RESPONSE|>": "<|END_RESPONSE|>"}
"""What stands before an answer -> what may stand after it."""
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


def split_reasoning(text: str, opened: bool = False) -> Reasoning:
    """Tell the thoughts of a text from its answer.

    Args:
        text: what a model wrote.
        opened: the prompt ended inside a thought (`opens_thought`), so that the text begins with the rest of it. Such a
            text with no end of a thought is all thought.
    """
    if (reasoning := _split_channels(text, opened)) is not None:
        return reasoning
    if (begin := _MY_THOUGHT.match(text)) and (then := _MY_RESPONSE.search(text, begin.end())):
        return Reasoning(text[then.end() :].strip(), text[begin.end() : then.start()].strip(), False)
    answer: list[str] = []
    thoughts: list[str] = []
    tagged, at, end, is_cut = TaggedText(text), 0, len(text), False
    written = len(text.rstrip())
    while (thought := tagged.first_thought(at, opened)) is not None:
        if thoughts and thought.after >= written and thought.start == thought.body and not thought.is_cut:
            # A closing tag after the whole answer closes nothing: what stands before it is the answer.
            end = thought.end
            break
        answer.append(text[at : thought.start].strip())
        thoughts.append(text[thought.body : thought.end].strip())
        is_cut, at, opened = thought.is_cut, _skip_blanks(text, thought.after), False
    if not thoughts:
        return Reasoning(text, None, False)
    rest = text[at:end].rstrip() if end < len(text) else text[at:]
    return Reasoning(_without_marks(_paragraphs([*answer, rest])), _paragraphs(thoughts), is_cut)


def _without_marks(answer: str) -> str:
    """An answer that came after a thought, without what its model writes around it."""
    for before, after in _AROUND_ANSWER.items():
        if answer.lstrip().startswith(before):
            return answer.strip().removeprefix(before).removesuffix(after).strip()
    return answer


def opens_thought(prompt: str) -> bool:
    """Whether a prompt ends inside a thought, as some templates end it: with the opening tag."""
    end = prompt.rstrip()
    if re.search(r"<\|channel\|>analysis(?:<\|message\|>)?\Z", end):
        return True
    tags = list(TAG.finditer(end, max(0, len(end) - 200)))
    last = tags[-1] if tags else None
    return last is not None and last.end() == len(end) and last["close"] is None


def marker_tokens(special_tokens: Iterable[str]) -> frozenset[str]:
    """Those of a tokenizer's special tokens that mark a thought: a decoder that skips them makes it part of the answer.

    `<|end|>` and its like are of a channel only where there are channels; elsewhere they end a turn.
    """
    tokens = set(special_tokens)
    channels = {token for token in tokens if "<|channel|>" in tokens and _CHANNEL_TOKEN.fullmatch(token)}
    return frozenset(channels | {token for token in tokens if TAG.fullmatch(token)})


def _paragraphs(parts: list[str]) -> str:
    return "\n\n".join(part for part in parts if part)


def _skip_blanks(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


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
