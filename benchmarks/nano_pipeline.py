"""The whole recipe on the nano world, judged by ground truth: what each stage adds, over several seeds.

    python benchmarks/nano_pipeline.py --seeds 0,1,2 --output runs/nano-benchmark

Each seed runs `almost-train run nano` and the arms that the comparison needs beside it (unguided self-play and SFT on
it, RLOO). Everything that a seed made is kept under the output folder and is not made again. Settings were chosen on
the `train` pool of queries; what is printed is measured on the `eval` pool, which no stage reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from almost_eval.engines.hf import HFEngine
from almost_eval.nano import shipped
from almost_eval.nano.data import data_root
from almost_eval.nano.oracle import score_text
from almost_eval.progress import Progress, progress_for
from almost_eval.rewards import HFRewardModel
from almost_eval.startup import import_transformers
from almost_eval.store import write_json
from almost_eval.types import Message
from almost_train.evaluation import EvaluationSettings, evaluate_policies
from almost_train.nano_data import oracle, write_prompts
from almost_train.nano_ladder import Configuration, oracle_ladder
from almost_train.pipeline import Pipeline, Recipe, load_recipe
from almost_train.records import Row, read_rows

Figures = dict[str, float]
HELD_OUT = 400
"""Eval-pool prompts whose answers, from all configurations, make the held-out pairs."""
EVALUATED = 1000
"""Eval-pool prompts that every policy answers."""
MARGIN = 0.1
"""Answers closer than this in oracle score are no pair: the oracle does not prefer either."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--output", type=Path, default=Path("runs/nano-benchmark"))
    arguments = parser.parse_args()
    import_transformers()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    found = [run_seed(seed, arguments.output / f"seed-{seed}", progress_for()) for seed in seeds]
    print_table(seeds, found)
    write_json(arguments.output / "figures.json", {str(s): f for s, f in zip(seeds, found, strict=True)})


def run_seed(seed: int, folder: Path, progress: Progress) -> Figures:
    """Everything for one seed: name of a figure -> its value."""
    # 1. The recipe, timed, and its other arms on the same prompts and reward model.
    began = time.monotonic()
    recipe = load_recipe("nano", seed=seed)
    Pipeline(recipe, folder / "nano", progress=progress).run()
    seconds = time.monotonic() - began
    for arm, changes in ARMS.items():
        run_arm(recipe, folder, arm, changes, progress)

    # 2. Measures.
    figures: Figures = {"recipe, seconds (0 where it was made before)": round(seconds, 1)}
    figures |= ladder(seed)
    figures |= synthetic_pairs(folder / "nano" / "comparisons")
    figures |= reward_model(recipe, folder, seed, progress)
    figures |= demonstrations(folder)
    figures |= policies(recipe, folder, seed, progress)
    figures |= alignment_tax(folder)
    return figures


ARMS: dict[str, Mapping[str, Mapping[str, Any]]] = {
    "unguided": {"self_play": {"unguided": True}},
    "rloo": {"rlsf": {"algorithm": "rloo", "num_generations": 4}},
}
"""Arm -> what differs from the recipe; stages before the first difference are shared with the recipe's own run."""


def run_arm(
    recipe: Recipe, folder: Path, arm: str, changes: Mapping[str, Mapping[str, Any]], progress: Progress
) -> None:
    """Run the recipe with changes, up to the last stage that the comparison reads."""
    sections = {name: {**section, **changes.get(name, {})} for name, section in recipe.sections.items()}
    first = next(iter(changes))
    target = folder / arm
    target.mkdir(parents=True, exist_ok=True)
    for stage in list(sections)[: list(sections).index(first)]:
        link = target / stage
        if not link.exists():
            link.symlink_to((folder / "nano" / stage).resolve())
    changed = dataclasses.replace(recipe, sections=sections)
    Pipeline(changed, target, progress=progress).run("sft" if arm == "unguided" else "rlsf")


# --- demand by demand ---


def ladder(seed: int) -> Figures:
    """Oracle score of the configurations, in the order that the comparisons assume."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sizes = ("small", "medium", "large")
    models = {s: AutoModelForCausalLM.from_pretrained(shipped(f"nano/vanilla-{s}")).eval() for s in sizes}
    tokenizer: Any = AutoTokenizer.from_pretrained(shipped("nano/vanilla-large"))
    asked = [
        Configuration("large", "good", 5),
        Configuration("large", "good", 1),
        Configuration("medium", "good", 1),
        Configuration("small", "weak", 1),
    ]
    rungs = oracle_ladder(models, tokenizer, asked, n=1000, seed=seed)
    figures: Figures = {}
    for rung in rungs:
        figures[f"oracle, {rung.configuration}"] = rung.overall
    for upper, lower in pairwise(rungs):
        gap, stderr = upper.overall - lower.overall, (upper.stderr**2 + lower.stderr**2) ** 0.5
        figures[f"gap in standard errors, {upper.configuration} over {lower.configuration}"] = gap / stderr
    return figures


def synthetic_pairs(folder: Path) -> Figures:
    """Do the pairs agree with the oracle, after each filter? And how far does each favour the longer answer?"""
    kept, dropped = read_rows(folder / "comparisons.jsonl"), read_rows(folder / "comparisons.rejected.jsonl")
    order = {"length_rule": 1, "rank_has_pair": 2, "identical": 3, "as_is_disagrees": 4, "length_balance": 5}
    stages = {"no filter": 1, "heuristic filter": 4, "as-is filter": 5, "length balance": 6}
    figures: Figures = {}
    for name, level in stages.items():
        pairs = kept + [row for row in dropped if order.get(row["reason"], 0) >= level]
        figures |= {f"pairs, {name}: {key}": value for key, value in agreement(pairs).items()}
    return figures


def agreement(pairs: Iterable[Row]) -> Figures:
    """Of pairs on which the oracle has an opinion: the share it agrees with, also where the chosen is shorter."""
    found: list[tuple[bool, int]] = []
    longer: list[bool] = []
    for row in pairs:
        prompt, chosen, rejected = (row[key][-1]["content"] for key in ("prompt", "chosen", "rejected"))
        difference = _oracle(prompt, chosen) - _oracle(prompt, rejected)
        if len(chosen) != len(rejected):
            longer.append(len(chosen) > len(rejected))
        if difference:
            found.append((difference > 0, len(chosen) - len(rejected)))
    shorter = [right for right, length in found if length < 0]
    return {
        "count": len(found),
        "agree with the oracle": fmean(right for right, _ in found),
        "agree where the chosen is shorter": fmean(shorter) if shorter else float("nan"),
        "chosen is longer": fmean(longer),
    }


def reward_model(recipe: Recipe, folder: Path, seed: int, progress: Progress) -> Figures:
    """Agreement of the reward model with the oracle on held-out pairs, beside "the longer answer wins"."""
    # The recipe's configurations answer eval-pool prompts.
    prompts = write_prompts(folder / "held-out-prompts.jsonl", HELD_OUT, pool="test", seed=seed)
    from almost_eval.assets import find_data
    from almost_eval.engines.build import generation_engine
    from almost_train.synthetic.responses import ResponseSettings, read_configurations, synthesize_responses

    settings = recipe.settings("responses", ResponseSettings, "configurations", prompt_set="nano")
    configurations = read_configurations(recipe.value("responses", "configurations"), "recipe")
    synthesize_responses(
        settings,
        prompts,
        configurations,
        folder / "held-out",
        data=find_data("nano", None),
        engine_for=generation_engine,
        progress=progress,
    )
    answers: dict[str, dict[str, str]] = {}
    texts = {row["id"]: row["prompt"] for row in read_rows(prompts)}
    for configuration in configurations:
        for row in read_rows(folder / "held-out" / f"{configuration.name}.jsonl"):
            answers.setdefault(row["id"], {})[row["response"]] = row["prompt"]
    scorer = HFRewardModel(str(folder / "nano" / "reward" / "model"))
    right, longer, shorter_right = [], [], []
    for number, by_text in answers.items():
        prompt, found = texts[number], list(by_text)
        rewards = scorer.score([(Message("user", prompt), Message("assistant", text)) for text in found])
        for i in range(len(found)):
            for j in range(i):
                difference = _oracle(prompt, found[i]) - _oracle(prompt, found[j])
                if abs(difference) >= MARGIN:
                    better, worse = (i, j) if difference > 0 else (j, i)
                    right.append(rewards[better] > rewards[worse])
                    length = len(found[better]) - len(found[worse])
                    longer.append(0.5 if length == 0 else float(length > 0))
                    if length < 0:
                        shorter_right.append(right[-1])
    return {
        "reward model: held-out pairs": len(right),
        "reward model: agrees with the oracle": fmean(right),
        "reward model: agrees where the better is shorter": fmean(shorter_right),
        "longer wins: agrees with the oracle": fmean(longer),
    }


def demonstrations(folder: Path) -> Figures:
    """Oracle score of the answers in guided and in unguided demonstrations."""
    figures = {}
    for arm in ("nano", "unguided"):
        scores = []
        for row in read_rows(folder / arm / "self_play" / "demonstrations.jsonl"):
            turns = row["messages"]
            for asked, answered in zip(turns[::2], turns[1::2], strict=True):
                found = score_text(asked["content"], answered["content"])
                if found is not None:  # a goodbye is no query
                    scores.append(found.overall)
        figures[f"oracle, demonstrations {'guided' if arm == 'nano' else arm}"] = fmean(scores)
    return figures


def policies(recipe: Recipe, folder: Path, seed: int, progress: Progress) -> Figures:
    """Every policy on the same eval-pool prompts: oracle score, reward, KL to the SFT policy, length."""
    settings = recipe.settings("evaluation", EvaluationSettings, "prompts", "vanilla", "nano_prompts")
    prompts = write_prompts(folder / "policy-prompts.jsonl", EVALUATED, pool="test", seed=seed)
    asked: dict[str, Path | str] = {
        "vanilla": "nano/vanilla-medium",
        "SFT unguided": folder / "unguided" / "sft" / "model",
        "SFT": folder / "nano" / "sft" / "model",
        "RLSF PPO": folder / "nano" / "rlsf" / "policy",
        "RLSF RLOO": folder / "rloo" / "rlsf" / "policy",
    }
    result = evaluate_policies(
        settings,
        prompts,
        asked,
        folder / "policies",
        reward_model=folder / "nano" / "reward" / "model",
        reference="SFT",
        judge=oracle,
        judge_name="nano oracle",
        progress=progress,
    )
    figures: Figures = {}
    for policy, metrics in result["metrics"].items():
        for name in ("oracle", "reward", "kl", "characters"):
            if name in metrics:
                figures[f"{name}, {policy}"] = metrics[name]["value"]
        figures[f"oracle stderr, {policy}"] = metrics["oracle"]["stderr"]
    return figures


def alignment_tax(folder: Path) -> Figures:
    """nano-MMLU, five shots: before and after."""
    from almost_eval.assets import DataSource
    from almost_eval.runner import Run
    from almost_eval.tasks.base import resolve_prompting
    from almost_eval.tasks.mmlu import MMLU

    data = DataSource("nano", data_root())
    figures = {}
    for name, model in (
        ("vanilla", str(shipped("nano/vanilla-medium"))),
        ("SFT", str(folder / "nano" / "sft" / "model")),
        ("RLSF PPO", str(folder / "nano" / "rlsf" / "policy")),
    ):
        engine = HFEngine(model)
        prompting = resolve_prompting(data, None, "none", engine.tokenizer, own_prompts=True)
        run = Run(MMLU([], 5, data, prompting), engine, seed=0)
        results, _ = run.execute(folder / f"mmlu-{name.replace(' ', '-')}", Progress())
        figures[f"nano-MMLU, {name}"] = results["metrics"]["accuracy"]["value"]
    return figures


def _oracle(prompt: str, answer: str) -> float:
    found = score_text(prompt, answer)
    return found.overall if found else 0.0


def print_table(seeds: Sequence[int], found: Sequence[Figures]) -> None:
    """Each figure: its mean over the seeds, and the range."""
    print("| figure | mean | range | " + " | ".join(f"seed {seed}" for seed in seeds) + " |")
    print("|---|---|---|" + "---|" * len(seeds))
    show: Callable[[float], str] = lambda value: f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"  # noqa: E731
    for name in found[0]:
        values = [figures[name] for figures in found]
        span = f"{show(min(values))} to {show(max(values))}"
        print(f"| {name} | {show(fmean(values))} | {span} | " + " | ".join(map(show, values)) + " |")
    print(json.dumps({"seeds": list(seeds)}))


if __name__ == "__main__":
    main()
