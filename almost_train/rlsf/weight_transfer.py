"""The policy's weights on their way to vLLM: the trainer's side of vLLM's weight-transfer API.

- `HandingSender`: to vLLM in this process. The tensors themselves are passed.
- `FileSender`: to a server that reads the same files. One safetensors file a transfer, removed when it was read.
- vLLM's own `nccl` engine: to a server on other GPUs.

The first two are received by `almost_eval.engines.vllm_weights`. All send whole weights under the checkpoint's names: a
LoRA is merged on the way, into a copy of one weight at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    materialize_full_tensor,
)

from almost_eval.engines.vllm_process import RECEIVER
from almost_eval.errors import InputError


class PolicyWeights(WeightSource):
    """Every weight of a policy by its name in the checkpoint, with a LoRA merged in.

    Args:
        model: a causal LM of transformers, or one with an adapter of PEFT.

    Raises:
        InputError: the weights are spread out in a way that is not gathered here.
    """

    def __init__(self, model: nn.Module) -> None:
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise InputError("weights that DeepSpeed has spread out (ZeRO-3) are not sent to vLLM; use FSDP or ZeRO-2")
        self._model = model

    def metadata(self) -> list[ParamMeta]:
        """Name, number format and whole shape of each."""
        return [ParamMeta(name, p.dtype, tuple(p.shape)) for name, p, _ in self._parameters()]

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Name and weight, on the device where it is; what FSDP has spread out is gathered, one at a time."""
        for name, parameter, layer in self._parameters():
            weight: Tensor = materialize_full_tensor(parameter.detach())
            if layer is not None:
                delta = layer.get_delta_weight("default")
                weight = (weight.float() + delta.float()).to(weight.dtype)
            yield name, weight

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter, Any]]:
        """Name in the checkpoint, parameter, and PEFT's layer around it or None."""
        layers = dict(self._model.named_modules())
        for name, parameter in self._model.named_parameters():
            if ".lora_" in name:
                continue
            plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            around, inner, rest = name.rpartition(".base_layer.")
            adapted = layers[around] if inner and rest == "weight" else None
            yield plain, parameter, adapted


@dataclass
class HandingInit(TrainerInitInfo):
    """To vLLM in this process."""

    backend: ClassVar[str] = RECEIVER


@dataclass
class FileInit(TrainerInitInfo):
    """To a server that reads the files of this machine."""

    backend: ClassVar[str] = RECEIVER

    folder: Path
    """Where the file is written; it has room for the weights once."""


class HandingSender(TrainerWeightTransferEngine[HandingInit]):
    """Passes the tensors themselves."""

    init_info_cls = HandingInit

    @classmethod
    def trainer_init(
        cls, init_info: HandingInit, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> HandingSender:
        """See vLLM's base class."""
        client.init_weight_transfer_engine({})
        return cls(client=client, source=source, is_sender=init_info.is_sender)

    def send_weights(self) -> None:
        """One transfer."""
        self.client.start_weight_update()
        self.client.update_weights({"tensors": self.source})
        self.client.finish_weight_update()


class FileSender(TrainerWeightTransferEngine[FileInit]):
    """Passes the path of a safetensors file, whose tensors are those of rank 0."""

    init_info_cls = FileInit
    folder: Path

    @classmethod
    def trainer_init(
        cls, init_info: FileInit, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> FileSender:
        """See vLLM's base class."""
        if init_info.is_sender:
            client.init_weight_transfer_engine({})
        sender = cls(client=client, source=source, is_sender=init_info.is_sender)
        sender.folder = init_info.folder
        return sender

    def send_weights(self) -> None:
        """One transfer; every process takes part in gathering the weights, the first one sends them."""
        from safetensors.torch import save_file

        assert self.source is not None
        weights: dict[str, Tensor] = {}
        for name, weight in self.source:
            if self.is_sender:
                weights[name] = weight.cpu().contiguous()
        if not self.is_sender:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "weights.safetensors"
        try:
            save_file(weights, file)
            weights.clear()
            self.client.start_weight_update()
            self.client.update_weights({"file": str(file.resolve())})
            self.client.finish_weight_update()
        finally:
            file.unlink(missing_ok=True)


class ToldClient:
    """The four methods that vLLM's senders call. `tell` takes the name of each, and the object that goes with it."""

    def __init__(self, tell: Callable[..., object]) -> None:
        self._tell = tell

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Before the first transfer."""
        self._tell("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """A transfer begins."""
        self._tell("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """A part of it."""
        self._tell("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """It is over."""
        self._tell("finish_weight_update")
