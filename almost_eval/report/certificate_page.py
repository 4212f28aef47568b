"""A judge's certificate as one HTML file: in the report's style, without a script, and with nothing to fetch."""

from __future__ import annotations

from pathlib import Path

from almost_eval import __version__
from almost_eval.errors import RunError
from almost_eval.files import whole_file
from almost_eval.report.certificate_views import page_view
from almost_eval.report.page import style_sheet, templates
from almost_eval.types import JSONMapping


def write_certificate(certificate: JSONMapping, folder: Path) -> Path:
    """Write `certificate.html` into a folder, whole or not at all.

    Args:
        certificate: what `judge.succession.certify` returned.
        folder: of the check.

    Raises:
        RunError: it cannot be written.
    """
    content = (
        templates()
        .get_template("certificate.html.jinja")
        .render(version=__version__, style=style_sheet(), **page_view(certificate))
    )
    file = folder / "certificate.html"
    try:
        with whole_file(file) as stream:
            stream.write(content.encode("utf-8", "replace"))
    except OSError as error:
        raise RunError(f"cannot write {file} ({error.strerror}); certificate.json is kept") from None
    return file
