"""What every algorithm of RLSF shares: the registry, the settings, the checked job, and how a policy is saved."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

from almost_eval.engines.build import PACKAGES
from almost_eval.errors import InputError, MissingDependencyError
from almost_eval.models.adapters import CONFIG, WEIGHTS
from almost_eval.models.chat import ChatTemplate
from almost_eval.models.checkpoint import Checkpoint
from almost_eval.models.endpoints import EndpointAddress
from almost_eval.models.loading import pick_device
from almost_eval.progress import Progress
from almost_eval.types import JSONObject
from almost_train.common.config import MOST_RATE, MOST_SEED, option
from almost_train.common.lora import ADAPTER, LoraSettings
from almost_train.common.merge import merge
from almost_train.common.processes import WORK, world_size
from almost_train.common.resume import replaced_folder
from almost_train.common.special_text import SKIP_SPECIAL

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from almost_eval.rewards.hf import HFRewardModel
    from almost_train.rlsf.rollouts import RolloutPrompt

ALGORITHMS = {
    "ppo": "almost_train.rlsf.loop:PPO",
    "rloo": "almost_train.rlsf.trl:RLOO",
    "grpo": "almost_train.rlsf.trl:GRPO",
}
"""Name -> import path of its `Algorithm`."""

COMMON_SETTINGS = frozenset(
    "algorithm steps batch_size micro_batch_size learning_rate schedule warmup_ratio weight_decay max_grad_norm "
    "max_new_tokens temperature stop eos_penalty clip kl_coefficient kl_limit guard_window seed device bf16 "
    "reward_dtype gradient_checkpointing save_every save_minutes samples_every keep_every keep_state lora_rank "
    "lora_alpha lora_targets lora_dropout quantize merge skip_special".split()
)
"""Settings that every algorithm takes."""
SAMPLER_SETTINGS = frozenset(
    "sampler sampler_url weight_transfer sampler_memory sampler_sleep parity_limit on_parity importance_cap".split()
)
"""Settings of an algorithm that samples by `samplers.make_sampler`."""


@dataclass(frozen=True, slots=True)
class RLSFSettings(LoraSettings):
    """How the policy is trained. Sizes are in completions, over all processes."""

    algorithm: str = option("ppo", "PPO (own loop), or RLOO or GRPO (TRL's).", choices=tuple(ALGORITHMS))
    steps: int = option(500, "Batches of completions to sample and learn from.", least=1)
    batch_size: int = option(64, "Completions sampled in a step.", least=1)
    mini_batch_size: int = option(16, "Completions in one update (PPO; RLOO and GRPO make one update a step).", least=1)
    micro_batch_size: int = option(4, "Completions in one forward and backward pass of a process.", least=1)
    sampling_batch_size: int = option(32, "Completions sampled at once by a process (PPO).", least=1)
    num_generations: int = option(4, "Completions of one prompt that are compared (RLOO, GRPO).", least=2)
    loss_type: str = option(
        "dapo",
        "How the loss of a token counts (GRPO): all tokens of the batch alike (dapo), all completions alike (grpo), or "
        "over max_new_tokens, rewards not divided by the group's deviation (dr_grpo).",
        choices=("dapo", "grpo", "dr_grpo"),
    )
    ppo_epochs: int = option(4, "Passes over a batch (PPO).", least=1)
    learning_rate: float = option(1e-6, "Peak, AdamW, of the policy.", above=0, most=MOST_RATE)
    value_learning_rate: float | None = option(
        None, "Of the value model; as the policy's where not given.", above=0, most=MOST_RATE
    )
    schedule: str = option("constant", "Learning rate after warm-up.", choices=("constant", "linear", "cosine"))
    warmup_ratio: float = option(
        0.03, "Share of the updates, rounded up, over which the learning rate rises.", least=0, most=1
    )
    weight_decay: float = option(0.0, "AdamW's.", least=0)
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.", above=0)
    max_new_tokens: int = option(256, "Longest completion, tokens.", least=1)
    temperature: float = option(1.0, "Of sampling, and of every log-probability.", above=0)
    stop: tuple[str, ...] = option(
        ("\n\nHuman:", "\n\nAssistant:"), "Text that ends a completion, besides EOS; it earns the penalty."
    )
    clip: float = option(0.2, "Probability ratios count up to 1 +- this.", above=0)
    value_clip: float = option(0.2, "A value may usefully move by this in a step (PPO).", above=0)
    gamma: float = option(1.0, "Discount of a token (PPO).", least=0, most=1)
    gae_lambda: float = option(0.95, "Of generalised advantage estimation (PPO).", least=0, most=1)
    whiten_advantages: bool = option(True, "Scale advantages to mean 0, deviation 1 over a batch (PPO, RLOO).")
    kl_coefficient: float = option(0.1, "Reward for a nat of KL to the SFT policy, taken off.", least=0)
    kl_controller: str = option(
        "adaptive", "Keep KL near its target, or the coefficient (PPO).", choices=("adaptive", "fixed")
    )
    kl_target: float = option(6.0, "Nats a completion (PPO, adaptive).", above=0)
    kl_horizon: float = option(10000.0, "Completions over which the coefficient may change by a fifth.", above=0)
    kl_limit: float = option(50.0, "Stop where the KL of a completion is beyond this, nats.", above=0)
    guard_window: int = option(
        20, "Stop where over so many steps the reward rises and the length-adjusted reward falls; 0: never.", least=0
    )
    normalise_rewards: str = option(
        "running",
        "Shift and scale rewards by mean and deviation: so far, or of the first batch, the SFT policy's (PPO).",
        choices=("running", "sft", "none"),
    )
    eos_penalty: float = option(1.0, "Taken off the (normalised) reward of a completion without EOS.", least=0)
    seed: int = option(0, "Of prompt order, sampling and mini-batches.", least=0, most=MOST_SEED)
    bf16: bool = option(False, "Compute in bfloat16; master weights stay float32.")
    reward_dtype: str = option(
        "auto",
        "Of the reward model, which each process holds whole; auto: float32 on a CPU, elsewhere its checkpoint's.",
        choices=("auto", "float32", "bfloat16"),
    )
    gradient_checkpointing: bool = option(False, "Compute activations twice, keep few of them.")
    device: str = option("auto", "auto, cpu, cuda, cuda:1.")
    save_every: int = option(20, "Steps between checkpoints.", least=1)
    save_minutes: float = option(10.0, "Minutes after which one is saved anyway; 0 for none.", least=0)
    keep_state: bool = option(True, "Keep the last checkpoint in state/: the same command with more --steps goes on.")
    samples_every: int = option(10, "Steps between entries of samples.jsonl.", least=1)
    keep_every: int = option(
        0, "Steps between policies kept in policies/, each a whole model, for almost-eval tax; 0: none.", least=0
    )
    skip_special: bool = option(False, f"{SKIP_SPECIAL[0].upper()}{SKIP_SPECIAL[1:]}.")
    sampler: str = option(
        "transformers",
        "What draws completions: the model itself, vLLM in this process, or a vLLM server.",
        choices=("transformers", "vllm", "vllm-server"),
    )
    sampler_url: str | None = option(None, "Address of the vLLM server: http://127.0.0.1:8000.")
    weight_transfer: str = option(
        "file",
        "How weights reach the server: as a safetensors file that it can read, or by NCCL between GPUs.",
        choices=("file", "nccl"),
    )
    sampler_memory: float | None = option(
        None, "Share of the GPU that vLLM takes in this process; its own choice if not given.", above=0, most=1
    )
    sampler_sleep: bool = option(False, "vLLM gives its GPU memory back while the policy learns.")
    parity_limit: float = option(
        0.01, "Nats by which log p of a sampled token may differ between vLLM and the model in training.", least=0
    )
    on_parity: str = option(
        "correct", "Beyond the limit: weight by truncated importance, or stop.", choices=("correct", "stop")
    )
    importance_cap: float = option(2.0, "The largest importance weight of a token (RLOO: of a completion).", least=1)


@dataclass(frozen=True, slots=True)
class Job:
    """What a run trains and with what, checked; no weight is loaded yet."""

    settings: RLSFSettings
    prompts: list[RolloutPrompt]
    prompts_too_long: list[str]
    """Ids of prompts that leave no room for an answer."""
    policy: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    reward: HFRewardModel
    output: Path
    processes: int
    is_first: bool
    """Whether this process is the one that writes."""
    progress: Progress
    prompts_special: int = 0
    """Prompts that were left out because their texts hold special tokens."""

    @property
    def work(self) -> Path:
        """Checkpoints to resume from; removed at the end."""
        return self.output / WORK

    def keeps(self, step: int) -> bool:
        """Whether `keep_every` keeps the policy after `step` steps; the last one is kept anyway."""
        every = self.settings.keep_every
        return bool(every and 0 < step < self.settings.steps and step % every == 0)

    def kept(self, step: int) -> Path:
        """The folder of the policy that is kept after `step` steps."""
        return self.output / "policies" / f"step-{step:06d}"


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A way to train the policy: what a path in `ALGORITHMS` names."""

    train: Callable[[Job], JSONObject]
    """Runs to the end, saves the policy with `save_policy`, returns metrics."""
    own_settings: frozenset[str]
    """Settings that it takes besides `COMMON_SETTINGS`. All others are refused where they are not at their default."""
    update_size: Callable[[RLSFSettings], int]
    """Completions of one update. Raises InputError for settings that do not go together."""
    checkpoints: Callable[[Path], list[Path]] = lambda _: []
    """Whole checkpoints in a folder `.work`, oldest first; by default it keeps none."""

    def takes(self, setting: str) -> bool:
        """Whether a setting changes what it does."""
        return setting in COMMON_SETTINGS or setting in self.own_settings


def load_algorithm(name: str) -> Algorithm:
    """The algorithm of a name in `ALGORITHMS`. Imports torch, and no TRL."""
    module, _, attribute = ALGORITHMS[name].partition(":")
    return cast(Algorithm, getattr(importlib.import_module(module), attribute))


def check_settings(settings: RLSFSettings, *, here: bool = True) -> Algorithm:
    """The algorithm that the settings name, once it is known that it takes them all.

    Args:
        settings: of the run.
        here: whether this machine is to run it: its packages, processes and GPU count then.

    Raises:
        InputError: a setting of another algorithm, or settings that do not go together.
        MissingDependencyError: vLLM is to sample here, and is not installed.
    """
    algorithm = load_algorithm(settings.algorithm)
    foreign = [
        field.name
        for field in fields(settings)
        if getattr(settings, field.name) != field.default and not algorithm.takes(field.name)
    ]
    if foreign:
        takers = [name for name in ALGORITHMS if any(load_algorithm(name).takes(setting) for setting in foreign)]
        raise InputError(
            f"algorithm {settings.algorithm} takes no {', '.join(foreign)} (of {', '.join(takers)}); leave it out, or "
            "choose another algorithm"
        )
    refuse_empty_stop(settings.stop)
    algorithm.update_size(settings)
    _check_sampler(settings)
    if here and settings.sampler != "transformers":
        _check_sampler_here(settings)
    return algorithm


def refuse_empty_stop(stop: Collection[str]) -> None:
    """Raises InputError where an empty text would end every completion at once."""
    if "" in stop:
        raise InputError("an empty stop string would end every completion at once; leave it out")


def _check_sampler(settings: RLSFSettings) -> None:
    default, where = RLSFSettings(), settings.sampler
    of_vllm = ("parity_limit", "on_parity", "importance_cap")
    in_process, on_server = ("sampler_memory", "sampler_sleep"), ("sampler_url", "weight_transfer")
    foreign = {"transformers": (*of_vllm, *in_process, *on_server), "vllm": on_server, "vllm-server": in_process}[where]
    if names := [name for name in foreign if getattr(settings, name) != getattr(default, name)]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise InputError(f"--sampler {where} takes no {flags}; leave it out, or choose another --sampler")
    if where == "transformers":
        return
    if settings.is_quantized:
        raise InputError(f"--sampler {where} takes no --quantize: vLLM is sent whole weights, not packed ones")
    if settings.temperature > 2:
        raise InputError(f"vLLM takes no temperature above 2, not {settings.temperature:g}; use --sampler transformers")
    if where == "vllm-server":
        if not settings.sampler_url:
            raise InputError(
                "--sampler vllm-server needs --sampler-url, the server's address, as http://127.0.0.1:8000"
            )
        EndpointAddress.parse(settings.sampler_url, "--sampler-url", "http://127.0.0.1:8000")


def _check_sampler_here(settings: RLSFSettings) -> None:
    package, line = PACKAGES["vllm"]
    if find_spec(package) is None:
        raise MissingDependencyError(
            f"--sampler {settings.sampler} needs the package {package!r}; install it with: {line}"
        )
    if settings.sampler == "vllm" and world_size() > 1:
        raise InputError("--sampler vllm is for one process: vLLM would take its group over; use --sampler vllm-server")
    if (settings.sampler_sleep or settings.weight_transfer == "nccl") and pick_device("auto") == "cpu":
        raise InputError("--sampler-sleep and --weight-transfer nccl need a GPU, and there is none; leave them out")


def save_policy(job: Job, model: PreTrainedModel | Path, step: int | None = None) -> None:
    """Write `policy/`, or that of a step, whole or not at all: weights, configuration, tokenizer and chat template.

    Args:
        job: of the run.
        model: the policy; or a folder with its adapter, which is copied. With `bf16` a model whose weights are trained
            is converted itself: pass a copy of one that goes on training.
        step: of a policy on the way; None for the last.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    folder = job.output / "policy" if step is None else job.kept(step)
    merged = folder if step is None and job.settings.merge else None
    folder = job.output / ADAPTER if merged else folder
    with replaced_folder(folder, job.work / "policy") as scratch:
        if isinstance(model, Path):
            for file in (CONFIG, WEIGHTS):
                shutil.copyfile(model / file, scratch / file)
        else:
            if job.settings.bf16 and not job.settings.lora_rank:
                model.bfloat16()
            model.save_pretrained(scratch)
        (scratch / "README.md").unlink(missing_ok=True)  # PEFT's, of empty headings
        job.tokenizer.save_pretrained(scratch)
    if merged:
        shutil.rmtree(merged, ignore_errors=True)
        merge(str(folder), merged, just_trained=True)
