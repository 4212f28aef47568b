"""Rewards by vLLM in this process: its pooling runner on the token ids that transformers would get.

By default vLLM puts a sigmoid on a one-label classifier. Here that is switched off: rewards are raw logits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property

import numpy as np

from almost_eval.engines.vllm_process import LLM, HoldsLLM, VLLMOptions, load, run, with_adapter
from almost_eval.errors import ModelError
from almost_eval.models.adapters import refuse_for_vllm
from almost_eval.models.chat import ChatTemplate
from almost_eval.models.checkpoint import Checkpoint, refuse_stray_weights
from almost_eval.rewards.base import CheckpointRewardModel
from almost_eval.types import Conversation, JSONObject


class VLLMRewardModel(HoldsLLM, CheckpointRewardModel):
    """A sequence classifier with one label on vLLM. Config and tokenizer load at once, weights on first use.

    Args:
        template: see `HFRewardModel`. All other arguments: see `VLLMEngine`.

    Raises:
        InputError: see `CheckpointRewardModel`; or a size below 1.
        ModelError: see `CheckpointRewardModel`; raised on first use where vLLM cannot run the model.
    """

    def __init__(
        self,
        model: str | Checkpoint,
        *,
        template: ChatTemplate | str | None = None,
        dtype: str = "auto",
        max_length: int | None = None,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        quantization: str | None = None,
        gpu_memory: float | None = None,
        kv_cache_gib: float | None = None,
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
        allow_unused_weights: bool = False,
    ) -> None:
        parallel = (tensor_parallel_size, pipeline_parallel_size)
        self.options = VLLMOptions(batch_size, batch_tokens, *parallel, gpu_memory, kv_cache_gib, quantization)
        super().__init__(
            model,
            template=template,
            dtype=dtype,
            device="auto",
            max_length=max_length,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            allow_unused_weights=allow_unused_weights,
        )
        if self.checkpoint.adapter:
            refuse_for_vllm(self.checkpoint.adapter, scores=True)
        refuse_stray_weights(self.checkpoint)
        self.options.check_split(self.checkpoint)

    def settings(self) -> JSONObject:
        """What belongs in a run's spec; see `HFEngine.settings`."""
        return {**self.options.settings(self.dtype, self.context_length), **self.identity()}

    @cached_property
    def llm(self) -> LLM:
        """The `vllm.LLM`, loaded.

        Raises:
            ModelError: vLLM cannot run this model here.
        """
        options = self.options.for_loading(
            self.dtype, self.context_length, trust_remote_code=self._trust_remote_code
        ) | {
            "runner": "pooling",
            "enable_prefix_caching": None if self.framed else True,  # an encoder reads both ways: vLLM decides
        }
        if self.checkpoint.adapter:
            # The base is a language model: vLLM makes room for the head that the adapter brings.
            labels = {"num_labels": 1, "problem_type": "regression"}
            options |= {"convert": "classify", "hf_overrides": labels}
        return self._hold(load(self.checkpoint.path, with_adapter(options, self.checkpoint.adapter)))

    def stream(
        self,
        conversations: Sequence[Conversation],
        wanted: Collection[int] | None = None,
        sample_of: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, float]]:
        """Yield (index, reward) of each wanted conversation as soon as it is known.

        Unlike `HFRewardModel`, vLLM forms its batches from what is wanted: a resumed run is equal up to rounding.

        Raises:
            InputError: see `distinct`; raised before any weight is loaded.
            ModelError: vLLM cannot run the model, or it gives more than one number for a text.
        """
        owners = self.distinct(conversations)
        self.warnings = self.notes
        wanted = frozenset(range(len(conversations)) if wanted is None else wanted)
        texts = {ids: mine for ids, indices in owners.items() if (mine := [i for i in indices if i in wanted])}
        if not texts:
            return
        import vllm

        names = {str(number): ids for number, ids in enumerate(texts)}
        requests = {
            name: (np.array(ids, dtype=np.int32), vllm.PoolingParams(task="classify", use_activation=False))
            for name, ids in names.items()
        }
        for name, output in run(self.llm, requests, self.checkpoint.path, self.checkpoint.adapter):
            values = output.outputs.data.float().flatten().tolist()
            if len(values) != 1:
                raise ModelError(
                    f"{self.checkpoint.path} gives {len(values)} numbers for a text; a reward model gives one"
                )
            yield from ((index, values[0]) for index in texts[names[name]])
