"""Weights that a running vLLM takes from a trainer: a backend of vLLM's weight-transfer API that needs no GPU.

vLLM's own backends (`nccl`, `ipc`) move weights between GPUs. This one takes the tensors themselves, where the trainer
is in the same process, or the path of a safetensors file, where it is not. vLLM knows it once
`vllm_process.register_receiver` was called, under the name `almost`:

    VLLM_SERVER_DEV_MODE=1 almost-serve policy --model MODEL --weight-transfer-config '{"backend": "almost"}'

On a CPU vLLM packs the weights of every linear layer for its kernels. Its reload (0.31) packs them anew where a layer
has weights in the checkpoint. An output head that is tied to the embedding has none of its own there, and goes on with
the packed copy of the old ones: log-probabilities were off by 1.3 nats. So the heads are packed here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo


@dataclass
class NothingToAgreeOn(WeightTransferInitInfo):
    """What this backend needs to know of the trainer before the first transfer."""


@dataclass
class WeightPart(WeightTransferUpdateInfo):
    """Some weights, or all of them, under the names of the checkpoint: one of the two is set."""

    tensors: Iterable[tuple[str, torch.Tensor]] | None = None
    """The weights themselves: from the same process alone."""
    file: str | None = None
    """A safetensors file that this machine can read."""

    def pairs(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Name and weight, one after the other."""
        if self.tensors is not None:
            return self.tensors
        if not self.file or not Path(self.file).is_file():
            raise ValueError(f"no weights: {self.file} is not a file that the server can read")
        return self._from_file(self.file)

    @staticmethod
    def _from_file(file: str) -> Iterable[tuple[str, torch.Tensor]]:
        from safetensors import safe_open

        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # no mapping
                yield name, weights.get_tensor(name)


class WeightReceiver(WeightTransferEngine[NothingToAgreeOn, WeightPart]):
    """The side of vLLM. A transfer that leaves a weight of the model as it was is refused."""

    init_info_cls = NothingToAgreeOn
    update_info_cls = WeightPart

    def init_transfer_engine(self, init_info: NothingToAgreeOn) -> None:
        """Nothing is opened."""

    def start_weight_update(self) -> None:
        """Layers take weights in the form of the checkpoint from now on."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._missing = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, object]) -> None:
        """Take one part. (The inherited one waits for an accelerator, which may not be there.)"""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: WeightPart) -> None:
        """Load one part."""
        loaded = cast(Any, self.model).load_weights(update_info.pairs())
        self._missing -= set(loaded or ())

    def finish_weight_update(self) -> None:
        """All parts are there.

        Raises:
            ValueError: weights of the model were in none of them.
        """
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            self._pack_heads()
        if self._missing:
            raise ValueError(f"the trainer sent no weights for {', '.join(sorted(self._missing)[:5])}")

    def _pack_heads(self) -> None:
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        for layer in self.model.modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)

    def shutdown(self) -> None:
        """Nothing is open."""
