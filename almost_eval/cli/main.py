"""`almost-eval`: all its commands. Each imports what it needs when it runs, so that `--help` is instant.

Those of the tasks are made here: their flags are the task's own settings and those of every run.
"""

from __future__ import annotations

import ast
import time
from functools import cached_property
from importlib.util import find_spec
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from almost_eval import __version__
from almost_eval.cli.all import all_tasks
from almost_eval.cli.arena import arena
from almost_eval.cli.command_line import Commands, comma_list, import_transformers, options, run_command_line
from almost_eval.cli.config_file import CONFIG, add_config
from almost_eval.cli.judge import judge, vicuna
from almost_eval.cli.list import completion, list_all
from almost_eval.cli.merge import merge
from almost_eval.cli.options import (
    DATA_OPTIONS,
    MODEL_OPTIONS,
    RUN_OPTIONS,
    SHARD,
    Values,
    run_request,
    show_plan,
    show_results,
    show_shard,
)
from almost_eval.cli.parity import parity
from almost_eval.cli.plan import plan
from almost_eval.cli.report import compare, report
from almost_eval.cli.tax import tax
from almost_eval.cli.verify import verify
from almost_eval.errors import InputError
from almost_eval.tasks.registry import TASKS, task_class

if TYPE_CHECKING:
    from almost_eval.run.runner import RunRequest
    from almost_eval.tasks.facts import TaskSetting

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
        assert self.name is not None
        own = [_option(setting) for setting in task_class(self.name).task_settings]

        @click.command()
        @options(own, MODEL_OPTIONS, DATA_OPTIONS, RUN_OPTIONS, [SHARD])
        def flags() -> None: ...

        return [*flags.params, CONFIG]

    def _run(self, **values: Any) -> int:
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
    from almost_eval.run.runner import open_run

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


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="almost-eval")
@click.pass_context
def cli(context: click.Context) -> None:
    """Evaluate language models: numbers that can be trusted, fast.

    \b
    Example:
      almost-eval all                                      built-in models and data, nothing to download
      almost-eval hhh --model ./my-checkpoint --data-root ./hub
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (
    all_tasks,
    plan,
    *(TaskCommand(name, path) for name, path in TASKS.items()),
    vicuna,
    judge,
    merge,
    compare,
    parity,
    verify,
    report,
    tax,
    arena,
    list_all,
    completion,
):
    cli.add_command(command)
add_config(cli, leave_out=TASKS)


def main() -> NoReturn:
    """Run the command line."""
    run_command_line(cli, "almost-eval")


if __name__ == "__main__":
    main()
