"""Rates of this machine for a plan: one training pass and one short generation of each model, timed."""

from __future__ import annotations

import time
from typing import Any

from almost_eval.engines.base import SamplingParams
from almost_eval.engines.build import EngineOptions, generation_engine
from almost_eval.progress import Progress
from almost_train.pipeline.needs import Need
from almost_train.pipeline.recipe import SAMPLED
from almost_train.pipeline.shapes import ANY, local_folder

TOKENS = 512
"""Read in the pass that is timed."""
NEW_TOKENS = 24
ROWS = 8
TEXT = "The river runs past the old mill, and the children who live there know where it is shallow enough to cross. "


class Rates:
    """Tokens a second of a stage on this machine, each model and kind measured once.

    Args:
        engine: the recipe's options; the stages of `SAMPLED` sample with it.
        progress: says what is measured.
    """

    def __init__(self, engine: EngineOptions, progress: Progress) -> None:
        self._engine = engine
        self._progress = progress
        self._known: dict[tuple[str, bool, bool, bool], float | None] = {}

    def __call__(self, need: Need, trains: bool) -> float | None:
        """See `RateOf`; None for a model whose weights are not on this machine."""
        # A model trains in one way, and samples in three.
        key = (need.model, trains, not trains and need.stage in SAMPLED, not trains and bool(need.trained))
        if key not in self._known:
            self._progress.notice(f"measures {'training' if trains else 'sampling'} with {need.model}")
            if local_folder(need.model) is None:
                self._known[key] = None
            else:
                self._known[key] = _trained(need.model) if trains else self._generated(need)
        rate = self._known[key]
        # What is timed is a forward and a backward pass: three forward passes' work.
        return rate * 3 if rate and trains else rate

    def _generated(self, need: Need) -> float:
        # A model in training is held in float32, whatever it computes in.
        plain = EngineOptions(dtype="float32") if need.trained else EngineOptions()
        options = self._engine if need.stage in SAMPLED else plain
        engine = generation_engine(need.model, options)
        params = SamplingParams(NEW_TOKENS, 1.0, 1.0)
        prompts = [f"{number}. {TEXT * 3}" for number in range(ROWS)]
        engine.generate(prompts[:1], params)  # loads the weights
        began = time.perf_counter()
        completions = engine.generate(prompts, params)
        tokens = sum(len(completion.token_ids) for some in completions for completion in some)
        return max(1, tokens) / (time.perf_counter() - began)


def _trained(model: str) -> float:
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    from almost_eval.models.checkpoint import CAUSAL, find_checkpoint
    from almost_eval.models.loading import load_weights, pick_device

    checkpoint = find_checkpoint(model, architectures=ANY)
    is_causal = any(part in checkpoint.architecture for part in CAUSAL)
    whole: Any = load_weights(
        AutoModelForCausalLM if is_causal else AutoModel,
        checkpoint,
        allow_unused=not is_causal,  # the head
        dtype=torch.float32,
        device=pick_device("auto"),
        attention="auto",
        trust_remote_code=False,
    ).train()
    width = min(256, int(getattr(whole.config.get_text_config(), "max_position_embeddings", 256)))
    ids = torch.randint(0, whole.config.get_text_config().vocab_size, (TOKENS // width, width), device=whole.device)
    rate = 0.0
    for _ in range(2):  # the first one prepares kernels
        began = time.perf_counter()
        if is_causal:
            whole(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        else:
            whole(input_ids=ids)[0].float().sum().backward()
        if whole.device.type == "cuda":
            torch.cuda.synchronize()
        rate = ids.numel() / (time.perf_counter() - began)
    return rate
