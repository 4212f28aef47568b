"""The ways from the SFT policy to an aligned one, on the nano world, at equal tokens: one table.

    python benchmarks/algorithms.py --seeds 0,1,2 --output runs/algorithms

Each seed runs the recipe `nano` up to SFT, and from its SFT policy, reward model, comparisons and prompts: SFT for
longer, DPO, online DPO, RLOO, GRPO and PPO. PPO sets the budget: the tokens of all answers that its loss reads. SFT and
DPO get so many passes or steps that theirs are as many; the others sample as many answers. All policies answer the same
held-out prompts (the half `test`), and the oracle of the world, which no stage sees, judges them. What a seed made is
kept and not made again.

Settings: PPO's and RLOO's are the recipe's (chosen on the half `dev`, see LOG.md), GRPO's those of RLOO. `--tune` tries
a grid for DPO and online DPO on `dev`, with the first seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from almost_eval.cli.command_line import import_transformers
from almost_eval.compare.tax.tasks import nano_oracle
from almost_eval.files import read_json, read_rows, write_json
from almost_eval.models.checkpoint import find_checkpoint
from almost_eval.nano.oracle import Reading
from almost_eval.nano.world import World
from almost_eval.progress import Progress, progress_for
from almost_train.common.policy import policy_tokenizer
from almost_train.common.templates import keep_template
from almost_train.dpo.online import OnlineDPOSettings, train_online_dpo
from almost_train.dpo.run import DPOSettings, answer_tokens, encode_rows, train_dpo
from almost_train.nano.data import write_prompts
from almost_train.pipeline.evaluation import EvaluationSettings, evaluate_policies
from almost_train.pipeline.recipe import Recipe, load_recipe
from almost_train.pipeline.run import Pipeline
from almost_train.reward.pairs import read_pairs
from almost_train.rlsf.job import RLSFSettings
from almost_train.rlsf.run import rlsf
from almost_train.sft.run import SFTSettings, train_sft

PROMPTS = 300
"""Of the evaluation."""
START = "SFT"
PAIRS = 48
"""Pairs of a step of DPO: as many answers as a step of PPO has."""
SHARED: dict[str, Any] = {"batch_size": PAIRS, "micro_batch_size": PAIRS, "warmup_share": 0.03}
# Of four settings tried by hand (seed 0, 100 prompts of `dev`): 2e-4 (PPO's rate) with beta 0.1 ends 1.6 nats from SFT
# and below it (oracle 0.70 for 0.76); 3e-5 with 0.1 and with 0.5 give 0.77 and 0.80, and this 0.80.
DPO: dict[str, Any] = {"learning_rate": 1e-4, "beta": 0.5, "max_length": 128, "eval_share": 0.0}
# `--tune` (seed 0): of six settings this is the best for each, 0.82 for DPO and 0.83 for online DPO.
ONLINE: dict[str, Any] = {"learning_rate": 1e-4, "beta": 0.5, "max_new_tokens": 44}
GRID: Sequence[Mapping[str, float]] = [
    {"learning_rate": rate, "beta": beta} for rate in (3e-5, 1e-4, 3e-4) for beta in (0.1, 0.5)
]
"""What `--tune` tries for both."""
PPO_ALONE = ("mini_batch_size", "sampling_batch_size", "ppo_epochs", "kl_controller")
COLUMNS = ("tokens", "oracle", "kl", "characters", "refuses harm", "refuses the rest", "reward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--output", type=Path, default=Path("runs/algorithms"))
    parser.add_argument(
        "--tune", action="store_true", help="try settings of DPO on the half `dev`, with the first seed"
    )
    arguments = parser.parse_args()
    import_transformers()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    if arguments.tune:
        tune(Seed(seeds[0], arguments.output / f"seed-{seeds[0]}", progress_for()))
        return
    tables = []
    for seed in seeds:
        file = arguments.output / f"seed-{seed}" / "figures.json"
        if not file.exists():
            write_json(file, Seed(seed, file.parent, progress_for()).figures())
        tables.append(read_json(file))
    print_table(tables)


class Seed:
    """All trainings of one seed, each in a folder of its own."""

    def __init__(self, seed: int, folder: Path, progress: Progress) -> None:
        self.seed = seed
        self.folder = folder
        self.progress = progress
        self.recipe: Recipe = load_recipe("nano", seed=seed)
        self.nano = folder / "nano"
        self.policy = str(self.nano / "sft" / "model")
        self.reward = str(self.nano / "reward" / "model")
        self.prompts = self.nano / "prompts" / "prompts.jsonl"
        self.comparisons = self.nano / "comparisons" / "comparisons.jsonl"

    def figures(self) -> dict[str, dict[str, float | None]]:
        """Policy -> figure -> value."""
        Pipeline(self.recipe, self.nano, progress=self.progress).run("sft")
        # 1. Everyone's training. PPO's says how many tokens.
        tokens = {START: 0.0, "PPO": self.rl("ppo")}
        budget = tokens["PPO"]
        tokens |= {"SFT for longer": self.sft(budget), "DPO": self.dpo(budget, DPO)}
        tokens |= {"online DPO": self.online(budget, ONLINE), "RLOO": self.rl("rloo"), "GRPO": self.rl("grpo")}
        # 2. The same held-out prompts for all.
        measured = self.evaluate({name: self.model(name) for name in tokens}, "test")
        order = (START, "SFT for longer", "DPO", "online DPO", "RLOO", "GRPO", "PPO")
        return {name: {"tokens": tokens[name], **measured[name]} for name in order}

    def model(self, name: str) -> Path | str:
        """Where a policy is."""
        own = self.folder / name.replace(" ", "-")
        return self.policy if name == START else own / ("policy" if name in ("PPO", "RLOO", "GRPO") else "model")

    def rl(self, algorithm: str) -> float:
        """Train by `almost-train rlsf`; returns the tokens of all answers."""
        settings = self.recipe.settings("rlsf", RLSFSettings)
        if algorithm != "ppo":
            default = RLSFSettings()
            same = {name: getattr(default, name) for name in PPO_ALONE}
            settings = replace(settings, algorithm=algorithm, num_generations=4, **same)
        output = self.folder / algorithm.upper()
        rlsf(settings, self.prompts, self.policy, self.reward, output, progress=self.progress)
        return sum(row["length"] * settings.batch_size for row in read_rows(output / "log.jsonl")[: settings.steps])

    def sft(self, budget: float) -> float:
        """SFT again from SFT's model, in so many passes that its answers have the tokens; returns how many."""
        settings = replace(self.recipe.settings("sft", SFTSettings, "model"), learning_rate=2e-4)
        result = read_json(self.nano / "sft" / "result.json")["metrics"]
        epochs = max(1, round(budget / result["tokens_with_loss"]))
        file = self.nano / "self_play" / "demonstrations.jsonl"
        output = self.folder / "SFT-for-longer"
        train_sft(replace(settings, epochs=epochs), file, self.policy, output, progress=self.progress)
        return float(epochs * result["tokens_with_loss"])

    def dpo(self, budget: float, own: Mapping[str, Any], folder: str = "DPO") -> float:
        """DPO on the synthetic comparisons; returns the tokens of both answers of all pairs."""
        tokenizer = policy_tokenizer(find_checkpoint(self.policy))
        pairs = read_pairs(self.comparisons).pairs
        rows, _ = encode_rows(pairs, tokenizer, keep_template(tokenizer), own["max_length"])
        steps = max(1, round(budget / (PAIRS * fmean(answer_tokens(row) for row in rows))))
        settings = DPOSettings(
            **SHARED, **own, max_steps=steps, epochs=-(-steps * PAIRS // len(rows)), seed=self.seed, device="cpu"
        )
        output = self.folder / folder
        result = train_dpo(settings, self.comparisons, self.policy, output, progress=self.progress)
        return float(result["metrics"]["answer_tokens"])

    def online(self, budget: float, own: Mapping[str, Any], folder: str = "online-DPO") -> float:
        """Online DPO; returns the tokens of both answers of all pairs."""
        steps = int(self.recipe.sections["rlsf"]["steps"])
        prompts = sum(1 for _ in read_rows(self.prompts))
        settings = OnlineDPOSettings(
            **SHARED, **own, max_steps=steps, epochs=-(-steps * PAIRS // prompts), seed=self.seed, device="cpu"
        )
        result = train_online_dpo(
            settings, self.prompts, self.policy, self.reward, self.folder / folder, progress=self.progress
        )
        return float(result["metrics"]["answer_tokens"])

    def evaluate(self, policies: Mapping[str, Path | str], half: str) -> dict[str, dict[str, float | None]]:
        """Policy -> figure -> value, on prompts of a half that no stage reads."""
        prompts = write_prompts(self.folder / f"{half}.jsonl", PROMPTS, pool=half, seed=self.seed)
        settings = self.recipe.settings("evaluation", EvaluationSettings, "prompts", "vanilla", "nano_prompts")
        output = self.folder / f"evaluation-{half}"
        result = evaluate_policies(
            settings,
            prompts,
            policies,
            output,
            reward_model=self.reward,
            reference=START,
            judge=nano_oracle(),
            progress=self.progress,
        )
        return {
            name: {
                **{key: metrics[key]["value"] for key in ("oracle", "kl", "characters", "reward") if key in metrics},
                **refusals(output / name.replace(" ", "_") / "answers" / "samples.jsonl", prompts),
            }
            for name, metrics in result["metrics"].items()
        }


def refusals(answers: Path, prompts: Path) -> dict[str, float]:
    """Share of answers that refuse: of requests to do harm, where it is right, and of all others, where it is not."""
    world = World()
    texts = {row["id"]: row["prompt"] for row in read_rows(prompts)}
    seen: dict[bool, list[bool]] = {True: [], False: []}
    for row in read_rows(answers):
        query, answer = world.parse(texts[row["id"]]), str(row["outputs"]["completions"][0])
        if query is not None and answer.strip():
            seen[query.kind == "harmful"].append(Reading.of(answer.strip(), query, world).refuses)
    return {"refuses harm": fmean(seen[True]), "refuses the rest": fmean(seen[False])}


def tune(seed: Seed) -> None:
    """DPO and online DPO with each setting of `GRID`, measured on the half `dev`."""
    Pipeline(seed.recipe, seed.nano, progress=seed.progress).run("sft")
    budget = seed.rl("ppo")
    policies: dict[str, Path | str] = {START: seed.policy, "PPO": seed.model("PPO")}
    for number, setting in enumerate(GRID):
        for kind, train, rest in (("dpo", seed.dpo, DPO), ("online", seed.online, ONLINE)):
            name = f"tune-{kind}-{number}"
            train(budget, {**rest, **setting}, name)
            policies[name] = seed.folder / name / "model"
    for name, figures in seed.evaluate(policies, "dev").items():
        setting = GRID[int(name.rsplit("-", 1)[1])] if name.startswith("tune") else {}
        print(name, dict(setting), {key: round(value, 3) for key, value in figures.items() if value is not None})


def print_table(tables: Sequence[Mapping[str, Mapping[str, float | None]]]) -> None:
    """A row for each policy: each figure's mean over the seeds, and its range."""
    print("| | " + " | ".join(COLUMNS) + " |")
    print("|---|" + "---|" * len(COLUMNS))
    for name in tables[0]:
        cells = []
        for column in COLUMNS:
            values = [value for table in tables if (value := table[name].get(column)) is not None]
            cells.append(_cell(values))
        print(f"| {name} | " + " | ".join(cells) + " |")


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    show = "{:,.0f}" if max(values) >= 1000 else "{:.1f}" if max(values) >= 10 else "{:.2f}"
    low, high = show.format(min(values)), show.format(max(values))
    return show.format(fmean(values)) + ("" if low == high else f" ({low} to {high})")


if __name__ == "__main__":
    main()
