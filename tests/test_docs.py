"""The pages of `docs/`: what they show exists, what their tables list is what the code has, and their examples run."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from shown_commands import PROGRAMS, ROOT, check_command, check_links, contexts, options_of, shown

from almost_eval.data.sources import find_data
from almost_eval.errors import DataError, InputError
from almost_eval.judge.prompts import load_judge_prompts

DOCS = ROOT / "docs"
PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md"))}
WRITTEN = sorted(PAGES.keys() - {"cli.md"})


def script() -> ModuleType:
    """`docs/make_cli_reference.py`, which is in no package."""
    spec = importlib.util.spec_from_file_location("make_cli_reference", DOCS / "make_cli_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(page: str, heading: str) -> list[list[str]]:
    """Cells of the tables under a heading, their backticks taken off."""
    section = re.split(r"^#+ ", PAGES[page].partition(f"# {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    lines = re.findall(r"^\|(.+)\|$", section, flags=re.MULTILINE)
    assert lines, f"{page} has no table under {heading!r}"
    return [[cell.strip().strip("`") for cell in line.split("|")] for line in lines]


# --- what is shown exists ---


@pytest.mark.parametrize("page", WRITTEN)
def test_every_command_option_and_link_exists(page: str) -> None:
    check_links(PAGES[page], DOCS)
    for program, line in shown(PAGES[page]):
        check_command(program, line)


def test_the_pages_show_commands_of_every_program() -> None:
    found = {program for page in WRITTEN for program, _ in shown(PAGES[page])}
    assert found == set(PROGRAMS)


def test_every_option_named_in_the_text_exists() -> None:
    known = set().union(*(options_of(context) for context in contexts().values()))
    # The page of serving tells which of vLLM's options are chosen, too: those that the command line of vLLM is made of.
    source = (ROOT / "serving" / "vllm" / "command.py").read_text(encoding="utf-8")
    of_vllm = {f"--{name}" for name in re.findall(r'"([a-z-]+)": ', source)}
    for page in WRITTEN:
        prose = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
        for code in re.findall(r"`([^`]+)`", prose):
            for option in re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", code):
                assert option in known | (of_vllm if page == "serve.md" else set()), f"{page}: `{code}`"


# --- the reference ---


def test_the_reference_is_what_the_commands_say() -> None:
    # In a process of its own: click keeps the help option of the first context, which other tests may have made.
    command = [sys.executable, str(DOCS / "make_cli_reference.py"), "--check"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr  # says which command mends it


def test_check_tells_a_page_that_is_out_of_date_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, page = script(), tmp_path / "cli.md"
    monkeypatch.setattr(made, "PAGE", page)
    page.write_text("old", encoding="utf-8")
    assert made.main(["--check"]) == 1
    assert made.MEND in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == "old"
    assert made.main([]) == 0
    assert made.main(["--check"]) == 0
    assert made.main(["--chekc"]) == 2


def test_every_program_of_the_package_is_in_the_reference() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(PROGRAMS) == set(project["project"]["scripts"])


# --- the tables ---


def test_the_validity_table_is_the_gate() -> None:
    from almost_eval.run.validity import ALLOWED

    found = {row[0]: row[1] for row in rows("evaluate.md", "When the headline is withheld")[2:]}
    assert found == {name: f"{share * 100:g} %" for name, share in ALLOWED.items()}


def test_the_statuses_fields_and_limits_are_the_gateways() -> None:
    from serving.cli.gateway import LIMITS
    from serving.gateway.openapi import openapi
    from serving.gateway.schema import Almost, ChatRequest
    from serving.gateway.settings import GatewaySettings

    settings = GatewaySettings(policy_url="http://127.0.0.1:8001", reward_url="http://127.0.0.1:8002")
    paths = openapi(settings)["paths"]
    assert [row[0] for row in rows("serve.md", "Statuses")[2:]] == sorted(
        status for status in paths["/v1/chat/completions"]["post"]["responses"] if status != "200"
    )
    told = {tuple(row[0].split()) for row in rows("serve.md", "Paths of the gateway")[2:]}
    assert told == {(method.upper(), path) for path, methods in paths.items() for method in methods}
    fields = [row[0] for row in rows("serve.md", "Best-of-N")]
    assert set(Almost.model_fields) <= set(fields)
    assert {name for name in ChatRequest.model_fields if name.startswith(("best", "almost"))} <= set(fields)

    def limits() -> None: ...

    for option in LIMITS:
        option(limits)
    assert {row[0] for row in rows("serve.md", "Limits")[2:]} == {
        param.opts[0]
        for param in limits.__click_params__  # type: ignore[attr-defined]
    }


def test_the_metrics_are_the_gateways() -> None:
    from serving.gateway.metrics import Metrics

    families = {
        (f"{family.name}_total" if family.type == "counter" else family.name, family.type)
        for family in Metrics().registry.collect()
        if family.name.startswith("almost_")
    }
    assert {(row[0], re.split(r"\W", row[1])[0]) for row in rows("serve.md", "Watch it")[2:]} == families


def test_the_recipe_table_has_every_section() -> None:
    from almost_train.pipeline.recipe import HEAD, SECTIONS

    cells = [re.findall(r"[a-z_]+", row[0]) for row in rows("train.md", "A recipe")[2:]]
    assert sorted(name for names in cells for name in names) == sorted(HEAD + SECTIONS)


# --- the files that are shown ---


def write_files(text: str, folder: Path) -> None:
    """Every code block below a line that is nothing but the name of a file."""
    for name, content in re.findall(r"^`([\w./-]+)`:\n\n```\w+\n(.*?)```$", text, flags=re.MULTILINE | re.DOTALL):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")


def test_the_files_for_training_are_read_as_shown(tmp_path: Path) -> None:
    import yaml

    from almost_eval.files import read_rows
    from almost_train.common.records import messages_of
    from almost_train.reward.pairs import read_pairs
    from almost_train.synthetic.ranking import read_ranking
    from almost_train.synthetic.responses import read_configurations

    write_files(PAGES["train.md"], tmp_path)
    assert [row["id"] for row in read_rows(tmp_path / "prompts.jsonl", {"id": str, "prompt": str})] == ["p00001"]
    assert read_pairs(tmp_path / "comparisons.jsonl").pairs[0].chosen[-1].content == "It is tiny."
    (row,) = read_rows(tmp_path / "demonstrations.jsonl", {"messages": list})
    assert messages_of(row["messages"], "row")[-1].role == "assistant"
    listed = read_configurations(yaml.safe_load((tmp_path / "configurations.yaml").read_text()), "configurations.yaml")
    ranked = [name for group in read_ranking(tmp_path / "ranking.yaml") for name in group]
    assert ranked == [configuration.name for configuration in listed]


def test_the_options_file_works_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, almost_eval: Callable[..., Any]
) -> None:
    write_files(PAGES["evaluate.md"], tmp_path)
    monkeypatch.chdir(tmp_path)
    outcome = almost_eval("hhh", "--config", "mine.yaml", "--output", "runs/mine")
    assert outcome.code == 0, outcome.err
    assert "hhh · likelihood · nano/sft" in outcome.out


# --- the examples of extend.md ---


def sections() -> dict[str, str]:
    """Heading -> text of the examples' page."""
    parts = re.split(r"^## (.+)$", PAGES["extend.md"], flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.fixture
def follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], almost_eval: Callable[..., Any]
) -> Iterator[Callable[[str], list[str]]]:
    """`follow(heading)`: put the section's files into an empty folder, run its commands there, give what they print."""

    def run(heading: str) -> list[str]:
        text = sections()[heading]
        write_files(text, tmp_path)
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        (block,) = re.findall(r"^```sh\n(.*?)```$", text, flags=re.MULTILINE | re.DOTALL)
        printed = []
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            if program == "python":
                capsys.readouterr()
                runpy.run_path(arguments[0], run_name="__main__")
                printed.append(capsys.readouterr().out)
            else:
                assert program == "almost-eval", line
                outcome = almost_eval(*arguments)
                assert outcome.code == 0, f"{line}: {outcome.err}"
                printed.append(outcome.out)
        return printed

    yield run
    for name in ("bigram", "brief", "quiz", "reinforce"):
        sys.modules.pop(name, None)


def test_a_task_of_ones_own(
    follow: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch, almost_eval: Callable[..., Any]
) -> None:
    from almost_eval.tasks.registry import TASKS

    monkeypatch.setitem(TASKS, "quiz", "")  # gone again after the test
    printed, table = follow("A task")
    assert printed == "1.0 True\nTrue\n"  # the built-in model knows all three; the run verifies
    assert "quiz" in table
    assert (Path("runs/quiz") / "results.json").is_file()
    # The rest of the page's claim: with the line in the registry every command knows it.
    for shown_text, *command in (
        ("verified", "verify", "runs/quiz", "--data-root", "data"),
        ("scored again", "verify", "runs/quiz", "--model", "nano/almost", "--data-root", "data"),
        ("not distinguishable", "compare", "runs/quiz", "runs/quiz"),
        ("quiz.html", "report", "runs/quiz", "-o", "quiz.html"),
        ("quiz", "list", "--json"),
        ("quiz", "all", "--dry-run", "--data", "hub", "--data-root", "data", "--prompt-set", "builtin"),
    ):
        outcome = almost_eval(*command, *(("--tasks", "quiz") if command[0] == "all" else ()))
        assert outcome.code == 0, f"{command}: {outcome.err}"
        assert shown_text in outcome.out + outcome.err, command
    assert "My quiz" in Path("quiz.html").read_text(encoding="utf-8")


def test_the_task_is_about_forty_lines() -> None:
    code = re.findall(r"^`quiz\.py`:\n\n```python\n(.*?)```$", PAGES["extend.md"], flags=re.MULTILINE | re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 45


def test_a_judge_prompt_family_of_ones_own(
    follow: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch, almost_eval: Callable[..., Any]
) -> None:
    from almost_eval.judge.families import FAMILIES

    monkeypatch.setitem(FAMILIES, "brief", "")  # gone again after the test
    (printed,) = follow("A judge prompt family")
    assert "Question: What does the otter eat?" in printed
    assert "Verdict(winner='2'" in printed
    assert "the letter of the better answer, after the reasons" in almost_eval("list", "--json").out
    with pytest.raises(DataError, match="only our own words"):
        load_judge_prompts("brief", "official", find_data("nano", None))


def test_an_engine_of_ones_own(
    follow: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch, almost_eval: Callable[..., Any]
) -> None:
    from almost_eval.engines import build

    printed, table = follow("An engine")
    accuracy = float(printed.split()[-1])
    assert 0 < accuracy < 1
    assert f"{accuracy:.1%}" in table
    # The same behind --engine, as the page says: a name in two tables, which the scorers' take up.
    for classes in (build.ENGINES, build.SCORERS):
        monkeypatch.setitem(classes, "bigram", "bigram:BigramEngine")
    for taken in (build.TAKES, build.SCORERS_TAKE):
        monkeypatch.setitem(taken, "bigram", set())
    options = ("--engine", "bigram", "--model", "bigram.py", "--data", "nano", "--protocol", "likelihood")
    outcome = almost_eval("hhh", *options, "--output", "runs/flag")
    assert outcome.code == 0, outcome.err
    assert f"{accuracy:.1%}" in outcome.out
    refused = almost_eval("hhh", *options, "--dtype", "float16")
    assert refused.code == 2
    assert "takes no dtype" in refused.err


def test_an_rl_algorithm_of_ones_own(follow: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    from almost_train.rlsf.job import ALGORITHMS, RLSFSettings, check_settings

    monkeypatch.setitem(ALGORITHMS, "reinforce", "")  # gone again after the test
    (printed,) = follow("An RL algorithm")
    assert "'algorithm': 'reinforce', 'steps': 2" in printed
    assert len(Path("runs/reinforce/log.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert Path("runs/reinforce/policy/model.safetensors").is_file()
    with pytest.raises(InputError, match=r"algorithm reinforce takes no gamma \(of ppo\); leave it out"):
        check_settings(RLSFSettings(algorithm="reinforce", gamma=0.9))


def test_a_template_of_ones_own(follow: Callable[[str], list[str]]) -> None:
    shown_prompt, table = follow("A template")
    assert "[ask] Two candidate replies" in shown_prompt
    assert "[say] The better one is Reply\n" in shown_prompt
    assert "accuracy" in table
