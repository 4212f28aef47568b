"""The parts of the study. Each goes on where it was killed, and does nothing where it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from almost_eval.api import HFEngine, evaluate
from almost_eval.files import read_rows, write_rows
from almost_eval.models.loading import release_memory
from almost_eval.progress import Progress
from almost_train.pipeline.evaluation import EvaluationSettings, evaluate_policies
from almost_train.pipeline.recipe import load_recipe
from almost_train.pipeline.run import Pipeline
from almost_train.reward.run import RewardSettings, train_reward
from benchmarks.real_world.data import halves, human_pairs, prepare, static_hhh
from benchmarks.real_world.forms import Form
from benchmarks.real_world.labels import write_labels
from benchmarks.real_world.scores import score_candidates, score_pairs
from benchmarks.real_world.variants import VARIANTS, folder_of, link_stages, policies

GEMMA, SMOLLM2 = "google/gemma-3-270m", "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDERS = {GEMMA: "gemma-3-270m", SMOLLM2: "smollm2-135m-instruct"}
"""Model that a recipe names -> its folder among the models. Those that `make real` makes are from 4-bit weights."""
RECIPES = {"gemma-270m": (GEMMA, SMOLLM2), "smollm2-135m": (SMOLLM2,)}
"""Recipe -> the models that it names, first the one that becomes the policy."""
POLICY_STOPS = ("\n\nHuman:", "\n\nAssistant:")


@dataclass(frozen=True, slots=True)
class Study:
    """One run of everything, in one folder."""

    recipe_name: str
    form: Form
    seed: int
    root: Path
    """Folder with `hub/`, `alpaca_eval/` and `hh_rlhf/`."""
    models: Path
    folder: Path
    progress: Progress
    until: str | None = None
    """The last stage of the recipe."""

    def run(self, part: str) -> None:
        """One part by its name in `PARTS`."""
        PARTS[part](self)

    @property
    def data_folder(self) -> Path:
        """Of the files that `data` writes."""
        return self.folder / "data"

    @property
    def runs(self) -> Path:
        """The recipe's run."""
        return self.folder / "recipe"

    @property
    def second_model(self) -> Path:
        """The reward model of people's preferences."""
        return self.folder / "second" / "model"

    def model(self, name: str) -> str:
        """The folder of a model that a recipe names."""
        return str(self.models / FOLDERS[name])

    def pipeline(self, folder: Path, values: Sequence[str] = ()) -> Pipeline:
        """The recipe in a folder, with the form's settings and then those that are named."""
        places = {name: self.model(name) for name in RECIPES[self.recipe_name]}
        places |= {name: str(self.data_folder / name) for name in ("as-is.jsonl", "held-out.jsonl")}
        recipe = load_recipe(self.recipe_name, seed=self.seed, places=places, values=(*self.form.values, *values))
        return Pipeline(recipe, folder, str(self.root / "hub"), self.progress)

    # --- parts ---

    def data(self) -> None:
        """Files that the recipe reads."""
        if not (self.data_folder / "held-out.jsonl").exists():
            prepare(
                self.root,
                self.data_folder,
                seed=self.seed,
                as_is_pairs=self.form.as_is_pairs,
                second_pairs=self.form.second_pairs,
                held_out=self.form.held_out,
            )

    def recipe(self) -> None:
        """All stages."""
        self.pipeline(self.runs).run(self.until)

    def second(self) -> None:
        """A reward model of people's preferences, which no stage of the recipe sees."""
        settings = RewardSettings(
            lora_rank=16,
            merge=True,
            learning_rate=2e-4,
            batch_size=16,
            micro_batch_size=4,  # half the memory of 8, which on a CPU's allocator was 17 GiB
            max_length=512,
            bf16=True,
            seed=self.seed,
        )
        file = self.data_folder / "second.jsonl"
        train_reward(settings, file, self.model(SMOLLM2), self.folder / "second", progress=self.progress)

    def rewards(self) -> None:
        """Each reward model's scores of real pairs."""
        people = human_pairs(self.root)
        sets = {"hhh": static_hhh(self.root), "people": people}
        most = {"hhh": self.form.hhh and 4 * self.form.hhh, "people": self.form.human_pairs}
        models = {name: self.runs / name / "model" for name in ("reward", "as_is_reward")}
        models["second"] = self.second_model
        for name, variant in VARIANTS.items():
            if variant.until == "reward":
                models[name] = folder_of(self.folder / "variants", name) / "reward" / "model"
        for name, model in models.items():
            for benchmark, pairs in sets.items() if model.exists() else ():
                # The second model has been trained on the other half.
                own = halves(pairs, self.seed)[1] if (name, benchmark) == ("second", "people") else pairs
                file = self.folder / "rewards" / f"{name.replace(' ', '-')}.{benchmark}.jsonl"
                few = None if name in ("reward", "second") else self.form.other_pairs
                score_pairs(own[: most[benchmark]][:few], model, file, self.progress)

    def policies(self) -> None:
        """Benchmarks of each policy on one load, then all policies' answers to held-out prompts.

        Policies of variants are measured on Static HHH alone: the goals of the study are there.
        """
        form, checkpoints, tries = self.form, self.checkpoints(), self.tries()
        truthfulqa = {"limit": form.truthfulqa, "metrics": ("mc1", "mc2", "mc1_true_prompt")}
        mmlu = {"limit": form.mmlu, "subjects": form.subjects}
        runs: dict[str, dict[str, Any]] = {
            "hhh-likelihood": {"limit": form.hhh},
            "hhh-choice": {"limit": form.hhh},
            "truthfulqa": truthfulqa,
            "mmlu": mmlu,
            "mmlu-words": {**mmlu, "words": True},
        }
        for label, model in {**checkpoints, **tries}.items():
            engine: Any = HFEngine(model, dtype="bfloat16")
            for name, settings in runs.items():
                if label in tries and not name.startswith("hhh"):
                    continue
                output, task = self.folder / "policies" / label / name, name.removesuffix("-words")
                evaluate(engine, task, output=output, data_root=self.root / "hub", seed=self.seed, **settings)
            del engine
            release_memory()  # two models at a time are too many for a small machine
        asked = self.data_folder / "asked.jsonl"
        if not asked.exists():
            rows = read_rows(self.data_folder / "held-out.jsonl")
            kinds = [[row for row in rows if row["id"].startswith(kind)] for kind in ("alpaca", "harmful")]
            write_rows(asked, [row for kind in kinds for row in kind[: form.answered]])
        evaluate_policies(
            EvaluationSettings(max_new_tokens=form.answer_tokens, stop=POLICY_STOPS, seed=self.seed),
            asked,
            {label: Path(model) for label, model in checkpoints.items()},
            self.folder / "answers",
            reward_model=self.second_model,
            reference="vanilla",
            progress=self.progress,
        )

    def checkpoints(self) -> dict[str, str]:
        """Label -> policy of the recipe."""
        return {
            "vanilla": self.model(RECIPES[self.recipe_name][0]),
            "sft": str(self.runs / "sft" / "model"),
            "rlsf": str(self.runs / "rlsf" / "policy"),
        }

    def tries(self) -> dict[str, str]:
        """Variant -> its policy, of those that are made."""
        return {name: str(path) for name, path in policies(self.folder / "variants").items()}

    def best_of(self) -> None:
        """The second model's reward of every self-play candidate of a first turn."""
        prompts = {row["id"]: row["prompt"] for row in read_rows(self.runs / "prompts" / "prompts.jsonl")}
        turns = read_rows(self.runs / "self_play" / "candidates.jsonl")
        first = min(row["turn"] for row in turns)
        rows = [row for row in turns if row["turn"] == first]
        score_candidates(rows, prompts, self.second_model, self.folder / "best-of.jsonl", self.progress)

    def labels(self) -> None:
        """How often "larger and better prompted" is better."""
        pipeline = self.pipeline(self.runs)
        write_labels(pipeline, self.root, self.data_folder, self.folder / "labels", self.seed, self.progress)

    def variants(self) -> None:
        """Other filters, and self-play without the reward model's choice."""
        for name, variant in VARIANTS.items():
            self.progress.note(f"variant: {name}")
            folder = folder_of(self.folder / "variants", name)
            folder.mkdir(parents=True, exist_ok=True)
            link_stages(self.runs, folder, variant.shared)
            self.pipeline(folder, variant.values).run(variant.until)


PARTS = {
    "data": Study.data,
    "recipe": Study.recipe,
    "second": Study.second,
    "variants": Study.variants,
    "rewards": Study.rewards,
    "policies": Study.policies,
    "best-of": Study.best_of,
    "labels": Study.labels,
}
"""Name -> part, in the order they run. What others measure comes first."""
