"""A template that writes the date: the date belongs to the run, not to the day on which it goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from almost_eval.compare.comparison import compare_runs
from almost_eval.errors import StoreError
from almost_eval.models.chat import load_template
from almost_eval.run.merge import merge_runs
from almost_eval.run.runner import Run, RunRequest, open_run
from almost_eval.run.shards import Shard, find_marks
from almost_eval.run.store import read_spec
from almost_eval.run.verify import rescore, verify_run

DATED = """Today: {{ strftime_now("%d %b %Y") }}
{% for m in messages %}

{{ "Human" if m.role == "user" else "Assistant" }}: {{ m.content }}{% endfor %}{% if add_generation_prompt %}

Assistant:{% endif %}
"""


def _run(folder: Path, protocol: str, now: str) -> Run:
    file = folder / "dated.jinja"
    file.write_text(DATED)
    model = "nano/reward" if protocol == "reward" else "nano/almost"
    run = open_run(RunRequest(task="hhh", protocol=protocol, model=model, data="nano", limit=3, template=str(file)))
    run.adopt_date({"template": {"now": now}})
    return run


@pytest.mark.parametrize("protocol", ["likelihood", "reward"])
def test_a_run_goes_on_tomorrow_with_its_own_date(tmp_path: Path, protocol: str) -> None:
    first, tomorrow = (_run(tmp_path, protocol, f"2026-11-{day}T10:00:00") for day in (28, 29))
    assert first.default_folder() == tomorrow.default_folder()
    first.execute(tmp_path / "run")
    lines = (tmp_path / "run" / "samples.jsonl").read_text()
    (tmp_path / "run" / "results.json").unlink()
    (tmp_path / "run" / "samples.jsonl").write_text("".join(lines.splitlines(keepends=True)[:3]))
    tomorrow.execute(tmp_path / "run")
    assert sorted((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == sorted(lines.splitlines())
    prompts = (tmp_path / "run" / "prompts.jsonl").read_text()
    assert "28 Nov 2026" in prompts
    assert "29 Nov 2026" not in prompts
    assert read_spec(tmp_path / "run")["template"]["now"] == "2026-11-28T10:00:00"


@pytest.mark.parametrize("protocol", ["likelihood", "reward"])
def test_shards_have_one_date(tmp_path: Path, protocol: str) -> None:
    """A shard that begins on the next day writes the date of those that have begun, where it sees them."""
    today, tomorrow = (_run(tmp_path, protocol, f"2026-11-{day}T23:59:59") for day in (28, 29))
    today.execute_shard(tmp_path / "run", Shard(2, 2))
    tomorrow.execute_shard(tmp_path / "run", Shard(1, 2))
    merge_runs(find_marks([tmp_path / "run"]), tmp_path / "run")
    today.execute(tmp_path / "whole")
    for name in ("samples.jsonl", "prompts.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert read_spec(tmp_path / "run")["template"]["now"] == "2026-11-28T23:59:59"


@pytest.mark.parametrize("protocol", ["likelihood", "reward"])
def test_shards_that_begin_together_differ_in_seconds_and_not_in_their_prompts(tmp_path: Path, protocol: str) -> None:
    first, second, later = (
        _run(tmp_path, protocol, f"2026-11-{when}") for when in ("28T10:00", "28T10:01", "29T10:00")
    )
    first.execute_shard(tmp_path / "a", Shard(1, 2))
    second.execute_shard(tmp_path / "b", Shard(2, 2))  # of another disk, as a node of a cluster has
    merge_runs(find_marks([tmp_path / "a", tmp_path / "b"]), tmp_path / "run")
    assert read_spec(tmp_path / "run")["template"]["now"] == "2026-11-28T10:00"
    later.execute_shard(tmp_path / "c", Shard(2, 2))
    with pytest.raises(
        StoreError, match=r"another run than .*: template\.now was .2026-11-28T10:00., is .2026-11-29T10:00."
    ):
        merge_runs(find_marks([tmp_path / "a", tmp_path / "c"]), tmp_path / "other")


def test_verify_writes_the_date_of_the_run_and_compare_names_two(tmp_path: Path) -> None:
    for day in (28, 29):
        _run(tmp_path, "likelihood", f"2026-11-{day}T10:00:00").execute(tmp_path / str(day))
    later = _run(tmp_path, "likelihood", "2026-12-24T10:00:00")
    verification = verify_run(tmp_path / "28", later.task.data)
    rescore(tmp_path / "28", later, verification, n=3, seed=0)
    assert verification.passed, verification.problems
    [warning] = [w for w in compare_runs(tmp_path / "28", tmp_path / "29").warnings if w.startswith("template.now: ")]
    assert "2026-11-28" in warning
    assert "2026-11-29" in warning


def test_one_template_writes_one_time(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(
        "{{ strftime_now('%Y-%m-%d %H:%M:%S') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    template = load_template(str(tmp_path / "t.jinja"))
    assert template is not None
    assert template.now is not None
    assert template.render(()) == template.now.replace("T", " ")
    assert replace(template, now="2001-02-03T04:05:06").render(()) == "2001-02-03 04:05:06"
