"""How lm-eval's generation tasks have a model write: their `generation_kwargs` as sampling parameters, or a refusal.

lm-eval hands these arguments to its backend as they are. What would change a text and is not done here (beams, a
penalty, the tokens that are drawn from) is refused by name; a value that changes nothing is accepted. One departure: an
answer also ends at the template's own end of turn, which lm-eval writes on after where the EOS is another token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from almost_eval.engines.base import SamplingParams
from almost_eval.errors import InputError
from almost_eval.tasks.base import Prompting

_DONE = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}
_NO_EFFECT = {"use_cache", "return_dict_in_generate", "output_scores", "pad_token_id"}
"""Arguments of transformers' `generate` that change no text."""
_OF_DRAWING = {"top_k", "typical_p", "min_p", "epsilon_cutoff", "eta_cutoff"}
"""Arguments that act on what is drawn, so on no greedy text."""
_OF_BEAMS = {"length_penalty", "early_stopping"}
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "min_tokens": (0,),
    "penalty_alpha": (0,),
    "top_k": (0, -1),
    "typical_p": (1,),
    "min_p": (0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}
"""Argument -> the values at which it does nothing; None is one for each."""


def harness_sampling(name: str, arguments: Mapping[str, Any], repeats: int, prompting: Prompting) -> SamplingParams:
    """Sampling parameters of one of lm-eval's requests.

    Args:
        name: of the task, for the error.
        arguments: `generation_kwargs` as lm-eval hands them to a model.
        repeats: completions for each prompt.
        prompting: with the template, where there is one.

    Raises:
        InputError: an argument that would change the text, and that the engines here do not have.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    options: dict[str, Any] = dict(normalize_gen_kwargs(dict(arguments)))
    draws = bool(options["do_sample"])
    temperature = float(options.get("temperature") or 0.0) if draws else 0.0
    if draws and temperature <= 0:
        raise _refusal(name, "do_sample", True, "samples without a temperature above 0")
    for key, value in options.items():
        if key in _DONE | _NO_EFFECT or value is None or value in _NEUTRAL.get(key, ()):
            continue
        if (key in _OF_DRAWING and not draws) or (key in _OF_BEAMS and options.get("num_beams") in (None, 1)):
            continue
        raise _refusal(name, key, value, "is not done here, and would change what the model writes")
    template = prompting.document_template
    ends = (*options["until"], prompting.special_tokens.get("eos_token"), *(template.stop if template else ()))
    return SamplingParams(
        max_new_tokens=options["max_gen_toks"],
        temperature=temperature,
        top_p=float(options.get("top_p") or 1.0) if draws else 1.0,
        n=repeats,
        stop=tuple(dict.fromkeys(end for end in ends if end)),
        alone=True,
    )


def _refusal(name: str, key: str, value: object, why: str) -> InputError:
    return InputError(
        f"{name} states {key}: {value!r} in its generation_kwargs, which {why}; run this task with lm-eval"
    )
