"""The whole recipe on the nano world, judged by ground truth: what each stage adds, over several seeds.

    python benchmarks/nano_pipeline.py --seeds 0,1,2 --output runs/nano-benchmark

Each seed runs `almost-train run nano` and the arms that the comparison needs beside it (unguided self-play and SFT on
it, three passes of SFT, RLOO). Everything that a seed made is kept under the output folder and is not made again.
Settings were chosen on `dev`, one half of the queries that no stage reads; what is printed is measured on `test`, the
other half.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from almost_eval.cli.command_line import import_transformers
from almost_eval.compare.tax.tasks import nano_oracle
from almost_eval.data.sources import DataSource, find_data
from almost_eval.engines.build import generation_engine
from almost_eval.engines.hf import HFEngine
from almost_eval.files import Row, read_json, read_rows, write_json
from almost_eval.nano import shipped
from almost_eval.nano.data import data_root
from almost_eval.nano.oracle import score_text
from almost_eval.progress import Progress, progress_for
from almost_eval.rewards.hf import HFRewardModel
from almost_eval.types import Message
from almost_train.nano.data import write_prompts
from almost_train.pipeline.evaluation import EvaluationSettings, evaluate_policies
from almost_train.pipeline.recipe import Recipe, load_recipe
from almost_train.pipeline.run import Pipeline
from almost_train.reward.run import RewardSettings, train_reward
from almost_train.synthetic.comparisons import ComparisonSettings, synthesize_comparisons
from almost_train.synthetic.responses import Configuration, ResponseSettings, read_configurations, synthesize_responses
from benchmarks.nano_ladder import Respondent, oracle_ladder

Figures = dict[str, float]
HeldOutPair = tuple[str, str, str]
"""(prompt, the answer that the oracle prefers, the other)."""
HELD_OUT = 400
"""Prompts of the test half whose answers, from all configurations, make the held-out pairs."""
EVALUATED = 600
"""Prompts of the test half that every policy answers; this world has few more."""
MARGIN = 0.1
"""Answers closer than this in oracle score are no pair: the oracle does not prefer either."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--output", type=Path, default=Path("runs/nano-benchmark"))
    arguments = parser.parse_args()
    import_transformers()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    found = []
    for seed in seeds:
        file = arguments.output / f"seed-{seed}" / "figures.json"
        if not file.exists():
            write_json(file, run_seed(seed, file.parent, progress_for()))
        found.append(read_json(file))
    print_table(seeds, found)


def run_seed(seed: int, folder: Path, progress: Progress) -> Figures:
    """Everything for one seed: name of a figure -> its value."""
    # 1. The recipe, and its other arms on the same prompts and reward model.
    recipe = load_recipe("nano", seed=seed)
    reports = Pipeline(recipe, folder / "nano", progress=progress).run()
    for arm, changes in ARMS.items():
        run_arm(recipe, folder, arm, changes, progress)

    # 2. Measures.
    figures: Figures = {"recipe, seconds of all stages": sum(report.result["seconds"] for report in reports)}
    figures |= ladder(seed)
    held_out = held_out_pairs(recipe, folder, seed, progress)
    figures |= filters(recipe, folder, held_out, progress)
    figures |= reward_model(folder / "nano" / "reward" / "model", held_out, "recipe")
    figures |= demonstrations(folder)
    figures |= policies(recipe, folder, seed, progress)
    figures |= alignment_tax(folder)
    return figures


PPO_SETTINGS = ("mini_batch_size", "sampling_batch_size", "ppo_epochs", "kl_controller")
"""What the recipe sets of PPO alone: RLOO does not take it."""

ARMS: dict[str, Mapping[str, Mapping[str, Any]]] = {
    "unguided": {"self_play": {"unguided": True}},
    "three-passes": {"sft": {"epochs": 3}},
    "rloo": {"rlsf": {"algorithm": "rloo", "num_generations": 4, **dict.fromkeys(PPO_SETTINGS)}},
}
"""Arm -> what differs from the recipe (None: left out). Stages before the first difference are the recipe's own."""


def run_arm(
    recipe: Recipe, folder: Path, arm: str, changes: Mapping[str, Mapping[str, Any]], progress: Progress
) -> None:
    """Run the recipe with changes, up to the last stage that the comparison reads."""
    sections = {
        name: {key: value for key, value in {**section, **changes.get(name, {})}.items() if value is not None}
        for name, section in recipe.sections.items()
    }
    first = next(iter(changes))
    target = folder / arm
    target.mkdir(parents=True, exist_ok=True)
    for stage in list(sections)[: list(sections).index(first)]:
        link = target / stage
        if not link.exists():
            link.symlink_to((folder / "nano" / stage).resolve())
    changed = dataclasses.replace(recipe, sections=sections)
    Pipeline(changed, target, progress=progress).run("rlsf" if arm == "rloo" else "sft")


# --- demand by demand ---


def ladder(seed: int) -> Figures:
    """Oracle score of the configurations, in the order that the comparisons assume."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sizes = ("small", "medium", "large")
    models = {s: AutoModelForCausalLM.from_pretrained(shipped(f"nano/vanilla-{s}")).eval() for s in sizes}
    tokenizer: Any = AutoTokenizer.from_pretrained(shipped("nano/vanilla-large"))
    asked = [
        Respondent("large", "good", 5),
        Respondent("large", "good", 1),
        Respondent("medium", "good", 1),
        Respondent("small", "weak", 1),
    ]
    rungs = oracle_ladder(models, tokenizer, asked, n=1000, seed=seed)
    figures: Figures = {}
    for rung in rungs:
        figures[f"oracle, {rung.configuration}"] = rung.overall
    for upper, lower in pairwise(rungs):
        gap, stderr = upper.overall - lower.overall, (upper.stderr**2 + lower.stderr**2) ** 0.5
        figures[f"gap in standard errors, {upper.configuration} over {lower.configuration}"] = gap / stderr
    return figures


FILTERS = {
    "none": {"length_rule": False, "drop_identical": False},
    "heuristic": {},
    "heuristic + as-is": {},
    "as-is": {"length_rule": False},
    "heuristic + as-is + balance": {"balance_length": True},
}
"""Name -> settings of the comparisons stage; those with `as-is` have the second filter too."""


def filters(recipe: Recipe, folder: Path, held_out: Sequence[HeldOutPair], progress: Progress) -> Figures:
    """Labels and reward models under each filter: agreement with the oracle, and how far length decides."""
    nano = folder / "nano"
    rewards = recipe.settings("reward", RewardSettings, "model")
    figures: Figures = {}
    for name, settings in FILTERS.items():
        target = folder / "filters" / name.replace(" ", "")
        synthesize_comparisons(
            ComparisonSettings(pairs="all", **settings),  # type: ignore[arg-type]
            nano / "responses",
            nano / "ranking.yaml",
            target / "comparisons",
            as_is_reward_model=str(nano / "as_is_reward" / "model") if "as-is" in name else None,
            progress=progress,
        )
        pairs = target / "comparisons" / "comparisons.jsonl"
        figures |= {f"filter {name}: pairs, {key}": value for key, value in agreement(read_rows(pairs)).items()}
        train_reward(rewards, pairs, str(recipe.value("reward", "model")), target / "reward", progress=progress)
        figures |= reward_model(target / "reward" / "model", held_out, f"filter {name}")
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


def held_out_pairs(recipe: Recipe, folder: Path, seed: int, progress: Progress) -> list[HeldOutPair]:
    """Pairs of answers of the recipe's configurations to test prompts, of which the oracle prefers one."""
    prompts = write_prompts(folder / "held-out-prompts.jsonl", HELD_OUT, pool="test", seed=seed)
    configurations = read_configurations(recipe.value("responses", "configurations"), "recipe")
    answer(recipe, prompts, configurations, folder / "held-out", progress)
    answers: dict[str, dict[str, float]] = {}
    for configuration in configurations:
        for row in read_rows(folder / "held-out" / f"{configuration.name}.jsonl"):
            answers.setdefault(row["prompt"], {})[row["response"]] = _oracle(row["prompt"], row["response"])
    return [
        (prompt, *(pair if scores[pair[0]] > scores[pair[1]] else pair[::-1]))
        for prompt, scores in answers.items()
        for pair in combinations(scores, 2)
        if abs(scores[pair[0]] - scores[pair[1]]) >= MARGIN
    ]


def answer(
    recipe: Recipe, prompts: Path, configurations: Sequence[Configuration], output: Path, progress: Progress
) -> None:
    """Answers of configurations as the recipe samples them."""
    settings = recipe.settings("responses", ResponseSettings, "configurations", prompt_set="nano")
    data = find_data("nano", None)
    synthesize_responses(
        settings, prompts, configurations, output, data=data, engine_for=generation_engine, progress=progress
    )


def reward_model(model: Path, pairs: Sequence[HeldOutPair], name: str) -> Figures:
    """Agreement of a reward model with the oracle, beside "the longer answer wins"."""
    scorer = HFRewardModel(str(model))
    dialogues = [(Message("user", p), Message("assistant", text)) for p, *both in pairs for text in both]
    rewards = scorer.score(dialogues)
    right = [float(better > worse) for better, worse in zip(rewards[::2], rewards[1::2], strict=True)]
    length = [len(better) - len(worse) for _, better, worse in pairs]
    figures = {
        f"{name}: reward model agrees with the oracle": fmean(right),
        f"{name}: ... where the better answer is shorter": fmean(
            r for r, n in zip(right, length, strict=True) if n < 0
        ),
    }
    if name == "recipe":
        figures["held-out pairs"] = len(pairs)
        figures["longer wins: agrees with the oracle"] = fmean(0.5 if n == 0 else float(n > 0) for n in length)
    return figures


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
        "SFT, three passes": folder / "three-passes" / "sft" / "model",
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
        judge=nano_oracle(),
        progress=progress,
    )
    figures: Figures = {}
    for policy, metrics in result["metrics"].items():
        for name in ("oracle", "reward", "kl", "characters"):
            if name in metrics:
                figures[f"{name}, {policy}"] = metrics[name]["value"]
        figures[f"oracle stderr, {policy}"] = metrics["oracle"]["stderr"]
    best = read_configurations(recipe.value("responses", "configurations"), "recipe")[:1]
    answer(recipe, prompts, best, folder / "large", progress)
    rows = read_rows(folder / "large" / f"{best[0].name}.jsonl")
    figures["oracle, vanilla-large with five demonstrations"] = fmean(_oracle(r["prompt"], r["response"]) for r in rows)
    return figures


def alignment_tax(folder: Path) -> Figures:
    """nano-MMLU, five shots: before and after, by letters (chance) and by words (which the models know)."""
    from almost_eval.run.runner import Run
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
        for words, suffix in ((False, ""), (True, ", words")):
            run = Run(MMLU([], 5, data, prompting, words=words), engine, seed=0)
            results, _ = run.execute(folder / f"mmlu-{name.replace(' ', '-')}{'-words' if words else ''}", Progress())
            figures[f"nano-MMLU, {name}{suffix}"] = results["metrics"]["accuracy"]["value"]
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


if __name__ == "__main__":
    main()
