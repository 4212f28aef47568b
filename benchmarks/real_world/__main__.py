"""The command: see the package."""

from __future__ import annotations

import argparse
import os
import resource
import time
from pathlib import Path

import benchmarks.real_world
from almost_eval.cli.command_line import import_transformers, run_program
from almost_eval.progress import progress_for
from almost_train.common.resume import RowLog
from benchmarks.real_world.figures import write_figures
from benchmarks.real_world.forms import FORMS
from benchmarks.real_world.study import FOLDERS, PARTS, RECIPES, Study


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.real_world",
        description=benchmarks.real_world.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", default="gemma-270m", choices=tuple(RECIPES))
    parser.add_argument("--form", default="full", choices=tuple(FORMS))
    parser.add_argument("--data-root", type=Path, required=True, help="folder with hub/, alpaca_eval/ and hh_rlhf/")
    parser.add_argument("--models", type=Path, default=Path("runs/models"), help="folder of the models")
    parser.add_argument("--output", type=Path, default=Path("runs/real-world"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", help=f"by commas: {', '.join(PARTS)}  [all but variants]")
    parser.add_argument("--until", help="the last stage of the recipe to run; no part after it is run")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",") if arguments.parts else [part for part in PARTS if part != "variants"]
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    for name in FOLDERS.values():
        if not (arguments.models / name / "config.json").is_file():
            parser.error(
                f"no model in {arguments.models / name}; `make real` makes it, or name the folder with --models"
            )
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as `almost-train` does
    import_transformers()
    arguments.output.mkdir(parents=True, exist_ok=True)
    study = Study(
        recipe_name=arguments.recipe,
        form=FORMS[arguments.form],
        seed=arguments.seed,
        root=arguments.data_root,
        models=arguments.models,
        folder=arguments.output,
        progress=progress_for(),
        until=arguments.until,
    )
    for part in parts:
        study.progress.note(f"--- {part} ---")
        began = time.monotonic()
        study.run(part)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux: KiB
        with RowLog(arguments.output / "times.jsonl") as log:
            log.append({"part": part, "seconds": round(time.monotonic() - began, 1), "peak_gib": round(peak, 2)})
        if part == "recipe" and arguments.until:
            break
    print(write_figures(study, arguments.form))


if __name__ == "__main__":
    run_program(main)
