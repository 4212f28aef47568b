"""A command for each task of the registry: its flags are the task's own settings and those of every run."""

from __future__ import annotations

import ast
import time
from functools import cached_property
from importlib.util import find_spec
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from almost_eval.cli.command_line import comma_list, import_transformers, open_console, options, print_json
from almost_eval.cli.config_file import CONFIG
from almost_eval.cli.options import DATA_OPTIONS, MODEL_OPTIONS, RUN_OPTIONS, SHARD, Values, run_request
from almost_eval.errors import InputError

if TYPE_CHECKING:
    from almost_eval.run.request import RunRequest
    from almost_eval.run.shards import Mark
    from almost_eval.tasks.facts import TaskSetting
    from almost_eval.types import JSONMapping, JSONObject

STARTED = time.perf_counter()


class TaskCommand(click.Command):
    """The command of a task.

    Only its help text is known before it runs, as importing a task takes a tenth of a second: its flags are made when
    they are first read.
    """

    def __init__(self, task: str, path: str) -> None:
        super().__init__(task, callback=self._run, help=_usage(path))
        del self.params  # click's own empty list, which would hide the property

    @cached_property
    def params(self) -> list[click.Parameter]:  # type: ignore[override]
        """Its flags."""
        from almost_eval.tasks.registry import task_class

        assert self.name is not None
        own = [_option(setting) for setting in task_class(self.name).task_settings]

        @click.command()
        @options(own, MODEL_OPTIONS, DATA_OPTIONS, RUN_OPTIONS, [SHARD])
        def flags() -> None: ...

        return [*flags.params, CONFIG]

    def _run(self, **values: Any) -> int:
        from almost_eval.tasks.registry import task_class

        assert self.name is not None
        settings = {setting.name: values.pop(setting.name) for setting in task_class(self.name).task_settings}
        request = run_request(values, self.name, settings.pop("protocol", ""), settings)
        return evaluate(request, values)


def _usage(path: str) -> str:
    """The help text that a task states, read from its source."""
    module, _, cls = path.partition(":")
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == cls:
            for statement in node.body:
                if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "usage":
                    return cleandoc(ast.literal_eval(statement.value))
    return ""


def _option(setting: TaskSetting) -> Any:
    """The flag of a task's setting."""
    name = f"--{setting.name.replace('_', '-')}"
    if setting.kind == "flag":
        return click.option(name, is_flag=True, help=setting.help)
    if setting.kind == "switch":
        return click.option(f"{name}/--no-{name[2:]}", default=None, help=setting.help)
    kind = click.IntRange(setting.minimum, setting.maximum) if setting.kind == "count" else None
    default = ",".join(setting.default) if isinstance(setting.default, tuple) else setting.default
    return click.option(
        name,
        default=None if default == "" else default,
        show_default=default not in ("", None),
        required=setting.required,
        type=kind,
        callback=comma_list if setting.kind == "names" else None,
        help=setting.help,
    )


def evaluate(request: RunRequest, values: Values) -> int:
    """Prepare, then run, or show what would be run; `values` are those of `RUN_OPTIONS`."""
    from almost_eval.progress import progress_for
    from almost_eval.run.request import open_run

    shard = values.get("shard")
    if shard and values["log_to"]:
        raise InputError("--log-to logs the figures of a whole run; give it to almost-eval merge, not to a shard")
    import_transformers()
    run = open_run(request)
    if values["dry_run"]:
        return show_plan(run.describe() | (run.describe_shard(shard) if shard else {}), as_json=values["as_json"])
    folder = request.output or run.default_folder()
    if shard:
        return show_shard(run.execute_shard(folder, shard, progress_for(), started=STARTED), as_json=values["as_json"])
    results, _ = run.execute(folder, progress_for(), started=STARTED)
    if values["log_to"]:
        from almost_eval.run.trackers import log_results

        log_results(folder, results, values["log_to"])
    return show_results(results, folder, as_json=values["as_json"])


def show_shard(mark: Mark, *, as_json: bool, merge: str = "almost-eval merge") -> int:
    """Say what a finished shard is, and what is to be done with it; returns the exit code."""
    if as_json:
        facts = {
            "shard": str(mark.shard),
            "folder": str(mark.folder),
            "samples": len(mark.ids),
            **(mark.finished or {}),
        }
        print_json(facts)
    else:
        click.echo(
            f"shard {mark.shard} is done: {len(mark.ids)} of {mark.total} samples, in {mark.folder}\n"
            f"no results yet; once all {mark.shard.of} are done: {merge} {mark.folder.parent}"
        )
    return 0


def show_plan(facts: JSONMapping, *, as_json: bool) -> int:
    """Print what `--dry-run` tells; returns the exit code."""
    if as_json:
        print_json(facts)
    else:
        from almost_eval.report.console import print_preflight

        print_preflight(facts, open_console())
    return 0


def show_results(results: JSONObject, folder: Path | None, *, as_json: bool) -> int:
    """Print `results.json`, or its table; returns the exit code: 3 where the headline is withheld."""
    if as_json:
        print_json(results)
    else:
        from almost_eval.report.console import print_results

        print_results(results, open_console(), folder=str(folder) if folder else None)
    return 0 if results["validity"]["passed"] else 3
