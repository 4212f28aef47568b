"""`almost-eval merge`: the shards of a run become the run."""

from __future__ import annotations

from pathlib import Path

import click

from almost_eval.cli.options import DATA_ROOT, LOG_TO, show_results


@click.command()
@click.argument("folders", nargs=-1, required=True, metavar="DIR...", type=click.Path(path_type=Path))
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder of the whole run; the default is that of the shards."
)
@DATA_ROOT
@LOG_TO
@click.option("--json", "as_json", is_flag=True, help="Print results.json instead of the table.")
def merge(
    folders: tuple[Path, ...], output: Path | None, data_root: str | None, log_to: tuple[str, ...], as_json: bool
) -> int:
    """Join the shards of a run (--shard K/N) to the whole run. Loads no model.

    \b
    DIR is the folder of a shard, or one that holds shards. A shard that is missing, there twice, not finished or of
    another run is named, and nothing is written.

    \b
    Example:
      almost-eval merge runs/hhh    # after `almost-eval hhh --output runs/hhh --shard 1/2` and the same with 2/2
    """
    from almost_eval.run.merge import merge_runs
    from almost_eval.run.shards import find_marks, whole_folder
    from almost_eval.run.store import read_spec

    marks = find_marks(folders)
    if read_spec(marks[0].folder).get("requires") == "judge":
        from almost_eval.judge.shards import merge_answers

        merge_answers(marks, output)
        whole = whole_folder(marks, output)
        click.echo(f"the answers of all {marks[0].shard.of} shards are in {whole}")
        click.echo(f"no results yet; now the judge: repeat the command without --shard, with --output {whole}")
        return 0
    results, _ = merge_runs(marks, output, data_root)
    whole = whole_folder(marks, output)
    if log_to:
        from almost_eval.run.trackers import log_results

        log_results(whole, results, log_to)
    return show_results(results, whole, as_json=as_json)
