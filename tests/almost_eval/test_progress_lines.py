"""Progress where nobody has a terminal: a line at least every so many seconds, while a step lasts too."""

from __future__ import annotations

import io
import time

import pytest

from almost_eval.errors import InputError
from almost_eval.progress import SECONDS_VARIABLE, PipeProgress, progress_for, progress_line


def lines(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


@pytest.mark.alone("the time left, by the rate of parts of a second")
def test_a_long_step_is_told_of_by_the_clock() -> None:
    stream = io.StringIO()
    with PipeProgress(stream, 0.05).track("training", 200, 100) as advance:
        time.sleep(0.25)  # one step that outlasts several lines
        assert len(lines(stream)) >= 2
        assert lines(stream)[0].startswith("training: 100 of 200, nothing finished in 0:00:00")
        advance(50)
        time.sleep(0.15)
    said = lines(stream)
    assert said[-1].startswith("training: 150 of 200, ")
    assert said[-1].endswith("/s, 0:00:00 left")
    time.sleep(0.1)
    assert lines(stream) == said  # its thread has ended


def test_a_short_step_says_nothing() -> None:
    stream = io.StringIO()
    with PipeProgress(stream, 30).track("training", 2) as advance:
        advance()
    with PipeProgress(stream, 0).track("training", 2) as advance:
        time.sleep(0.05)
    assert lines(stream) == []


def test_a_line_after_an_error_too() -> None:
    stream = io.StringIO()

    def fail() -> None:
        time.sleep(0.05)
        raise RuntimeError

    with pytest.raises(RuntimeError), PipeProgress(stream, 0.02).track("training", 2):
        fail()
    assert lines(stream)


def test_rates_and_times() -> None:
    # 20 items in 40 s are 0.5 a second; 70 are left: 140 s
    assert progress_line(30, 100, 20, 40) == "30 of 100, 0.50/s, 0:02:20 left"
    assert progress_line(3, 500, 3, 600) == "3 of 500, 0.005/s, 27:36:40 left"
    assert progress_line(4000, 5000, 4000, 100) == "4000 of 5000, 40.0/s, 0:00:25 left"


def test_the_interval_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECONDS_VARIABLE, "0.02")
    stream = io.StringIO()
    with progress_for(stream).track("training", 2):
        time.sleep(0.06)
    assert lines(stream)
    for wrong in ("soon", "-1", "nan"):
        monkeypatch.setenv(SECONDS_VARIABLE, wrong)
        with pytest.raises(InputError, match=f"{SECONDS_VARIABLE} is '{wrong}'; it must be a number of seconds"):
            progress_for(stream)
