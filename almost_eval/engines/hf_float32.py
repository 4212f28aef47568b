"""A half-precision model computes in float32 for a while: the yardstick for its structure and for its rounding.

Weights in bfloat16 or float16 are float32 numbers too, so nothing is lost by reading them as such. One layer at a time
is converted while it runs. Memory grows by at most `KEPT` bytes of converted weights and one layer more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from almost_eval.engines.hf_head import HALF

KEPT = 1 << 30
"""Bytes of float32 weights that stay for the next pass: all of a model below 270 M parameters."""


@contextmanager
def in_float32(model: nn.Module, *, kept: int = KEPT) -> Iterator[None]:
    """Inside, every forward pass of `model` is in float32, with its own weights; a float32 model stays as it is."""
    store = _Store(kept)
    with ExitStack() as hooks:
        for module, recurse in _units(model):
            tensors = [t for t in (*module.parameters(recurse), *module.buffers(recurse)) if t.dtype in HALF]
            if tensors:
                converter = _Converter(tensors, store)
                hooks.callback(converter.restore)  # a pass that fails half-way leaves nothing converted
                hooks.callback(module.register_forward_pre_hook(converter.convert, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(converter.restore).remove)
        yield


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """(module, whether its children belong to it): the largest modules that hold no list of layers."""
    if not any(isinstance(part, nn.ModuleList) for part in module.modules()):
        yield module, True
        return
    yield module, False
    for child in module.children():
        yield from _units(child)


class _Store:
    """Float32 copies, kept as far as the bytes go. Weights that are tied have one copy."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._copies: dict[int, torch.Tensor] = {}

    def float32(self, tensor: torch.Tensor) -> torch.Tensor:
        key = id(tensor)
        if key in self._copies:
            return self._copies[key]
        copy = tensor.data.float()
        size = copy.numel() * copy.element_size()
        if size <= self._left:
            self._left -= size
            self._copies[key] = copy
        return copy


class _Converter:
    """The tensors of one unit, as float32 while it runs."""

    def __init__(self, tensors: list[torch.Tensor], store: _Store) -> None:
        self._tensors = tensors
        self._store = store
        self._own: list[torch.Tensor] = []

    def convert(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Inputs become float32 as well: what stands between two units may have rounded them."""
        self._own = [tensor.data for tensor in self._tensors]
        for tensor in self._tensors:
            tensor.data = self._store.float32(tensor)
        return tuple(map(_widened, args)), {name: _widened(value) for name, value in kwargs.items()}

    def restore(self, *_: object) -> None:
        """The tensors are as they were."""
        for tensor, own in zip(self._tensors, self._own, strict=False):
            tensor.data = own
        self._own = []


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype in HALF else value
    return tuple(map(_widened, value)) if type(value) is tuple else value
