"""How a judge tells its verdict: in text, as one JSON object, or by the probabilities of a letter (`--verdict`).

The command line reads the names here, so what reads verdicts is imported where it is used.
"""

from __future__ import annotations

from typing import Literal

from almost_eval.errors import InputError
from almost_eval.types import JSONObject

Mode = Literal["text", "json", "logprobs"]

MODES: dict[Mode, str] = {
    "text": "the prompt's own form, read by a parser",
    "json": "one object, held to a schema where the endpoint can",
    "logprobs": "the probabilities of the letter, where the endpoint tells them",
}
"""Name -> what it is."""


def closing_of(mode: Mode, form: str) -> str | None:
    """What stands under the prompt; None where the prompt says all of it."""
    from almost_eval.judge import probabilities, structured

    if mode == "json":
        return structured.CLOSING[form]
    return probabilities.CLOSING if mode == "logprobs" else None


def fields_of(mode: Mode, form: str) -> JSONObject:
    """What each request states besides."""
    from almost_eval.judge import probabilities, structured

    if mode == "json":
        return {structured.RESPONSE_FORMAT: structured.response_format(form)}
    return {"logprobs": True, "top_logprobs": probabilities.TOP} if mode == "logprobs" else {}


def check_mode(mode: Mode, form: str, options: JSONObject) -> None:
    """Refuse what can never give a verdict.

    Raises:
        InputError: probabilities of letters from a prompt of scores; a field that the mode sets itself.
    """
    from almost_eval.judge import structured

    if mode == "logprobs" and form != "letters":
        raise InputError(
            "--verdict logprobs needs a prompt whose verdict is a letter; give --prompt-family mt-bench, or a "
            "--judge-prompt of kind letters"
        )
    if mode == "json" and form not in structured.CLOSING:
        raise InputError(f"--verdict json has no schema for a prompt of kind {form}; give --verdict text")
    own = fields_of(mode, form).keys() - {"top_logprobs"}  # some endpoints take fewer
    if twice := sorted(own & options.keys()):
        raise InputError(f"--judge-options sets {twice[0]}, and so does --verdict {mode}; leave it out there")
