"""`almost-eval parity`: the same numbers on every engine, or which are not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from almost_eval.cli.command_line import FiniteRange, comma_list, import_transformers, open_console, print_json
from almost_eval.cli.options import DATA, DATA_ROOT, ENGINE_FIELDS, LIMIT, PROMPT_SET, engine_flag, run_request

if TYPE_CHECKING:
    from rich.console import Console

    from almost_eval.compare.parity import Certificate


@click.command()
@click.option("--model", help="Checkpoint directory, hub id or built-in name.")
@click.option(
    "--engines", callback=comma_list, help="hf, vllm, openai; the first is compared with.  [hf,vllm,+ served]"
)
@engine_flag(ENGINE_FIELDS["base_url"], "openai: where the model is served, up to and with /v1.")
@click.option("--tasks", callback=comma_list, help="hhh, truthfulqa, mmlu.  [all]")
@LIMIT
@engine_flag(ENGINE_FIELDS["dtype"], default="float32")
@click.option(
    "--tolerance",
    type=FiniteRange(min=0, min_open=True),
    default=1e-3,
    show_default=True,
    help="Nats that a log-likelihood may differ by.",
)
@DATA
@DATA_ROOT
@PROMPT_SET
@click.option("--template", default="auto", show_default=True, help="See almost-eval hhh.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the runs and of certificate.json.")
@click.option("--json", "as_json", is_flag=True, help="Print the certificate as JSON.")
def parity(
    engines: list[str],
    base_url: str | None,
    tasks: list[str],
    dtype: str,
    tolerance: float,
    output: Path | None,
    as_json: bool,
    **values: Any,
) -> int:
    """One model on several engines: the same predictions, the same log-likelihoods?

    \b
    Example:
      almost-eval parity --model ./my-checkpoint --limit 20
      almost-eval parity --model ./my-checkpoint --base-url http://127.0.0.1:8000/v1
    """
    from almost_eval.compare.parity import certify, plan
    from almost_eval.nano import DEFAULT_MODEL
    from almost_eval.progress import progress_for

    import_transformers()
    base = run_request({**values, "model": values["model"] or DEFAULT_MODEL}, "")
    wanted = plan(base, engines=engines, tasks=tasks, base_url=base_url, dtype=dtype, tolerance=tolerance)
    folder = output or Path("runs") / f"parity-{Path(wanted.model).name}"
    certificate = certify(wanted, folder, progress_for())
    if as_json:
        print_json(certificate.to_dict())
    else:
        render(certificate, open_console(), folder)
    return 0 if certificate.holds else 1


def render(certificate: Certificate, console: Console, folder: Path) -> None:
    """The certificate as a table."""
    from rich.table import Table
    from rich.text import Text

    reference = certificate.rows[0].reference
    table = Table(title=Text(f"parity · {certificate.model} · against {reference}"), title_justify="left")
    for name in ("task", "engine"):
        table.add_column(name)
    for name in ("samples", "largest, nats", "per token", "flips"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for row in certificate.rows:
        verdict = Text("the same", "green") if row.holds else Text("differs", "red")
        numbers = (str(row.samples), f"{row.largest_nats:.2g}", f"{row.largest_per_token:.2g}", str(len(row.flips)))
        table.add_row(row.task, row.engine, *numbers, verdict)
    console.print(table)
    for row in certificate.rows:
        for problem in row.problems:
            console.print(Text.assemble((f"{row.task}, {row.engine}:", "red"), f" {problem}"), soft_wrap=True)
    ran = certificate.machine
    where = ", ".join([*ran["devices"], f"{ran['cpu']}, {ran['cores']} cores"])
    facts = (
        f"tolerance {certificate.tolerance:g} nats; {certificate.seconds:g} s on {where}",
        "versions: " + ", ".join(f"{name} {version}" for name, version in certificate.versions.items()),
        f"weights: sha256 {certificate.weight_digest}",
    )
    for fact in facts:
        console.print(Text(fact, style="dim"), soft_wrap=True)
    for name, settings in certificate.engines.items():
        server = settings.get("server") or {}
        told = {
            "version": settings.get("version"),
            "server": " ".join(str(value) for value in server.values() if value),
            "base_url": settings.get("base_url"),
            "dtype": settings["dtype"] or "not told",
            "weights": "as above" if settings["weight_digest"] == certificate.weight_digest else "not told",
        }
        if settings["weight_digest"] not in (None, certificate.weight_digest):
            told["weights"] = f"sha256 {settings['weight_digest']}"
        shown = ", ".join(f"{key} {value}" for key, value in told.items() if value)
        console.print(Text(f"{name}: {shown}", style="dim"), soft_wrap=True)
    console.print(Text(f"certificate: {folder / 'certificate.json'}"), soft_wrap=True)
