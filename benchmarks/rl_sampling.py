"""New tokens a second in reinforcement learning, transformers against vLLM in turn, and the certificate over 20 syncs.

    OMP_NUM_THREADS=2 python benchmarks/rl_sampling.py runs/models/smollm2-135m-instruct [--rounds 3] [--new-tokens 64]
    OMP_NUM_THREADS=1 python benchmarks/rl_sampling.py --nano [--seeds 0,1,2]

The first: both sides draw from the same float32 weights, in one process, with the stop strings and seeds of
`almost-train rlsf`; 64 prompts are one batch. A round times each side once. Then the weights are changed 20 times, as
an update would, and sent to vLLM; each time the largest |log p(vLLM) - log p(trainer)| over the sampled tokens is
printed.

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

import torch

from almost_eval.cli.command_line import import_transformers
from almost_eval.compare.tax.tasks import nano_oracle
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.models.loading import load_tokenizer
from almost_eval.progress import Progress
from almost_eval.types import Message
from almost_train.common.trainers import keep_template
from almost_train.nano.data import write_prompts
from almost_train.pipeline.evaluation import EvaluationSettings, evaluate_policies
from almost_train.pipeline.recipe import load_recipe
from almost_train.rlsf.certificate import SamplerCertificate, certify
from almost_train.rlsf.job import Job, RLSFSettings
from almost_train.rlsf.models import load_policy
from almost_train.rlsf.rollouts import Sampled, collate, completion_logprobs, read_prompts
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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--nano", action="store_true", help="PPO on the nano world instead")
    parser.add_argument("--seeds", default="0,1,2")
    arguments = parser.parse_args()
    import_transformers()
    if arguments.nano:
        return nano([int(seed) for seed in arguments.seeds.split(",")])
    job = make_job(arguments.model, arguments.new_tokens)
    policy = load_policy(job.policy, "cpu").eval()
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


def speed(job: Job, policy: Any, vllm: RolloutSampler, rounds: int) -> None:
    """New tokens a second of both sides in turn, and the ratio of each round."""
    sides = {"transformers": TransformersSampler(job), "vLLM": vllm}
    ids = [prompt.token_ids for prompt in job.prompts]
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for sampler in sides.values():  # what is made on first use is not timed
        sampler.sample(policy, ids[:4], 0, range(4))
    for number in range(rounds):
        for name, sampler in sides.items():
            sampler.sync(policy)  # also empties vLLM's cache of prompts
            began = time.perf_counter()
            drawn = sampler.sample(policy, ids, number, range(len(ids)))
            seconds = time.perf_counter() - began
            tokens = sum(len(sampled.token_ids) for sampled in drawn)
            rates[name].append(tokens / seconds)
            print(f"round {number}: {name}, {len(ids)} prompts, {tokens} new tokens, {tokens / seconds:.1f} tokens/s")
    ratios = [fast / slow for fast, slow in zip(rates["vLLM"], rates["transformers"], strict=True)]
    print(f"vLLM / transformers: median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


# --- the certificate ---


def certificates(job: Job, policy: Any, vllm: RolloutSampler) -> None:
    """The largest difference after each of `SYNCS` changes of the weights."""
    generator, ids = torch.Generator().manual_seed(0), [prompt.token_ids for prompt in job.prompts[:16]]
    gaps, seconds = [], []
    for number in range(SYNCS):
        with torch.no_grad():
            for parameter in policy.parameters():  # a hundredth of each weight's usual size
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise, alpha=0.01 * float(parameter.std()) if parameter.numel() > 1 else 0.0)
        began = time.perf_counter()
        vllm.sync(policy)
        seconds.append(time.perf_counter() - began)
        drawn = vllm.sample(policy, ids, number, range(len(ids)))
        certificate = compare(job, policy, ids, drawn)
        gaps.append(certificate.largest)
        print(f"sync {number + 1}: {certificate.largest:.2e} nats over {certificate.tokens} tokens")
    verdict = "within" if max(gaps) <= LIMIT else "BEYOND"
    typical = statistics.median(seconds)
    print(f"largest of {SYNCS} syncs: {max(gaps):.2e} nats, {verdict} {LIMIT:g}; a sync {typical:.2f} s")


@torch.no_grad()
def compare(job: Job, policy: Any, ids: Sequence[tuple[int, ...]], drawn: Sequence[Sampled]) -> SamplerCertificate:
    """Compare vLLM's log-probabilities with the policy's own."""
    batch = collate(ids, [sampled.token_ids for sampled in drawn], job.tokenizer)
    width = batch.completion_mask.shape[1]
    trainer = completion_logprobs(policy, batch.input_ids, batch.attention_mask, width, job.settings.temperature)
    by_vllm = torch.zeros_like(trainer)
    for row, sampled in enumerate(drawn):
        assert sampled.logprobs is not None
        by_vllm[row, : len(sampled.logprobs)] = torch.tensor(sampled.logprobs)
    return certify(by_vllm, trainer, batch.completion_mask, limit=LIMIT, cap=2.0)


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
