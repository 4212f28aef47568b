"""Which judge decides, and how it is reached: one set of options, and the judge they name. Imports are late."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from almost_eval.errors import InputError, did_you_mean
from almost_eval.judge.api.connection import Connection
from almost_eval.judge.families import DEFAULT_FAMILY, FAMILY_OF_ONE, FAMILY_OF_TURNS
from almost_eval.types import JSONObject

if TYPE_CHECKING:
    from almost_eval.data.sources import DataSource
    from almost_eval.judge.judges import Judge
    from almost_eval.judge.modes import Mode

DEFAULT_JUDGE = "gpt-6.1-terra"
NANO_JUDGE = "nano"
"""The oracle of the nano world, and the default on its data."""
REWARD_PREFIX = "reward:"
"""Before the checkpoint of a reward model that judges."""
DEFAULT_BASELINE = "nano/vanilla-medium"
"""What a built-in model is compared with."""
MAX_NEW_TOKENS = 1024
"""The official budget of an answer."""
NANO_MAX_NEW_TOKENS = 128
"""The nano world's answers have some twenty words."""

_OF_AN_API = (
    *("judge_base_url", "judge_prompt", "prompt_set", "max_cost", "price_in", "price_out", "price_cached"),
    *("price_reasoning", "price_batch", "max_tokens", "judge_temperature", "reasoning_effort", "judge_options"),
    *("verdict", "batch", "batch_wait"),
)
_RESERVED = {"model": "--judge", "messages": "--judge-prompt", "stream": "", "n": "--repeats or --orders"} | {
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), "--max-tokens"),
    "temperature": "--judge-temperature",
}
"""Fields of a request that `--judge-options` cannot set, and what does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeOptions(Connection):
    """Which judge, and how it is reached. Fields are named as the flags."""

    judge: str | None = None
    """A model of an API, `nano` or `reward:CKPT`; None is `nano` on the nano world's data, else `DEFAULT_JUDGE`."""
    judge_prompt: Path | None = None
    """API: a prompt file, in the place of a prompt set."""
    prompt_family: str | None = None
    """API: a name in `FAMILIES`; None is as the questions are, and the judging."""
    judging: str = "pairwise"
    """`pairwise`, or `single`: a mark for each answer by itself."""
    prompt_set: str | None = None
    """API: `official` or `builtin`; None is as the data are."""
    max_tokens: int | None = None
    """API: tokens of a review, those of its thoughts included; None is the prompt's."""
    judge_temperature: float | None = None
    """API: None is the prompt's."""
    reasoning_effort: str | None = None
    """API: `low`, `medium`, `high`, or what else the judge takes; None says nothing of it."""
    judge_options: str | None = None
    """API: more fields of each request, as a JSON object."""
    reask: bool = False
    """API: whether a review that cannot be read is requested once more."""
    verdict: Mode | None = None
    """API: how the verdict is told, a key of `MODES`; None is `text`."""
    dry_run: bool = False
    """API: nothing will be sent, so no key is needed."""
    dtype: str = "auto"
    """Reward model: see `EngineOptions`, as for the five that follow."""
    device: str = "auto"
    attention: str = "auto"
    allow_pickle: bool = False
    trust_remote_code: bool = False
    allow_unused_weights: bool = False

    @property
    def is_local(self) -> bool:
        """Whether the judge needs no API."""
        return self.judge == NANO_JUDGE or self.is_reward_model

    @property
    def is_reward_model(self) -> bool:
        """Whether a reward model judges."""
        return self.judge is not None and self.judge.startswith(REWARD_PREFIX)


def request_options(text: str | None, effort: str | None) -> JSONObject:
    """The fields that `--judge-options` and `--reasoning-effort` add to each request.

    Raises:
        InputError: no JSON object, or a field that another flag sets.
    """
    try:
        options = json.loads(text or "{}")
    except ValueError as error:
        raise InputError(f"--judge-options is no JSON ({error}); write it as '{{\"top_p\": 0.9}}'") from None
    if not isinstance(options, dict):
        raise InputError("--judge-options must be a JSON object, such as '{\"top_p\": 0.9}'")
    if reserved := next((name for name in options if name in _RESERVED), None):
        instead = f"use {_RESERVED[reserved]}" if _RESERVED[reserved] else "leave it out"
        raise InputError(f"--judge-options cannot set {reserved}; {instead}")
    if effort is not None:
        if "reasoning_effort" in options:
            raise InputError("--judge-options sets reasoning_effort, and so does --reasoning-effort; keep one")
        options["reasoning_effort"] = effort
    return dict(options)


def without_api() -> JSONObject:
    """What sets the options that only a judge behind an API takes back to their defaults, by name."""
    return {field.name: field.default for field in fields(JudgeOptions) if field.name in _OF_AN_API}


def open_judges(
    names: Sequence[str],
    options: JudgeOptions,
    data: DataSource,
    *,
    endpoints: Mapping[str, str] | None = None,
    prices: Mapping[str, str] | None = None,
    several_turns: bool = False,
) -> Judge:
    """One judge, or a panel of several.

    Args:
        names: as `--judge` gives them; none is the default judge.
        options: for all; of those of an API, judges without one take none.
        data: see `open_judge`.
        endpoints: judge -> its endpoint, in the place of `judge_base_url`.
        several_turns: see `open_judge`.
        prices: judge -> USD per million tokens, in and out ("0.5,1.5"), in the place of `price_in` and `price_out`.

    Raises:
        InputError: see `open_judge`; an endpoint or a price of nobody.
    """
    endpoints, prices = endpoints or {}, prices or {}
    for flag, stated in (("--judge-at", endpoints), ("--judge-price", prices)):
        if unknown := next((name for name in stated if name not in names), None):
            raise InputError(f"{flag} {unknown}: there is no such judge; {did_you_mean(unknown, names)}")
    if len(names) < 2 and not endpoints and not prices:
        return open_judge(replace(options, judge=names[0] if names else None), data, several_turns=several_turns)
    if len(names) > 1 and options.judging == "single":
        raise InputError("--judging single takes one --judge; grade with each of them in a run of its own")
    chosen = [_options_of(name, options, endpoints, prices) for name in names]
    shared = not all(one.is_local for one in chosen)  # else an option that nobody takes is refused
    judges = [open_judge(one, data, shared=shared, several_turns=several_turns) for one in chosen]
    if len(judges) == 1:
        return judges[0]
    from almost_eval.judge.panel import Panel

    return Panel(judges)


def _options_of(
    name: str, options: JudgeOptions, endpoints: Mapping[str, str], prices: Mapping[str, str]
) -> JudgeOptions:
    """The options of one judge of several."""
    mine = replace(options, judge=name)
    if mine.is_local:
        for flag, stated in (("--judge-at", endpoints), ("--judge-price", prices)):
            if name in stated:
                raise InputError(f"{flag} {name}: it belongs to a judge behind an API; leave it out")
        return mine
    if name in endpoints:
        mine = replace(mine, judge_base_url=endpoints[name])
    if name in prices:
        try:
            price_in, price_out = (float(price) for price in prices[name].split(","))
        except ValueError:
            raise InputError(
                f"--judge-price {name}={prices[name]} is not two numbers; write USD per million tokens in and out, "
                f"such as {name}=0.5,1.5"
            ) from None
        mine = replace(mine, price_in=price_in, price_out=price_out)
    return mine


def answer_budget(data_name: str) -> int:
    """Tokens that an answer may take where no flag says so, on the data of this name."""
    return NANO_MAX_NEW_TOKENS if data_name == "nano" else MAX_NEW_TOKENS


def open_judge(options: JudgeOptions, data: DataSource, *, shared: bool = False, several_turns: bool = False) -> Judge:
    """The judge that the options name, without weights and without a request.

    Args:
        options: see there.
        data: where official prompts are looked for.
        shared: the options are those of several judges, of which this one takes what is its own.
        several_turns: a question has more than one: Vicuna's prompts, the default for one, know nothing of a second.

    Raises:
        InputError: an option that this judge does not take; whatever the judge refuses.
    """
    name = options.judge or (NANO_JUDGE if data.name == "nano" else DEFAULT_JUDGE)
    unused = next((flag for flag in _OF_AN_API if getattr(options, flag) not in (None, False)), None)
    if unused and not shared and (name == NANO_JUDGE or options.is_reward_model):
        raise InputError(f"--{unused.replace('_', '-')} belongs to a judge behind an API, not to {name}; leave it out")
    if name == NANO_JUDGE:
        from almost_eval.judge.local import NanoJudge

        return NanoJudge()
    if options.is_reward_model:
        if options.judging == "single":
            raise InputError(
                f"--judging single needs marks from 1 to 10, and {name} gives raw rewards, which have no scale; "
                "compare two systems, or name another --judge"
            )
        from almost_eval.judge.local import RewardJudge
        from almost_eval.rewards.hf import HFRewardModel

        model = HFRewardModel(
            name.removeprefix(REWARD_PREFIX),
            dtype=options.dtype,
            device=options.device,
            attention=options.attention,
            allow_pickle=options.allow_pickle,
            trust_remote_code=options.trust_remote_code,
            allow_unused_weights=options.allow_unused_weights,
        )
        return RewardJudge(model, name)
    from almost_eval.judge.model_judge import ModelJudge
    from almost_eval.judge.probabilities import MAX_TOKENS
    from almost_eval.judge.prompts import load_judge_prompts

    family = options.prompt_family
    if family is None:
        family = DEFAULT_FAMILY if not several_turns else FAMILY_OF_TURNS
        family = FAMILY_OF_ONE if options.judging == "single" else family
    prompts = load_judge_prompts(family, options.prompt_set, data, file=options.judge_prompt)
    if prompts.n_answers != (1 if options.judging == "single" else 2):
        shows = "one answer by itself" if prompts.n_answers == 1 else "two answers"
        raise InputError(
            f"the prompts {prompts.name} are about {shows}, and --judging is {options.judging}; change one"
        )
    prompts = replace(prompts, verdict=options.verdict or "text")
    if options.verdict == "logprobs":
        prompts = replace(prompts, max_tokens=MAX_TOKENS)
    if options.max_tokens is not None:
        prompts = replace(prompts, max_tokens=options.max_tokens)
    if options.judge_temperature is not None:
        prompts = replace(prompts, temperature=options.judge_temperature)
    if options.batch and "," in (options.judge_base_url or ""):
        raise InputError("--batch goes to one endpoint, which works on it by itself; give one --judge-base-url")
    if options.batch_wait is not None and not options.batch:
        raise InputError("--batch-wait goes with --batch; add it, or leave both out")
    fields = request_options(options.judge_options, options.reasoning_effort)
    return ModelJudge(name, prompts, options, options=fields, reask=options.reask, dry=options.dry_run)
