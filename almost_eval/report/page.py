"""One run, or several, as one HTML file. It needs no network and no other file, and escapes every text of a run.

The tables and plots are in the document itself and read without a script; the samples travel packed (`samples.pack`)
and are shown by the page's script. A content security policy lets only that script run, and lets nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from almost_eval import __version__
from almost_eval.errors import InputError
from almost_eval.files import whole_file
from almost_eval.report import views
from almost_eval.report.matrix import Matrix, build_matrix
from almost_eval.report.runs import RunSet, load_runs
from almost_eval.report.samples import Payload, pack

if TYPE_CHECKING:
    import jinja2
    from markupsafe import Markup

_PAGE = Path(__file__).with_name("assets")


@dataclass(frozen=True, slots=True)
class Page:
    """A page that was written."""

    file: Path
    size: int
    """Bytes."""
    n_samples: int
    """Distinct samples in its browser."""


@dataclass(frozen=True, slots=True)
class ReferenceRow:
    """One published figure."""

    task: str
    system: str
    """What was measured, against what."""
    value: str
    """As published: text, so that nothing can compute with it."""
    what: str
    protocol: str
    source: str


def write_page(folders: Sequence[Path], file: Path, *, samples: bool = True) -> Page:
    """The page of some run folders; see `write_report`."""
    run_set = load_runs(folders, prompts=samples)
    matrix = build_matrix(run_set) if run_set.comparable else None
    return write_report(run_set, matrix, file, samples=samples)


def write_report(run_set: RunSet, matrix: Matrix | None, file: Path, *, samples: bool = True) -> Page:
    """Write the page, whole or not at all; `matrix` compares the runs where there are several models.

    Raises:
        InputError: the file cannot be written.
    """
    payload = pack(run_set) if samples else Payload()
    try:
        with whole_file(file) as stream:
            for part in render(run_set, matrix, payload):
                stream.write(part.encode("utf-8", "replace"))
            size = stream.tell()
    except OSError as error:
        raise InputError(f"cannot write {file} ({error.strerror}); choose another --output") from None
    return Page(file, size, payload.n_samples)


@cache
def templates() -> jinja2.Environment:
    """The templates of all pages, each compiled once in a process (0.1 s); they escape every text."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def style_sheet() -> Markup:
    """Of all pages."""
    from markupsafe import Markup

    return Markup((_PAGE / "style.css").read_text(encoding="utf-8"))


def render(run_set: RunSet, matrix: Matrix | None, payload: Payload) -> Iterator[str]:
    """The document, part by part: it may be hundreds of megabytes."""
    from markupsafe import Markup

    script = (_PAGE / "page.js").read_text(encoding="utf-8")
    return (
        templates()
        .get_template("page.html.jinja")
        .generate(
            title=_title(run_set),
            version=__version__,
            style=style_sheet(),
            script=Markup(script),
            script_digest=_digest(script),
            models=[{"label": label, "series": at % views.plots.SERIES} for at, label in enumerate(run_set.models)],
            headlines=views.headline_rows(run_set),
            matrix=views.matrix_view(matrix) if matrix else None,
            sections=_with_svg(views.sections(run_set)),
            provenance=views.provenance(run_set),
            references=reference_rows(),
            unfinished=run_set.unfinished,
            blobs=map(Markup, payload.blobs),
            n_samples=payload.n_samples,
        )
    )


def reference_rows() -> list[ReferenceRow]:
    """All published figures on record, shown greyed in a table of their own. No export and no comparison reads them."""
    content = json.loads(_PAGE.with_name("reference.json").read_text(encoding="utf-8"))
    return [ReferenceRow(**row) for row in content["rows"]]


def _with_svg(sections: list[views.View]) -> list[views.View]:
    """Marks the plots, which are drawn here and hold no name of a run, as markup."""
    from markupsafe import Markup

    for section in sections:
        for plot in section["plots"]:
            plot["svg"] = Markup(plot["svg"])
        for judged in section["judged"]:
            judged["by_length"] = judged["by_length"] and Markup(judged["by_length"])
    return sections


def _title(run_set: RunSet) -> str:
    if len(run_set.models) == 1:
        return run_set.models[0]
    return f"{len(run_set.models)} models, {len(run_set.benchmarks)} benchmark{'s' * (len(run_set.benchmarks) > 1)}"


def _digest(script: str) -> str:
    """As a content security policy names an inline script; the element holds it between two newlines."""
    return base64.b64encode(hashlib.sha256(f"\n{script}\n".encode()).digest()).decode()
