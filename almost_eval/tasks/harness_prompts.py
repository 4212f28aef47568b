"""lm-eval's requests of a document, as text: byte for byte what lm-eval's own `hf` model reads with the same flags.

lm-eval draws the examples and builds the turns; the template that writes them is ours (`ChatTemplate`), by the rules
that `apply_chat_template` of transformers follows. With a template, examples are turns of their own unless
`fewshot_as_multiturn` is off, as on lm-eval's command line.

One departure: where a template ends a prompt without whitespace (`Assistant:`), a choice follows after the space that
the template itself would write. lm-eval writes none there, and "Assistant:A" is no text that a model was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from almost_eval.errors import AlmostError, InputError, TemplateError
from almost_eval.tasks.base import Prompting
from almost_eval.types import Conversation, LoglikelihoodRequest, Message

_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


@dataclass(frozen=True, slots=True)
class DocumentChat:
    """How documents become a chat, where there is a template: lm-eval's flags of these names."""

    fewshot_as_multiturn: bool | None = None
    """None is lm-eval's default: True with a template."""
    system_instruction: str | None = None

    def is_multiturn(self, prompting: Prompting) -> bool:
        """Whether examples are turns of their own."""
        return prompting.document_template is not None and self.fewshot_as_multiturn is not False

    def check(self, prompting: Prompting) -> None:
        """Refuse what does not go together.

        Raises:
            InputError: turns without a template.
            TemplateError: a system instruction for a template that takes none.
        """
        if self.fewshot_as_multiturn and prompting.document_template is None:
            raise InputError("--fewshot-as-multiturn: examples are turns only in a template; add --template tokenizer")
        if self.system_instruction and refuses_system(prompting):
            raise TemplateError("--system-instruction: the chat template takes no system message; leave it out")

    def settings(self, prompting: Prompting, has_description: bool) -> dict[str, Any]:
        """Its part of a task's `settings`: what was in force, not what was left to the default.

        Args:
            prompting: with the template.
            has_description: a task begins its prompts with words of its own, a system message in a chat.
        """
        settings: dict[str, Any] = {}
        if prompting.document_template is not None:
            settings["fewshot_as_multiturn"] = self.is_multiturn(prompting)
            if has_description and refuses_system(prompting):
                settings["description"] = "left out, as in lm-eval: the template takes no system message"
        if self.system_instruction:
            settings["system_instruction"] = self.system_instruction
        return settings


def refuses_system(prompting: Prompting) -> bool:
    """Whether the template for documents takes no system message, or leaves it out without a word."""
    if prompting.document_template is None:
        return False
    rule = "a rule of its own kind"
    try:
        return rule not in _render(prompting, (Message("system", rule), Message("user", "U")))
    except TemplateError:
        return True


def lm_eval_instances(
    task: Any, doc: dict[str, Any], shots: int, prompting: Prompting, chat: DocumentChat | None = None
) -> list[Any]:
    """The lm-eval requests (`Instance`s) of one document.

    Raises:
        InputError: the task cannot write it: more examples than there are, a field that its rows have not.
    """
    chat = chat or DocumentChat()
    options: dict[str, Any] = {}
    if prompting.document_template is not None:

        def render(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            turns = tuple(Message(m["role"], m["content"]) for m in messages)
            write = _render if add_generation_prompt else _render_begun
            try:
                return write(prompting, turns)
            except TemplateError:
                if turns[0].role != "system":
                    raise
                return write(prompting, turns[1:])  # as lm-eval does; `DocumentChat.settings` says so

        options = {"apply_chat_template": True, "chat_template": render}
    try:
        context = task.fewshot_context(
            doc,
            num_fewshot=shots,
            system_instruction=chat.system_instruction,
            fewshot_as_multiturn=chat.is_multiturn(prompting),
            gen_prefix=task.doc_to_prefix(doc),
            **options,
        )
        made = task.construct_requests(doc=doc, ctx=context, metadata=(task.task_name, 0, 1), **options)
    except AlmostError:
        raise
    except Exception as error:  # a task's own code may raise anything
        problem = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(
            f"lm-eval cannot write a prompt of {task.task_name} with {shots} examples ({problem}); give fewer --shots, "
            "or mend the task's data"
        ) from None
    instances = made if isinstance(made, list) else [made]
    if options and task.OUTPUT_TYPE == "multiple_choice" and (seam := _seam(prompting)):
        for instance in instances:
            context, continuation = instance.args
            if not (context[-1:].isspace() or continuation[:1].isspace()):
                instance.arguments = (context, seam + continuation)
    return instances


def _render(prompting: Prompting, turns: Conversation) -> str:
    assert prompting.document_template is not None
    return prompting.document_template.render(
        turns, add_generation_prompt=True, special_tokens=prompting.special_tokens
    )


def _render_begun(prompting: Prompting, turns: Conversation) -> str:
    """A chat that ends inside its last turn, by the rule of transformers' `continue_final_message`."""
    assert prompting.document_template is not None
    *before, last = turns
    marked = (*before, Message(last.role, last.content + _TAG))
    text = prompting.document_template.render(marked, special_tokens=prompting.special_tokens)
    if last.content.strip() not in text or _TAG.strip() not in text:
        raise TemplateError(
            f"chat template {prompting.document_template.name!r} does not write the answer's beginning "
            f"{last.content!r}, which the task wants continued; choose another template"
        )
    end = text.rindex(_TAG.strip())
    return text[:end] if text[end:].startswith(_TAG) else text[:end].rstrip()


def _seam(prompting: Prompting) -> str:
    """What a template writes between `Assistant:` and an answer, if that is whitespace."""
    template, tokens = prompting.document_template, prompting.special_tokens
    assert template is not None
    turn = (Message("user", "Q"),)
    prompt = template.render(turn, add_generation_prompt=True, special_tokens=tokens)
    whole = template.render((*turn, Message("assistant", "A")), special_tokens=tokens)
    between = whole.removeprefix(prompt).partition("A")[0] if whole.startswith(prompt) else ""
    return between if between.isspace() else ""


def as_requests(arguments: Sequence[tuple[Any, ...]]) -> list[LoglikelihoodRequest]:
    """(context, continuation) pairs as requests: neighbours with one context travel together."""
    if arguments and len(arguments[0]) == 1:  # a whole text, for its perplexity
        return [LoglikelihoodRequest("", (text,), rolling=True) for (text,) in arguments]
    requests: list[LoglikelihoodRequest] = []
    for context, continuation in arguments:
        if requests and requests[-1].context == context:
            requests[-1] = LoglikelihoodRequest(context, (*requests[-1].continuations, continuation))
        else:
            requests.append(LoglikelihoodRequest(context, (continuation,)))
    return requests
