"""Measures nano models by ground truth: how well does each configuration answer?

A configuration is a model, the quality of its demonstrations and their number (ALMoST, arXiv 2305.13735, section
2.1). The method assumes an order among them; the oracle can say whether it holds.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from almost_eval.nano.oracle import score
from almost_eval.nano.queries import Pool, Query
from almost_eval.nano.world import World, render
from almost_train.nano.pretrain import OPENING

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Respondent:
    """Who answers, after which demonstrations."""

    model: str
    """A name among the models of `oracle_ladder`."""
    quality: str = "good"
    """`good`, `weak` or `bad`."""
    shots: int = 0

    def __str__(self) -> str:
        return f"{self.model}-{self.quality}-{self.shots}shot" if self.shots else f"{self.model}-0shot"


LADDER = (
    Respondent("large", "good", 5),
    Respondent("large", "good", 1),
    Respondent("medium", "good", 1),
    Respondent("small", "weak", 1),
)
"""The order that the synthetic comparisons assume, best first."""


@dataclass(frozen=True, slots=True)
class Rung:
    """How one configuration answers."""

    configuration: str
    overall: float
    """Mean oracle score, 0 to 1; an answer cut off by the token budget scores 0."""
    stderr: float
    n: int
    by_dimension: Mapping[str, float]
    """helpful, honest, harmless: mean over the queries that test it."""
    by_kind: Mapping[str, float]
    characters: float
    """Mean length of an answer."""
    unfinished: int
    """Answers that the token budget cut off."""


def oracle_ladder(
    models: Mapping[str, LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    configurations: Sequence[Respondent] = LADDER,
    *,
    n: int = 1000,
    pool: Pool | None = "eval",
    seed: int = 0,
    world: World | None = None,
) -> list[Rung]:
    """The oracle score of each configuration on the same `n` queries, sampled at temperature 1 and top-p 0.95.

    Args:
        models: by the names that the configurations use.
        tokenizer: the family's.
        configurations: what to measure, in order.
        n: queries; the standard error is near 0.4 / sqrt(n).
        pool: whose queries; demonstrations are always of the train pool.
        seed: of queries, demonstrations and sampling.
        world: the world of seed 0 where None.
    """
    world = world or World()
    queries = [world.query(rng, pool) for rng in [random.Random(f"{seed}/queries")] for _ in range(n)]
    rungs = []
    for configuration in configurations:
        rng = random.Random(f"{seed}/demonstrations")
        prompts = []
        for query in queries:
            shots = world.demonstrations(rng, configuration.quality, configuration.shots)
            prompts.append("".join(map(render, shots)) + OPENING.format(query.text))
        answers = sample(models[configuration.model], tokenizer, prompts, seed=seed)
        rungs.append(_rung(str(configuration), queries, answers, world))
    return rungs


def _rung(name: str, queries: Sequence[Query], answers: Sequence[tuple[str, bool]], world: World) -> Rung:
    values = [
        score(q, text, world).overall if ended else 0.0 for q, (text, ended) in zip(queries, answers, strict=True)
    ]

    def means(names: Sequence[str]) -> dict[str, float]:
        groups: dict[str, list[float]] = {}
        for group, value in zip(names, values, strict=True):
            groups.setdefault(group, []).append(value)
        return {group: fmean(members) for group, members in sorted(groups.items())}

    return Rung(
        configuration=name,
        overall=fmean(values),
        stderr=stdev(values) / len(values) ** 0.5,
        n=len(values),
        by_dimension=means([query.dimension for query in queries]),
        by_kind=means([query.kind for query in queries]),
        characters=fmean(len(text) for text, _ in answers),
        unfinished=sum(not ended for _, ended in answers),
    )


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float = 0.95,
    max_new_tokens: int = 48,
    rows: int = 125,
) -> list[tuple[str, bool]]:
    """One answer to each prompt, and True where it ended by itself: with the separator or the user's next turn."""
    import torch

    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("\n\nHuman:")]
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))  # little padding
    answers: dict[int, tuple[str, bool]] = {}
    # `generate` draws from the global generator, which is put back afterwards.
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            batch = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True, padding_side="left")
            output = model.generate(
                **batch,
                do_sample=True,
                temperature=temperature,
                top_p=top_p,
                top_k=0,
                max_new_tokens=max_new_tokens,
                eos_token_id=ends,
                pad_token_id=tokenizer.pad_token_id,
            )
            for i, row in zip(chosen, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                end = next((place for place, token in enumerate(row) if token in ends), None)
                answers[i] = (tokenizer.decode(row[:end]).strip(), end is not None)
    return [answers[i] for i in range(len(prompts))]
