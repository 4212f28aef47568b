"""The Report tab: the report of a run, from below one folder, in a frame that cannot reach the page."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

import gradio as gr

from serving.chat.render import notice_html
from serving.chat.widgets import QUICK, raw_html

PAGE = "report.html"
MAX_BYTES = 20_000_000
_DEPTH = 4


def runs_with_report(root: Path) -> list[str]:
    """Folders below `root` that hold a report, newest first, as paths from there."""
    reports: list[tuple[float, str]] = []
    for folder, inner, files in os.walk(root):
        relative = Path(folder).relative_to(root)
        if len(relative.parts) >= _DEPTH:
            inner.clear()
        inner[:] = [name for name in inner if not name.startswith(".")]
        if PAGE in files:
            reports.append((Path(folder, PAGE).stat().st_mtime, relative.as_posix()))
    return [name for _, name in sorted(reports, reverse=True)]


def report_html(root: Path, run: str) -> str:
    """The report in a sandboxed frame, or a sentence.

    The frame has an origin of its own: its scripts can draw plots, and reach neither this page nor its cookies.
    """
    try:
        file = (root / run / PAGE).resolve(strict=True)
        if not (file.is_relative_to(root.resolve()) and file.name == PAGE and file.is_file()):
            raise OSError
        if file.stat().st_size > MAX_BYTES:
            return notice_html(f"The report of {run} is over {MAX_BYTES // 1_000_000} MB: open the file itself.")
        page = file.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return notice_html("There is no such report below the folder that this server was given.")
    return (
        f'<iframe class="report" sandbox="allow-scripts" title="Report" srcdoc="{escape(page, quote=True)}"></iframe>'
    )


class ReportTab:
    """Builds the tab inside a `gr.Blocks` and answers its events; runs are looked for below `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        with gr.Row(elem_classes="composer"):
            self.runs = gr.Dropdown([], label="Run", interactive=True, scale=8, elem_id="report-run")
            self.look = gr.Button("Look again", scale=1, min_width=110, elem_id="report-look")
        self.page = raw_html(elem_id="report")

    def connect(self, page: gr.Blocks) -> None:
        """Attach the events."""
        for event in (page.load, self.look.click):
            event(self._on_look, None, [self.runs, self.page], **QUICK)
        self.runs.input(self._on_open, self.runs, self.page, **QUICK | {"show_progress": "minimal"})

    def _on_look(self) -> tuple[object, str]:
        names = runs_with_report(self._root) if self._root.is_dir() else []
        if names:
            return gr.Dropdown(names, value=None), notice_html("Choose a run to see its report.", "hint")
        sentence = (
            f"No run here has a report yet: make one with almost-eval report RUN --output RUN/{PAGE}, then look again."
        )
        return gr.Dropdown([], value=None), notice_html(sentence, "hint")

    def _on_open(self, run: str | None) -> str:
        return report_html(self._root, run) if run else ""
