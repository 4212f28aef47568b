"""The memory of a training step, measured without a weight: the step runs on tensors that have shapes and no content.

torch's FakeTensorMode computes shapes alone, so the very code of a step (transformers' layers, PEFT, TRL's head, AdamW)
runs in seconds for any architecture. A dispatch mode sees every tensor that comes and goes, the ones that autograd
saves included, and adds up the bytes of their storages. So no formula for activations is needed, and a new architecture
needs no entry. What a kernel allocates inside itself is not seen.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MAPPED = 32 * 2**20
"""Bytes of a block from which on glibc maps it for itself, and gives it back when it is freed (mallopt(3))."""


class Meter(TorchDispatchMode):
    """Bytes of all tensors that are made while it is on: `live` now, and `peak`, the most since `restart`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.mapped = 0
        """Of what is live, in blocks of `MAPPED` bytes or more."""
        self.mapped_at_peak = 0
        self._storages: set[int] = set()

    def restart(self) -> None:
        """Look for the peak from here on."""
        self.peak, self.mapped_at_peak = self.live, self.mapped

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # A number is asked of a tensor without content. As a truth value (is there no padding?) it is false.
            return False if args[0].dtype == torch.bool else 1
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._hold(leaf.untyped_storage())
        return output

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self.live += size
        self.mapped += size if size >= MAPPED else 0
        if self.live > self.peak:
            self.restart()
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size
        self.mapped -= size if size >= MAPPED else 0


@contextmanager
def measured() -> Iterator[Meter]:
    """Inside, tensors have no content and are counted; a model that is built here costs no memory."""
    meter = Meter()
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # torch's own autograd does
    with FakeTensorMode(allow_non_fake_inputs=True), meter, _fused_attention(), _new_parameters(), _new_copies():
        yield meter


@contextmanager
def _new_parameters() -> Iterator[None]:
    """Inside, `module.to` puts new parameters in the place of the old: torch would swap, which tensors without content
    do not allow. PEFT moves its matrices to the base's device so.
    """
    own = nn.Module._apply

    def apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in module.children() if recurse else ():
            apply(child, change)
        for name, old in module._parameters.items():
            if old is not None and (new := change(old)) is not old:
                module._parameters[name] = nn.Parameter(new.detach(), old.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else change(buffer)
        return module

    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = own  # type: ignore[method-assign]


@contextmanager
def _new_copies() -> Iterator[None]:
    """Inside, `copy.deepcopy` of a tensor makes a new one: torch 2.13 copies the storage that has no content, and where
    `tensor.data` is set next, the heap is damaged. PEFT copies a head and casts it so.
    """

    def copied(tensor: FakeTensor, memo: dict[int, Any]) -> Tensor:
        copy: Tensor = torch.empty_like(tensor.detach())
        if isinstance(tensor, nn.Parameter):
            copy = nn.Parameter(copy, tensor.requires_grad)
        memo[id(tensor)] = copy
        return copy

    FakeTensor.__deepcopy__ = copied  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del FakeTensor.__deepcopy__  # what it inherits stands again


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Inside, attention keeps what a fused kernel keeps: without content torch would take the path that keeps all
    weights (T, T). No function mode: the backward pass, which recomputes under checkpointing, would not see it.
    """
    own = nn.functional.scaled_dot_product_attention

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: object, **__: object
    ) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = attn_mask.to(query.dtype)  # the kernels add it
        output: Tensor = _Attention.apply(query, key, value, attn_mask)
        return output

    nn.functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = own


class _Attention(torch.autograd.Function):
    """What FlashAttention keeps for the backward pass: inputs, output, and a float32 number for each row of weights
    (arXiv 2205.14135, section 3.1).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))  # (B, H, T, D)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)  # (B, H, T)
        ctx.save_for_backward(query, key, value, mask, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


# --- sums over models ---


def size_of(*models: nn.Module, trained: bool = False, least: int = 0) -> int:
    """Bytes of the parameters and buffers, tied ones once; with `trained` of the trained parameters alone.

    Args:
        models: whose.
        trained: leave out what is not trained.
        least: leave out tensors of fewer bytes.
    """
    sizes: dict[int, int] = {}
    for model in models:
        tensors: list[Tensor] = [p for p in model.parameters() if p.requires_grad or not trained]
        tensors += [] if trained else list(model.buffers())
        sizes |= {id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}
    return sum(size for size in sizes.values() if size >= least)


def count(model: nn.Module, *, trained: bool = False) -> int:
    """Parameters, tied ones once; with `trained` those that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def optimiser_size(*models: nn.Module, optim: str) -> int:
    """Bytes of what an optimiser keeps of the trained parameters; see `almost_train.common.hardware.OPTIMIZERS`.

    AdamW keeps two moments of a number, in float32. bitsandbytes holds them in a byte each, with a float32 scale for
    every 256 numbers; tensors of fewer than 4,096 numbers stay in float32 (its `Optimizer2State`). Adafactor keeps of a
    matrix a float32 number for each row and column (arXiv 1804.04235, section 3), of a vector one for each entry.
    """
    trained = [p for model in models for p in model.parameters() if p.requires_grad]
    if optim == "adafactor":
        return sum(
            4 * (p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.dim() > 1 else p.numel()) for p in trained
        )
    if optim.endswith("8bit"):
        return sum(8 * p.numel() if p.numel() < 4096 else 2 * p.numel() + 8 * -(-p.numel() // 256) for p in trained)
    return 8 * sum(p.numel() for p in trained)


def step_peak(
    meter: Meter,
    models: list[nn.Module],
    update: Callable[[], None],
    *,
    micro_batches: int,
    on_gpu: bool,
    optim: str = "adamw_torch",
) -> tuple[int, int]:
    """(the most bytes that an update needs, all models included; of what its passes add, the bytes in mapped blocks).

    On a CPU AdamW's update goes parameter by parameter. On a GPU it goes over all at once ("foreach"), with a copy of
    their size (torch.optim.AdamW: "~ sizeof(params) more peak memory"). The other optimisers do without that copy.

    Args:
        meter: it has counted the models.
        models: with parameters that are trained.
        update: the forward and backward pass of a micro-batch.
        micro_batches: of an update; from the second on, gradients are added to those there are.
        on_gpu: which AdamW.
        optim: the optimiser.
    """
    if optim not in ("adamw_torch", "adamw_torch_fused"):
        peak, mapped = _passes_peak(meter, update, micro_batches)
        return peak + optimiser_size(*models, optim=optim), mapped
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-5) for m in models]
    # 1. The moments are there from the second update on: made here without a pass.
    for model in models:
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    # 2. That update.
    peak, mapped = _passes_peak(meter, update, micro_batches)
    for optimizer, model in zip(optimizers, models, strict=True):
        if on_gpu:
            copy = 0 if optim == "adamw_torch_fused" else size_of(model, trained=True)
            peak = max(peak, meter.live + copy)
        else:
            meter.restart()
            optimizer.step()
            peak = max(peak, meter.peak)
    return peak, mapped


def _passes_peak(meter: Meter, update: Callable[[], None], micro_batches: int) -> tuple[int, int]:
    """(bytes at the fullest moment of the passes, how much of what they add is in mapped blocks then)."""
    meter.restart()
    before = meter.mapped
    for _ in range(min(2, micro_batches)):
        update()
    return meter.peak, meter.mapped_at_peak - before
