"""Dialogues as messages, as text and as token ids.

The dialogue format is ALMoST's (arXiv 2305.13735; naver-ai/ALMoST `eval/eval_prompt.py`), which Static HHH uses too:
`\\n\\nHuman: ...\\n\\nAssistant: ...`. Other formats are Jinja files in `templates/`, chosen by flag or taken from the
tokenizer, and rendered as `transformers.PreTrainedTokenizerBase.apply_chat_template` renders them.

Departures from the official code: a prompt is split into turns before its placeholders are filled, so no data can open
a turn; and nothing is guessed from a model's name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from almost_eval.errors import TemplateError, did_you_mean
from almost_eval.models.stops import STOP_STRINGS, template_file
from almost_eval.models.tokenizers import Opening
from almost_eval.types import Conversation, JSONObject, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_OPENING_LINE = re.compile(r"\A\{\{- (?:bos_token|'[^'\n]*') -\}\}\n")

_MARK = "\ufeff"
"""What an editor may write before a text: no part of a prompt."""

# What a template, which is a program, may fail with; jinja lets Python's own errors through.
_PYTHON_FAULTS = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
_TEMPLATE_FAULTS = (jinja2.TemplateError, *_PYTHON_FAULTS)


# --- the dialogue format ---


def parse_dialogue(text: str) -> Conversation:
    """Messages of a `\\n\\nHuman: ...\\n\\nAssistant: ...` text, each stripped of the whitespace around it.

    A marker counts at the start of the text or after a blank line. Text before the first one is a system message, text
    without any is one user turn, and an `Assistant:` with nothing after it is the generation prompt, hence no message.
    """
    head, *rest = _TURN.split(text)
    head = head.strip()
    if not rest:
        return (Message("user", head),) if head else ()
    messages = [Message("system", head)] if head else []
    messages += [Message(_ROLES[marker], turn.strip()) for marker, turn in zip(rest[::2], rest[1::2], strict=True)]
    if messages[-1] == Message("assistant", ""):
        messages.pop()
    return tuple(messages)


def dialogue_text(conversation: Conversation, *, add_generation_prompt: bool = False) -> str:
    """The text of a dialogue, no special tokens; `parse_dialogue` undoes it where the turns are stripped."""
    return _built_in("almost").render(conversation, add_generation_prompt=add_generation_prompt)


# --- templates ---


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """How one family of models writes a dialogue."""

    name: str
    """A built-in name, `tokenizer`, or the path it was read from."""
    source: str
    """Jinja."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer, besides EOS."""
    now: str | None = None
    """The time that the template writes, ISO, where it writes one: part of the spec, and kept while a run goes on."""

    @property
    def digest(self) -> str:
        """sha256 of the source, hex: goes into `spec.json`, where a name alone would not pin the prompt."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def to_dict(self) -> JSONObject:
        """What a spec holds of it."""
        plain: JSONObject = {"name": self.name, "digest": self.digest, "text": self.source}
        return plain if self.now is None else {**plain, "now": self.now}

    def render(
        self,
        conversation: Conversation,
        *,
        add_generation_prompt: bool = False,
        response_prefix: str = "",
        special_tokens: Mapping[str, str] = {},
    ) -> str:
        """The text of a conversation.

        `response_prefix` is the beginning of the answer, which the model is to continue: it follows the generation
        prompt (and implies it) verbatim, after one space where neither side of the seam has whitespace.
        """
        variables: dict[str, Any] = {
            **special_tokens,
            "messages": [message.to_dict() for message in conversation],
            "add_generation_prompt": add_generation_prompt or bool(response_prefix),
            # As transformers passes them: published templates ask `tools is not none`, which holds for an undefined.
            "tools": None,
            "documents": None,
        }
        if self.now is not None:
            moment = datetime.fromisoformat(self.now)
            variables["strftime_now"] = moment.strftime
        try:
            text = _compile(self.source).render(variables)
        except _TEMPLATE_FAULTS as error:
            self._fail(error)
        # "\n\nAssistant:" + "Sure!" would be tokens that no answer in training began with.
        seam = " " if response_prefix and not (text[-1:].isspace() or response_prefix[0].isspace()) else ""
        return text + seam + response_prefix

    def check(self) -> ChatTemplate:
        """Itself, once its syntax is known to be sound: a bad file is refused before a model is loaded."""
        if "\0" in self.source:  # a disk that kept the length and lost the text: it would stand in every prompt
            raise TemplateError(f"chat template {self.name!r} holds NUL bytes, so it is damaged; save it again")
        try:
            _compile(self.source)
        except _TEMPLATE_FAULTS as error:
            self._fail(error)
        return self

    def _fail(self, error: Exception) -> NoReturn:
        problem = " ".join(str(error).split()) or type(error).__name__
        line = ""
        if isinstance(error, jinja2.TemplateSyntaxError):
            line = f" (line {error.lineno}); mend it, or choose another template"
        raise TemplateError(f"chat template {self.name!r} cannot render: {problem}{line}") from error


def load_template(choice: str, tokenizer: PreTrainedTokenizerBase | None = None) -> ChatTemplate | None:
    """The template of a `--template` flag: `auto`, `none`, `tokenizer`, a built-in name, or a path to a Jinja file.

    `auto` is the tokenizer's own, else `almost`. `none` is None: prompts go to the model as they are. `tokenizer` is
    the tokenizer's own or an error; where it has several, `tokenizer:NAME` is the one of that name.
    """
    if choice == "none":
        return None
    if choice.partition(":")[0] == "tokenizer" and not os.path.isfile(choice):
        return _settled(_named_template(choice, tokenizer), tokenizer)
    if choice == "auto":
        own = _own_template(tokenizer)
        return _settled(own, tokenizer) if own else _built_in("almost")
    if choice in STOP_STRINGS:
        return _built_in(choice)
    if not os.path.isfile(choice):  # not Path.is_file, which raises for a name that is too long
        known = did_you_mean(choice, ["auto", "none", "tokenizer", *STOP_STRINGS])
        raise TemplateError(f"unknown chat template {choice!r}: {known}; a path to a Jinja file also works")
    try:
        source = Path(choice).read_text(encoding="utf-8-sig")  # an editor's mark is no part of a prompt
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"chat template {choice!r} cannot be read as UTF-8 text: {error}") from error
    return _settled(ChatTemplate(choice, source).check(), tokenizer)


def _settled(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase | None) -> ChatTemplate:
    """With the time it writes, and with the end of turn it writes, where the model's EOS is another token.

    Raises:
        TemplateError: it leaves out what a user says.
    """
    _refuse_lost_text(template, tokenizer)
    now = datetime.now().isoformat(timespec="seconds") if "strftime_now" in template.source else None
    end = _end_of_turn(template, tokenizer)
    return replace(template, now=now, stop=(end,) if end else template.stop)


def _refuse_lost_text(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """A template that reads lists of parts (of models that see images), say, drops a plain text without a word."""
    # Long, for those that cut, and with what HTML writes in another way.
    mark = f"a question of its own kind: isn't 1 < 2 & true? {'word ' * 2000}is its end"
    # An engine of one's own may have a tokenizer that knows no more than its template.
    tokens = special_tokens(tokenizer) if tokenizer is not None and hasattr(tokenizer, "special_tokens_map") else {}
    try:
        text = template.render((Message("user", mark),), add_generation_prompt=True, special_tokens=tokens)
    except TemplateError:
        return  # what it cannot write is refused where it is asked to
    if mark not in text and mark[:20] in text:
        raise TemplateError(
            f"chat template {template.name!r} changes what the user says: it cuts a message of {len(mark)} characters, "
            "or escapes it (an apostrophe, <, &); pass one that writes it as it is"
        )
    if mark not in text:
        raise TemplateError(
            f"chat template {template.name!r} leaves out what the user says: of one message it makes {text[:60]!r}; "
            "it may be made for messages of another form, such as lists of parts: pass one that writes plain text"
        )


def _end_of_turn(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """The added token that the template writes right after an answer, unless it is EOS, which ends one anyhow."""
    added = getattr(tokenizer, "added_tokens_decoder", None)
    if tokenizer is None or not added:
        return None
    tokens, mark = special_tokens(tokenizer), "an answer of its own kind"
    try:
        text = template.render((Message("user", "a"), Message("assistant", mark)), special_tokens=tokens)
    except TemplateError:
        return None  # a template of one role, say: what it cannot write is refused where it is asked to
    _, seam, after = text.rpartition(mark)
    # Blanks may stand before it, or be a part of it.
    starts = [
        t for t in map(str, added.values()) if t.strip() and (after.lstrip().startswith(t) or after.startswith(t))
    ]
    end = max(starts, key=len, default=None) if seam else None
    return None if end == tokens.get("eos_token") else end


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The special tokens that a template may name, those that are set."""
    # The map holds only what is set; asking for an attribute that is not makes transformers log an error.
    tokens = tokenizer.special_tokens_map
    return {
        name: str(tokens[name]) for name in ("bos_token", "eos_token", "pad_token", "unk_token") if tokens.get(name)
    }


def _own_template(tokenizer: PreTrainedTokenizerBase | None) -> ChatTemplate | None:
    """The tokenizer's chat template, if it has one."""
    source = getattr(tokenizer, "chat_template", None)
    if isinstance(source, dict) and source:
        if "default" not in source:
            raise TemplateError(
                f"the tokenizer has chat templates {sorted(source)} but no 'default': pass the one that is meant as "
                f"--template tokenizer:{min(source)}, or save it to a file and pass its path"
            )
        source = source["default"]
    if source is None or source == {}:
        file = Path(str(getattr(tokenizer, "name_or_path", "") or "")) / "chat_template.json"
        if file.is_file():  # another would be taken for the model's own, as if it had none
            raise TemplateError(
                f"{file} is a processor's, which no tokenizer reads: save what it holds as chat_template.jinja, or "
                "choose a template (--template)"
            )
        return None
    # An empty text is a file that was cut short, not a checkpoint without a template.
    return ChatTemplate("tokenizer", str(source).removeprefix(_MARK)).check()


def _named_template(choice: str, tokenizer: PreTrainedTokenizerBase | None) -> ChatTemplate:
    """`tokenizer` or `tokenizer:NAME`."""
    name = choice.partition(":")[2]
    sources = getattr(tokenizer, "chat_template", None)
    if name and isinstance(sources, dict):
        if name not in sources:
            raise TemplateError(f"the tokenizer has no chat template {name!r}; {did_you_mean(name, sources)}")
        return ChatTemplate(choice, str(sources[name]).removeprefix(_MARK)).check()
    template = None if name else _own_template(tokenizer)
    if template is None:
        what = f"only one chat template, so none of the name {name!r}" if sources else "no chat template of its own"
        raise TemplateError(f"--template {choice}: the tokenizer has {what}; known: {', '.join(STOP_STRINGS)}, a FILE")
    return template


@cache
def _built_in(name: str) -> ChatTemplate:
    return ChatTemplate(name, template_file(name).read_text(encoding="utf-8"), STOP_STRINGS[name])


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, by which some templates mark the answer: here it writes its body.

    transformers tracks these blocks for its own mask; `encode_with_completion_mask` works for templates without them.
    """

    tags = {"generation"}  # noqa: RUF012  (jinja's declaration)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=lineno)


@lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    """A template in the environment that transformers gives it: same whitespace rules, filters and globals."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: object, ensure_ascii: bool = False, **options: Any) -> str:
        # Jinja's own filter escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def at_random(*_: object, **__: object) -> NoReturn:
        raise jinja2.TemplateError("it writes what is drawn at random, so no prompt would be the same twice")

    # Sandboxed: a tokenizer's template is code from whoever made the checkpoint.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.filters["random"] = environment.globals["lipsum"] = at_random
    environment.globals["raise_exception"] = raise_exception
    # What `load_template` read has a time of its own, which hides this one.
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def stop_strings(template: ChatTemplate) -> tuple[str, ...]:
    """The strings that end an answer, besides EOS.

    A tokenizer's own template has those of the built-in one whose text it is, with or without the line that training
    puts in front where the tokenizer adds BOS (`Opening.line`): other programs add no special token of their own.
    """
    source = _OPENING_LINE.sub("", template.source)
    alike = (name for name in STOP_STRINGS if template_file(name).read_text(encoding="utf-8") == source)
    return template.stop or STOP_STRINGS.get(next(alike, ""), ())


# --- prompts with placeholders ---


def fill(template: str, values: Mapping[str, str]) -> str:
    """Replace each `{name}` that has a value, in one pass: braces inside a value are data and stay."""
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)


def render_prompt(
    prompt: str, values: Mapping[str, str], template: ChatTemplate | None, special_tokens: Mapping[str, str] = {}
) -> str:
    """What a model reads for one item: `prompt`, a dialogue with placeholders, filled and written as `template` says.

    The turns are the prompt's own: it is split before it is filled. A closing assistant turn is the beginning of the
    answer. Without a template the filled prompt is taken as it is.
    """
    if template is None:
        return fill(prompt, values)
    messages = [replace(message, content=fill(message.content, values)) for message in parse_dialogue(prompt)]
    prefix = messages.pop().content if messages and messages[-1].role == "assistant" else ""
    return template.render(
        tuple(messages), add_generation_prompt=True, response_prefix=prefix, special_tokens=special_tokens
    )


# --- token ids ---


@dataclass(frozen=True, slots=True)
class MaskedTokens:
    """One conversation, ready to train on."""

    input_ids: list[int]
    """(T,)"""
    completion_mask: list[bool]
    """(T,) True on the last answer and on the EOS or end-of-turn text that closes it."""


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a rendered text: its opening once (see `Opening`), and no EOS but the text's own."""
    return Opening.of(tokenizer).before(text, list(tokenizer.encode(text, add_special_tokens=False)))


def encode_with_completion_mask(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, conversation: Conversation
) -> MaskedTokens:
    """Token ids of a whole conversation, and which of them the model is to learn to write: its last answer."""
    if not conversation or conversation[-1].role != "assistant":
        raise TemplateError("a conversation to train on must end with an assistant message")
    tokens = special_tokens(tokenizer)
    prompt = template.render(conversation[:-1], add_generation_prompt=True, special_tokens=tokens)
    whole = template.render(conversation, special_tokens=tokens)
    if not whole.startswith(prompt):
        raise TemplateError(
            f"chat template {template.name!r} rewrites the turns before an answer, so the answer's tokens cannot be "
            "told apart: pass one that only appends"
        )
    prompt_ids, input_ids = encode_text(tokenizer, prompt), encode_text(tokenizer, whole)
    # Not len(prompt_ids): the whole is encoded jointly, and a token that straddles the seam belongs to the answer.
    pairs = enumerate(zip(prompt_ids, input_ids, strict=False))
    start = next((position for position, (one, other) in pairs if one != other), len(prompt_ids))
    return MaskedTokens(input_ids, [position >= start for position in range(len(input_ids))])
