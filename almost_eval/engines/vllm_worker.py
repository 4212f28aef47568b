"""vLLM's worker for a CPU with `ExactSampler` in its sampler, room for a pipeline, and temperatures for guessed tokens.

vLLM loads it by name (its option `--worker-cls`).
"""

from __future__ import annotations

from typing import Any

from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.ops import topk_topp_sampler
from vllm.v1.worker.cpu_worker import CPUWorker

from almost_eval.engines.vllm_sampling import ExactSampler, draws_are_torchs_own, expand_rows, expands_rows

logger = init_logger(f"vllm.{__name__}")  # vLLM configures the loggers below its own


class Worker(CPUWorker):
    """All of vLLM's worker. Where its sampler is not the one that is known here, that stays, and a warning says so."""

    def compile_or_warm_up_model(self) -> Any:
        """Make room for what the layers of another process send (pipeline parallelism).

        vLLM makes it in the pass that compiles the model (0.31), and nothing is compiled here.
        """
        times = super().compile_or_warm_up_model()
        runner: Any = self.model_runner
        if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
            )
        return times

    def init_device(self) -> None:
        """Make the model runner, and change one part of its sampler."""
        super().init_device()
        guesses: Any = rejection_sampler
        if not expands_rows(guesses.expand_batch_to_tokens):
            guesses.expand_batch_to_tokens = expand_rows
        sampler: Any = getattr(self.model_runner, "sampler", None)
        vllms: Any = getattr(sampler, "topk_topp_sampler", None)
        if reason := _reason_to_leave(vllms):
            logger.warning("vLLM's own sampler stays (%s): top-p costs a sort of the vocabulary a token", reason)
            return
        sampler.topk_topp_sampler = ExactSampler(vllms, topk_topp_sampler.apply_top_k_top_p)
        logger.info("top-p and seeds without sorting the vocabulary")


def _reason_to_leave(vllms: Any) -> str:
    """Why a sampler must stay as it is; empty where it need not."""
    if not isinstance(vllms, topk_topp_sampler.TopKTopPSampler):
        return f"it is a {type(vllms).__name__}"
    if vllms.forward != vllms.forward_cpu:
        return "not the one for this kind of CPU"
    if vllms.use_fp64_gumbel or vllms.logprobs_mode not in ("raw_logprobs", "raw_logits"):
        return "an option wants more of it than tokens"
    if topk_topp_sampler.HAS_TRITON:
        return "Triton has a kernel for it"
    if not draws_are_torchs_own():
        return "torch draws in another way here"
    return ""
