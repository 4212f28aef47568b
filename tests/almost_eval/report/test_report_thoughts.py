"""The page shows a thought folded beside the answer that was scored, a judge's before its review."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_fixtures import sample, write_run

from almost_eval.report.page import write_page
from almost_eval.types import SampleRecord, Score

pytest_plugins = ["report_fixtures"]
pytestmark = pytest.mark.browser


@pytest.fixture
def page_file(tmp_path: Path) -> Path:
    outputs: dict[str, Any] = {"completions": ["Four.", "Five."], "finish_reasons": ["stop", "length"]}
    outputs |= {"reasoning": ["2 + 2", "<b>6 - 1</b>"], "thought_cut": [False, True]}
    records = [SampleRecord(sample("1"), outputs, Score(1.0, None, {"accuracy": 1.0}))]
    write_run(tmp_path / "written", records, task="harness")
    stored: dict[str, Any] = {"order": "forward", "baseline": "b", "model": "m"}
    review = {"review": "8 7", "winner": "1", "scores": [8, 7], "lengths": [5, 3], "thinking": "The first is right."}
    judged = write_run(
        tmp_path / "judged",
        [SampleRecord(sample("q/forward", cluster="q", **stored), review, Score(1.0))],
        task="vicuna",
        headline="win_rate",
        protocol="j",
        spec={"settings": {"systems": {"baseline": {"name": "b"}, "model": {"name": "m"}}}, "requires": "judge"},
    )
    (judged / "answers").mkdir()
    (judged / "questions.jsonl").write_text(json.dumps({"question_id": "q", "text": "2 + 2?"}) + "\n")
    for name, metadata in (("b", {"reasoning": "two and two"}), ("m", None)):
        row = {"question_id": "q", "model_id": name, "text": "Four.", "metadata": metadata}
        (judged / f"answers/{name}.jsonl").write_text(json.dumps(row) + "\n")
    write_page([tmp_path / "written", tmp_path / "judged"], tmp_path / "report.html")
    return tmp_path / "report.html"


def test_thoughts_are_folded(page_file: Path, visit: Any) -> None:
    page = visit(page_file)
    shown: dict[str, list[tuple[str, str, bool]]] = {}
    for number in range(2):
        page.select_option("#benchmark", str(number))
        page.wait_for_timeout(200)
        page.focus("#list")
        page.keyboard.press("ArrowDown")
        page.wait_for_selector("#detail details.thought")
        title = page.text_content("#detail h3")
        shown[title] = [
            (fold.text_content("summary"), fold.text_content("pre"), fold.get_attribute("open") is not None)
            for fold in map(Fold, page.query_selector_all("#detail details.thought"))
        ]
        assert page.locator("#detail dl.rest").count() == 0  # none of them is listed among what is left
    assert shown["1"] == [
        ("Thought 5 characters", "2 + 2", False),
        ("Thought 12 characters, cut before an answer", "<b>6 - 1</b>", False),
    ]
    assert shown["q/forward"] == [
        ("Thought 11 characters", "two and two", False),
        ("Thought 19 characters", "The first is right.", False),
    ]


class Fold:
    """One folded thought."""

    def __init__(self, element: Any) -> None:
        self._element = element

    def text_content(self, part: str) -> str:
        return str(self._element.query_selector(part).text_content())

    def get_attribute(self, name: str) -> str | None:
        value: str | None = self._element.get_attribute(name)
        return value
