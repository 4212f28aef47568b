"""New tokens a second in reinforcement learning, transformers against vLLM in turn, and the certificate over 20 syncs.

    OMP_NUM_THREADS=2 python benchmarks/rl_sampling.py runs/models/smollm2-135m-instruct [--rounds 2] [--new-tokens 128]
    OMP_NUM_THREADS=1 python benchmarks/rl_sampling.py --nano [--seeds 0,1,2]

The first: both sides draw from the same float32 weights, in one process, with the stop strings and seeds of
`almost-train rlsf`; 64 prompts are one batch. transformers draws with the prompts' common
header read once, as `rlsf` does, and with it read by each row. A round times each side once. Before it, the matrix
products of a decoding step are timed alone, as transformers computes them: what a side takes beyond is all that another
engine can save, but for faster products. Then the weights are updated 20 times and sent to vLLM; each time the largest
|log p(vLLM) - log p(trainer)| over the sampled tokens is printed.

The second: PPO on the nano world with the recipe's settings, from the shipped SFT policy by the shipped reward model,
once for each sampler and seed, judged by the oracle on 600 prompts of the test half.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from transformers import PreTrainedModel

from almost_eval.cli.command_line import import_transformers
from almost_eval.compare.tax.tasks import nano_oracle
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.models.loading import load_tokenizer
from almost_eval.progress import Progress
from almost_eval.types import Message
from almost_train.common.templates import keep_template
from almost_train.nano.data import write_prompts
from almost_train.pipeline.evaluation import EvaluationSettings, evaluate_policies
from almost_train.pipeline.recipe import load_recipe
from almost_train.rlsf import rollouts
from almost_train.rlsf.certificate import SamplerCertificate, certify
from almost_train.rlsf.job import Job, RLSFSettings
from almost_train.rlsf.models import load_policy
from almost_train.rlsf.rollouts import Sampled, TokenIds, collate, completion_logprobs, read_prompts
from almost_train.rlsf.run import rlsf
from almost_train.rlsf.samplers import RolloutSampler, TransformersSampler, make_sampler

SYNCS = 20
LIMIT = 1e-4
"""Nats that sampler and trainer may be apart in float32."""
ASKS = ("Explain {} to a child.", "Write three sentences about {}.", "What is {} good for?", "Tell a story about {}.")
THINGS = (
    *("bread", "the moon", "a bicycle", "rain", "chess", "bees", "sleep", "maps"),
    *("salt", "a bridge", "music", "tea", "the sea", "a clock", "paper", "snow"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="runs/models/smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--products", action="store_true", help="the matrix products alone, no engine")
    parser.add_argument("--nano", action="store_true", help="PPO on the nano world instead")
    parser.add_argument("--seeds", default="0,1,2")
    arguments = parser.parse_args()
    import_transformers()
    if arguments.nano:
        return nano([int(seed) for seed in arguments.seeds.split(",")])
    job = make_job(arguments.model, arguments.new_tokens)
    policy = load_policy(job.policy, "cpu").eval()
    products(policy, len(job.prompts))
    if arguments.products:
        return None
    vllm = make_sampler(job)
    try:
        vllm.sync(policy)
        speed(job, policy, vllm, arguments.rounds)
        certificates(job, policy, vllm)
    finally:
        vllm.close()


def make_job(model: str, new_tokens: int) -> Job:
    """A job as `almost-train rlsf --sampler vllm` would have it, but for the reward model."""
    checkpoint = find_checkpoint(model)
    tokenizer = load_tokenizer(checkpoint)
    template = keep_template(tokenizer)
    settings = RLSFSettings(
        sampler="vllm", max_new_tokens=new_tokens, batch_size=64, sampling_batch_size=64, device="cpu"
    )
    texts = [ask.format(thing) for thing in THINGS for ask in ASKS]
    rows = [(str(number), (Message("user", text),)) for number, text in enumerate(texts)]
    return Job(
        settings=settings,
        prompts=read_prompts(rows, tokenizer, template),
        prompts_too_long=[],
        policy=checkpoint,
        tokenizer=tokenizer,
        template=template,
        reward=cast(Any, None),
        output=Path(tempfile.mkdtemp()),
        processes=1,
        is_first=True,
        progress=Progress(),
    )


# --- speed ---


@torch.no_grad()
def products(policy: PreTrainedModel, rows: int, repeats: int = 20) -> None:
    """The tokens a second of the linear layers alone, by torch's products, one token of `rows` texts at a time."""
    layers = [module for module in policy.modules() if isinstance(module, torch.nn.Linear)]
    states = {size: torch.randn(rows, size) for size in {layer.in_features for layer in layers}}

    def step() -> None:
        for layer in layers:
            torch.nn.functional.linear(states[layer.in_features], layer.weight)

    step()
    began, began_cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        step()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    tokens = rows * repeats
    work = 2 * sum(layer.weight.numel() for layer in layers) * tokens / 1e9  # GFLOP
    for what, spent in (("", seconds), (" by CPU time", cpu_seconds)):
        print(
            f"matrix products alone, {rows} rows, float32{what}: {tokens / spent:.1f} tokens/s, "
            f"{work / spent:.0f} GFLOP/s",
            flush=True,
        )


APART = "transformers without shared headers"


class ReadsApart(TransformersSampler):
    """As it was before shared headers: transformers' `generate` for every prompt."""

    def sample(
        self, model: PreTrainedModel, prompts: Sequence[TokenIds], step: int, rows: Sequence[int]
    ) -> list[Sampled]:
        """See `RolloutSampler`."""
        with mock.patch.object(rollouts, "sample_behind_headers", return_value={}):
            return super().sample(model, prompts, step, rows)


def speed(job: Job, policy: Any, vllm: RolloutSampler, rounds: int) -> None:
    """New tokens a second of both sides in turn, and the ratio of each round."""
    sides = {"transformers": TransformersSampler(job), APART: ReadsApart(job), "vLLM": vllm}
    ids = [prompt.token_ids for prompt in job.prompts]
    rates: dict[str, list[float]] = {name: [] for name in sides}
    cpu_rates: dict[str, list[float]] = {name: [] for name in sides}
    for sampler in sides.values():  # what is made on first use is not timed
        sampler.sample(policy, ids[:4], 0, range(4))
    for number in range(rounds):
        for name, sampler in sides.items():
            sampler.sync(policy)  # also empties vLLM's cache of prompts
            began, began_cpu = time.perf_counter(), time.process_time()
            drawn = sampler.sample(policy, ids, number, range(len(ids)))
            seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
            tokens = sum(len(sampled.token_ids) for sampled in drawn)
            rates[name].append(tokens / seconds)
            cpu_rates[name].append(tokens / cpu_seconds)
            print(
                f"round {number}: {name}, {len(ids)} prompts, {tokens} new tokens, {tokens / seconds:.1f} tokens/s, "
                f"{tokens / cpu_seconds:.1f} by CPU time",
                flush=True,
            )
    for what, both in (("", rates), (", by CPU time", cpu_rates)):
        for other in ("transformers", APART):
            ratios = [fast / slow for fast, slow in zip(both["vLLM"], both[other], strict=True)]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            print(f"vLLM / {other}{what}: median {statistics.median(ratios):.2f} ({spread})", flush=True)


# --- the certificate ---


def certificates(job: Job, policy: Any, vllm: RolloutSampler) -> None:
    """The largest difference after each of `SYNCS` updates: AdamW on completions, half of them praised."""
    ids, optimizer = [prompt.token_ids for prompt in job.prompts[:16]], torch.optim.AdamW(policy.parameters(), lr=1e-5)
    gaps, seconds = [], []
    for number in range(SYNCS + 1):
        began = time.perf_counter()
        vllm.sync(policy)
        seconds.append(time.perf_counter() - began)
        drawn = vllm.sample(policy, ids, number, range(len(ids)))
        batch = collate(ids, [sampled.token_ids for sampled in drawn], job.tokenizer)
        mask, width = batch.completion_mask, batch.completion_mask.shape[1]
        logprobs = completion_logprobs(policy, batch.input_ids, batch.attention_mask, width, job.settings.temperature)
        certificate = compare(drawn, logprobs.detach(), mask)
        print(f"update {number}: {certificate.largest:.2e} nats over {certificate.tokens} tokens", flush=True)
        gaps.append(certificate.largest)
        praise = torch.tensor([1.0, -1.0]).repeat(len(ids) // 2)  # (B,)
        (-(praise[:, None] * logprobs)[mask].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    verdict = "within" if max(gaps) <= LIMIT else "BEYOND"
    typical = statistics.median(seconds)
    print(f"largest of {SYNCS} updates: {max(gaps):.2e} nats, {verdict} {LIMIT:g}; a sync {typical:.2f} s")


def compare(drawn: Sequence[Sampled], logprobs: torch.Tensor, mask: torch.Tensor) -> SamplerCertificate:
    """Compare vLLM's log-probabilities with the policy's own (B, T)."""
    by_vllm = torch.zeros_like(logprobs)
    for row, sampled in enumerate(drawn):
        assert sampled.logprobs is not None
        by_vllm[row, : len(sampled.logprobs)] = torch.tensor(sampled.logprobs)
    return certify(by_vllm, logprobs, mask, limit=LIMIT, cap=2.0)


# --- the nano world ---


def nano(seeds: Sequence[int]) -> None:
    """PPO with each sampler: oracle score of the answers."""
    folder = Path(tempfile.mkdtemp())
    recipe = load_recipe("nano", seed=0)
    asked = write_prompts(folder / "test.jsonl", 600, pool="test", seed=0)
    policies: dict[str, Path | str] = {"SFT": "nano/sft"}
    for seed in seeds:
        prompts = write_prompts(folder / f"train-{seed}.jsonl", 560, pool="train", seed=seed)
        chosen = replace(recipe.settings("rlsf", RLSFSettings), seed=seed, keep_every=0)
        for sampler in ("transformers", "vllm"):
            output = folder / f"{sampler}-{seed}"
            began = time.perf_counter()
            metrics = rlsf(replace(chosen, sampler=sampler), prompts, "nano/sft", "nano/reward", output)["metrics"]
            gap = metrics.get("sampler_gap_largest")
            print(
                f"seed {seed}, {sampler}: KL {metrics['kl_last']:.3f}, {time.perf_counter() - began:.0f} s"
                + (f", largest gap {gap:.2e} nats" if gap is not None else "")
            )
            policies[f"{sampler} {seed}"] = output / "policy"
    settings = recipe.settings("evaluation", EvaluationSettings, "prompts", "vanilla", "nano_prompts")
    result = evaluate_policies(
        settings, asked, policies, folder / "policies", reward_model="nano/reward", judge=nano_oracle()
    )
    for name, row in result["metrics"].items():
        print(f"oracle, {name}: {row['oracle']['value']:.3f} (standard error {row['oracle']['stderr']:.3f})")


if __name__ == "__main__":
    main()
