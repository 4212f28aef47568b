"""Which judge decides, and how it is reached: one set of options, and the judge they name. Imports are late."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from almost_eval.errors import InputError
from almost_eval.judge.families import DEFAULT_FAMILY

if TYPE_CHECKING:
    from almost_eval.data.sources import DataSource
    from almost_eval.judge.judges import Judge

DEFAULT_JUDGE = "gpt-4"
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

_OF_AN_API = ("judge_base_url", "judge_prompt", "prompt_set", "max_cost", "price_in", "price_out")


@dataclass(frozen=True, slots=True)
class JudgeOptions:
    """Which judge, and how it is reached. Fields are named as the flags."""

    judge: str | None = None
    """A model of an API, `nano` or `reward:CKPT`; None is `nano` on the nano world's data, else `DEFAULT_JUDGE`."""
    judge_base_url: str | None = None
    """API: the endpoint, up to and including `/v1`; None is `OPENAI_BASE_URL`, else OpenAI's."""
    judge_prompt: Path | None = None
    """API: a prompt file, in the place of a prompt set."""
    prompt_family: str = DEFAULT_FAMILY
    """API: a name in `FAMILIES`."""
    prompt_set: str | None = None
    """API: `official` or `builtin`; None is as the data are."""
    concurrency: int = 32
    """API: requests on their way at a time, at most."""
    timeout: float = 120.0
    """API: seconds that one review may take."""
    max_cost: float | None = None
    """API: USD that all reviews may cost; None is no bound."""
    price_in: float | None = None
    """API: USD per million prompt tokens; None is the table's."""
    price_out: float | None = None
    """API: USD per million completion tokens."""
    reask: bool = False
    """API: whether a review that cannot be read is requested once more."""
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
    def is_reward_model(self) -> bool:
        """Whether a reward model judges."""
        return self.judge is not None and self.judge.startswith(REWARD_PREFIX)


def answer_budget(data_name: str) -> int:
    """Tokens that an answer may take where no flag says so, on the data of this name."""
    return NANO_MAX_NEW_TOKENS if data_name == "nano" else MAX_NEW_TOKENS


def open_judge(options: JudgeOptions, data: DataSource) -> Judge:
    """The judge that the options name, without weights and without a request.

    Raises:
        InputError: an option that this judge does not take; whatever the judge refuses.
    """
    name = options.judge or (NANO_JUDGE if data.name == "nano" else DEFAULT_JUDGE)
    unused = next((flag for flag in _OF_AN_API if getattr(options, flag) is not None), None)
    if unused and (name == NANO_JUDGE or options.is_reward_model):
        raise InputError(f"--{unused.replace('_', '-')} belongs to a judge behind an API, not to {name}; leave it out")
    if name == NANO_JUDGE:
        from almost_eval.judge.local import NanoJudge

        return NanoJudge()
    if options.is_reward_model:
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
    from almost_eval.judge.judges import Connection, ModelJudge
    from almost_eval.judge.prompts import load_judge_prompts

    prompts = load_judge_prompts(options.prompt_family, options.prompt_set, data, file=options.judge_prompt)
    connection = Connection(
        base_url=options.judge_base_url,
        timeout=options.timeout,
        concurrency=options.concurrency,
        max_cost=options.max_cost,
        price_in=options.price_in,
        price_out=options.price_out,
    )
    return ModelJudge(name, prompts, connection, reask=options.reask, dry=options.dry_run)
