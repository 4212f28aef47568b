"""`--slurm N`: the command that was typed as a script for Slurm, on stdout. Nothing is submitted, and nothing runs.

The script submits two jobs: an array with a shard of the run for each of its tasks, and, once all of these have ended,
the merge. That one waits for their end, not for their success: where a shard is missing, `merge` names it.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from almost_eval.errors import InputError
from almost_eval.run.provenance import command
from almost_eval.run.shards import without_shard

_SCRIPT = """\
#!/bin/bash
# {name}: {shards} shards, and their merge.
# Submit with: bash THIS_FILE [options of sbatch, as --partition=gpu --gres=gpu:1 --time=2:00:00]
set -euo pipefail
mkdir -p {logs}

submit_shards() {{ sbatch --parsable "$@" <<'SHARDS'
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array=1-{shards}
#SBATCH --output="{quoted}/shard-%a.log"
set -euo pipefail
cd {folder}
{command} --shard "$SLURM_ARRAY_TASK_ID/{shards}"
SHARDS
}}
shards=$(submit_shards "$@")

sbatch --dependency="afterany:${{shards%%;*}}" "$@" <<'MERGE'
#!/bin/bash
#SBATCH --job-name={name}-merge
#SBATCH --output="{quoted}/merge.log"
set -euo pipefail
cd {folder}
{last}
MERGE
"""


def script(command: Sequence[str], merge: Sequence[str], output: Path, shards: int, *, then: bool = False) -> str:
    """The script.

    Args:
        command: the program and its arguments, without a shard.
        merge: the program and its command that joins shards.
        output: folder of the whole run.
        shards: tasks of the array.
        then: the command itself follows the merge: answers were divided, their judge is one.
    """
    folder = Path.cwd()
    logs = str(folder / output / "slurm")
    last = [shlex.join([*merge, str(output)])] + ([shlex.join(command)] if then else [])
    return _SCRIPT.format(
        name="almost-" + re.sub(r"[^\w.-]", "-", output.absolute().name),
        logs=shlex.quote(logs),
        # As sbatch reads it, not a shell: a quoted text, in which % begins a number of the job's.
        quoted=logs.replace("\\", r"\\").replace('"', r"\"").replace("%", "%%"),
        shards=shards,
        folder=shlex.quote(str(folder)),
        command=shlex.join(command),
        last="\n".join(last),
    )


def print_script(context: click.Context, option: str, shards: int) -> None:
    """Print the script of the command line, all of which is checked before, and exit. `option` is the name under which
    the number of shards stands there.

    Raises:
        InputError: it names no folder, or something that is each shard's own.
    """
    path = context.command_path.split()[1:]
    if sys.argv[1 : 1 + len(path)] != path:
        raise InputError(f"--{option} is for the command line alone")
    arguments = without_shard(sys.argv, option)[1 + len(path) :]
    with context.command.make_context(context.info_name, arguments, parent=context.parent) as whole:
        words = without_shard([sys.argv[0], *command()[1:]], option)  # with the options that a file stands for
        values = whole.params
    if values.get("shard"):
        raise InputError("--slurm makes the shards itself; leave out --shard")
    if values.get("output") is None:
        raise InputError("--slurm: name the folder of the run with --output; the shards are written inside it")
    for name in ("dry_run", "log_to"):
        if values.get(name):
            raise InputError(f"--slurm takes no --{name.replace('_', '-')}, as it would be each shard's; leave it out")
    program = _program(words[0])
    root = context.find_root().command
    assert isinstance(root, click.Group)
    merge = [*program, next(name for name in ("merge-shards", "merge") if name in root.commands)]
    click.echo(script([*program, *words[1:]], merge, values["output"], shards, then="judge" in values), nl=False)
    context.exit(0)


def _program(name: str) -> list[str]:
    """How a job starts the program: by its path, as the search path of a job may be another."""
    file = Path(name)
    if file.name == "__main__.py":
        return [sys.executable, "-m", ".".join(file.parent.parts[-2:])]
    return [str(file.absolute()) if file.exists() else name]
