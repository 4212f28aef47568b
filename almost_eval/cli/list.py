"""`almost-eval list` and `almost-eval completion`: names of all parts, read from the modules that use them."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec

import click

from almost_eval.cli.command_line import open_console
from almost_eval.errors import InputError, did_you_mean
from almost_eval.types import JSONObject

SHELLS = ("bash", "zsh", "fish")


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the tables.")
def list_all(as_json: bool) -> int:
    """What there is: tasks, data, prompts, templates, engines, judges, built-in models.

    \b
    Example:
      almost-eval list
      almost-eval list --json | jq -r '.models[].name'
    """
    tables = inventory()
    if as_json:
        click.echo(json.dumps(tables, indent=1))
        return 0
    from rich.text import Text

    from almost_eval.report.tables import titled

    console = open_console()
    for title, rows in tables.items():
        table = titled(title.replace("_", " "), rows[0])
        for row in rows:
            table.add_row(*(Text(_cell(value)) for value in row.values()))
        console.print(table)
    return 0


def _cell(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def inventory() -> dict[str, list[JSONObject]]:
    """All tables, as JSON: kind -> rows with the same keys."""
    from almost_eval.data.prompt_sets import PROMPT_SET_NAMES
    from almost_eval.data.sources import DATA_NAMES
    from almost_eval.engines.build import ENGINES, PACKAGES
    from almost_eval.judge.families import FAMILIES
    from almost_eval.judge.prompts import load_family
    from almost_eval.models.stops import STOP_STRINGS

    return {
        "tasks": _tasks(),
        "data": [{"name": name, "what": what} for name, what in DATA_NAMES.items()],
        "prompt_sets": [{"name": name, "what": what} for name, what in PROMPT_SET_NAMES.items()],
        "templates": [{"name": name, "stop": [repr(s)[1:-1] for s in stop]} for name, stop in STOP_STRINGS.items()],
        "engines": [
            {
                "name": name,
                "package": (package := PACKAGES.get(name, ("transformers", ""))[0]),
                "installed": find_spec(package) is not None,
            }
            for name in ENGINES
        ],
        "judges": [
            {"name": "MODEL", "what": "a model of an OpenAI-compatible endpoint, with two families of prompts"},
            {"name": "reward:CKPT", "what": "a reward model: the higher reward wins"},
            {"name": "nano", "what": "the oracle of the built-in world, on its questions"},
        ],
        "judge_prompts": [{"name": name, "reviews": load_family(name).title} for name in FAMILIES],
        "models": _models(),
    }


def _tasks() -> list[JSONObject]:
    from almost_eval.judge.families import FAMILIES
    from almost_eval.judge.results import HEADLINE
    from almost_eval.judge.run import TASK
    from almost_eval.tasks.registry import task_classes

    rows: list[JSONObject] = [
        {
            "name": task.name,
            "protocols": list(task.protocols),
            "metrics": list(task.metric_names),
            "data": task.dataset.id if task.dataset else "each task's own",
        }
        for task in task_classes()
    ]
    # Judged comparison is a command, and no task of the registry.
    metrics = [HEADLINE, "wins", "ties", "losses"]
    return [*rows, {"name": TASK, "protocols": list(FAMILIES), "metrics": metrics, "data": "FastChat"}]


def _models() -> list[JSONObject]:
    from almost_eval.models.checkpoint import find_checkpoint
    from almost_eval.nano import SEEDED, SHIPPED

    rows: list[JSONObject] = []
    for name in SHIPPED:
        checkpoint = find_checkpoint(name, architectures=("",))  # of any kind
        size = sum(file.stat().st_size for file in checkpoint.weight_files)
        rows.append({"name": name, "parameters": checkpoint.n_parameters(), "bytes": size, "weights": "trained"})
    # Made on first use, which `list` is not.
    rows += [
        {"name": name, "parameters": None, "bytes": None, "weights": "random, made on first use"} for name in SEEDED
    ]
    return rows


@click.command()
@click.argument("shell", required=False, metavar="bash|zsh|fish")
@click.pass_context
def completion(context: click.Context, shell: str | None) -> int:
    """The script with which a shell completes commands and options.

    \b
    To install it:
      bash   add to ~/.bashrc:  eval "$(almost-eval completion bash)"
      zsh    add to ~/.zshrc:   eval "$(almost-eval completion zsh)"
      fish   once:  almost-eval completion fish > ~/.config/fish/completions/almost-eval.fish

    \b
    Example:
      almost-eval completion bash
    """
    from click.shell_completion import get_completion_class

    shell = shell or os.path.basename(os.environ.get("SHELL", ""))
    if shell not in SHELLS:
        raise InputError(f"there is no completion for the shell {shell!r}; {did_you_mean(shell, SHELLS)}")
    root = context.find_root()
    name = str(root.info_name)
    cls = get_completion_class(shell)
    assert cls is not None  # these three are click's own
    click.echo(cls(root.command, {}, name, f"_{name.replace('-', '_')}_COMPLETE".upper()).source())
    return 0
