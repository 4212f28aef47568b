"""A half-precision model computes in float32 for a while: the yardstick for its structure and for its rounding.

Weights in bfloat16 or float16 are float32 numbers too, so nothing is lost by reading them as such. Buffers that a class
makes of its config are made anew: Gemma multiplies embeddings by the root of their size, 25.30 in float32 and 25.25 in
bfloat16. One layer at a time is converted while it runs; of an embedding only the rows that are looked up, of the
output projection `ROWS` tokens at a time. So memory grows by one layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from almost_eval.engines.hf_head import HALF

ROWS = 1 << 14
"""Rows of an output projection that are converted together."""


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Inside, every forward pass of `model` is in float32, with its own weights; a float32 model stays as it is."""
    made = _made_in_float32(model)
    with ExitStack() as undo:
        for module, recurse in _units(model):
            tensors = [t for t in (*module.parameters(recurse), *module.buffers(recurse)) if t.dtype in HALF]
            if type(module) is nn.Linear and tensors:
                module.forward = _projection(module)  # type: ignore[method-assign, assignment]
                undo.callback(module.__dict__.pop, "forward")
            elif tensors:
                converter = (
                    _Rows(tensors, made, module) if isinstance(module, nn.Embedding) else _Converter(tensors, made)
                )
                undo.callback(converter.restore)  # a pass that fails half-way leaves nothing converted
                undo.callback(module.register_forward_pre_hook(converter.convert, with_kwargs=True).remove)
                undo.callback(module.register_forward_hook(converter.restore).remove)
        yield


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """(module, whether its children belong to it): the largest modules that hold no list of layers."""
    if not any(isinstance(part, nn.ModuleList) for part in module.modules()):
        yield module, True
        return
    yield module, False
    for child in module.children():
        yield from _units(child)


def _made_in_float32(model: nn.Module) -> dict[int, torch.Tensor]:
    """`id` of a half-precision buffer that no checkpoint holds -> the same in float32, as its class makes it."""
    stored = model.state_dict(keep_vars=True).keys()
    rounded = {name: b for name, b in model.named_buffers() if b.dtype in HALF and name not in stored}
    if not rounded:
        return {}
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):  # weights on no device; buffers are real
        made = dict(type(model)(copy.deepcopy(model.config)).named_buffers())
    return {id(buffer): made[name].to(buffer.device) for name, buffer in rounded.items() if name in made}


class _Converter:
    """The tensors of one unit, as float32 while it runs.

    Args:
        tensors: of the unit, in half precision.
        made: see `_made_in_float32`.
    """

    def __init__(self, tensors: list[torch.Tensor], made: dict[int, torch.Tensor]) -> None:
        self._tensors = tensors
        self._made = made
        self._own: list[torch.Tensor] = []

    def convert(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Inputs become float32 as well: what stands between two units may have rounded them."""
        self._own = [tensor.data for tensor in self._tensors]
        for tensor in self._tensors:
            tensor.data = self._made.get(id(tensor), tensor.data).float()
        return tuple(map(_widened, args)), {name: _widened(value) for name, value in kwargs.items()}

    def restore(self, *_: object) -> None:
        """The tensors are as they were."""
        for tensor, own in zip(self._tensors, self._own, strict=False):
            tensor.data = own
        self._own = []


class _Rows(_Converter):
    """The rows of an embedding that are looked up; the ids become places among them."""

    def __init__(self, tensors: list[torch.Tensor], made: dict[int, torch.Tensor], module: nn.Embedding) -> None:
        table = module.weight
        super().__init__([table, *(tensor for tensor in tensors if tensor is not table)], made)
        self._module = module
        self._padding_idx = module.padding_idx

    def convert(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same lookup in a small float32 table."""
        if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor):
            return super().convert(module, args, kwargs)
        table = self._module.weight
        ids, places = args[0].unique(return_inverse=True)
        whole, table.data = table.data, table.data[ids]
        super().convert(module, (), {})
        self._own[0] = whole
        self._module.padding_idx = None  # matters to gradients alone, and must be a row of the table
        return (places,), {}

    def restore(self, *_: object) -> None:
        """The table and its padding row are as they were."""
        super().restore()
        self._module.padding_idx = self._padding_idx


def _projection(module: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """Its forward pass in float32, some rows of the weight at a time."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        parts = [nn.functional.linear(_widened(x), rows.float()) for rows in module.weight.split(ROWS)]
        out = torch.cat(parts, -1)
        return out if module.bias is None else out + module.bias.float()

    return forward


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype in HALF else value
    return tuple(map(_widened, value)) if type(value) is tuple else value
