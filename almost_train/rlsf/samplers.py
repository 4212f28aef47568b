"""Where completions are drawn: by the model in training itself, or by vLLM, in this process or on a server.

A sampler takes the policy's weights anew before each step (`sync`) and then draws the step's completions. vLLM's come
with the log-probability of each token by vLLM, which `certificate` compares with the trainer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from almost_train.rlsf.job import Job
from almost_train.rlsf.rollouts import Sampled, TokenIds, sample, uniforms

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RolloutSampler(Protocol):
    """Draws completions from the policy as it is now."""

    def sync(self, model: PreTrainedModel) -> None:
        """Take the weights of the policy; all processes call it together."""
        ...

    def sample(
        self, model: PreTrainedModel, prompts: Sequence[TokenIds], step: int, rows: Sequence[int]
    ) -> list[Sampled]:
        """One completion of each prompt, in order.

        Args:
            model: the policy in training.
            prompts: token ids.
            step: of the run; with the seed and the row it decides what is drawn.
            rows: number of each prompt in the batch of all processes.
        """
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


class TransformersSampler:
    """The model in training draws by itself."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def sync(self, model: PreTrainedModel) -> None:
        """There is one set of weights."""

    def sample(
        self, model: PreTrainedModel, prompts: Sequence[TokenIds], step: int, rows: Sequence[int]
    ) -> list[Sampled]:
        """See `RolloutSampler`."""
        settings = self._job.settings
        return sample(
            model,
            self._job.tokenizer,
            prompts,
            uniforms(settings.seed, step, rows, settings.max_new_tokens),
            temperature=settings.temperature,
            stop=settings.stop,
            max_rows=settings.sampling_batch_size,
        )

    def close(self) -> None:
        """Nothing is held."""


def make_sampler(job: Job) -> RolloutSampler:
    """The sampler that the settings name. vLLM's model is loaded, or its server asked, here.

    Raises:
        InputError: the server cannot be used.
        ModelError: vLLM cannot run the policy.
    """
    where = job.settings.sampler
    if where == "transformers":
        return TransformersSampler(job)
    from almost_train.rlsf.vllm_sampler import ServerSampler, VLLMSampler

    return VLLMSampler(job) if where == "vllm" else ServerSampler(job)
