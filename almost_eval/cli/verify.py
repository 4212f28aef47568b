"""`almost-eval verify`: are the numbers of a finished run what its lines, and its model, say?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from almost_eval.cli.command_line import SEED, import_transformers, open_console, options
from almost_eval.cli.options import DATA_ROOT, MODEL_OPTIONS, Values, run_request

if TYPE_CHECKING:
    from almost_eval.run.runner import RunRequest
    from almost_eval.run.verify import Verification

PROBLEMS_SHOWN = 20


@click.command()
@click.argument("run_folder", type=click.Path(path_type=Path))
@click.option("--samples", default=16, show_default=True, type=click.IntRange(min=1), help="How many to score again.")
@options(MODEL_OPTIONS, [DATA_ROOT])
@click.option("--seed", default=0, show_default=True, type=SEED, help="Chooses the samples to score again.")
def verify(run_folder: Path, samples: int, seed: int, **values: Any) -> int:
    """Recompute every metric of a run from its lines; with --model, score a sample of them again.

    \b
    Example:
      almost-eval verify runs/my-run
      almost-eval verify runs/my-run --model ./my-checkpoint --samples 32
    """
    from almost_eval.data.sources import find_data
    from almost_eval.run.store import read_spec
    from almost_eval.run.verify import rescore, verify_run

    spec = read_spec(run_folder)
    if spec.get("requires") == "judge":
        from almost_eval.judge.results import verify_judged

        if values["model"]:
            raise click.UsageError("--model: a judged run has no samples to score again; leave it out")
        return _show(verify_judged(run_folder), rescored=False)
    verification = verify_run(run_folder, find_data(spec["data"]["source"], values["data_root"]))
    if values["model"]:
        from almost_eval.run.runner import open_run

        import_transformers()
        rescore(run_folder, open_run(_request(spec, values)), verification, n=samples, seed=seed)
    return _show(verification, rescored=bool(values["model"]))


def _request(spec: Mapping[str, Any], values: Values) -> RunRequest:
    """What makes a spec's prompts and numbers again; flags about the engine win."""
    from almost_eval.tasks.registry import task_class

    prompts, template, engine = spec["prompt_set"], spec["template"], spec["engine"]
    name = values["engine"] or engine["name"]
    again: Values = {**values, "engine": name}
    if name != "openai":
        again["max_length"] = engine["context_length"]
        kept = ("dtype", "attention") if name == "hf" else ("dtype",)
        again |= {key: engine[key] for key in kept if values[key] == "auto" and engine.get(key)}
    elif not values["base_url"]:
        again["base_url"] = engine.get("base_url")
    again |= {
        "data": spec["data"]["source"],
        "prompt_set": prompts and ("builtin" if prompts["name"] == "builtin" else "official"),
        "template": (template["name"] if template else "none") if spec["template_asked"] else "auto",
        "limit": spec["settings"].get("limit"),
        "seed": spec["seed"],
    }
    own = [setting.name for setting in task_class(spec["task"]).task_settings]
    settings = {key: value for key, value in spec["settings"].items() if key in own}
    return run_request(again, spec["task"], spec["protocol"], settings)


def _show(verification: Verification, *, rescored: bool) -> int:
    from rich.text import Text

    console = open_console()
    console.print(f"{verification.samples} samples, {verification.metrics} entries of results.json recomputed")
    if rescored:
        console.print(
            f"{verification.rescored} samples scored again, largest difference {verification.largest_difference:.2g}"
        )
    problems = verification.problems
    for problem in problems[:PROBLEMS_SHOWN]:
        console.print(Text.assemble(("differs:", "red"), f" {problem}"), soft_wrap=True)
    if len(problems) > PROBLEMS_SHOWN:
        console.print(f"and {len(problems) - PROBLEMS_SHOWN} more")
    console.print("verified" if verification.passed else f"[red]not verified: {len(problems)} differences[/red]")
    return 0 if verification.passed else 1
