"""What a stage needs that generates or judges: weights, keys and values (`shapes.cache_bytes`), logits.

Arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from almost_eval.errors import InputError
from almost_eval.models.loading import LARGE, cpu_has_bfloat16
from almost_train.pipeline.needs import Estimator, Need
from almost_train.pipeline.shapes import cache_bytes, local_folder

VLLM_SHARE = 0.92
"""Of a GPU's memory, which vLLM 0.31 takes where it is not told."""
VLLM_PASS = 1 << 30
"""Bytes of a pass over 2,048 tokens and its logits, as vLLM profiles it on a GPU."""
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def judging_need(estimator: Estimator, stage: str, model: str, *, length: int, texts: int) -> Need:
    """A stage that reads texts with a reward model, as `almost_eval.rewards.hf.HFRewardModel` does.

    Args:
        estimator: with the devices and the configurations of models.
        stage: its name.
        model: the reward model, or the one that it will be made of.
        length: tokens of the longest text.
        texts: how many.
    """
    devices = estimator.devices
    text = estimator.config(model).get_text_config()
    count = estimator.count(model)
    length = min(length, getattr(text, "max_position_embeddings", None) or length)
    tokens = max(length, 16384 if devices.on_gpu else 1024)  # of one pass
    # Reward models of this project are saved in float32.
    return Need(
        stage,
        model,
        parameters=count,
        weights=4 * count,
        activations=4 * tokens * (8 * text.hidden_size + 3 * (getattr(text, "intermediate_size", None) or 0)),
        runtime=devices.runtime(model),
        measured_tokens=texts * length,
        rows=max(1, tokens // length),
    )


def generation_need(
    estimator: Estimator,
    stage: str,
    model: str,
    *,
    read: int,
    new: int,
    requests: int,
    engine: Mapping[str, Any],
    shared: int = 0,
    together: int | None = None,
    reward: str = "",
) -> Need:
    """A stage that continues texts.

    Args:
        estimator: with the devices and the configurations of models.
        stage: its name.
        model: that continues.
        read: tokens of the longest text before an answer.
        new: tokens of an answer.
        requests: how many answers.
        engine: the recipe's options.
        shared: of what is read, the tokens that all answers of a call begin with.
        together: answers of one call, or None for all.
        reward: a reward model that is in memory beside it.

    Raises:
        InputError: vLLM would divide the model among more devices than there are.
    """
    devices = estimator.devices
    beside = estimator.count(reward) * 4 if reward else 0
    if engine.get("engine") == "openai":
        return Need(
            stage,
            model,
            weights=beside,
            runtime=devices.runtime(reward or model),
            generated_tokens=requests * new,
            elsewhere=True,
            note=f"{model} is served elsewhere, and not planned here" + (", but the reward model is" if beside else ""),
        )
    config = estimator.config(model)
    count = estimator.count(model)
    text = config.get_text_config()
    stored = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    dtype = engine.get("dtype", "auto")
    if dtype == "auto" and devices.on_gpu:
        dtype = stored if local_folder(model) else "bfloat16"
    elif dtype == "auto":
        dtype = "bfloat16" if count >= LARGE and cpu_has_bfloat16() else "float32"
    number = _BYTES.get(dtype, 4)
    split = engine.get("tensor_parallel_size", 1) * engine.get("pipeline_parallel_size", 1)
    # A text that does not fit the model's context is refused by its stage.
    context = engine.get("max_length") or getattr(text, "max_position_embeddings", None)
    read = min(read, context - new) if context and context > new else read
    one = cache_bytes(config, read + new, number)
    note = ""
    if engine.get("engine", "hf") == "vllm":
        if split > devices.count:
            raise InputError(
                f"{stage}: vLLM would divide {model} among {split} devices, and there are {devices.count}; "
                "lower tensor_parallel_size, or plan for more --devices"
            )
        weights = count * number // split
        stated = engine.get("kv_cache_gib") or (None if devices.on_gpu else 1)  # vLLM would take all of a CPU's memory
        if stated is not None:
            cache, room = int(stated * (1 << 30)), f"{stated:g} GiB of keys and values have"
        else:
            share = engine.get("gpu_memory") or VLLM_SHARE
            cache, room = int(share * devices.memory) - weights - VLLM_PASS, f"vLLM's share of {share:g} has"
        rows = max(0, min(256, cache * split // one))
        if rows == 0:
            cache, note = one // split, f"{room} no room for one answer"
        activations = VLLM_PASS
        weights += beside
    else:
        budget = engine.get("batch_tokens") or (
            65536 if devices.on_gpu else max(4096, min(65536, (1 << 30) // cache_bytes(config, 1, 4)))
        )
        # Rows attend to one copy of what they share (`hf_header.py`); what each has of its own counts for each.
        shared = min(shared, read)
        own = read - shared + new
        fitting = (budget - shared) // own
        rows = max(1, min(fitting, requests, together or requests, (1 << 26) // (4 * text.vocab_size) or 1))
        if engine.get("batch_size"):
            rows = min(rows, engine["batch_size"])
        cache = cache_bytes(config, shared + rows * own, number)
        weights = count * number + beside
        activations = (
            min(2048, max(shared, rows * (read - shared)))
            * (8 * text.hidden_size + 3 * text.intermediate_size)
            * number
        )
        activations += 4 * rows * text.vocab_size * 4
        if devices.on_gpu and rows > 1:
            # Out of memory, the engine halves its batches, down to one row.
            room = devices.room - weights - activations - devices.runtime(model)
            each = cache_bytes(config, own, number)
            if cache > room >= one:
                rows = 1 + (room - one) // each
                cache, note = one + (rows - 1) * each, "the engine halves its batches until they fit"
    return Need(
        stage,
        model,
        parameters=count,
        weights=weights,
        activations=activations,
        cache=cache,
        runtime=devices.runtime(model),
        generated_tokens=requests * new,
        rows=max(1, rows),
        note=note,
    )
